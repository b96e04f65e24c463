# %% [markdown]
# # A run as a value
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/run_as_value.ipynb)
#
# A model is a function of its parameters, and training is a function of a seed, settings and tokens. So `vmap` trains
# several models at once, `grad` differentiates through the training, and the same loss shows which training text a
# prediction depends on. A CPU suffices.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:
    wanted = "jaxgpt[report] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgpt
from jaxgpt import model as nn

SMALL = os.environ.get("JAXGPT_NOTEBOOK") == "small"  # a few steps of everything, as the tests run it
STEPS, SEEDS, LAYERS = (20, 3, 1) if SMALL else (400, 8, 2)

corpus = jaxgpt.prepare_corpus("python-docs").corpus
tokenizer = corpus.tokenizer
train, val = (jnp.asarray(np.asarray(ids, np.int32)) for ids in corpus.split(jaxgpt.DataConfig()))

# %% [markdown]
# ## Training as a function
#
# The config is static. Parameters are nested dicts of arrays. The windows of step `n` are a function of (seed, `n`), so
# nothing is hidden in an iterator.

# %%
T, B = 32, 16
config = jaxgpt.ModelConfig(
    vocab_size=tokenizer.vocab_size, block_size=T, n_layer=LAYERS, n_head=4, n_embd=64, position="rope", norm="rms"
)
starts = jnp.stack([jnp.asarray(jaxgpt.window_starts(0, n, len(train), T, B)) for n in range(STEPS)])  # (STEPS, B)
held_out = jaxgpt.take(val, jnp.arange(0, 64 * T, T), T)  # (64, T) inputs and targets


def loss(params, batch):  # nats per token
    return nn.losses(config, params, batch.inputs, batch.targets).mean()


def learn(key, rate):
    """The parameters after STEPS steps of AdamW, and the loss of each step."""
    optimizer = optax.adamw(rate)
    params = nn.init_params(config, key)

    def step(state, starts):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, jaxgpt.take(train, starts, T))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), starts)
    return params, losses


# %% [markdown]
# ## Eight seeds, one program
#
# `vmap` over the seed: each array of parameters gets a leading axis. The spread between the rows is what a single run
# does not show.

# %%
seeds = jax.random.split(jax.random.key(0), SEEDS)
many, losses = jax.jit(jax.vmap(learn, in_axes=(0, None)))(seeds, 3e-3)  # losses: (SEEDS, STEPS)
scores = jax.jit(jax.vmap(loss, in_axes=(0, None)))(many, held_out)  # (SEEDS,)
print(f"losses {losses.shape}; held out {scores.mean():.3f}, standard deviation over seeds {scores.std(ddof=1):.3f}")

# %%
from jaxgpt.display.charts import ACCENT, chart, columns, layer, quantity
from jaxgpt.monitor.notebook import Chart

n, step = np.indices(losses.shape)
rows = columns(seed=n.ravel(), step=step.ravel(), loss=np.asarray(losses).ravel())
encoding = {"x": quantity("step"), "y": quantity("loss", zero=False), "detail": {"field": "seed", "type": "nominal"}}
Chart(chart(layer=[layer(rows, "line", encoding, color=ACCENT, strokeWidth=1, opacity=0.5)]))

# %% [markdown]
# An ensemble is the mean of the members' probabilities. Its loss is at most the mean loss of its members, because -log
# is convex.

# %%
each = jax.jit(jax.vmap(lambda params: nn.losses(config, params, held_out.inputs, held_out.targets)))(many)
vote = -jnp.log(jnp.exp(-each).mean(axis=0)).mean()  # each: (SEEDS, 64, T)
print(f"members {each.mean():.3f}, ensemble {vote:.3f}")
assert vote < each.mean()

# %% [markdown]
# ## A gradient through training
#
# The loss after some steps of gradient descent is a function of the learning rate, so it has a derivative: a
# hypergradient (Maclaurin et al. 2015, arXiv:1502.03492). Here gradient descent finds the learning rate of gradient
# descent. (Use reverse mode: a plain `jax.jvp` of the loss does not work, because its backward pass is written out.)

