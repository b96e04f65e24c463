import json

import pytest
from tokenizers import ByteLevelBPETokenizer

from jaxgpt import tokenizer
from jaxgpt.corpus import CorpusError
from jaxgpt.prepare import vocabularies

TEXT = "the cat sat on the mat, that cat's hat été 中文\n" * 9


def trained(special):
    """A byte-level BPE by Hugging Face's trainer, which gives the first ids to special tokens."""
    theirs = ByteLevelBPETokenizer()
    theirs.train_from_iterator([TEXT], vocab_size=280 + len(special), special_tokens=special, show_progress=False)
    return theirs


@pytest.mark.parametrize("special", [[], ["<|endoftext|>"], ["<s>", "[PAD]"]])
@pytest.mark.parametrize("form", ["tokenizer.json", "two files"])
def test_vocabulary_of_a_folder_gives_the_ids_of_its_library(tmp_path, special, form):
    theirs = trained(special)
    theirs.add_special_tokens(["<|late|>"])
    if form == "tokenizer.json":
        theirs.save(str(tmp_path / form))
    else:
        theirs.save_model(str(tmp_path))
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<|late|>": 280 + len(special)}))
    tok = vocabularies.read_tokenizer(tmp_path)
    assert tok == vocabularies.read_vocabulary(tmp_path) == tokenizer.from_json(json.loads(json.dumps(tok.to_json())))
    assert tok.encode(TEXT + "  12 <pad>").tolist() == theirs.encode(TEXT + "  12 <pad>").ids
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert [tok.decode([i]) for i in (*range(len(special)), 280 + len(special))] == [*special, "<|late|>"]


def test_files_saved_with_a_byte_order_mark_or_crlf_are_read(tmp_path):
    trained([]).save_model(str(tmp_path))
    expected = vocabularies.read_vocabulary(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        text = (tmp_path / name).read_text("utf-8").replace("\n", "\r\n")
        (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert vocabularies.read_vocabulary(tmp_path) == expected


def test_merges_without_a_version_line_are_read(tmp_path):
    trained([]).save_model(str(tmp_path))
    expected, merges = vocabularies.read_vocabulary(tmp_path), tmp_path / "merges.txt"
    version, _, rest = merges.read_text("utf-8").partition("\n")
    assert version.startswith("#version")
    merges.write_text(rest, "utf-8")
    assert vocabularies.read_vocabulary(tmp_path) == expected


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "the normalizer is .*NFC"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "type is 'Metaspace', expected 'ByteLevel'"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space is True"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "add_prefix_space is True"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}}, "use_regex is False"),
        ({"pre_tokenizer": None}, "expected a model, a pre_tokenizer"),
        ({"added_tokens": [{"content": "  ", "id": 280, "special": False}]}, "added token .* special true"),
        ({"added_tokens": [{"content": "<x>", "id": 300, "special": True}]}, "do not agree"),
        ({"added_tokens": [{"content": "<x>", "id": "280", "special": True}]}, "not a JSON object"),
        ({"model": {"type": "Unigram"}}, "type is 'Unigram', expected 'BPE'"),
        ({"model": {"type": "BPE", "dropout": 0.1}}, "dropout is 0.1"),
        ({"model": {"type": "BPE", "continuing_subword_prefix": "##"}}, "continuing_subword_prefix is '##'"),
        ({"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}, "end_of_word_suffix is '</w>'"),
        ({"model": {"vocab": {"a": 0}, "merges": [["a"]]}}, r"merge \['a'\], expected two tokens"),
        ({"model": {"vocab": {"a": "b"}, "merges": []}}, "no JSON object|not a JSON object"),
    ],
)
def test_tokenizer_that_would_give_other_ids_is_refused(tmp_path, edit, message):
    path = tmp_path / "tokenizer.json"
    trained([]).save(str(path))
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(CorpusError, match=f"the vocabulary of .* cannot be used: .*{message}"):
        vocabularies.read_tokenizer(tmp_path)


def test_unsupported_vocabulary_files_are_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\nthe\n")
    with pytest.raises(CorpusError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        vocabularies.read_tokenizer(tmp_path)
    trained([]).save_model(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    with pytest.raises(ValueError, match="add_prefix_space is true"):
        vocabularies.read_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "added_tokens.json").write_text('{"the": 280}')  # its library gives text with "the" other ids
    with pytest.raises(ValueError, match="do not agree"):
        vocabularies.read_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        vocabularies.read_vocabulary(tmp_path)


def test_file_of_a_hugging_face_folder_is_refused_with_a_hint(tmp_path):
    trained([]).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"tokenizer\.json: it has no seal.*, or the folder of a Hugging Face model$"):
        vocabularies.read_tokenizer(tmp_path / "tokenizer.json")


def test_unreachable_merges_are_refused(tmp_path):
    """After "ab" is merged, "a" and "bc" never meet: tokenizers gives "ab", "c", but tiktoken would give "abc"."""
    letters = sorted(vocabularies.byte_of_letter())
    words = [*letters, "ab", "bc", "abc"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\nb c\na bc\n")
    theirs = ByteLevelBPETokenizer.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert theirs.encode("abc").tokens == ["ab", "c"]
    with pytest.raises(ValueError, match="the merge a bc is not reached"):
        vocabularies.read_vocabulary(tmp_path)
    without = json.dumps({word: i for i, word in enumerate([*letters, "abc"])})
    with pytest.raises(ValueError, match="the merge ab c is not reached"):  # no merge gives "ab"
        vocabularies.parse("#version: 0.2\nab c\n", without)


def test_vocabulary_with_a_character_that_stands_for_no_byte_is_refused():
    """As of a library that writes characters, not bytes."""
    letters = sorted(vocabularies.byte_of_letter())
    words = json.dumps({word: i for i, word in enumerate(["中", *letters[1:]])})
    with pytest.raises(ValueError, match="character '中' does not stand for a byte in GPT-2's files"):
        vocabularies.parse("#version: 0.2\n", words)


def test_a_pre_tokenizer_without_use_regex_splits_as_gpt2_does(tmp_path):
    """Older versions of the library did not write it."""
    path = tmp_path / "tokenizer.json"
    trained([]).save(str(path))
    expected, tree = vocabularies.read_tokenizer(tmp_path), json.loads(path.read_text())
    del tree["pre_tokenizer"]["use_regex"]
    path.write_text(json.dumps(tree))
    assert vocabularies.read_tokenizer(tmp_path) == expected
