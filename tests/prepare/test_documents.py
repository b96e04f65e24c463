import gzip
import json
import sys

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from jaxgpt.config import UsageError
from jaxgpt.prepare import documents
from jaxgpt.prepare.sources import SourceError
from tests.prepare.texts import read

DOCUMENTS = ["The cat\nsat.", "", "é \u2028 中 \x85 🙂", "on the mat\n"]


def write(path, column, values):
    rows = [{"id": i, column: value} for i, value in enumerate(values)]
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        # No escapes, so that the line ends that JSON lets stand in a string do stand there.
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


KINDS = pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.jsonlines.gz", "a.JSON", "a.parquet"])


@pytest.mark.smoke
@KINDS
def test_documents_are_joined_by_a_blank_line(tmp_path, name):
    source = read(str(write(tmp_path / name, "text", DOCUMENTS)))
    assert source.text == "\n\n".join(DOCUMENTS)
    assert source.name == "a"


@KINDS
def test_another_column_and_line_ends(tmp_path, name):
    write(tmp_path / name, "body", ["a\r\nb", "c"])
    source = read(str(tmp_path / name), "body")
    assert source.text == "a\nb\n\nc"
    with pytest.raises(SourceError, match=rf"{name}.* has no column 'text'; it has id, body: --column NAME"):
        read(str(tmp_path / name))


@KINDS
@pytest.mark.parametrize(("value", "said"), [(None, "None"), (3, "3")])
def test_a_value_that_is_no_string_is_named_with_its_place(tmp_path, name, value, said):
    values = [value] * 2 if name.endswith("parquet") and value else ["a", value]
    write(tmp_path / name, "text", values)
    place = f"(row|line) {values.index(value) + 1}"
    with pytest.raises(SourceError, match=rf"{place}: column 'text' holds {said}, expected a string"):
        read(str(tmp_path / name))


@KINDS
def test_a_column_of_an_object_is_named_after_a_dot(tmp_path, name):
    write(tmp_path / name, "meta", [{"text": "a", "more": {"title": "A"}}, {"text": "b", "more": {"title": "B"}}])
    assert read(str(tmp_path / name), "meta.text").text == "a\n\nb"
    assert read(str(tmp_path / name), "meta.more.title").text == "A\n\nB"
    with pytest.raises(SourceError, match=r"no column 'meta.body'; it has id, meta\.text, meta\.more\.title: --column"):
        read(str(tmp_path / name), "meta.body")
    write(tmp_path / name, "meta.text", ["a dot in the name", "b"])
    assert read(str(tmp_path / name), "meta.text").text == "a dot in the name\n\nb"
    write(tmp_path / name, "meta", [{"text": "a"}, None])
    with pytest.raises(SourceError, match=r"(row|line) 2: column 'meta.text' holds None, expected a string"):
        read(str(tmp_path / name), "meta.text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_column_of_an_object_whose_own_name_has_a_dot(tmp_path, name):
    write(tmp_path / name, "a.b", [{"c.d": {"text": "one"}}])
    assert read(str(tmp_path / name), "a.b.c.d.text").text == "one"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_of_many_columns_the_first_are_named(tmp_path, name):
    write(tmp_path / name, "x", [{f"c{i}": "a" for i in range(2000)}])
    with pytest.raises(SourceError, match=r"it has id, x\.c0, x\.c1, [^:]* x\.c18 and 1,981 more: --column NAME$"):
        read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.parquet"])
def test_a_pointer_of_git_lfs_is_no_text(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(SourceError, match=rf"{name} is a pointer of Git LFS, .*: git lfs pull"):
        read(str(tmp_path))


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    values = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(values, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has 2 columns named 'text', expected one"):
        read(str(tmp_path / "a.parquet"))


def test_a_parquet_column_of_lists_is_named_as_it_is_given(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "tags": [["a", "b"]]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has no column 'text'; it has id, tags: --column"):
        read(str(tmp_path / "a.parquet"))
    with pytest.raises(SourceError, match=r"row 1: column 'tags' holds \['a', 'b'\], expected a string"):
        read(str(tmp_path / "a.parquet"), "tags")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"text": "a"}', "a"),
        ('\n{"id": 1, "text": "a"}\n\n{"text": "b"}\n', "a\n\nb"),
        ('{"name": "a program"}', None),
        ('{\n  "text": "a"\n}\n', None),
        ('[{"text": "a"}]\n', None),
        ('"a"\n', None),
    ],
)
def test_a_json_file_is_documents_if_it_is_json_lines(tmp_path, data, text):
    (tmp_path / "a.json").write_text(data)
    source = read(str(tmp_path / "a.json"))
    assert source.text == (text or data)
    (tmp_path / "a.json").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(SourceError, match="no column 'text'; it has body"):
        read(str(tmp_path / "a.json"))


def test_an_array_on_one_line_is_not_read_whole_to_see_that_it_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    monkeypatch.setattr(documents, "_lines", None)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}] * 100))
    assert not documents.holds_documents(tmp_path / "a.json", "text")


