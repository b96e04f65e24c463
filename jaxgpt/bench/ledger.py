"""The honest cost of `jit`: one training step run every way there is, what each costs first, and what it saves then.

Each way differs from "jit" in one thing. Each is a process of its own, so that none finds what another has compiled,
and all are asked in turn, so that what disturbs the machine disturbs all.
"""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxgpt.bench import ruler, story
from jaxgpt.bench.facts import facts
from jaxgpt.bench.ruler import Contest, Rates, Series, series
from jaxgpt.bench.table import Report
from jaxgpt.config import Config, ModelConfig, UsageError, differences, to_tree

STAGES = ("trace", "lower", "compile", "first call")
PROCESS_BYTES = 600_000_000
"""What a process with JAX and its compiler takes beside what a step needs, about."""


@dataclass(frozen=True)
class Variant:
    """One way to run a step, and how it differs from `jit`."""

    about: str
    way: str = "jit"
    """As in `stages.Stages`, or of the twin, as in `twin.WAYS`."""
    torch: bool = False
    cache: bool = False
    model: tuple[tuple[str, Any], ...] = ()
    """Settings of the model."""
    steps: int = 1
    """Steps in a program."""


JIT = story.JIT
VARIANTS = {
    "op by op": Variant("every primitive a program of its own (jax.disable_jit)", "op by op"),
    "eager": Variant("the step called without jit; functions of jax.numpy are programs", "eager"),
    JIT: Variant("the step as one program"),
    "jit, donated": Variant("it may overwrite the state", "donated"),
    "scan of 10": Variant("10 steps in a program, donated", "scan", steps=10),
    "scan of 50": Variant("50 steps in a program, donated", "scan", steps=50),
    "ahead of time": Variant("the compiled program called itself", "ahead of time"),
    "cache, empty": Variant("what is compiled is kept on disk", cache=True),
    "cache, full": Variant("what the one before kept is found", cache=True),
    "remat products": Variant("all but products computed again", model=(("remat", "products"),)),
    "remat blocks": Variant("blocks computed again", model=(("remat", "blocks"),)),
    "bfloat16": Variant("products of bfloat16", model=(("precision", "bfloat16"),)),
    "torch": Variant("the PyTorch twin, eager", "float32", torch=True),
    "torch bfloat16": Variant("the twin under autocast", "bfloat16", torch=True),
    "torch compiled": Variant("the twin through torch.compile", "float32+compile", torch=True),
}
BY_DEFAULT = tuple(name for name in VARIANTS if name != "torch compiled")
"""torch.compile takes a minute on two cores, as long as all others together."""

NOTES = (
    "trace, lower, compile: Python to a jaxpr, that to HLO, that to machine code, as JAX itself times them. first "
    "call: the rest of the time until the first step, or the first scan, is done. programs: how many were compiled by "
    "then; the eager ways compile too, each operation for each shape, once. torch: all of its first step counts as its "
    "first call.",
    "steady: steps in turn with all others (A B C A B C), median with least and greatest of the rounds; a step's loss "
    "is waited for while the next one runs. speed: round by round, above 1 faster. dispatches: programs handed to the "
    "device in a step, counted in a trace by JAX's profiler. page faults: pages of memory that the system hands to the "
    "process in a step, on a CPU; JAX asks for the temporaries of a program anew each time that it runs.",
    "step, MB: arguments, results and temporaries of the program by XLA's analysis; what is overwritten counts once. "
    "process, MB: the most that the process ever had resident, libraries and the compiler's own memory included.",
    "pays after: steps until all that came before is paid for by the faster step, against eager; 0 if its first step "
    "came sooner as well.",
)


