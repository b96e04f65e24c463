# %% [markdown]
# # The lecture in 20 minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/lecture.ipynb)
#
# From characters to a GPT, one idea at a time: tokens, batches, a bigram, averages over the past, self-attention, and
# the blocks around it. The text is the documentation that comes with Python; nothing else is downloaded. A CPU suffices.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:
    wanted = "jaxgpt[report] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)

# %%
import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxgpt

SMALL = os.environ.get("JAXGPT_NOTEBOOK") == "small"  # a few steps of everything, as the tests run it

# %% [markdown]
# ## Tokens
#
# A tokenizer turns text into integers and back. Here each character is a token. The first 90% of the text train, the
# rest validates.

# %%
corpus = jaxgpt.prepare_corpus("python-docs").corpus
tokenizer = corpus.tokenizer
train, val = corpus.split(jaxgpt.DataConfig())
V = tokenizer.vocab_size
print(corpus.summary)
print(tokenizer.encode("def f(x):").tolist())
print(tokenizer.decode(train[:200]))

# %% [markdown]
# ## Batches
#
# A batch is `B` windows of `T` tokens. The targets are the inputs, one token later: each of the `B * T` positions is a
# prediction to learn from.

# %%
B, T = 4, 8
starts = jaxgpt.window_starts(seed=1337, step=0, n_tokens=len(train), T=T, B=B)  # (B,)
batch = jaxgpt.take(train, starts, T=T)  # inputs and targets, (B, T) each
for t in range(T):
    context = tokenizer.decode(batch.inputs[0, : t + 1])
    print(f"after {context!r} comes {tokenizer.decode(batch.targets[0, t : t + 1])!r}")

# %% [markdown]
# ## A bigram, and its loss
#
# The simplest model is a table of `V` rows: each token looks up the logits of the next one. A table of zeros finds every
# token equally likely, so its loss is ln V.

# %%
bigram = jaxgpt.ModelConfig(kind="bigram", vocab_size=V, block_size=T)
table = {"token_embedding_table": {"embedding": jnp.zeros((V, V))}}
logits, loss = jaxgpt.logits_and_loss(bigram, table, batch.inputs, batch.targets)
print(f"loss {loss:.3f}, ln V {np.log(V):.3f}")

# %% [markdown]
# ## Averages over the past, three ways
#
# Before tokens communicate, each takes the mean of itself and its past: by a loop, by a matmul with a lower-triangular
# matrix, and by a softmax over a mask. The last one is attention in which all affinities are equal.

# %%
from jaxgpt.lecture import attention as notes

x = jax.random.normal(jax.random.key(1), (B, T, 32))  # (B, T, C)
loop, matmul, softmax = notes.mean_by_loop(x), notes.mean_by_matmul(x), notes.mean_by_softmax(x)
print(np.allclose(loop, matmul, atol=1e-5), np.allclose(loop, softmax, atol=1e-5))

# %% [markdown]
# ## Self-attention
#
# Each token emits a query, a key and a value. Query times key is the affinity; a softmax over the past turns affinities
# into weights; the output is the weighted sum of values. Each row of the weights sums to one, and the future has weight
# zero.

# %%
from jaxgpt.attention import attention_weights, causal_mask

key, query, value = jax.random.normal(jax.random.key(2), (3, 32, 16)) * 32**-0.5
weights = attention_weights(x @ query, x @ key, causal_mask(T)[None])  # (B, T, T)
out = weights @ (x @ value)  # (B, T, 16)
print(np.round(weights[0], 2))

# %% [markdown]
# Causality is a property of gradients: token `t` depends on token `s` only where `s <= t`.


# %%
def outputs(x):
    return (attention_weights(x @ query, x @ key, causal_mask(T)[None]) @ (x @ value)).sum(-1)[0]  # (T,)


reaches = jnp.abs(jax.jit(jax.jacobian(outputs))(x[:1])).sum(-1)[:, 0] > 0  # (T, T)
print(reaches.astype(int))
assert (reaches == np.tril(np.ones((T, T), bool))).all()

# %% [markdown]
# ## The ladder
#
# The lecture adds one idea at a time. Each rung below is trained and scored on the whole validation split; the chart
# shows the loss in nats per character. The last rung of the lecture, a GPT of 0.8 million parameters, comes after it.

# %%
from jaxgpt.lecture import ladder
from jaxgpt.monitor.notebook import Chart

rungs = ladder.RUNGS[:-1]
if SMALL:
    rungs, val = tuple(replace(rung, steps=30) for rung in rungs[:6]), val[:4096]
results = []
for result in ladder.climb(rungs, train, val, tokenizer):
    results.append(result)
    print(ladder.line(result))

# %%
Chart(ladder.chart(results))

# %% [markdown]
# ## A GPT
#
# The recipe `gpt-demo` has what has been learnt since: rotary positions, RMSNorm, squared ReLU, and the Muon optimizer.
# A run is a folder: its config, vocabulary, metrics and checkpoints.

# %%
import tempfile

from jaxgpt.config import replaced
from jaxgpt.metrics_log import Progress
from jaxgpt.recipes import recipe

config = recipe("gpt-demo").config
if SMALL:
    config = replaced(
        config, n_layer=1, n_embd=32, block_size=32, steps=20, scan_steps=10, eval_every=0, val_tokens=4096
    )


def show(event):
    if isinstance(event, Progress):
        print(f"step {event.step:>4}  loss {event.loss:.3f}")


run, corpus = jaxgpt.start_run(config, "lecture", Path(tempfile.mkdtemp()), Path("data"))
done = jaxgpt.fit(run, corpus, show)
print(f"validation loss {done.scores[-1].evaluation.loss:.3f} nats per character")

# %%
trained = jaxgpt.load(run.path)
trained

# %%
trained.plot()

# %%
print(trained.sample("The ", tokens=400, sampling=jaxgpt.SamplingParams(temperature=0.6)))
