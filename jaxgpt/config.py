"""The settings of a run: frozen dataclasses, validation, and JSON. Does not import jax.

Each setting is documented once, here: `jaxgpt train RECIPE --help` prints these docstrings.
"""

import dataclasses
import difflib
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal


class UsageError(ValueError):
    """The user asked for something impossible. The command line prints this message and exits with 2."""


_short = reprlib.Repr()
_short.maxstring = 80


def shown(value: Any) -> str:
    """The repr of a value from a file, shortened for a message however long or deeply nested the value is."""
    return _short.repr(value)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """A question that suggests the closest of `names`, to append to a message; empty if none is close."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {near[0]!r}?" if near else ""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, library: str, extra: str):
        super().__init__(
            f"{what} needs {library}, which is not installed: pip install {library} (or 'jaxgpt[{extra}]')"
        )


class ConfigError(UsageError):
    """A setting is missing, unknown, of the wrong type or out of range."""


class Section:
    """Settings. A ConfigError names one of the wrong type; NumPy scalars become Python numbers, which JSON can hold."""

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            value = getattr(self, name)
            if type(value) is not kind:
                value = value.item() if hasattr(value, "item") else value
                object.__setattr__(self, name, _value(kind, value, name))


_kinds: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""A dataclass -> the type of each field, by name."""


