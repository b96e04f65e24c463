"""GPT-2 weights and configs in the format of Hugging Face: reading, writing, and what is refused."""

import json
import re
import shutil
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt import model
from jaxgpt.config import ModelConfig
from jaxgpt.huggingface import folders, gpt2
from jaxgpt.huggingface.gpt2 import InteropError
from jaxgpt.sample import SamplingParams, generate

GOLDENS = Path(__file__).parents[1] / "goldens"
DOCS = Path(__file__).parents[2] / "docs"
TINY = GOLDENS / "hf-gpt2-tiny"
GOLDEN = dict(np.load(GOLDENS / "hf-gpt2-tiny.npz"))


def noisy(config):
    """Random parameters, none of them zero."""
    shapes = jax.eval_shape(partial(model.init_params, config), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape) + (x.ndim == 1), x.dtype), shapes)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(TINY, tmp_path / "gpt2"))


def edit_config(folder, **values):
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **values}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.smoke
def test_logits_and_greedy_continuation_equal_those_of_transformers():
    config, params = gpt2.load(TINY)
    assert config == ModelConfig(
        vocab_size=96, block_size=32, n_layer=2, n_head=4, n_embd=32, bias=True, tie_weights=True, gelu="tanh"
    )
    logits = model.forward(config, params, jnp.asarray(GOLDEN["idx"], jnp.int32))
    np.testing.assert_allclose(logits, GOLDEN["logits"], rtol=1e-4, atol=1e-5 * np.abs(GOLDEN["logits"]).max())
    # After the prompt of 5 tokens, transformers generated one token, the end-of-text id 0.
    prompt, expected = GOLDEN["greedy"][:, :5], GOLDEN["greedy"][:, 5:]
    np.testing.assert_array_equal(prompt, GOLDEN["idx"][:1, :5])
    np.testing.assert_array_equal(generate(config, params, prompt, 1, jax.random.key(0), SamplingParams(0)), expected)


@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"tie_weights": False}, {"gelu": "exact"}, {"scan_layers": True}, {"n_kv_head": 2}]
)
def test_a_saved_and_loaded_model_gives_equal_logits(tmp_path, options):
    config = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)
    config = ModelConfig(**{**vars(config), **options})
    params = noisy(config)
    gpt2.save(tmp_path, config, params)
    again, back = gpt2.load(tmp_path)
    assert again == ModelConfig(**{**vars(config), "bias": True, "scan_layers": False, "n_kv_head": 0})
    idx = jnp.arange(8)[None]
    separate = ModelConfig(**{**vars(config), "scan_layers": False})  # a scan over blocks may round differently
    logits = model.forward(separate, model.unstacked(params), idx)
    np.testing.assert_array_equal(model.forward(again, back, idx), logits)


def test_an_export_keeps_the_dropout_of_the_run(tmp_path):
    config = ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1, n_embd=4, dropout=0.25)
    gpt2.save(tmp_path, config, noisy(config))
    tree = json.loads((tmp_path / "config.json").read_text())
    assert [tree[name] for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop")] == [0.25] * 3


def test_params_survive_conversion_bit_for_bit():
    config, params = gpt2.load(TINY)
    back = gpt2.to_params(config, gpt2.to_tensors(config, params))
    jax.tree.map(np.testing.assert_array_equal, params, back)
    template = jax.eval_shape(lambda: model.init_params(config, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, template), "exactly the parameters of the model"
    low = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert {x.dtype for x in gpt2.to_tensors(config, low).values()} == {np.dtype("float32")}, "as config.json says"


def test_all_tensors_that_do_not_fit_are_listed_at_once(folder):
    def change(tensors):
        tensors["transformer.ln_f.gamma"] = tensors.pop("transformer.ln_f.weight")
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5]

    edit_tensors(folder, change)
    with pytest.raises(InteropError) as caught:
        gpt2.load(folder)
    for message in (
        "'ln_f.weight': expected (32,), found none",
        "'ln_f.gamma': expected none, found (32,)",
        "'wpe.weight': expected (32, 32), found (5, 32)",
    ):
        assert message in str(caught.value)


def test_names_without_prefix_masks_and_a_tied_head_stored_twice_are_accepted(folder):
    def change(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tri(32, dtype=np.float32)[None, None]
        tensors["h.0.attn.masked_bias"] = np.float32([-1e4])
        tensors["lm_head.weight"] = tensors["wte.weight"].copy()

    edit_tensors(folder, change)
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder), gpt2.load(TINY))


