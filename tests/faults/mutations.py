"""One-line faults; for each, one of the tests beside it must fail. `scripts/mutate` plants them one at a time.

They represent the kinds of mistakes that the suite must catch: a wrong mask, a shifted target, a reused random key, a
hash that is not compared, a lock that is not taken, an off-by-one in a window.
"""

from typing import NamedTuple


class Mutation(NamedTuple):
    """A fault: in `file` (below jaxgpt/), the only occurrence of `old` becomes `new`."""

    name: str
    file: str
    old: str
    new: str
    tests: str
    """Files and folders below tests/, separated by spaces; one of them must fail."""


MUTATIONS = [
    # Attention and the model.
    Mutation(
        "a token attends to the next one",
        "attention.py",
        "if window else distance >= 0",
        "if window else distance >= -1",
        "test_attention.py",
    ),
    Mutation(
        "a window is one token too long",
        "attention.py",
        "(distance < window)",
        "(distance <= window)",
        "test_attention.py test_model_options.py",
    ),
    Mutation(
        "the dropout mask of fused attention differs in the backward pass",
        "flash.py",
        "* scale, drop(weights, rows, columns)",
        "* scale, drop(weights, columns, rows)",
        "test_flash.py",
    ),
    Mutation(
        "fused attention forgets the normalizer of earlier blocks",
        "flash.py",
        "total * shrink + weights.sum(axis=1)",
        "total + weights.sum(axis=1)",
        "test_flash.py",
    ),
    Mutation(
        "attention is scaled by 1/D",
        "attention.py",
        "q.shape[-1] ** -0.5 if scale",
        "q.shape[-1] ** -1.0 if scale",
        "test_attention.py test_goldens.py",
    ),
    Mutation(
        "rotary embedding rotates one half in the wrong direction",
        "attention.py",
        "a * sin + b * cos",
        "a * sin - b * cos",
        "test_attention.py test_model_options.py",
    ),
    Mutation(
        "cached decoding rotates every token as if it were the first",
        "model.py",
        "first = 0 if start is None else start",
        "first = 0",
        "test_cache.py",
    ),
    Mutation(
        "the ring cache is written one slot too far",
        "attention.py",
        "start % S, axis=2",
        "(start + 1) % S, axis=2",
        "test_cache.py",
    ),
    Mutation(
        "cached attention reads empty slots",
        "attention.py",
        "& (positions >= 0)[None]",
        "& (positions >= -S)[None]",
        "test_cache.py",
    ),
    Mutation(
        "every row has the same dropout mask",
        "prng.py",
        "_mix((first ^ row) ^ column)",
        "_mix((first ^ row[..., :1, :]) ^ column)",
        "test_prng.py",
    ),
    Mutation(
        "dropout hashes rows and columns with one seed",
        "prng.py",
        "for i in (1, 2, 3))",
        "for i in (1, 1, 1))",
        "test_prng.py",
    ),
    Mutation(
        "dropout does not rescale the kept values",
        "prng.py",
        "x / jnp.asarray(self.keep, x.dtype)",
        "x",
        "test_model.py test_step.py test_model_options.py",
    ),
    Mutation(
        "residual projections are initialized too large",
        "model.py",
        "0.02 * (2 * config.n_layer) ** -0.5",
        "0.02 * config.n_layer**-0.5",
        "test_model.py",
    ),
    Mutation(
        "smear mixes a token with itself",
        "model.py",
        "factor[None, None] * previous(x, before)",
        "factor[None, None] * x",
        "test_model_options.py",
    ),
    Mutation(
        "the first token gets a bigram embedding",
        "model.py",
        "jnp.where(positions[None, :, None] > 0, embedded, 0)",
        "embedded",
        "test_model_options.py",
    ),
    Mutation(
        "soft-capping is not applied",
        "model.py",
        "config.softcap * jnp.tanh(out.astype(jnp.float32) / config.softcap) if config.softcap else out",
        "out",
        "test_model_options.py",
    ),
    Mutation(
        "KV heads are shared in the wrong order",
        "kernels.py",
        "jnp.repeat(x, H // x.shape[1], axis=1)",
        "jnp.tile(x, (1, H // x.shape[1], 1, 1))",
        "test_model_options.py test_attention.py",
    ),
    Mutation(
        "RMSNorm divides by the mean square",
        "model.py",
        "x * jax.lax.rsqrt(jnp.mean(",
        "x / (jnp.mean(",
        "test_model_options.py",
    ),
    # The training step.
    Mutation(
        "dropout uses one key for every step",
        "step.py",
        "jax.random.fold_in(stream_key(hyper.seed, DROPOUT), state.step)",
        "stream_key(hyper.seed, DROPOUT)",
        "test_step.py",
    ),
    Mutation(
        "micro-batches share a dropout key",
        "step.py",
        "jax.random.fold_in(dropout_key, i)",
        "dropout_key",
        "test_step.py",
    ),
    Mutation(
        "gradients of micro-batches are summed",
        "step.py",
        "lambda x: x / A, total",
        "lambda x: x, total",
        "test_step.py",
    ),
    Mutation("a non-finite update is applied", "step.py", "applied & jnp.isfinite(new)", "applied", "test_step.py"),
    Mutation(
        "moments include the gradients of a skipped step",
        "optimizer.py",
        "jnp.where(applied, beta1 * m + (1 - beta1) * g, m)",
        "beta1 * m + (1 - beta1) * g",
        "test_step.py",
    ),
    Mutation(
        "the gradient of GELU lacks the density term",
        "activations.py",
        "phi + wide * density",
        "phi",
        "test_activations.py",
    ),
    Mutation(
        "the gradient of LayerNorm keeps its mean",
        "activations.py",
        "d - d.mean(-1, keepdims=True)",
        "d",
        "test_activations.py",
    ),
    Mutation(
        "the gradient of the loss lacks the target",
        "loss.py",
        "probabilities - jax.nn.one_hot(targets, logits.shape[-1], dtype=jnp.float32)",
        "probabilities",
        "test_loss.py",
    ),
    Mutation(
        "of rows with equal ids, only one gradient counts", "sharding.py", "a[1] + b[1]", "b[1]", "test_lookup.py"
    ),
    Mutation("a non-finite loss is applied", "step.py", "jnp.isfinite(loss) & ", "", "test_step.py"),
    Mutation(
        "embeddings do not decay",
        "optimizer.py",
        'DECAYED = ("kernel", "embedding")',
        'DECAYED = ("kernel",)',
        "test_optimizer.py test_goldens.py",
    ),
    Mutation(
        "the warm-up starts at zero",
        "optimizer.py",
        "first = peak / (warmup + 1)",
        "first = 0.0 * peak",
        "test_optimizer.py",
    ),
    Mutation(
        "the cosine schedule rises again after its end",
        "optimizer.py",
        "jnp.minimum(n, length).astype",
        "n.astype",
        "test_optimizer.py",
    ),
    Mutation(
        "Muon's polynomial has a wrong sign",
        "optimizer.py",
        "(3.4445, -4.7750, 2.0315)",
        "(3.4445, 4.7750, 2.0315)",
        "test_muon.py",
    ),
    # Batches and evaluation.
    Mutation(
        "targets are the inputs",
        "data.py",
        "Batch(windows[..., :-1], windows[..., 1:])",
        "Batch(windows[..., :-1], windows[..., :-1])",
        "test_data.py",
    ),
    Mutation(
        "random windows never reach the last token",
        "data.py",
        "raw[mine] % (n_tokens - T)",
        "raw[mine] % (n_tokens - T - 1)",
        "test_data.py",
    ),
    Mutation(
        "every epoch has the same order",
        "data.py",
        "permute(positions[mine], n, seed, int(epoch))",
        "permute(positions[mine], n, seed, 0)",
        "test_data.py",
    ),
    Mutation(
        "a mixture repeats the windows of its first block",
        "data.py",
        "block * count + earlier[positions[mine]]",
        "earlier[positions[mine]]",
        "test_data.py",
    ),
    Mutation(
        "loss estimates use the RNG stream of the training batches",
        "data.py",
        '"estimate": ESTIMATE}',
        '"estimate": RANDOM}',
        "test_data.py",
    ),
    Mutation(
        "the last window counts tokens twice",
        "data.py",
        "np.maximum(starts - (N - 1 - T), 0)",
        "np.zeros_like(starts)",
        "test_evaluation.py",
    ),
    Mutation(
        "the standard error divides by n instead of n - 1",
        "evaluation.py",
        "(n * (n - 1))",
        "(n * n)",
        "test_evaluation.py",
    ),
    # Sampling.
    Mutation(
        "all tokens of a text are sampled with the same key",
        "sample.py",
        "next_tokens(draw, logits, keys)",
        "next_tokens(draw, logits, state.keys)",
        "test_generate.py",
    ),
    Mutation(
        "sequences of a batch share a key",
        "sample.py",
        "(None, 0))(key, jnp.arange(B))",
        "(None, 0))(key, jnp.zeros(B, jnp.int32))",
        "test_generate.py",
    ),
    Mutation(
        "top-k keeps one token too many",
        "sample.py",
        "lax.top_k(logits, k)[0]",
        "lax.top_k(logits, k + 1)[0]",
        "test_filters.py",
    ),
    Mutation(
        "top-p drops the token that reaches p",
        "sample.py",
        "jnp.ones_like(ordered[..., :1], bool), before < p",
        "jnp.ones_like(ordered[..., :1], bool), before < p / 2",
        "test_filters.py",
    ),
    Mutation(
        "padding ids are sampled",
        "sample.py",
        "logits = logits[:, : sampling.n_ids or None]",
        "pass",
        "test_generate.py test_write.py",
    ),
    Mutation(
        "a text includes its stop string",
        "sample.py",
        "yield held[: min(found)[1]]",
        "yield held[: min(found)[0]]",
        "test_write.py",
    ),
    # Files, checkpoints, runs.
    Mutation(
        "the hash of a checkpoint is not compared",
        "checkpoint.py",
        "if found != saved:",
        "if False:",
        "test_checkpoint.py",
    ),
    Mutation(
        "the best checkpoint is pruned",
        "checkpoint.py",
        "{*steps[-self._keep :], best_step(steps, Run(self.directory.parent).val_losses())}",
        "{*steps[-self._keep :]}",
        "test_checkpoint.py",
    ),
    Mutation(
        "an edited sealed file is accepted", "files.py", "if digest !=", "if False and digest !=", "test_files.py"
    ),
    Mutation("the run directory is not locked", "run.py", "lock.acquire()", "pass", "test_run.py"),
    Mutation(
        "a resume keeps the metrics after its checkpoint",
        "metrics_log.py",
        "self._file.truncate(n_bytes)",
        "pass",
        "test_metrics_log.py test_train.py",
    ),
    Mutation(
        "a resume does not verify the metrics before its checkpoint",
        "start.py",
        "            require_metrics(run, manifest)\n",
        "",
        "test_recovery.py",
    ),
    Mutation("a resume may change any setting", "start.py", "    if refused:", "    if False:", "test_recovery.py"),
    Mutation(
        "an interrupted run is not saved",
        "train.py",
        "if not processes.broadcast(int(state.step) in checkpoints.steps):",
        "if not checkpoints.steps:",
        "test_train.py test_signals.py",
    ),
    Mutation(
        "the validation split is taken from the start",
        "corpus.py",
        "text[part.n_tokens :]",
        "text[: -part.n_tokens]",
        "test_corpus.py",
    ),
    # Rooms.
    Mutation(
        "the gradient of softmax lacks the mean",
        "lecture/backprop.py",
        "p * (d_out - (p * d_out).sum(axis=-1, keepdims=True))",
        "p * d_out",
        "lecture",
    ),
    Mutation(
        "any host name is served",
        "serve/guard.py",
        "name in self.hosts or bool(ipaddress.ip_address(name))",
        "True",
        "serve/test_refusals.py serve/test_app.py",
    ),
    Mutation(
        "an export has a wrong epsilon",
        "huggingface/gpt2.py",
        '"layer_norm_epsilon": 1e-5,\n        "attn',
        '"layer_norm_epsilon": 1e-6,\n        "attn',
        "huggingface",
    ),
    Mutation(
        "verify-resume does not compare arrays",
        "verify/resume.py",
        "if x.tobytes() != y.tobytes():",
        "if False:",
        "verify",
    ),
]