def measure(
    config: Config,
    name: str,
    variants: Sequence[str] = BY_DEFAULT,
    device: str = "cpu",
    rounds: int = 5,
    seconds: float = 0.5,
    starts: int = 1,
    free: int | None = None,
    tell: Callable[[str], None] = ruler.to_stderr,
) -> Report:
    """A report on the step of `config`, its vocab_size known, called `name`.

    Args:
      seconds: how long each works in a round, at least.
      starts: how often each is started; the stages are those of every start, the rounds come after the last.
      free: bytes of memory there are for all of them together; None asks nobody.

    Raises:
      UsageError: no such variant; the twin cannot do this config; or all of them do not fit beside each other.
    """
    asked, config = config, baseline(config)
    chosen, left_out = choose(config, variants)
    require_room(config, chosen, free)
    about: dict[str, list[dict[str, Any]]] = {each: [] for each in chosen}
    rates: Rates = {}
    for start in range(starts):
        with tempfile.TemporaryDirectory(prefix="jaxgpt-ledger-") as cache, Contest(device, tell) as contest:
            for each, variant in chosen.items():
                contest.enter(each, spec(config, variant, device), environment(variant, cache))
                if each in contest.workers:
                    about[each].append(contest.workers[each].about)
            if start == starts - 1:
                rates = contest.measure(rounds, seconds)
    report: Report = {"mode": f"the ledger of {name}", "facts": facts(device) | {"device": contest.device_name}}
    tokens = config.train.batch_size * config.model.block_size
    steps = {each: [_steps(rate, chosen[each], tokens) for rate in found] for each, found in rates.items()}
    done = {each: _figures(about[each], contest.peak_bytes.get(each, 0)) for each in rates}
    title = f"A training step of {name}, {tokens:,} tokens"
    said = "; ".join(f"{each}: {variant.about}" for each, variant in chosen.items())
    return report | {
        "failed": left_out | contest.failed,
        "tables": [
            {"title": f"{title}: until the first is done", "rows": beforehand(done)},
            {"title": f"{title}: each one after it", "rows": afterwards(done, steps)},
        ],
        "story": story.told(name, tokens, done, steps),
        "notes": [said, *own_settings(asked), *NOTES, same_losses(done), contest.quiet()],
        "about": about,
        "figures": done,
        "steps_per_second": steps,
    }


def baseline(config: Config) -> Config:
    """What `jit` runs and every other variant changes one thing of: float32, without remat."""
    return replace(config, model=replace(config.model, precision="float32", remat="none"))


def own_settings(config: Config) -> list[str]:
    """A note on what `baseline` changes of `config`, if it does."""
    changed = [f"{name} {ours}" for name, ours, _ in differences(config, baseline(config))]
    return [f"the config's own {' and '.join(changed)} apply to no variant but those named after them"] * bool(changed)


def require_not_varied(config: Config, recipe: Config) -> None:
    """Check that nothing was asked for, beyond what `recipe` says, that is set by the variants themselves.

    Raises:
      UsageError: it was; with the variants that show it.
    """
    measured_by = {
        "precision": "bfloat16",
        "remat": "remat products, remat blocks",
        "scan_steps": "scan of 10, scan of 50",
    }
    plain = {name for name, *_ in differences(config, baseline(config))} | {"scan_steps"}
    for name, value, _ in differences(config, recipe):
        if name in measured_by.keys() & plain:
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: the variants set {name}, so that each differs from {JIT} in one "
                f"thing; leave it out, and compare {JIT} with {measured_by[name]} (--variants)"
            )


def choose(config: Config, names: Sequence[str]) -> tuple[dict[str, Variant], dict[str, str]]:
    """The variants of these names, and why some are left out.

    Raises:
      UsageError: there is no such variant.
    """
    left_out = {}
    if "cache, full" in names:
        names = (*names, "cache, empty")  # which fills it
    for name in names:
        if name not in VARIANTS:
            raise UsageError(f"no variant {name!r}, expected some of {', '.join(map(repr, VARIANTS))}")
        if VARIANTS[name].torch and not twin_does(config):
            left_out[name] = "the twin is nanoGPT's model, without the options of this one"
        elif VARIANTS[name].torch and importlib.util.find_spec("torch") is None:
            left_out[name] = "PyTorch is not installed: pip install 'jaxgpt[torch]'"
    chosen = {name: variant for name, variant in VARIANTS.items() if name in names and name not in left_out}
    if not chosen:
        raise UsageError("; ".join(f"{name}: {why}" for name, why in left_out.items()) or "no variants are named")
    return chosen, left_out


def twin_does(config: Config) -> bool:
    """Whether the twin can train `config`: a GPT-2 by AdamW with nanoGPT's schedule."""
    model, opt = config.model, config.optimizer
    its_own = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "dropout", "bias", "tie_weights", "gelu")
    plain = ModelConfig(**{name: getattr(model, name) for name in its_own}, scan_layers=model.scan_layers)
    return model == plain and opt.algorithm == "adamw" and opt.schedule == "cosine"