@pytest.mark.parametrize("value", [[{"role": "user", "content": "hi"}], [("user", "hi")]], ids=["list", "map"])
def test_a_parquet_column_of_objects_in_a_list_or_of_maps_is_named_as_it_is_given(tmp_path, value):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string()) if isinstance(value[0], tuple) else None
    parquet.write_table(pyarrow.table({"turns": pyarrow.array([value], kind)}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has no column 'text'; it has turns: --column"):
        read(str(tmp_path / "a.parquet"))
    with pytest.raises(SourceError, match=r"row 1: column 'turns' holds .*user.*, expected a string"):
        read(str(tmp_path / "a.parquet"), "turns")


@given(st.lists(st.text(st.characters())))
def test_json_lines_give_back_any_strings(tmp_path_factory, strings):
    path = tmp_path_factory.mktemp("a") / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": document}) for document in strings))
    read = documents.normalized(documents.pieces(path, "text"))
    text = "\n\n".join(strings).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(read) == text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "b"', r"line 3 is not JSON \(Expecting ',' delimiter\), expected an object such as {\"text\": "),
        ("[" * 100_000, r"line 3 is not JSON \(maximum recursion|line 3 is not JSON \(Stack overflow"),
        ('"b"', 'line 3 holds "b", expected an object'),
        ('{"txt": "b"}', "line 3 has no column 'text'; it has txt"),
        ("{}", "line 3 has no column 'text'; it has none"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(SourceError, match=said):
        read(str(tmp_path / "a.jsonl"))


@KINDS
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"\xff"])
def test_damage_is_named(tmp_path, name, damage):
    path = write(tmp_path / name, "text", DOCUMENTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=name):
        read(str(path))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(2**60, pyarrow.timestamp("ms")), (1, pyarrow.timestamp("ns")), (2**30, pyarrow.date32())],
)
def test_a_column_of_dates_that_python_has_not_is_refused(tmp_path, value, kind):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([value], kind)}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet"):
        read(str(tmp_path / "a.parquet"))


def test_a_folder_may_hold_shards(tmp_path):
    for name, text in (("1.parquet", "A"), ("0.jsonl", "B")):
        write(tmp_path / name, "body", [text, "x"])
    (tmp_path / "2.txt").write_text("C")
    source = read(str(tmp_path), "body")
    assert source.text == "B\n\nx\nA\n\nx\nC"


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", "text", DOCUMENTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"a\.parquet, a Parquet file, needs pyarrow.*pip install pyarrow"):
        read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("compliant", [True, False])  # list.element, or list.item as pyarrow wrote before
def test_a_parquet_column_of_lists_is_named_without_its_items(tmp_path, compliant):
    table = pyarrow.table({"tags": [["a"]]})
    parquet.write_table(table, tmp_path / "a.parquet", use_compliant_nested_type=compliant)
    with pytest.raises(SourceError, match="it has tags: --column"):
        read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("url", ["https://host/x.jsonl#part", "https://host/x.jsonl?download=1#part"])
def test_the_name_of_a_file_at_a_url_has_no_fragment(url):
    assert documents.name_of(url) == "x.jsonl"
