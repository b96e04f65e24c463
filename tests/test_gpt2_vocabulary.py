import hashlib
import json
import sys

import pytest
import tiktoken
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models, pre_tokenizers, trainers

from jaxgpt import bpe, corpus, gpt2, tokenizer
from jaxgpt.config import UsageError
from jaxgpt.prepare.sources import SourceError

TEXT = "the cat sat on the mat, that cat's hat été 中文\n" * 9


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAXGPT_DATA", raising=False)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A small vocabulary in GPT-2's two files, written by another library, and their hashes expected."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    folder = tmp_path / "written"
    folder.mkdir()
    model.model.save(str(folder))
    merges, vocabulary = folder / "merges.txt", folder / "vocab.json"
    vocabulary.write_text(json.dumps(json.loads(vocabulary.read_text()) | {"<|endoftext|>": 280}))
    for name, path in (("MERGES", merges), ("VOCABULARY", vocabulary)):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(gpt2, name, (getattr(gpt2, name)[0], sha256))
    return merges, vocabulary


@pytest.fixture
def expected():
    return bpe.BPETokenizer(bpe.train(TEXT, 280).tokens, ("<|endoftext|>",))


@pytest.mark.smoke
def test_parsing_gives_back_the_vocabulary_that_was_written(files, expected):
    tok = gpt2.parse(*(path.read_text() for path in files))
    assert tok == expected
    assert tok.vocab_size == 281
    assert tok.decode([280]) == "<|endoftext|>"


def test_files_that_do_not_agree_are_refused(files):
    merges, vocabulary = (path.read_text() for path in files)
    swapped = merges.splitlines()
    swapped[1:3] = swapped[2:0:-1]
    for wrong in ("\n".join(swapped), merges.rsplit("\n", 2)[0], merges + "a b\n"):
        with pytest.raises(ValueError, match="do not agree"):
            gpt2.parse(wrong, vocabulary)
    holed = json.loads(vocabulary) | {"<|endoftext|>": 281}
    with pytest.raises(ValueError, match="do not agree"):
        gpt2.parse(merges, json.dumps(holed))


@pytest.mark.parametrize("names", [("vocab.bpe", "encoder.json"), ("merges.txt", "vocab.json")])
@pytest.mark.parametrize("place", ["data", "cache/jaxgpt", "mine", "beside"])
def test_the_files_are_found(files, expected, tmp_path, monkeypatch, names, place):
    (tmp_path / place).mkdir(parents=True)
    for path, name in zip(files, names, strict=True):
        path.rename(tmp_path / place / name)
    if place == "mine":
        monkeypatch.setenv("JAXGPT_DATA", str(tmp_path / place))
    if place == "beside":
        monkeypatch.setenv("JAXGPT_DATA", str(tmp_path / place / "tinyshakespeare.txt"))
    assert gpt2.load() == expected


def trained(special):
    """A byte-level BPE as Hugging Face's own trainer makes it: its special tokens have the first ids."""
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=280 + len(special), special_tokens=special, show_progress=False)
    return theirs


@pytest.mark.parametrize("special", [[], ["<|endoftext|>"], ["<s>", "[PAD]"]])
@pytest.mark.parametrize("form", ["tokenizer.json", "two files"])
def test_a_folders_own_vocabulary_gives_the_ids_of_its_library(tmp_path, special, form):
    theirs = trained(special)
    theirs.add_special_tokens(["<|late|>"])
    if form == "tokenizer.json":
        theirs.save(str(tmp_path / form))
    else:
        theirs.save_model(str(tmp_path))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|late|>": 280 + len(special)}))
    tok = corpus.tokenizer_of(tmp_path)
    assert tok == gpt2.in_folder(tmp_path) == tokenizer.from_json(json.loads(json.dumps(tok.to_json())))
    assert tok.encode(TEXT + "  12 <pad>").tolist() == theirs.encode(TEXT + "  12 <pad>").ids
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert [tok.decode([i]) for i in (*range(len(special)), 280 + len(special))] == [*special, "<|late|>"]