def test_a_tied_head_stored_with_other_values_is_refused(folder):
    """It would be lost: `transformers` uses it, and warns."""
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] + 1}))
    with pytest.raises(InteropError, match=r"lm_head\.weight differs from wte\.weight"):
        gpt2.load(folder)
    edit_config(folder, tie_word_embeddings=False)
    np.testing.assert_array_equal(
        gpt2.load(folder)[1]["lm_head"]["kernel"].T, gpt2.load(TINY)[1]["wte"]["embedding"] + 1
    )


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_tied_weights_may_be_stored_under_the_name_of_the_head(folder, prefix):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
        for name in set(tensors) - {"lm_head.weight"}:
            tensors[prefix + name.removeprefix("transformer.")] = tensors.pop(name)

    edit_tensors(folder, change)
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder), gpt2.load(TINY))
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(InteropError, match=r"'wte\.weight': expected .*, found none"):
        gpt2.load(folder)


def test_shards_are_read_through_their_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder), gpt2.load(TINY))
    shutil.copy(TINY / "model.safetensors", folder.parent)
    for bad in ("../model.safetensors", "/etc/passwd", "missing.safetensors", 3):
        index.write_text(json.dumps({"weight_map": {names[0]: bad}}))
        with pytest.raises(InteropError, match="has no file"):
            gpt2.load(folder)


def test_an_index_beside_a_whole_file_is_ignored(folder):
    """As in transformers, whose save_pretrained leaves the index of earlier shards in the folder."""
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "model-1-of-2.safetensors"}}')
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(folder), gpt2.load(TINY))


def test_positions_can_be_cropped():
    config, params = gpt2.load(TINY, block_size=8)
    whole, whole_params = gpt2.load(TINY)
    assert config.block_size == 8
    idx = jnp.arange(8)[None]
    np.testing.assert_array_equal(model.forward(config, params, idx), model.forward(whole, whole_params, idx))
    assert gpt2.load(TINY, block_size=32)[0] == whole
    with pytest.raises(InteropError, match="expected 0, or at most the 32 positions"):
        gpt2.load(TINY, block_size=33)
    with pytest.raises(InteropError, match="block_size is -1"):
        gpt2.load(TINY, block_size=-1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'gpt2'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 100}, "n_inner is 100"),
        ({"n_layer": "2"}, "n_layer is '2'"),
        ({"n_embd": None}, "n_embd is None"),
        ({"n_head": 0}, "n_head is 0"),
        ({"n_head": 5}, "must be divisible by n_head 5"),
        ({"n_layer": 3}, "'h.2.attn.c_attn.weight': expected .*, found none"),
        ({"n_layer": 10_000}, "n_layer is 10000, expected at most the number of tensors"),
    ],
)
def test_unsupported_configs_are_refused(folder, values, message):
    edit_config(folder, **values)
    with pytest.raises(InteropError, match=message):
        gpt2.load(folder)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, "cannot be read"),
        ("config.json", "{", "is not JSON"),
        ("config.json", "[]", r"config\.json is \[\], expected an object"),
        ("model.safetensors", None, "has no file 'model.safetensors'"),
        ("model.safetensors", "{}", "cannot be read"),
    ],
)
def test_damaged_files_are_named(folder, name, text, message):
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    with pytest.raises(InteropError, match=message):
        gpt2.load(folder)


def test_settings_that_a_config_leaves_out_are_the_defaults_of_transformers(folder):
    tree, kept = json.loads((folder / "config.json").read_text()), {"model_type", *gpt2.SIZES}
    (folder / "config.json").write_text(json.dumps({name: value for name, value in tree.items() if name in kept}))
    assert gpt2.read_config(folder) == gpt2.read_config(TINY)
    for name, gelu in (("gelu_pytorch_tanh", "tanh"), ("gelu", "exact")):
        edit_config(folder, activation_function=name)
        assert gpt2.read_config(folder).gelu == gelu


