"""Read and write GPT-2 in Hugging Face's format, by one table of tensor names.

A folder holds `config.json` and `model.safetensors` (or shards and `model.safetensors.index.json`). Names, shapes and
dtypes are checked before any tensor is read, nothing is executed, and an index can only name files in the folder.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxgpt.config import ModelConfig, UsageError, shown
from jaxgpt.files import json_object
from jaxgpt.model import Params, unstacked

Tensors = dict[str, NDArray[np.float32]]
DTYPES = ("F32", "BF16", "F16")
"""Accepted dtypes; all are read as float32."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of PyTorch files, which are never read."""
NOT_GPT2 = ["kind", "position", "norm", "mlp", "qk_norm", "n_kv_head", "window", "softcap", "smear", "bigram_embed"]
"""Options of our model that GPT-2 does not have."""
SIZES = dict(vocab_size="vocab_size", n_positions="block_size", n_embd="n_embd", n_layer="n_layer", n_head="n_head")
"""Fields of `config.json` to those of `ModelConfig`."""


class InteropError(UsageError):
    """A folder is not a GPT-2 that can be loaded, or a model cannot be written as one."""


class Row(NamedTuple):
    """A Hugging Face tensor, and the parameters of ours that it concatenates along its last axis."""

    name: str
    ours: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool = False


def table(config: ModelConfig) -> list[Row]:
    """All tensors of a GPT-2. Its linear layers are (in, out), like Flax's kernels."""
    C, V = config.n_embd, config.vocab_size
    rows = [
        Row("wte.weight", ("wte/embedding",), (V, C)),
        Row("wpe.weight", ("wpe/embedding",), (config.block_size, C)),
    ]

    def add(name: str, *shape: int) -> None:
        """A layer; our names are the same, but h_0/ for h.0., and `c_attn` is our query, key and value."""
        path = name.replace(".", "_", 1).replace(".", "/")
        ours = [path.replace("c_attn", each) for each in ("query", "key", "value")] if "c_attn" in path else [path]
        weight = "kernel" if len(shape) > 1 else "scale"
        rows.append(Row(f"{name}.weight", tuple(f"{each}/{weight}" for each in ours), shape))
        if config.bias:
            rows.append(Row(f"{name}.bias", tuple(f"{each}/bias" for each in ours), shape[-1:]))

    for i in range(config.n_layer):
        add(f"h.{i}.ln_1", C)
        add(f"h.{i}.ln_2", C)
        add(f"h.{i}.attn.c_attn", C, 3 * C)
        add(f"h.{i}.attn.c_proj", C, C)
        add(f"h.{i}.mlp.c_fc", C, 4 * C)
        add(f"h.{i}.mlp.c_proj", 4 * C, C)
    add("ln_f", C)
    if not config.tie_weights:
        rows.append(Row("lm_head.weight", ("lm_head/kernel",), (V, C), transposed=True))
    return rows


def to_params(config: ModelConfig, tensors: Tensors) -> Params:
    """Our parameters from Hugging Face's tensors."""
    params: Params = {}
    for row in table(config):
        tensor = tensors[row.name].T if row.transposed else tensors[row.name]
        for path, array in zip(row.ours, np.split(tensor, len(row.ours), axis=-1), strict=True):
            tree, (*modules, leaf) = params, path.split("/")
            for name in modules:
                tree = tree.setdefault(name, {})
            tree[leaf] = np.ascontiguousarray(array, np.float32)
    return params


def _require_fit(config: ModelConfig, found: Mapping[str, tuple[int, ...]]) -> None:
    """Check the names and shapes of tensors."""
    if config.n_layer > len(found):  # before a table of n_layer blocks is made
        raise InteropError(f"n_layer is {config.n_layer}, expected at most the number of tensors, {len(found)}")
    expected = {row.name: row.shape for row in table(config)}
    wrong = [
        f"  {shown(name)}: expected {expected.get(name, 'none')}, found {found.get(name, 'none')}"
        for name in {**expected, **found}
        if expected.get(name) != found.get(name)
    ]
    if wrong:
        raise InteropError("the shapes of the tensors do not fit the model:\n" + "\n".join(wrong[:100]))


def to_tensors(config: ModelConfig, params: Params) -> Tensors:
    """Hugging Face's float32 tensors from our parameters, the inverse of `to_params`. GPT-2 always has biases: they are
    zeros if the model has none."""
    tensors, params = Tensors(), unstacked(params)
    for row in table(replace(config, bias=True)):
        if not config.bias and row.name.endswith(".bias"):
            tensors[row.name] = np.zeros(row.shape, np.float32)
            continue
        parts = [np.asarray(reduce(getitem, path.split("/"), params), np.float32) for path in row.ours]
        tensor = np.concatenate(parts, axis=-1)
        tensors[row.name] = np.ascontiguousarray(tensor.T if row.transposed else tensor)
    return tensors


