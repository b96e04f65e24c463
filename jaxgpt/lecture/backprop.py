"""Backpropagation by hand: the chain rule written out, to compare with `jax.grad`.

Each function takes the inputs of the forward pass and the gradient of the loss with respect to its output (`d_out`),
and returns the gradients with respect to its inputs. Later functions use earlier ones.
"""

import jax
import jax.numpy as jnp

from jaxgpt.attention import attention_weights, causal_mask


def matmul(a: jax.Array, b: jax.Array, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    """C = A @ B: the notes' rule. A (..., n, k), B (..., k, m), d_out (..., n, m) -> dA, dB.

    C[i, j] = sum over k of A[i, k] B[k, j], so the derivative of C[i, j] with respect to A[i, k] is B[k, j]: dA[i, k]
    is the sum over j of d_out[i, j] B[k, j], which is d_out @ B.T. Likewise, dB is A.T @ d_out.
    """
    return d_out @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ d_out


def softmax(p: jax.Array, d_out: jax.Array) -> jax.Array:
    """p = softmax(x) over the last axis, (..., T): p (its output), d_out -> dx.

    dp[i]/dx[j] = p[i] (1[i = j] - p[j]): raising x[j] raises p[j] and lowers the others in proportion. Summed over i,
    dx is p times the difference between d_out and its mean under p.
    """
    return p * (d_out - (p * d_out).sum(axis=-1, keepdims=True))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The mean of -log softmax(logits)[target]: logits (N, V), targets (N,) -> d_logits (N, V).

    The gradient of -x[target] + log(sum(exp(x))) is softmax(x) - 1[target]: a step against it raises the
    logit of the target and lowers the others. Each row sums to zero.
    """
    N, V = logits.shape
    return (jax.nn.softmax(logits, axis=-1) - jax.nn.one_hot(targets, V)) / N


def bigram(table: jax.Array, idx: jax.Array, targets: jax.Array) -> jax.Array:
    """The bigram's loss: table (V, V), idx and targets (B, T) -> d_table (V, V).

    Row i of the table is the logits at every position that holds token i, so it sums their gradients: the number of
    times i occurs, times the predicted minus the observed frequency of each next token. It is zero exactly when the
    table predicts the bigram counts.
    """
    V = table.shape[1]
    d_logits = cross_entropy(table[idx].reshape(-1, V), targets.reshape(-1))
    return jnp.zeros_like(table).at[idx.reshape(-1)].add(d_logits)


def head(
    x: jax.Array, key: jax.Array, query: jax.Array, value: jax.Array, d_out: jax.Array, scale: float = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One head of causal self-attention: x (B, T, C), weights (C, D), d_out (B, T, D) -> dx, d_key, d_query, d_value.

    Forward: k, q, v = x @ key, x @ query, x @ value; wei = softmax(mask(scale q @ k.T)); out = wei @ v.
    Backward, the same steps in reverse; x is used three times, so dx is a sum of three gradients.
    """
    k, q, v = x @ key, x @ query, x @ value
    mask = causal_mask(x.shape[1])[None]
    wei = attention_weights(q, k, mask, scale=scale)  # (B, T, T)

    d_wei, d_v = matmul(wei, v, d_out)
    d_affinity = jnp.where(mask, softmax(wei, d_wei), 0.0)  # masked entries have no gradient
    d_q, d_k_transposed = matmul(scale * q, k.swapaxes(-1, -2), d_affinity)
    d_q, d_k = scale * d_q, d_k_transposed.swapaxes(-1, -2)

    dx_k, d_key = matmul(x, key, d_k)
    dx_q, d_query = matmul(x, query, d_q)
    dx_v, d_value = matmul(x, value, d_v)
    return dx_k + dx_q + dx_v, d_key.sum(axis=0), d_query.sum(axis=0), d_value.sum(axis=0)