def test_files_saved_with_a_byte_order_mark_or_crlf_are_read(tmp_path):
    trained([]).save_model(str(tmp_path))
    expected = gpt2.in_folder(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        text = (tmp_path / name).read_text("utf-8").replace("\n", "\r\n")
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert gpt2.in_folder(tmp_path) == expected


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ({"normalizer": {"type": "NFC"}}, "the normalizer is .*NFC"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "type is 'Metaspace', expected 'ByteLevel'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space is True"),
        ({"pre_tokenizer": None}, "expected a model, a pre_tokenizer"),
        ({"added_tokens": [{"content": "  ", "id": 280, "special": False}]}, "added token .* special true"),
        ({"added_tokens": [{"content": "<x>", "id": 300, "special": True}]}, "do not agree"),
        ({"added_tokens": [{"content": "<x>", "id": "280", "special": True}]}, "added token"),
        ({"model": {"type": "Unigram"}}, "type is 'Unigram', expected 'BPE'"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "dropout is 0.1"),
        ({"model": {"vocab": {"a": 0}, "merges": [["a"]]}}, r"merge \['a'\], expected two tokens"),
        ({"model": {"vocab": {"a": "b"}, "merges": []}}, "no JSON object|not a JSON object"),
    ],
)
def test_a_vocabulary_that_gives_text_other_ids_is_refused(tmp_path, edit, said):
    path = tmp_path / "tokenizer.json"
    trained([]).save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(corpus.CorpusError, match=f"the vocabulary of .* cannot be used: .*{said}"):
        corpus.tokenizer_of(path)


def test_vocabularies_of_other_kinds_and_halves_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    with pytest.raises(corpus.CorpusError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        corpus.tokenizer_of(tmp_path)
    trained([]).save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(ValueError, match="add_prefix_space is true"):
        gpt2.in_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text('{"the": 280}')  # text with that word would become other ids
    with pytest.raises(ValueError, match="do not agree"):
        gpt2.in_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        gpt2.in_folder(tmp_path)


def test_merges_that_the_merges_before_them_never_reach_are_refused(tmp_path):
    """With "ab" merged first, "a" and "bc" never meet: their library leaves "ab", "c"; tiktoken would make "abc"."""
    letters = sorted(bpe.byte_of_letter())
    words = [*letters, "ab", "bc", "abc"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb c\na bc\n")
    theirs = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert theirs.encode("abc").tokens == ["ab", "c"]
    with pytest.raises(ValueError, match="the merge a bc is not reached"):
        gpt2.in_folder(tmp_path)


@pytest.mark.parametrize("which", [0, 1])
def test_other_files_of_those_names_are_refused(files, monkeypatch, which):
    monkeypatch.setenv("JAXGPT_DATA", str(files[0].parent))
    files[which].write_text(files[which].read_text() + "\n")
    with pytest.raises(SourceError, match=rf"{files[which].name} is not the expected file: SHA-256"):
        gpt2.load()


def test_the_hashes_are_those_that_tiktoken_pins(monkeypatch):
    from tiktoken_ext import openai_public

    asked = {}
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", lambda **kwargs: asked.update(kwargs))
    pattern = openai_public.gpt2()["pat_str"]
    assert asked["vocab_bpe_file"] == gpt2.URL + gpt2.MERGES[0][0]
    assert asked["encoder_json_file"] == gpt2.URL + gpt2.VOCABULARY[0][0]
    assert (asked["vocab_bpe_hash"], asked["encoder_json_hash"]) == (gpt2.MERGES[1], gpt2.VOCABULARY[1])
    assert pattern == bpe.PATTERNS["gpt2"]


def test_else_tiktoken_is_asked(expected, monkeypatch):
    ranks = {token: rank for rank, token in enumerate(expected.tokens)}
    known = tiktoken.Encoding(
        "gpt2", pat_str=bpe.PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 280}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": known}.__getitem__)
    assert gpt2.load() == expected


def test_else_it_says_what_to_fetch_and_where_to_put_it(monkeypatch, tmp_path):
    def unreachable(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    monkeypatch.setenv("JAXGPT_DATA", str(tmp_path))
    with pytest.raises(SourceError) as caught:
        gpt2.load()
    for said in (
        "no network",
        str(tmp_path),
        "data",
        "cache/jaxgpt",
        gpt2.URL + "vocab.bpe",
        gpt2.URL + "encoder.json",
    ):
        assert said in str(caught.value)
    for names, sha256 in (gpt2.MERGES, gpt2.VOCABULARY):
        assert all(said in str(caught.value) for said in (*names, sha256))


def test_the_real_one_where_its_files_are_given(monkeypatch, request):
    given = request.config.rootpath / "data"
    if not (given / "vocab.bpe").is_file():
        pytest.skip("needs GPT-2's vocab.bpe and encoder.json in data/")
    monkeypatch.setenv("JAXGPT_DATA", str(given))
    tok = gpt2.load()
    assert tok.vocab_size == 50257
    assert tok.encode("hello world").tolist() == [31373, 995]  # tiktoken's README
    assert tok.decode([50256]) == "<|endoftext|>"


def test_without_tiktoken_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UsageError, match=r"GPT-2's vocabulary needs tiktoken.*pip install tiktoken"):
        gpt2.load()
