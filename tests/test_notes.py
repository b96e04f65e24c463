"""The shapes and numbers of the lecture notes: PyTorch ran the notes' own snippets, which the docstrings quote."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgpt import model
from jaxgpt.attention import attention_weights, causal_mask
from jaxgpt.config import ModelConfig
from jaxgpt.lecture.attention import Head
from jaxgpt.loss import cross_entropy
from jaxgpt.tokenizer import CharTokenizer

pytestmark = pytest.mark.smoke
GOLDEN = dict(np.load(Path(__file__).parent / "goldens" / "document_snippets.npz"))
B, T, C, V = 4, 8, 32, 65
BIGRAM = ModelConfig(kind="bigram", vocab_size=V, block_size=T)
TABLE = {"token_embedding_table": {"embedding": GOLDEN["bigram_table"]}}
IDX, TARGETS = (GOLDEN[name].astype(np.int32) for name in ("bigram_idx", "bigram_targets"))
HEAD = {name: {"kernel": GOLDEN[f"weight_{name}"].T} for name in ("key", "query", "value")}
X, CONTEXT = GOLDEN["x"], GOLDEN["context"]
SCALES = {"unscaled": 1.0, "scaled": None}


def assert_close(ours, theirs, rtol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * float(np.abs(theirs).max()))


def test_char_tokenizer_round_trip():
    """'encoder: take a string, output a list of integers; decoder: take a list of integers, output a string'."""
    tok = CharTokenizer.train("hii there")
    ids = tok.encode("hii there").tolist()
    assert ids == [2, 3, 3, 0, 5, 2, 1, 4, 1]
    assert tok.decode(ids) == "hii there"


def test_bigram_logits():
    """'it returns out a (B, T, C) batch size by time by channel'; 'if targets is None: loss = None'."""
    logits, loss = model.logits_and_loss(BIGRAM, TABLE, IDX)
    assert loss is None
    chex.assert_shape(logits, (B, T, V))
    np.testing.assert_array_equal(logits, GOLDEN["bigram_logits"])


def test_bigram_loss_flattens_logits_and_targets():
    """'logits = logits.view(B*T,C); targets = targets.view(B*T); loss = F.cross_entropy(logits, targets)'."""
    logits, loss = model.logits_and_loss(BIGRAM, TABLE, IDX, TARGETS)
    chex.assert_shape(logits, (B * T, V))
    assert_close(loss, GOLDEN["bigram_loss"])
    assert_close(cross_entropy(logits, TARGETS.reshape(B * T)), GOLDEN["bigram_loss"])


def test_bigram_gradient():
    grad = jax.grad(lambda table: model.logits_and_loss(BIGRAM, table, IDX, TARGETS)[1])(TABLE)
    assert_close(grad["token_embedding_table"]["embedding"], GOLDEN["bigram_grad"])


def test_shapes_in_a_head():
    """'k = key(x) # (B,T,16)', 'q = query(x) # (B,T,16)', 'wei # (B,T,T)', out (B, T, 16)."""
    shapes = {}

    def record_shape(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        shapes[context.module.name] = out.shape
        return out

    import flax.linen as linen

    with linen.intercept_methods(record_shape):
        Head(16).apply({"params": HEAD}, X)
    assert shapes["key"] == shapes["query"] == shapes["value"] == shapes[None] == (B, T, 16)


@pytest.mark.parametrize("kind", SCALES)
def test_attention_weights_are_causal_and_sum_to_one(kind):
    """'wei = wei.masked_fill(tril==0, float("-inf")); wei = F.softmax(wei, dim=-1)'."""
    q, k = (X @ HEAD[name]["kernel"] for name in ("query", "key"))
    wei = attention_weights(q, k, causal_mask(T)[None], scale=SCALES[kind])
    chex.assert_shape(wei, (B, T, T))
    np.testing.assert_array_equal(np.triu(wei, 1), 0)
    np.testing.assert_allclose(wei.sum(-1), np.ones((B, T)), rtol=1e-6)
    assert_close(wei, GOLDEN[f"head_{kind}_wei"])


@pytest.mark.parametrize("kind", SCALES)
def test_head_output_and_gradients(kind):
    """The output, and the gradient of the sum of its squares with respect to the input and to each weight."""
    head = Head(16, scale=SCALES[kind])
    assert_close(head.apply({"params": HEAD}, X), GOLDEN[f"head_{kind}_out"])
    loss = lambda params, x: (head.apply({"params": params}, x) ** 2).sum()  # noqa: E731
    dparams, dx = jax.jit(jax.grad(loss, (0, 1)))(HEAD, X)
    assert_close(dx, GOLDEN[f"head_{kind}_dx"])
    for name in HEAD:
        assert_close(dparams[name]["kernel"].T, GOLDEN[f"head_{kind}_d{name}"])


def test_cross_attention_output():
    """'self in self attention because key, query and value come from x; cross attention may have other sources'."""
    head = Head(16)
    assert_close(head.apply({"params": HEAD}, X, CONTEXT), GOLDEN["cross_scaled_out"])
    chex.assert_shape(head.apply({"params": HEAD}, X, CONTEXT), (B, T, 16))


def test_cross_attention_sees_the_whole_context_and_self_attention_the_past():
    head, params = Head(16), {"params": HEAD}
    jacobian = jax.jit(jax.jacobian(lambda c: head.apply(params, X[:1], c).sum(-1)))(jnp.asarray(CONTEXT[:1]))
    assert (np.abs(jacobian).sum(-1)[0, :, 0] > 0).all()
    jacobian = jax.jit(jax.jacobian(lambda x: head.apply(params, x).sum(-1)))(jnp.asarray(X[:1]))
    np.testing.assert_array_equal(np.abs(jacobian).sum(-1)[0, :, 0] > 0, np.tri(T, dtype=bool))
