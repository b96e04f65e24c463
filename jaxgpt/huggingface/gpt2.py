"""GPT-2 in the format of Hugging Face, in and out: one table of names serves both ways.

A folder holds `config.json` and `model.safetensors` (or shards and `model.safetensors.index.json`). Tensors are looked
up by the names of the table alone, and read only once names, shapes and kinds of number are those of the table; nothing
is executed, and no path is made from a tensor's name.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import ModelConfig, UsageError, shown
from jaxgpt.model import Params, unstacked

Tensors = dict[str, NDArray[np.float32]]
NUMBERS = ("F32", "BF16", "F16")
"""What a file may hold; each is read as float32."""


PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""How files of PyTorch are named that are not read."""


NOT_GPT2 = (
    "position",
    "norm",
    "mlp",
    "qk_norm",
    "n_kv_head",
    "window",
    "softcap",
    "smear",
    "bigram_embed",
    "value_embed",
)
"""Options of our blocks that a GPT-2 is without."""


class InteropError(UsageError):
    """A folder holds no GPT-2 that this model can be."""


@dataclass(frozen=True)
class Row:
    """One tensor of theirs, and the parameters of ours that it is made of.

    Several parameters stand side by side in their tensor's last axis. `transposed` tensors are the other way round.
    """

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False


def table(config: ModelConfig) -> list[Row]:
    """Every tensor of a GPT-2 of that shape. Their linear layers are (in, out), as Flax's kernels are."""
    rows = [Row("wte.weight", ("wte/embedding",)), Row("wpe.weight", ("wpe/embedding",))]
    for i in range(config.n_layer):
        ours, theirs = f"h_{i}", f"h.{i}"
        rows += _norm(config, f"{theirs}.ln_1", f"{ours}/ln_1") + _norm(config, f"{theirs}.ln_2", f"{ours}/ln_2")
        for layer, parts in {
            "attn.c_attn": ("attn/query", "attn/key", "attn/value"),
            "attn.c_proj": ("attn/c_proj",),
            "mlp.c_fc": ("mlp/c_fc",),
            "mlp.c_proj": ("mlp/c_proj",),
        }.items():
            rows.append(Row(f"{theirs}.{layer}.weight", tuple(f"{ours}/{part}/kernel" for part in parts)))
            if config.bias:
                rows.append(Row(f"{theirs}.{layer}.bias", tuple(f"{ours}/{part}/bias" for part in parts)))
    rows += _norm(config, "ln_f", "ln_f")
    if not config.tie_weights:
        rows.append(Row("lm_head.weight", ("lm_head/kernel",), transposed=True))
    return rows


def _norm(config: ModelConfig, theirs: str, ours: str) -> list[Row]:
    scale = Row(f"{theirs}.weight", (f"{ours}/scale",))
    return [scale, Row(f"{theirs}.bias", (f"{ours}/bias",))] if config.bias else [scale]


def to_params(config: ModelConfig, tensors: Tensors) -> Params:
    """Our parameters from their tensors.

    Raises:
      InteropError: names are missing or left over, or shapes differ; all of them are told at once.
    """
    _require_fit(config, {name: tensor.shape for name, tensor in tensors.items()})
    params: Params = {}
    for row in table(config):
        tensor = tensors[row.theirs].T if row.transposed else tensors[row.theirs]
        for path, part in zip(row.ours, np.split(tensor, len(row.ours), axis=-1), strict=True):
            _put(params, path.split("/"), np.ascontiguousarray(part, np.float32))
    return params