@dataclass(frozen=True)
class DataConfig(Section):
    """The text to train on, and its tokenizer."""

    corpus: str = "python-docs"
    """A named corpus (python-docs, python-stdlib, shakespeare, fineweb, fineweb-edu, openwebtext), a file or folder of
    UTF-8, JSON Lines or Parquet, or a prepared folder; local, at a URL, or a Hugging Face dataset
    (hf://datasets/ORG/NAME). Or a mixture by weight: `0.7*a.txt + 0.3*b.txt`."""
    tokenizer: str = "char"
    """char, ascii, byte, gpt2, bpe:SIZE (learned from the text, such as bpe:4096), a tokens.json whose vocabulary to
    reuse, or a Hugging Face folder with a byte-level BPE."""
    val_fraction: float = 0.1
    """Fraction of the corpus, at its end, held out for validation."""
    val_tokens: int = 4_000_000
    """Maximum size of the validation split, in tokens; 0: no limit."""
    unknown: Literal["error", "skip"] = "error"
    """What to do with characters outside the vocabulary; skipped ones are counted and reported."""
    column: str = "text"
    """Column of JSON Lines (.jsonl) or .parquet that holds the text; meta.text is `text` in an object `meta`."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """The model, with nanoGPT's names."""

    kind: Literal["gpt", "bigram"] = "gpt"
    """gpt: causal self-attention; bigram: logits looked up in a (V, V) table."""
    vocab_size: int = 0
    """V, vocabulary size; 0 takes it from the tokenizer."""
    block_size: int = 64
    """T, maximum context length."""
    n_layer: int = 4
    """L, number of transformer blocks."""
    n_head: int = 4
    """H, number of attention heads; must divide n_embd."""
    n_embd: int = 128
    """C, number of channels."""
    dropout: float = 0.0
    """Dropout probability in training."""
    bias: bool = False
    """Give linear and LayerNorm layers a bias, as GPT-2 does."""
    tie_weights: bool = True
    """Share the token embedding with the output head."""
    gelu: Literal["exact", "tanh"] = "exact"
    """exact, as in nanoGPT; tanh, GPT-2's approximation (gelu_new)."""
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Compute dtype of matmuls; parameters and sums are float32. auto: bfloat16 on TPUs, GPUs of compute capability 8
    and up, and CPUs with amx_bf16 or avx512_bf16, else float32; fixed when a run starts."""
    position: Literal["learned", "rope"] = "learned"
    """Positional encoding: learned, an embedding of block_size positions; rope, queries and keys rotated by position
    (Su et al. 2021, arXiv:2104.09864)."""
    norm: Literal["layer", "rms"] = "layer"
    """layer: LayerNorm; rms: RMSNorm without a gain (Zhang and Sennrich 2019, arXiv:1910.07467)."""
    mlp: Literal["gelu", "relu2", "swiglu"] = "gelu"
    """gelu: as in GPT-2; relu2: squared ReLU (So et al. 2021, arXiv:2109.08668); swiglu: gated SiLU, 2/3 as wide
    (Shazeer 2020, arXiv:2002.05202)."""
    qk_norm: bool = False
    """Apply RMSNorm to queries and keys (Henry et al. 2020, arXiv:2010.04245)."""
    n_kv_head: int = 0
    """KV heads, each shared by n_head / n_kv_head query heads (grouped-query attention, Ainslie et al. 2023,
    arXiv:2305.13245); 0 is n_head."""
    window: int = 0
    """How many tokens a position attends to, itself included (Beltagy et al. 2020, arXiv:2004.05150); 0 is all."""
    init_scale: float = 1.0
    """Multiplier of the initial kernels and embeddings."""
    zero_init: bool = False
    """Initialize the output projections of attention and MLP, and an untied head, to zero (Zhang et al. 2019,
    arXiv:1901.09321; modded-nanogpt 2024)."""
    softcap: float = 0.0
    """Cap logits as `softcap * tanh(logits / softcap)` (Gemma 2, 2024, arXiv:2408.00118); 0 turns it off."""
    smear: bool = False
    """Add the previous token's embedding, scaled by a learned factor per channel, initially 0 (modded-nanogpt 2025; the
    token shift of RWKV, Peng et al. 2023, arXiv:2305.13048)."""
    bigram_embed: bool = False
    """Add an embedding of the pair (previous token, token), initially zero: a full table of V x V rows, for small
    vocabularies (modded-nanogpt 2025 hashes it to fewer rows)."""
    remat: Literal["none", "matmuls", "blocks"] = "none"
    """What the backward pass recomputes to save memory: nothing; everything but matmuls; whole blocks. On CPUs, this
    saves memory only with scan_layers."""
    scan_layers: bool = False
    """Stack the blocks' parameters and scan over them: deep models compile many times faster."""
    deterministic: bool = False
    """Avoid attention kernels with non-deterministic gradients: on GPUs, cuDNN's at contexts over 256 tokens."""


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW or Muon, its schedule and clipping."""

    algorithm: Literal["adamw", "muon"] = "adamw"
    """muon: Muon (Jordan et al. 2024) for the kernels inside blocks, AdamW for the rest."""
    muon_learning_rate: float = 0.02
    """Muon's peak learning rate; follows the same schedule as learning_rate."""
    muon_momentum: float = 0.95
    """Decay of Muon's Nesterov momentum."""
    muon_steps: int = 5
    """Newton-Schulz iterations that orthogonalize an update."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the schedule; None: min_lr_ratio * learning_rate."""
    min_lr_ratio: float = 0.1
    """Final learning rate as a fraction of the peak, if min_learning_rate is None."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Decay schedule after the warm-up."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    decay_steps: int = 0
    """Step at which the schedule ends; 0: the last step."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.99
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Added to the square root of Adam's second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, applied to kernels and embeddings only."""
    grad_clip: float = 1.0
    """Maximum global norm of the gradient; 0 turns clipping off."""

    @property
    def final_learning_rate(self) -> float:
        """The learning rate at the end of a cosine or linear schedule."""
        return self.learning_rate * self.min_lr_ratio if self.min_learning_rate is None else self.min_learning_rate


@dataclass(frozen=True)
class TrainConfig(Section):
    """Length, batch size, evaluation and checkpoints."""

    seed: int = 1337
    """Seed of the initial parameters, the batches and dropout."""
    steps: int = 1000
    """Total optimizer steps."""
    batch_size: int = 12
    """B, sequences per optimizer step, over all devices and micro-batches."""
    accumulate: int = 1
    """Micro-batches per batch, to save memory; must divide batch_size."""
    sampling: Literal["epoch", "random"] = "epoch"
    """epoch: every window once per epoch, shuffled; random: with replacement, as nanoGPT."""
    scan_steps: int = 50
    """K, training steps per compiled scan; metrics, signals and saves are handled between scans."""
    eval_every: int = 250
    """Steps between evaluations and saves, a multiple of scan_steps; 0: evaluate at the start and the end, save at the
    end."""
    eval_start: bool = True
    """Evaluate the untrained model too."""
    eval_batches: int = 20
    """Random batches in the nanoGPT-style estimate beside the exact evaluation; 0 turns it off."""
    keep: int = 2
    """How many of the newest checkpoints to keep, besides the best."""
    keep_every: int = 0
    """Also keep checkpoints whose step is a multiple of this; 0 turns it off."""
    max_skipped: int = 5
    """End the run after this many consecutive non-finite steps; each is skipped."""
    on_save_error: Literal["continue", "stop"] = "continue"
    """If a save fails, as on a full disk: continue and retry at the next save, or end the run."""