def require_room(config: Config, chosen: dict[str, Variant], free: int | None) -> None:
    """Check that all processes fit beside each other: each of them keeps its model while the others are asked.

    Raises:
      UsageError: they do not.
    """
    from jaxgpt import memory

    each = memory.needed(config, 0).total + PROCESS_BYTES
    if free is not None and each * len(chosen) > free:
        raise UsageError(
            f"{len(chosen)} processes need about {memory.size(each)} each, beside each other; {memory.size(free)} are "
            "free: name fewer, as in --variants jit eager, or make the model smaller"
        )


def spec(config: Config, variant: Variant, device: str) -> dict[str, Any]:
    """What the variant's worker is (`worker.build`)."""
    model, steps = (
        replace(config.model, **dict(variant.model)),
        max(10, variant.steps) if variant.torch else variant.steps,
    )
    tree = to_tree(replace(config, model=model, train=replace(config.train, scan_steps=steps, eval_every=0)))
    if variant.torch:
        return {"task": "train-torch", "config": tree, "way": variant.way, "device": device}
    return {"task": "ledger", "config": tree, "way": variant.way}


def environment(variant: Variant, cache: str) -> dict[str, str]:
    """Variables for the variant's process: where what is compiled is kept, if it is."""
    if not variant.cache:
        return {}
    return {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def beforehand(done: dict[str, Any]) -> list[dict[str, Any]]:
    """What each variant costs until its first step is done."""
    return [
        {"variant": name}
        | {f"{stage}, s": figures["stages"].get(stage) for stage in STAGES}
        | {"in all, s": story.before(figures), "programs": figures["programs"]}
        for name, figures in done.items()
    ]


def afterwards(done: dict[str, Any], steps: Rates) -> list[dict[str, Any]]:
    """What a step of each variant costs then, and when that has paid for what was before it."""
    return [
        {
            "variant": name,
            "steady, ms": series([1e3 / rate for rate in steps[name]]),
            "speed, of jit's": ruler.ratio(steps[name], steps[JIT]) if JIT in steps and name != JIT else None,
            "dispatches": _whole(figures["dispatches"]),
            "page faults": figures["faults"] if figures["faults"] is None else round(figures["faults"]),
            "step, MB": _megabytes(figures["step_bytes"]),
            "process, MB": _megabytes(figures["process_bytes"]),
            "pays after, steps": _pays(done, steps, name),
        }
        for name, figures in done.items()
    ]


def same_losses(done: dict[str, Any]) -> str:
    """A note: all that compute in float32 on the same parameters and tokens come to one loss."""
    losses = [figures["loss"] for figures in done.values() if figures["loss"] is not None]
    exact = [figures["loss"] for name, figures in done.items() if figures["loss"] and name != "bfloat16"]
    if len(exact) < 2:
        return "the first loss: " + ", ".join(f"{loss:.4f}" for loss in losses)
    apart = max(exact) - min(exact)
    same = f"differs by {apart:.1g} at most" if apart else "is the same in all, to the last bit"
    return f"the first loss of the {len(exact)} variants of jaxgpt in float32 is {exact[0]:.4f}, and {same}"


def _figures(starts: list[dict[str, Any]], process_bytes: int) -> dict[str, Any]:
    """What the starts of one variant say, in one: each stage as a series."""
    last = starts[-1]
    each = [start.get("stages") or {"first call": start["first_seconds"]} for start in starts]
    stages: dict[str, Series] = {stage: series([one[stage] for one in each]) for stage in STAGES if stage in each[0]}
    return {
        "stages": stages,
        "programs": last.get("programs"),
        "dispatches": last.get("dispatches"),
        "faults": last.get("faults"),
        "loss": last.get("loss"),
        "step_bytes": last.get("compiled_bytes"),
        "process_bytes": process_bytes or None,
    }


def _steps(rate: float, variant: Variant, tokens: int) -> float:
    """Steps per second of what a worker counts: tokens in PyTorch."""
    return rate / tokens if variant.torch else rate


def _pays(done: dict[str, Any], steps: Rates, name: str) -> int | str | None:
    if name == story.EAGER or story.EAGER not in done:
        return None
    after = story.paid(done, steps, name)
    return "never" if after is None else after


def _whole(n: float | None) -> float | None:
    return n if n is None or n % 1 else int(n)


def _megabytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 1e6
