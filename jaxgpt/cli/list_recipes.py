"""`jaxgpt recipes`: list the recipes."""

from dataclasses import dataclass

from jaxgpt.cli.options import parse
from jaxgpt.recipes import RECIPES


@dataclass(frozen=True)
class Recipes:
    """No options."""


def run(args: list[str]) -> int:
    parse(Recipes, args, "recipes")
    for name, known in RECIPES.items():
        print(f"jaxgpt train {name}")
        print(f"  {known.about}")
        print(f"  {known.hardware}: {known.time}; loss {known.loss}")
    return 0