@pytest.mark.parametrize(("dtype", "accepted"), [("float16", True), ("bfloat16", True), ("int32", False)])
def test_tensors_of_other_floats_are_read_as_float32(folder, dtype, accepted):
    edit_tensors(folder, lambda x: x.update({name: x[name].astype(jnp.dtype(dtype)) for name in x}))
    if accepted:
        embedding, exact = (gpt2.load(each)[1]["wte"]["embedding"] for each in (folder, TINY))
        np.testing.assert_array_equal(embedding, exact.astype(jnp.dtype(dtype)).astype(np.float32))
    else:
        with pytest.raises(InteropError, match="is I32, expected F32, BF16, F16"):
            gpt2.load(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_accepted(folder, encoding):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding)
    assert gpt2.read_config(folder) == gpt2.read_config(TINY)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"pytorch_model\.bin is a pickle, .*docs/howto/checkpoints\.md"),
        ("pytorch_model-00001-of-00002.bin", "is a pickle"),
        ("ckpt.pt", r"ckpt\.pt is a pickle, .*docs/howto/checkpoints\.md"),
    ],
)
@pytest.mark.parametrize("config", ["with config.json", "without"])
def test_pickles_are_refused_with_the_page_that_converts_them(folder, name, message, config):
    (folder / "model.safetensors").rename(folder / name)
    if config == "without":
        (folder / "config.json").unlink()
    with pytest.raises(InteropError, match=message):
        gpt2.load(folder)
    with pytest.raises(InteropError, match=f"no folder .*{message}"):
        folders.find(str(folder / name))


@pytest.mark.parametrize("bias", [True, False])
def test_the_converter_of_the_docs_reads_nanogpts_checkpoints(folder, tmp_path, monkeypatch, bias):
    """TINY, converted to a nanoGPT checkpoint and back: transposed linear layers, names of a compiled module."""
    torch = pytest.importorskip("torch", reason="needs PyTorch: pip install --group bench")
    (code,) = re.findall(r"```py\n(.*?)```", (DOCS / "howto" / "checkpoints.md").read_text("utf-8"), re.DOTALL)
    theirs = {name: torch.tensor(x) for name, x in load_file(TINY / "model.safetensors").items()}
    model = {
        f"_orig_mod.{name}": x.T if re.search(r"\.c_\w+\.weight", name) else x
        for name, x in theirs.items()
        if bias or not name.endswith(".bias")
    }
    model["_orig_mod.lm_head.weight"] = model["_orig_mod.transformer.wte.weight"]
    model["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "bias": bias, "vocab_size": 96, "dropout": 0.0}
    torch.save({"model": model, "model_args": sizes, "optimizer": {}, "iter_num": 5}, tmp_path / "ckpt.pt")
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / "ckpt.pt"), str(tmp_path / "out")])
    exec(compile(code, "checkpoints.md", "exec"), {})
    if not bias:
        edit_tensors(folder, lambda x: x.update({name: 0 * x[name] for name in x if name.endswith(".bias")}))
    edit_config(folder, activation_function="gelu")
    jax.tree.map(np.testing.assert_array_equal, gpt2.load(tmp_path / "out"), gpt2.load(folder))


def test_a_bigram_cannot_be_exported(tmp_path):
    config = ModelConfig(kind="bigram", vocab_size=5)
    with pytest.raises(InteropError, match="GPT-2 does not have kind bigram"):
        gpt2.save(tmp_path, config, noisy(config))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        {"position": "rope"},
        {"norm": "rms"},
        {"mlp": "relu2"},
        {"qk_norm": True},
        {"n_kv_head": 1},
        {"window": 2},
        {"softcap": 15.0},
        {"smear": True},
        {"bigram_embed": True},
    ],
)
def test_a_model_with_features_that_gpt2_lacks_cannot_be_exported(tmp_path, options):
    config = ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=2, n_embd=8, **options)
    ((name, value),) = options.items()
    with pytest.raises(InteropError, match=f"GPT-2 does not have {name} {value}"):
        gpt2.save(tmp_path, config, noisy(config))
    assert list(tmp_path.iterdir()) == []


def test_transformers_loads_saved_models(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs PyTorch: pip install --group bench")
    torch = pytest.importorskip("torch")
    for options in ({}, {"tie_weights": False, "gelu": "exact"}, {"bias": False}):
        config = ModelConfig(vocab_size=11, block_size=8, n_layer=2, n_head=2, n_embd=16, bias=True)
        config = ModelConfig(**{**vars(config), **options})
        params = noisy(config)
        gpt2.save(tmp_path, config, params)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        idx = np.arange(8)[None]
        with torch.no_grad():
            logits = theirs(torch.tensor(idx)).logits.numpy()
        np.testing.assert_allclose(
            model.forward(config, params, idx), logits, rtol=1e-4, atol=1e-5 * np.abs(logits).max()
        )
