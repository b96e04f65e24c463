"""What commands do between their options and the core: prepare the corpus of a config, and make or find its run.

Without the room prepare/ they use corpora that are prepared already.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jaxgpt import config as configs
from jaxgpt import model, processes
from jaxgpt import start as core
from jaxgpt.cli import corpora, memory, places
from jaxgpt.config import Config, UsageError, check
from jaxgpt.corpus import Corpus, CorpusError, load
from jaxgpt.run import Run


def start(
    config: Config,
    name: str,
    runs_dir: Path,
    data_dir: Path,
    weights: model.Params | None = None,
    origin: str = "",
    require_room: Callable[[Config, int], None] = memory.require,
) -> tuple[Run, Corpus]:
    """Check everything, prepare the corpus, and create the run.

    Args:
      weights, origin: as `start.new_run`.
      require_room: raises UsageError where the devices cannot train a config, whose vocabulary may be unknown, on a
        number of tokens.

    Raises:
      UsageError: the config cannot run, the run exists, or the text is unavailable; before anything is written. Or the
        config cannot run, or is too large, with the vocabulary of the text, which is prepared by then.
    """
    check(config, new=True)
    Run.require_free(runs_dir, name)
    places.require_writable(runs_dir, "--runs-dir")
    require_room(config, 0)
    corpus = tokens_of(config, data_dir)
    config = resolve(config, corpus)
    require_room(config, len(corpus.split(config.data)[0]))  # the size of the vocabulary is known only now
    return core.new_run(config, corpus, name, runs_dir, weights, origin), corpus


def resume(config: Config, run: Run, data_dir: Path) -> Corpus:
    """The corpus of `run`, to resume it with under `config`.

    Raises:
      RunError: `config` changes what the run computes; each such field is named.
      CorpusError: the tokens that it was trained on are unavailable.
    """
    core.require_resumable(run, run.config, check(config))
    return corpus_of(run, data_dir)


def corpus_of(run: Run, data_dir: Path) -> Corpus:
    """The corpus that `run` trains on: as prepared then, or prepared again and found to be the same.

    Of several processes the first calls it before the others, which skip its checks.

    Raises:
      SourceError, CorpusError: it is unavailable, or not the same.
    """
    name, wanted = run.config.data.corpus, run.corpus_meta["sha256"]
    if found := corpora.find_prepared(name, run.corpus_meta, data_dir, verified=not processes.is_primary()):
        return found
    folders = " and ".join(map(str, corpora.folders_of(run.corpus_meta, data_dir)))
    by_hand = f"put the tokens-*.bin and tokens.json of then into {folders}, or name the folder around: --data-dir"
    try:
        found, problem = tokens_of(run.config, data_dir), ""
    except UsageError as error:
        found, problem = None, f"cannot be prepared again: {error}"
    if found and found.meta["sha256"] == wanted:
        return found
    raise CorpusError(
        f"run {run.path.name!r} trains on {run.corpus_meta['origin']} (tokens of SHA-256 {wanted}), but {name!r} "
        f"{problem or 'now gives other tokens'}; {by_hand}"
    )


def tokens_of(config: Config, data_dir: Path) -> Corpus:
    """The corpus of a config, prepared if need be.

    Raises:
      UsageError: it is unavailable, or too small.
    """
    data, model = config.data, config.model
    try:
        from jaxgpt.prepare.build import prepare_corpus
    except ModuleNotFoundError as error:
        if not (Path(data.corpus) / "tokens.json").is_file():
            raise UsageError(f"{data.corpus} is not a prepared corpus, and jaxgpt.prepare is not installed") from error
        return load(Path(data.corpus))
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
    """`config` as `start.resolve` completes it, with the path of its text in full."""
    return core.resolve(configs.replaced(config, corpus=corpora.absolute(config.data.corpus)), corpus)


def complete(config: Config, data_dir: Path) -> Config:
    """`config`, checked, with its vocabulary size: if it has none, its text is prepared to know it.

    Raises:
      UsageError: the config cannot run, or the text is unavailable.
    """
    if check(config).model.vocab_size:
        return config
    V = tokens_of(config, data_dir).tokenizer.vocab_size
    return check(replace(config, model=replace(config.model, vocab_size=V)))
