"""From a config to its corpus and its run. Without the package prepare/, only prepared corpora can be used."""

from collections.abc import Callable
from pathlib import Path

from jaxgpt import config as configs
from jaxgpt import model, processes
from jaxgpt import start as core
from jaxgpt.cli import corpora, memory, places
from jaxgpt.config import Config, UsageError, check
from jaxgpt.corpus import Corpus, CorpusError, load
from jaxgpt.run import Run
from jaxgpt.tokenizer import UnknownCharacterError


def start_run(
    config: Config,
    name: str,
    runs_dir: Path,
    data_dir: Path,
    weights: model.Params | None = None,
    origin: str = "",
    require_room: Callable[[Config, int], None] = memory.require,
) -> tuple[Run, Corpus]:
    """Check everything, prepare the corpus of `config`, and create the run, for `fit` to train.

    Args:
      name: of the run and of its folder in `runs_dir`.
      data_dir: folder of all prepared corpora.
      weights, origin: as in `start.new_run`.
      require_room: raises a UsageError if the devices cannot train a config on a number of tokens. vocab_size may be 0.

    Raises:
      UsageError: the config cannot run, the run exists, or the text is unavailable; nothing is written then. Or, once
        the text is prepared, the config cannot run or does not fit into memory with its vocabulary.
    """
    check(config, new=True)
    Run.require_free(runs_dir, name)
    places.require_writable(runs_dir, "--runs-dir")
    require_room(config, 0)
    corpus = prepared(config, data_dir)
    config = resolve(config, corpus)
    require_room(config, len(corpus.split(config.data)[0]))  # the size of the vocabulary is known only now
    return core.new_run(config, corpus, name, runs_dir, weights, origin), corpus


def resume(config: Config, run: Run, data_dir: Path) -> Corpus:
    """The corpus of `run`, as `corpus_of`; a RunError if `config` changes what the run computes."""
    core.require_resumable(run, run.config, check(config))
    return corpus_of(run, data_dir)


def corpus_of(run: Run, data_dir: Path) -> Corpus:
    """The corpus that `run` trains on: the one prepared for it, or the same tokens prepared again.

    Process 0 has to call it before the others, which do not hash the tokens.

    Raises:
      CorpusError: it is unavailable, or its text now gives other tokens.
    """
    name, wanted = run.config.data.corpus, run.corpus_meta["sha256"]
    if found := corpora.find_prepared(name, run.corpus_meta, data_dir, verified=not processes.is_primary()):
        return found
    folders = " and ".join(map(str, corpora.folders_of(run.corpus_meta, data_dir)))
    by_hand = f"put its original tokens-*.bin and tokens.json into {folders}, or name the folder above: --data-dir"
    problem = "now gives other tokens"
    try:
        parts = [part for _, part in corpora.mixture(name)]
        if any(part.startswith(("/dev/stdin", "/dev/fd/")) or places.local_path(part).is_fifo() for part in parts):
            raise CorpusError("a pipe is read only once")
        found = prepared(configs.replaced(run.config, tokenizer=str(run.path / "tokens.json")), data_dir)
        if found.meta["sha256"] == wanted:
            return found
    except UnknownCharacterError:  # of a text that changed; --unknown, which its message names, cannot help
        pass
    except UsageError as error:
        problem = f"cannot be prepared again: {error}"
    raise CorpusError(
        f"run {run.path.name!r} trains on {run.corpus_meta['origin']} (tokens of SHA-256 {wanted}), but {name!r} "
        f"{problem}; {by_hand}"
    )


def prepared(config: Config, data_dir: Path) -> Corpus:
    """The corpus of a config, prepared if necessary; a UsageError if it is unavailable or too small."""
    data, model = config.data, config.model
    try:
        from jaxgpt.prepare.build import prepare_corpus
    except ModuleNotFoundError as error:
        folder = places.local_path(data.corpus)
        if not (folder / "tokens.json").is_file():
            raise UsageError(f"{data.corpus} is not a prepared corpus, and jaxgpt.prepare is not installed") from error
        return load(folder)
    return prepare_corpus(
        data.corpus,
        data.tokenizer,
        unknown=data.unknown,
        data_dir=data_dir,
        block_size=model.block_size,
        val_fraction=data.val_fraction,
        vocab_size=model.vocab_size,
        column=data.column,
    ).corpus


def resolve(config: Config, corpus: Corpus) -> Config:
    """`start.resolve` of a config, with absolute paths in its corpus."""
    return core.resolve(configs.replaced(config, corpus=corpora.absolute(config.data.corpus)), corpus)


def complete(config: Config, data_dir: Path) -> Config:
    """`config`, checked; a vocab_size of 0 is replaced by that of its text, which is prepared."""
    if check(config).model.vocab_size:
        return config
    return check(configs.replaced(config, vocab_size=prepared(config, data_dir).tokenizer.vocab_size))
