"""GPT-2 in the format of Hugging Face, in and out, by one table of tensor names.

A folder holds `config.json` and `model.safetensors` (or shards and `model.safetensors.index.json`). Names, shapes and
dtypes are checked against the table before any tensor is read; nothing is executed, and no path is made from a name
in a file.
"""

import json
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import ModelConfig, UsageError, shown
from jaxgpt.model import Params, unstacked

Tensors = dict[str, NDArray[np.float32]]
DTYPES = ("F32", "BF16", "F16")
"""What a file may hold; each is read as float32."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of PyTorch's files, which are not read."""
NOT_GPT2 = ["position", "norm", "mlp", "qk_norm", "n_kv_head", "window", "softcap", "smear"]
NOT_GPT2 += ["bigram_embed"]
"""Options of our blocks that GPT-2 does not have."""
SIZES = {"vocab_size": "vocab_size", "n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head"}
SIZES |= {"n_embd": "n_embd"}
"""Fields of `config.json`, and ours."""


class InteropError(UsageError):
    """A folder holds no GPT-2 that can be loaded, or a model cannot be written as one."""


class Row(NamedTuple):
    """A tensor of Hugging Face's, and our parameters that are concatenated along its last axis."""

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


def table(config: ModelConfig) -> list[Row]:
    """All tensors of a GPT-2 of that shape. Its linear layers are (in, out), as Flax's kernels are."""
    C, V = config.n_embd, config.vocab_size
    rows = [
        Row("wte.weight", ("wte/embedding",), (V, C)),
        Row("wpe.weight", ("wpe/embedding",), (config.block_size, C)),
    ]

    def add(name: str, ours: tuple[str, ...], shape: tuple[int, ...], weight: str) -> None:
        rows.append(Row(f"{name}.weight", tuple(f"{each}/{weight}" for each in ours), shape))
        if config.bias:
            rows.append(Row(f"{name}.bias", tuple(f"{each}/bias" for each in ours), shape[-1:]))

    for i in range(config.n_layer):
        add(f"h.{i}.ln_1", (f"h_{i}/ln_1",), (C,), "scale")
        add(f"h.{i}.ln_2", (f"h_{i}/ln_2",), (C,), "scale")
        query_key_value = tuple(f"h_{i}/attn/{name}" for name in ("query", "key", "value"))
        add(f"h.{i}.attn.c_attn", query_key_value, (C, 3 * C), "kernel")
        add(f"h.{i}.attn.c_proj", (f"h_{i}/attn/c_proj",), (C, C), "kernel")
        add(f"h.{i}.mlp.c_fc", (f"h_{i}/mlp/c_fc",), (C, 4 * C), "kernel")
        add(f"h.{i}.mlp.c_proj", (f"h_{i}/mlp/c_proj",), (4 * C, C), "kernel")
    add("ln_f", ("ln_f",), (C,), "scale")
    if not config.tie_weights:
        rows.append(Row("lm_head.weight", ("lm_head/kernel",), (V, C), transposed=True))
    return rows


def to_params(config: ModelConfig, tensors: Tensors) -> Params:
    """Our parameters from Hugging Face's tensors.

    Raises:
      InteropError: all missing and unknown names, and all wrong shapes.
    """
    _require_fit(config, {name: tensor.shape for name, tensor in tensors.items()})
    params: Params = {}
    for row in table(config):
        tensor = tensors[row.name].T if row.transposed else tensors[row.name]
        for path, part in zip(row.ours, np.split(tensor, len(row.ours), axis=-1), strict=True):
            *outer, leaf = path.split("/")
            reduce(lambda tree, name: tree.setdefault(name, {}), outer, params)[leaf] = np.ascontiguousarray(
                part, np.float32
            )
    return params