# %%
params = jax.tree.map(lambda leaf: leaf[0], many)  # the first member from here on
untrained = nn.init_params(config, jax.random.key(1))


def after_descent(log_rate):
    def descend(params, starts):
        grads = jax.grad(loss)(params, jaxgpt.take(train, starts, T))
        return jax.tree.map(lambda p, g: p - jnp.exp(log_rate) * g, params, grads), None

    return loss(jax.lax.scan(descend, untrained, starts[:5])[0], held_out)


hyper = jax.jit(jax.value_and_grad(after_descent))
log_rate = jnp.log(0.03)
(above, _), (below, _) = hyper(log_rate + 0.02), hyper(log_rate - 0.02)
print(f"slope {hyper(log_rate)[1]:.3f}, by finite differences {(above - below) / 0.04:.3f}")
for _ in range(3 if SMALL else 10):
    value, slope = hyper(log_rate)
    print(f"learning rate {jnp.exp(log_rate):.3f}: loss {value:.3f}")
    log_rate = log_rate - jnp.clip(slope, -0.5, 0.5)

# %% [markdown]
# ## Influence
#
# Which training text does a prediction depend on? To first order, a step of gradient descent on a training window lowers
# the loss of another window by the learning rate times the dot product of their gradients (one term of TracIn, Pruthi et
# al. 2020, arXiv:2002.08484).

# %%
from jaxgpt.diagnostics import derivatives

candidates = jaxgpt.take(train, jnp.asarray(jaxgpt.window_starts(7, 0, len(train), T, 16 if SMALL else 256)), T)
question = jax.tree.map(lambda ids: ids[:1], held_out)
measure = jax.jit(lambda params: derivatives.influence(derivatives.mean_loss(config), params, candidates, question))
products = np.asarray(measure(params)[0])  # (windows,)
print(f"      {tokenizer.decode(question.inputs[0])!r}")
for i in np.argsort(-products)[:5]:
    print(f"{products[i]:5.2f} {tokenizer.decode(candidates.inputs[i])!r}")

# %% [markdown]
# Check the first of them: a small step on that window alone lowers the loss of the question, by about rate times
# product.

# %%
best, rate = int(products.argmax()), 1e-4
window = jax.tree.map(lambda ids: ids[best : best + 1], candidates)


@jax.jit
def improvement(params):
    moved = jax.tree.map(lambda p, g: p - rate * g, params, jax.grad(loss)(params, window))
    return loss(params, question) - loss(moved, question)


print(f"predicted {rate * products[best]:.6f}, measured {improvement(params):.6f}")

# %% [markdown]
# ## Attention maps
#
# How much each token (row) attends to each token before it (column), for every layer and head.

# %%
from jaxgpt.diagnostics import inside, view

maps = jax.jit(inside.attention_maps, static_argnums=0)(config, params, question.inputs)[:, 0]  # (L, H, T, T)
Chart(view.attention_maps(maps))

# %% [markdown]
# A run that is saved has an interactive view: in its report, point at a token to see what each head attends to there.
# (`jaxgpt serve RUN` has the same for text that you type.)

# %%
import html
import tempfile
from pathlib import Path

from jaxgpt.config import replaced
from jaxgpt.recipes import recipe
from jaxgpt.report.reporter import reports

saved = replaced(
    recipe("gpt-demo").config, n_layer=LAYERS, n_embd=64, block_size=T, steps=STEPS, scan_steps=10, eval_every=0
)
if SMALL:
    saved = replaced(saved, val_tokens=4096)
run, tokens = jaxgpt.start_run(saved, "value", Path(tempfile.mkdtemp()), Path("data"))
jaxgpt.fit(run, tokens)
page = run.path / "report.html"
next(reports([run], Path("data"))).write(page)


class Page:
    def _repr_html_(self):
        return f'<iframe srcdoc="{html.escape(page.read_text("utf-8"))}" width="100%" height="700"></iframe>'


Page()