def read_config(folder: Path) -> ModelConfig:
    """The config of the model in a Hugging Face folder.

    Raises:
      InteropError: `config.json` is missing or damaged, or is not of a GPT-2 that our model can express.
    """
    file = folder / "config.json"
    tree = _read_json(file)
    if tree.get("model_type") != "gpt2":
        raise InteropError(f"{file}: model_type is {shown(tree.get('model_type'))}, expected 'gpt2'")
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
    """The tensors of a folder as float32, without the prefix "transformer.", and without causal masks and a second copy
    of a tied head, which some files have.

    Raises:
      InteropError: a file is missing or damaged, or is outside the folder; or, before any tensor is read, names are
        missing or unknown, or shapes are wrong: it lists them.
    """
    from safetensors import SafetensorError, safe_open

    masks = re.compile(r"h\.[0-9]+\.attn\.(masked_)?bias")
    head, embedding = "lm_head.weight", "wte.weight"
    stored = dict[str, Any]()  # of safetensors, not read yet
    with ExitStack() as stack:
        for path in _files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="np"))
                for key in file.keys():  # noqa: SIM118 (it is not a dict)
                    name, tensor = key.removeprefix("transformer."), file.get_slice(key)
                    if masks.fullmatch(name):
                        continue
                    if name in stored:
                        raise InteropError(f"{path} holds {shown(name)} a second time")
                    if (dtype := tensor.get_dtype()) not in DTYPES:
                        raise InteropError(f"{path}: {shown(name)} is {dtype}, expected {', '.join(DTYPES)}")
                    stored[name] = tensor
            except (SafetensorError, OSError) as error:
                raise InteropError(f"{path} cannot be read: {error}") from error
        if config.tie_weights and embedding not in stored and head in stored:
            # safetensors.torch.save_model writes tied weights once, under the name that sorts first
            stored[embedding] = stored.pop(head)
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in stored.items()}
        twice = config.tie_weights and shapes.get(head) == (config.vocab_size, config.n_embd)
        _require_fit(config, {name: shape for name, shape in shapes.items() if not (twice and name == head)})
        tensors = {name: tensor[:].astype(np.float32) for name, tensor in stored.items()}
        if twice and not np.array_equal(tensors.pop(head), tensors[embedding], equal_nan=True):
            raise InteropError(
                f"{folder}: lm_head.weight differs from wte.weight, but config.json ties them: set tie_word_embeddings "
                "to false there to keep both"
            )
        return tensors


def _files(folder: Path) -> list[Path]:
    """`model.safetensors`; without it the shards that the index names, which must be in the folder itself."""
    index, names = folder / "model.safetensors.index.json", list[Any](["model.safetensors"])
    if index.is_file() and not (folder / names[0]).is_file():
        weight_map = _read_json(index).get("weight_map")
        names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    for name in names:
        is_plain = isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name)
        if not is_plain or not os.path.isfile(folder / name):
            raise InteropError(f"{folder} has no file {shown(name)}; {advice(folder)}")
    return [folder / name for name in sorted(set(names))]


def advice(folder: Path) -> str:
    """The end of an error: what a GPT-2 folder holds, or how to convert the pickle in this one."""
    if not (pickles := sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)):
        return "a GPT-2 folder holds config.json and model.safetensors"
    return (
        f"{pickles[0]} is a pickle, which can run code and is never loaded; docs/howto/checkpoints.md has the commands "
        "that convert it"
    )


def load(folder: Path, block_size: int = 0) -> tuple[ModelConfig, Params]:
    """The model of a Hugging Face folder.

    Args:
      block_size: keep only the first positions; 0 keeps all.

    Raises:
      InteropError: as `read_config` and `read_tensors`; or there are fewer positions than `block_size`.
    """
    config = read_config(folder)
    params = to_params(config, read_tensors(folder, config))
    if not 0 <= block_size <= config.block_size:
        raise InteropError(
            f"block_size is {block_size}, expected 0, or at most the {config.block_size} positions of {folder}"
        )
    if block_size:
        params["wpe"]["embedding"] = params["wpe"]["embedding"][:block_size]
        config = replace(config, block_size=block_size)
    return config, params


def save(folder: Path, config: ModelConfig, params: Params) -> None:
    """Write `config.json` and `model.safetensors` into a folder, as `transformers` loads them.

    Raises:
      InteropError: the model is not a GPT-2.
    """
    from safetensors.numpy import save_file

    default = ModelConfig(n_kv_head=config.n_head if config.n_kv_head == config.n_head else 0)
    extra = [f"{name} {getattr(config, name)}" for name in NOT_GPT2 if getattr(config, name) != getattr(default, name)]
    if extra:
        raise InteropError(f"GPT-2 does not have {', '.join(extra)}: such a model cannot be exported")
    tensors = {
        name if name == "lm_head.weight" else f"transformer.{name}": tensor
        for name, tensor in to_tensors(config, params).items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tree = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(config, ours) for theirs, ours in SIZES.items()},
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
        return json_object(path.read_bytes(), str(path))  # with or without a byte order mark
    except OSError as error:
        raise InteropError(f"{path} cannot be read: {error.strerror}; {advice(path.parent)}") from error
    except ValueError as error:
        raise InteropError(str(error)) from error