def _require_fit(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of tensors, at a cost that no number in a file can raise."""
    if config.n_layer > len(found):
        raise InteropError(f"n_layer is {config.n_layer}, expected at most the number of tensors, {len(found)}")
    wanted = {row.name: row.shape for row in table(config)}
    wrong = [f"  missing   {name}" for name in wanted if name not in found]
    wrong += [f"  not known {shown(name)} {found[name]}" for name in found if name not in wanted]
    wrong += [
        f"  misshapen {name}: expected {shape}, found {found[name]}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if wrong:
        raise InteropError("the tensors do not fit the model:\n" + "\n".join(wrong[:100]))


def to_tensors(config: ModelConfig, params: Params) -> Tensors:
    """Hugging Face's tensors from our parameters, the inverse of `to_params`. GPT-2 always has biases: a model without
    gets zeros."""
    tensors, params = Tensors(), unstacked(params)
    for row in table(ModelConfig(**{**vars(config), "bias": True})):
        if not config.bias and row.name.endswith(".bias"):
            tensors[row.name] = np.zeros(row.shape, np.float32)
            continue
        leaves = [reduce(lambda tree, name: tree[name], path.split("/"), params) for path in row.ours]
        tensor = np.concatenate([np.asarray(leaf) for leaf in leaves], axis=-1)
        tensors[row.name] = np.ascontiguousarray(tensor.T if row.transposed else tensor)
    return tensors


def read_config(folder: Path) -> ModelConfig:
    """The model that a Hugging Face `config.json` describes.

    Raises:
      InteropError: it is missing or damaged, or the model has a feature that our GPT-2 does not have.
    """
    file = folder / "config.json"
    tree = _read_json(file)
    if tree.get("model_type") != "gpt2":
        raise InteropError(f"{folder} holds a model of type {shown(tree.get('model_type'))}, expected 'gpt2'")
    gelus = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
    allowed_values: dict[str, tuple[Any, ...]] = {  # the default of transformers first
        "activation_function": tuple(gelus),
        "layer_norm_epsilon": (1e-5,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True, False),
        "n_inner": (None, 4 * tree["n_embd"] if isinstance(tree.get("n_embd"), int) else None),
    }
    for name, allowed in allowed_values.items():
        if tree.get(name, allowed[0]) not in allowed:
            raise InteropError(f"{file}: {name} is {shown(tree[name])}, expected {allowed[0]!r}")
    for name in SIZES:
        if type(tree.get(name)) is not int or not 0 < tree[name] < 2**31:
            raise InteropError(f"{file}: {name} is {shown(tree.get(name))}, expected a whole number")
    if tree["n_embd"] % tree["n_head"]:
        raise InteropError(f"{file}: n_embd {tree['n_embd']} must be divisible by n_head {tree['n_head']}")
    return ModelConfig(
        **{ours: tree[theirs] for theirs, ours in SIZES.items()},
        bias=True,
        tie_weights=bool(tree.get("tie_word_embeddings", True)),
        gelu=gelus[tree.get("activation_function", "gelu_new")],  # type: ignore[arg-type]
    )


def read_tensors(folder: Path, config: ModelConfig) -> Tensors:
    """The tensors of a folder as float32, without the prefix "transformer." and the causal masks of older files.

    Raises:
      InteropError: a file is missing or damaged, or is outside the folder; or, before any tensor is read, as
        `to_params`. A tied head that is stored too is accepted.
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
                        raise InteropError(f"{path} holds {shown(name)} a second time")
                    if part.get_dtype() not in DTYPES:
                        raise InteropError(f"{path}: {shown(name)} is {part.get_dtype()}, expected {', '.join(DTYPES)}")
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
    """`model.safetensors`, or the shards of the index; in the folder itself and nowhere else."""
    index, names = folder / "model.safetensors.index.json", list[Any](["model.safetensors"])
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not plain or not os.path.isfile(folder / name):
            raise InteropError(f"{folder} has no file {shown(name)}; {wanted(folder)}")
    return [folder / name for name in sorted(set(names))]


def wanted(folder: Path) -> str:
    """What a folder without tensors should hold, or how to convert the pickles in it."""
    if not (pickles := sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)):
        return "a GPT-2 folder holds config.json and model.safetensors"
    code = "from sys import argv; from transformers import GPT2LMHeadModel as M; "
    code += "M.from_pretrained(argv[1]).save_pretrained(argv[1])"
    return (
        f"{pickles[0]} is a pickle, which can run code and is never loaded. With torch and transformers, this converts "
        f"pytorch_model.bin: {shlex.join(['python', '-c', code, str(folder)])}; others: docs/howto/checkpoints.md"
    )


def load(folder: Path, block_size: int = 0) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face folder.

    Args:
      block_size: keep only the first positions; 0 keeps all.

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
      InteropError: the model is not a GPT-2.
    """
    from safetensors.numpy import save_file

    if config.kind != "gpt":
        raise InteropError(f"a {config.kind} is no GPT-2; only models of kind 'gpt' can be exported")
    plain = ModelConfig(n_kv_head=config.n_head if config.n_kv_head == config.n_head else 0)
    others = [f"{name} {getattr(config, name)}" for name in NOT_GPT2 if getattr(config, name) != getattr(plain, name)]
    if others:
        raise InteropError(f"GPT-2 does not have {', '.join(others)}: such a model cannot be exported")
    tensors = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in to_tensors(config, params).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tree = {
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
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n", "utf-8")


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
