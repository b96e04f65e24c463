"""Every shape and number that the notes state, against PyTorch's run of their own snippets."""

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


def close(ours, theirs, rtol=1e-5):
    np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=rtol * float(np.abs(theirs).max()))


def test_tokenize_characters_separate_into_tokens_represented_as_integers():
    """'encoder: take a string, output a list of integers; decoder: take a list of integers, output a string'."""
    tok = CharTokenizer.train("hii there")
    ids = tok.encode("hii there").tolist()
    assert all(type(i) is int for i in ids)
    assert tok.decode(ids) == "hii there"


def test_each_token_directly_reads_off_the_logits_for_the_next_token():
    """'it returns out a (B, T, C) batch size by time by channel'; 'if targets is None: loss = None'."""
    logits, loss = model.logits_and_loss(BIGRAM, TABLE, IDX)
    assert loss is None
    chex.assert_shape(logits, (B, T, V))
    np.testing.assert_array_equal(logits, GOLDEN["bigram_logits"])


def test_so_we_need_to_reshape_the_logits_and_targets():
    """'logits = logits.view(B*T,C); targets = targets.view(B*T); loss = F.cross_entropy(logits, targets)'."""
    logits, loss = model.logits_and_loss(BIGRAM, TABLE, IDX, TARGETS)
    chex.assert_shape(logits, (B * T, V))
    close(loss, GOLDEN["bigram_loss"])
    close(cross_entropy(logits, TARGETS.reshape(B * T)), GOLDEN["bigram_loss"])


def test_compute_gradients_with_respect_to_loss():
    grad = jax.grad(lambda table: model.logits_and_loss(BIGRAM, table, IDX, TARGETS)[1])(TABLE)
    close(grad["token_embedding_table"]["embedding"], GOLDEN["bigram_grad"])


def test_every_token_emits_a_query_and_a_key():
    """'k = key(x) # (B,T,16)', 'q = query(x) # (B,T,16)', 'wei # (B,T,T)', out (B, T, 16)."""
    shapes = {}

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        shapes[context.module.name] = out.shape
        return out

    import flax.linen as linen

    with linen.intercept_methods(note):
        Head(16).apply({"params": HEAD}, X)
    assert shapes["key"] == shapes["query"] == shapes["value"] == shapes[None] == (B, T, 16)


@pytest.mark.parametrize("kind", SCALES)
def test_the_weights_are_data_dependent_lower_triangular_and_sum_to_one(kind):
    """'wei = wei.masked_fill(tril==0, float("-inf")); wei = F.softmax(wei, dim=-1)'."""
    q, k = (X @ HEAD[name]["kernel"] for name in ("query", "key"))
    wei = attention_weights(q, k, causal_mask(T)[None], scale=SCALES[kind])
    chex.assert_shape(wei, (B, T, T))
    np.testing.assert_array_equal(np.triu(wei, 1), 0)
    np.testing.assert_allclose(wei.sum(-1), np.ones((B, T)), rtol=1e-6)
    close(wei, GOLDEN[f"head_{kind}_wei"])


@pytest.mark.parametrize("kind", SCALES)
def test_the_head_and_its_gradients(kind):
    """The output, and the gradient of the sum of its squares with respect to the input and to each weight."""
    head = Head(16, scale=SCALES[kind])
    close(head.apply({"params": HEAD}, X), GOLDEN[f"head_{kind}_out"])
    loss = lambda params, x: (head.apply({"params": params}, x) ** 2).sum()  # noqa: E731
    dparams, dx = jax.jit(jax.grad(loss, (0, 1)))(HEAD, X)
    close(dx, GOLDEN[f"head_{kind}_dx"])
    for name in HEAD:
        close(dparams[name]["kernel"].T, GOLDEN[f"head_{kind}_d{name}"])


def test_cross_attention_has_other_sources():
    """'self in self attention because key, query and value come from x; cross attention may have other sources'."""
    head = Head(16)
    close(head.apply({"params": HEAD}, X, CONTEXT), GOLDEN["cross_scaled_out"])
    chex.assert_shape(head.apply({"params": HEAD}, X, CONTEXT), (B, T, 16))


def test_a_head_sees_all_of_its_context_and_only_the_past_of_its_own_text():
    head, params = Head(16), {"params": HEAD}
    heard = jax.jit(jax.jacobian(lambda c: head.apply(params, X[:1], c).sum(-1)))(jnp.asarray(CONTEXT[:1]))
    assert (np.abs(heard).sum(-1)[0, :, 0] > 0).all()
    heard = jax.jit(jax.jacobian(lambda x: head.apply(params, x).sum(-1)))(jnp.asarray(X[:1]))
    np.testing.assert_array_equal(np.abs(heard).sum(-1)[0, :, 0] > 0, np.tri(T, dtype=bool))
