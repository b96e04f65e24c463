# %% [markdown]
# # GPT-2: import it, look into it, fine-tune it
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgpt/jaxgpt/blob/main/notebooks/gpt2.ipynb)
#
# By default, a GPT-2 of two layers is made on the spot, so the notebook runs in a minute on a CPU. Set the environment
# variable `JAXGPT_NOTEBOOK=full` before the first cell (in a notebook: `%env JAXGPT_NOTEBOOK=full`) to take OpenAI's
# weights instead: a download of 500 MB, and a GPU for the fine-tuning.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("jaxgpt") is None:
    wanted = "jaxgpt[hf,data,report] @ git+https://github.com/jaxgpt/jaxgpt"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", wanted], check=True)

# %%
import os
import tempfile
from pathlib import Path

import jax
import numpy as np

import jaxgpt
from jaxgpt import model as nn
from jaxgpt.config import replaced
from jaxgpt.huggingface import folders, gpt2
from jaxgpt.recipes import FINETUNE

FULL = os.environ.get("JAXGPT_NOTEBOOK") == "full"
SMALL = os.environ.get("JAXGPT_NOTEBOOK") == "small"  # a few steps of everything, as the tests run it
work = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A GPT-2 in Hugging Face's format
#
# A folder with `config.json` and `model.safetensors`. The one made here has random weights and an ASCII vocabulary.

# %%
if FULL:
    source = folders.find("gpt2")
else:
    source = work / "tiny-gpt2"
    source.mkdir()
    tiny = jaxgpt.ModelConfig(vocab_size=96, block_size=64, n_layer=2, n_head=4, n_embd=64, bias=True, gelu="tanh")
    gpt2.save(source, tiny, nn.init_params(tiny, jax.random.key(0)))
print(sorted(path.name for path in source.iterdir()))

# %% [markdown]
# ## Import
#
# `import_run` makes a run at step 0: the weights, the settings for fine-tuning, and the text. The command for it is
# `jaxgpt import-gpt2 gpt2 --run tuned`. Shapes and names of all tensors are checked; nothing of the folder is executed.

# %%
steps = 20 if SMALL else 200 if FULL else 600
config = replaced(FINETUNE, corpus="python-docs", steps=steps, scan_steps=10, eval_every=0, eval_batches=0)
if not FULL:
    config = replaced(config, tokenizer="ascii", unknown="skip", learning_rate=3e-3, batch_size=16)
if SMALL:
    config = replaced(config, val_tokens=4096)
run = folders.import_run(source, config, "tuned", work / "runs", Path("data"), block_size=256 if FULL else 0)
before = jaxgpt.load(run.path)
before

# %%
prompt = "The list "
print(before.sample(prompt, tokens=60 if FULL else 100))

# %% [markdown]
# ## Look into it
#
# The loss of each token of a text, and what the model finds most likely in its place.

# %%
from jaxgpt.diagnostics import inside

text = "If the object has no such method, a TypeError is raised."
ids = np.asarray(before.tokenizer.encode(text), np.int32)


def surprises(loaded):
    scores = inside.token_scores(loaded.config.model, loaded.params, ids, k=3)
    for n, loss in enumerate(scores.losses[:12], 1):
        likely = [loaded.tokenizer.decode(scores.ids[n - 1, k : k + 1]) for k in range(3)]
        print(f"{loaded.tokenizer.decode(ids[n : n + 1])!r:>10}  {loss:5.2f} nats  likely: {likely}")
    print(f"mean {scores.losses.mean():.3f} nats per token")


surprises(before)

# %% [markdown]
# The logit lens applies the last norm and the head to the residual stream at each depth: the loss falls from layer to
# layer in a trained model.

# %%
batch = jaxgpt.take(ids, np.zeros(1, np.int64), T=min(32, len(ids) - 1))


def by_depth(loaded):
    found = jax.jit(inside.lens, static_argnums=0)(loaded.config.model, loaded.params, batch)
    return " ".join(f"{loss:.2f}" for loss in found[0].mean(axis=(1, 2)))  # (L + 1,) nats


print(by_depth(before))

# %% [markdown]
# ## Fine-tune
#
# Training resumes from the imported weights. In a terminal: `jaxgpt train --run tuned --resume`.

# %%
from jaxgpt.cli.runs import corpus_of
from jaxgpt.metrics_log import Progress


def show(event):
    if isinstance(event, Progress) and event.step % 100 == 0:
        print(f"step {event.step:>4}  loss {event.loss:.3f}")


done = jaxgpt.fit(run, corpus_of(run, Path("data")), show)
first, last = done.scores[0].evaluation, done.scores[-1].evaluation
print(f"validation loss {first.loss:.3f} before, {last.loss:.3f} after, in nats per token")

# %%
after = jaxgpt.load(run.path)
after.plot()

# %%
print(after.sample(prompt, tokens=60 if FULL else 300))

# %%
surprises(after)
print("by depth:", by_depth(after))

# %%
from jaxgpt.diagnostics import view
from jaxgpt.monitor.notebook import Chart

attention_maps = jax.jit(inside.attention_maps, static_argnums=0)
maps = attention_maps(after.config.model, after.params, batch.inputs)[:4, 0, :4]  # (L, H, T, T), at most 4 each
Chart(view.attention_maps(maps))

# %% [markdown]
# ## Export
#
# The result is a folder that `transformers.GPT2LMHeadModel.from_pretrained` reads, with a model card.

# %%
folders.export_run(run, work / "exported")
print(sorted(path.name for path in (work / "exported").iterdir()))
print((work / "exported" / "README.md").read_text("utf-8")[:600])