@dataclass(frozen=True)
class Config:
    """All settings of a run. With the tokens they determine every number that it produces, if the kernels are
    deterministic (docs/explain/reliability.md)."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


_AT_LEAST = {
    0: "val_tokens vocab_size n_kv_head window warmup_steps decay_steps eval_every eval_batches keep_every",
    1: "block_size n_layer n_head n_embd muon_steps steps batch_size accumulate scan_steps keep max_skipped",
}
"""Lower bound -> the integer fields that have it. All are at most 2**31 - 1."""
_BELOW = {
    1.0: "dropout beta1 beta2 muon_momentum",
    math.inf: "softcap init_scale learning_rate weight_decay grad_clip min_learning_rate muon_learning_rate",
}
"""Exclusive upper bound, as a float32 -> the float fields that have it. All are at least 0."""
_ROUNDS_TO = {1.0: 1 - 2**-25, math.inf: 2.0**128 - 2**103}
"""The least number that float32 rounds to a bound."""


def problems(config: Config, new: bool = False) -> list[str]:
    """One sentence for each reason why `config` cannot run.

    Args:
      new: a run starts with it. A run may be resumed, but not started, if its learning rate rises to min_learning_rate.
    """
    data, model, optimizer, train = config.data, config.model, config.optimizer, config.train
    values = vars(data) | vars(model) | vars(optimizer) | vars(train)
    checks: list[tuple[bool, str, str]] = []  # (passed, field, expected value)
    for low, names in _AT_LEAST.items():
        for name in names.split():
            checks.append((low <= values[name] <= 2**31 - 1, name, f"a whole number from {low} to 2**31 - 1"))
    for high, names in _BELOW.items():
        for name in names.split():
            passed = values[name] is None or 0 <= values[name] < _ROUNDS_TO[high]
            checks.append((passed, name, f"a number from 0 up to, not including, {high:g} in float32"))

    def multiple(name: str, unit: int, of: str) -> tuple[bool, str, str]:
        unit = max(1, unit)
        nearest = unit * max(1, (2 * values[name] + unit) // (2 * unit))
        return values[name] % unit == 0, name, f"a multiple of {of}: try --{name.replace('_', '-')} {nearest}"

    T, H, A, peak = model.block_size, model.n_head, train.accumulate, optimizer.learning_rate
    decays, end = optimizer.schedule != "constant", optimizer.decay_steps or train.steps
    rises = new and decays and (optimizer.min_learning_rate or 0) > peak
    too_long = decays and 1 <= end <= optimizer.warmup_steps
    most = 2**24 // max(1, train.batch_size)
    heads = f"n_head ({H})"
    if model.kind == "gpt" and model.position == "rope":
        H, heads = 2 * H, f"2 * n_head ({2 * H}), because position rope needs an even head size"
    checks += [
        (0 < data.val_fraction < 1, "val_fraction", "a fraction between 0 and 1"),
        (not 0 < data.val_tokens <= T, "val_tokens", f"more than block_size ({T}), or 0"),
        multiple("n_embd", H, heads),
        (model.n_kv_head <= 0 or model.n_head % model.n_kv_head == 0, "n_kv_head", "a divisor of n_head"),
        (not model.bigram_embed or model.vocab_size <= 4096, "vocab_size", "at most 4096, or --no-bigram-embed"),
        (0 <= optimizer.min_lr_ratio <= 1, "min_lr_ratio", "a number from 0 to 1"),
        (not rises, "min_learning_rate", f"at most learning_rate ({peak}): try --min-learning-rate None"),
        (optimizer.algorithm != "muon" or peak != 0, "learning_rate", "above 0 with muon, which divides by it"),
        (0 < optimizer.eps < _ROUNDS_TO[math.inf], "eps", "a number above 0, finite in float32"),
        (not too_long, "warmup_steps", f"fewer than the steps of the schedule ({end}): try --warmup-steps {end // 10}"),
        (0 <= train.seed < 2**32, "seed", "a whole number from 0 to 2**32 - 1"),
        (train.batch_size * T < 2**31, "batch_size", f"less than 2**31 tokens in windows of {T}"),
        (train.eval_batches <= most, "eval_batches", f"at most {most}, for 2**24 sequences"),
        (train.batch_size % max(1, A) == 0, "batch_size", f"a multiple of accumulate ({A})"),
        multiple("eval_every", train.scan_steps, f"scan_steps ({train.scan_steps})"),
    ]
    return [f"{name} is {values[name]!r}, expected {expected}" for passed, name, expected in checks if not passed]


def check(config: Config, new: bool = False) -> Config:
    """`config` itself, if it can run; `new` as in `problems`.

    Raises:
      ConfigError: with one line for each problem.
    """
    found = problems(config, new)
    if found:
        raise ConfigError("the configuration cannot run:\n" + "\n".join(f"  {line}" for line in found))
    return config


def replaced(config: Config, **values: Any) -> Config:
    """`config` with fields of any section replaced by name. The result is not checked.

    >>> replaced(Config(), n_layer=6, steps=10).train.steps
    10
    """
    sections = {}
    for section, old in vars(config).items():
        mine = {name: values.pop(name) for name in vars(old) if name in values}
        sections[section] = dataclasses.replace(old, **mine)
    if values:
        raise TypeError(f"no such fields: {', '.join(values)}")
    return Config(**sections)


def unresolved(config: Config) -> Config:
    """`config` with decay_steps 0 where it is the number of steps, as `start.resolve` sets it: the schedule then
    follows a change of steps."""
    return replaced(config, decay_steps=0) if config.optimizer.decay_steps == config.train.steps else config


def differences(a: Config, b: Config) -> list[tuple[str, Any, Any]]:
    """(field, value in `a`, value in `b`) of every field in which two configs differ."""
    found = []
    for section, ours in vars(a).items():
        theirs = vars(getattr(b, section))
        found += [(name, value, theirs[name]) for name, value in vars(ours).items() if value != theirs[name]]
    return found


# Saved configs of older versions:
BEFORE = {"val_tokens": 0}
"""Field that they may lack -> its value then, where that is not the default."""
RENAMED = {("model.remat", "products"): "matmuls"}
"""(field, old value) -> its value now."""
REMOVED = {"model.value_embed": False}
"""Removed field -> the only value that can still be read."""


def from_tree(tree: Any) -> Config:
    """The inverse of `dataclasses.asdict`. A missing field has its value in BEFORE, or its default, so that configs of
    older versions keep their meaning.

    Raises:
      ConfigError: a field is unknown (perhaps of a newer version), of the wrong type or out of range.
    """
    return check(_build(Config, tree, ""))


def _build(cls: type[Any], tree: Any, path: str) -> Any:
    """A dataclass `cls` from JSON values, strict about names and types."""
    where = path or "the config"
    if not isinstance(tree, dict):
        raise ConfigError(f"{where}: expected an object, found {shown(tree)}")
    kinds = _kinds(cls)
    tree = {name: value for name, value in tree.items() if (f"{path}.{name}", value) not in REMOVED.items()}
    for name in tree:
        if name not in kinds:
            raise ConfigError(f"{where}: unknown field {shown(name)}{did_you_mean(name, kinds)}")
    tree = {name: value for name, value in BEFORE.items() if name in kinds} | tree
    return cls(**{name: _value(kinds[name], value, f"{path}.{name}".lstrip(".")) for name, value in tree.items()})


def _value(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast("type[Any]", kind), value, path)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        value = RENAMED.get((path, value), value) if isinstance(value, str) else value
        if value not in choices:
            raise ConfigError(f"{path}: expected one of {', '.join(choices)}, found {shown(value)}")
        return value
    if isinstance(kind, types.UnionType):  # float | None
        return None if value is None else _value(typing.get_args(kind)[0], value, path)
    if type(value) is int and abs(value) >= 2**63:
        raise ConfigError(f"{path}: expected {kind.__name__} of at most 64 bits, found {shown(value)}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path}: expected {kind.__name__}, found {shown(value)}")
    return value