def _require_fit(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of tensors, at no cost that a number in a file could raise."""
    if config.n_layer > len(found):
        raise InteropError(f"n_layer is {config.n_layer}, expected at most the number of tensors, {len(found)}")
    expected = shapes(config)
    wanted = {row.theirs: expected[row.theirs] for row in table(config)}
    wrong = [f"  missing   {name}" for name in wanted if name not in found]
    wrong += [f"  not known {_printable(name)} {found[name]}" for name in found if name not in wanted]
    wrong += [
        f"  misshapen {name}: expected {wanted[name]}, found {found[name]}"
        for name in wanted
        if name in found and found[name] != wanted[name]
    ]
    if wrong:
        more = [f"  and {len(wrong) - 100:,} more"] if len(wrong) > 100 else []
        raise InteropError("the tensors do not fit the model:\n" + "\n".join(wrong[:100] + more))


def _printable(name: str) -> str:
    return name if re.fullmatch(r"[\w.]{1,80}", name) else shown(name)


def to_tensors(config: ModelConfig, params: Params) -> Tensors:
    """Their tensors from our parameters, the inverse of `to_params`. A model without biases gets zeros, as GPT-2 has
    no other way to say so."""
    tensors, params = Tensors(), unstacked(params)
    biased = ModelConfig(**{**vars(config), "bias": True})
    expected = shapes(biased)
    for row in table(biased):
        if not config.bias and row.ours[0].endswith("/bias"):
            tensors[row.theirs] = np.zeros(expected[row.theirs], np.float32)
            continue
        joined = np.concatenate([np.asarray(_get(params, path.split("/"))) for path in row.ours], axis=-1)
        tensors[row.theirs] = np.ascontiguousarray(joined.T if row.transposed else joined)
    return tensors


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each of their tensors."""
    C, V, T = config.n_embd, config.vocab_size, config.block_size
    sizes: dict[str, tuple[int, ...]] = {"wte.weight": (V, C), "wpe.weight": (T, C), "lm_head.weight": (V, C)}
    linear = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    for row in table(config):
        if row.theirs not in sizes:
            layer, kind = re.sub(r"^h\.\d+\.", "", row.theirs).rsplit(".", 1)
            shape = linear.get(layer, (C,))
            sizes[row.theirs] = shape if kind == "weight" else shape[-1:]
    return sizes


def read_config(folder: Path) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
      InteropError: it is missing, damaged, of another kind of model, or has a feature that GPT-2 has not.
    """
    tree = _read_json(folder / "config.json")
    if tree.get("model_type") != "gpt2":
        raise InteropError(f"{folder} holds a model of type {shown(tree.get('model_type'))}, expected 'gpt2'")
    gelus = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    wanted = {
        "activation_function": tuple(gelus),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True, False),
        "n_inner": (None, 4 * tree["n_embd"] if isinstance(tree.get("n_embd"), int) else None),
    }
    defaults = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True}
    for name, allowed in wanted.items():
        value = tree.get(name, defaults.get(name, allowed[0]))
        if value not in allowed:
            raise InteropError(f"{folder / 'config.json'}: {name} is {shown(value)}, expected {allowed[0]!r}")
    sizes = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head"}
    sizes["n_embd"] = "n_embd"
    for name in sizes:
        if type(tree.get(name)) is not int or not 0 < tree[name] < 2**31:
            value = shown(tree.get(name))
            raise InteropError(f"{folder / 'config.json'}: {name} is {value}, expected a whole number")
    if tree["n_embd"] % tree["n_head"]:
        raise InteropError(f"{folder / 'config.json'}: n_head {tree['n_head']} does not divide n_embd {tree['n_embd']}")
    return ModelConfig(
        **{ours: tree[theirs] for theirs, ours in sizes.items()},
        bias=True,
        tie_weights=bool(tree.get("tie_word_embeddings", True)),
        gelu=gelus[tree.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
    )


def read_tensors(folder: Path, config: ModelConfig) -> Tensors:
    """The tensors of a folder as float32, by their names in the table: without the prefix "transformer." and without
    what is no parameter (the causal masks that older files hold).

    Raises:
      InteropError: a file is missing or damaged, or lies outside the folder; or, before any tensor is read, as
        `to_params`. A tied head that is stored too is let through.
    """
    from safetensors import SafetensorError, safe_open

    masks = re.compile(r"h\.[0-9]+\.attn\.(masked_)?bias")
    places: dict[str, tuple[Any, str]] = {}
    found: dict[str, tuple[int, ...]] = {}
    with ExitStack() as stack:
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    name, part = key.removeprefix("transformer."), file.get_slice(key)
                    if masks.fullmatch(name):
                        continue
                    if name in found:
                        raise InteropError(f"{path} holds {_printable(name)}, which is there already")
                    if part.get_dtype() not in NUMBERS:
                        raise InteropError(
                            f"{path}: {_printable(name)} is {part.get_dtype()}, expected {', '.join(NUMBERS)}"
                        )
                    places[name], found[name] = (file, key), tuple(part.get_shape())
            except (SafetensorError, OSError) as error:
                raise InteropError(f"{path} cannot be read: {error}") from error
        if config.tie_weights and "wte.weight" not in found and "lm_head.weight" in found:
            # safetensors.torch.save_model writes tied weights once, under the name that sorts first
            places["wte.weight"], found["wte.weight"] = places.pop("lm_head.weight"), found.pop("lm_head.weight")
        tied = config.tie_weights and found.get("lm_head.weight") == (config.vocab_size, config.n_embd)
        _require_fit(config, {name: shape for name, shape in found.items() if not (tied and name == "lm_head.weight")})
        return {name: file.get_tensor(key).astype(np.float32) for name, (file, key) in places.items()}


def _files(folder: Path) -> list[Path]:
    """`model.safetensors`, or the shards that the index names; in the folder itself and nowhere else."""
    index, names = folder / "model.safetensors.index.json", list[Any](["model.safetensors"])
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        known = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not known or not os.path.isfile(folder / name):
            raise InteropError(f"{folder} has no file {shown(name)}; {wanted(folder)}")
    return [folder / name for name in sorted(set(names))]


def wanted(folder: Path) -> str:
    """What a folder without tensors should hold, and how to get there from the pickles in it."""
    pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
    if any(name.startswith("pytorch_model") for name in pickles):
        code = "from sys import argv; from transformers import GPT2LMHeadModel as M; "
        code += "M.from_pretrained(argv[1]).save_pretrained(argv[1])"
        return (
            f"pytorch_model.bin is a pickle, which can run code and is never loaded. Where torch and transformers are "
            f"installed, this writes model.safetensors beside it: {shlex.join(['python', '-c', code, str(folder)])}"
        )
    if pickles:
        return (
            f"{pickles[0]} is a pickle, which can run code and is never loaded. docs/import.md says how to convert it"
        )
    return "a GPT-2 folder holds config.json and model.safetensors"


def load(folder: Path, block_size: int = 0) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face folder.

    Args:
      block_size: keep the first positions only; 0 keeps all.

    Raises:
      InteropError: as `read_config`, `read_tensors` and `to_params`; or there are fewer positions than `block_size`.
    """
    config = read_config(folder)
    tensors = read_tensors(folder, config)
    head = tensors.get("lm_head.weight")
    if config.tie_weights and head is not None and np.array_equal(head, tensors.get("wte.weight", ())):
        del tensors["lm_head.weight"]  # some writers store the tied head twice
    params = to_params(config, tensors)
    if block_size > config.block_size:
        raise InteropError(
            f"block_size is {block_size}, expected at most the {config.block_size} positions of {folder}"
        )
    if block_size:
        params["wpe"]["embedding"] = params["wpe"]["embedding"][:block_size]
        config = ModelConfig(**{**vars(config), "block_size": block_size})
    return config, params


def save(folder: Path, config: ModelConfig, params: Params) -> None:
    """Write `config.json` and `model.safetensors` into a folder, as `transformers` loads them.

    Raises:
      InteropError: the model is no GPT-2.
    """
    from safetensors.numpy import save_file

    if config.kind != "gpt":
        raise InteropError(f"a {config.kind} is no GPT-2; only models of kind 'gpt' can be exported")
    plain = ModelConfig(n_kv_head=config.n_head if config.n_kv_head == config.n_head else 0)
    others = [f"{name} {getattr(config, name)}" for name in NOT_GPT2 if getattr(config, name) != getattr(plain, name)]
    if others:
        raise InteropError(f"GPT-2 has no way to say {', '.join(others)}: a model with that cannot be exported")
    tensors = to_tensors(config, params)
    names = {name: name if name == "lm_head.weight" else f"transformer.{name}" for name in tensors}
    save_file({names[name]: x for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2) + "\n", "utf-8")


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` of `transformers.GPT2LMHeadModel` for a model of ours."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "activation_function": "gelu_new" if config.gelu == "tanh" else "gelu",
        "layer_norm_epsilon": 1e-5,
        "attn_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "float32",
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())  # with or without a byte order mark
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror}; {wanted(path.parent)}") from error
    except (ValueError, RecursionError) as error:
        raise InteropError(f"{path} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise InteropError(f"{path} holds no JSON object")
    return tree


def _put(params: Params, path: list[str], value: Any) -> None:
    for name in path[:-1]:
        params = params.setdefault(name, {})
    params[path[-1]] = value


def _get(params: Params, path: list[str]) -> Any:
    for name in path:
        params = params[name]
    return params
