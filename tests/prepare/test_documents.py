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
    return write_rows(path, [{"id": i, column: value} for i, value in enumerate(values)])


def write_rows(path, rows):
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        # Unescaped, so that strings contain the line separators that JSON allows in them.
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


ALL_FORMATS = pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.ndjson", "a.jsonlines.gz", "a.JSON", "a.parquet"]
)


@pytest.mark.smoke
@ALL_FORMATS
def test_documents_are_joined_by_a_blank_line(tmp_path, name):
    source = read(str(write(tmp_path / name, "text", DOCUMENTS)))
    assert source.text == "\n\n".join(DOCUMENTS)
    assert source.name == "a"


@ALL_FORMATS
def test_another_column_and_normalized_line_ends(tmp_path, name):
    write(tmp_path / name, "body", ["a\r\nb", "c"])
    source = read(str(tmp_path / name), "body")
    assert source.text == "a\nb\n\nc"
    with pytest.raises(SourceError, match=rf"{name}.* has no column 'text'; it has id, body: --column NAME"):
        read(str(tmp_path / name))


@ALL_FORMATS
@pytest.mark.parametrize(("value", "shown"), [(None, "None"), (3, "3")])
def test_non_string_value_is_reported_with_its_row(tmp_path, name, value, shown):
    values = [value] * 2 if name.endswith("parquet") and value else ["a", value]
    write(tmp_path / name, "text", values)
    where = f"(row|line) {values.index(value) + 1}"
    with pytest.raises(SourceError, match=rf"{where}: column 'text' holds {shown}, expected a string"):
        read(str(tmp_path / name))


@ALL_FORMATS
def test_dotted_column_selects_a_field_of_an_object(tmp_path, name):
    write(tmp_path / name, "meta", [{"more": {"title": "A"}, "text": "a"}, {"more": {"title": "B"}, "text": "b"}])
    assert read(str(tmp_path / name), "meta.text").text == "a\n\nb"
    assert read(str(tmp_path / name), "meta.more.title").text == "A\n\nB"
    columns = r"meta\.more\.title, meta\.text" if name.endswith("parquet") else "meta"
    with pytest.raises(SourceError, match=rf"no column 'meta.body'; it has id, {columns}: --column"):
        read(str(tmp_path / name), "meta.body")
    write(tmp_path / name, "meta.text", ["a dot in the name", "b"])
    assert read(str(tmp_path / name), "meta.text").text == "a dot in the name\n\nb"
    write(tmp_path / name, "meta", [{"text": "a"}, None])
    with pytest.raises(SourceError, match=r"(row|line) 2: column 'meta.text' holds None, expected a string"):
        read(str(tmp_path / name), "meta.text")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_missing_column_error_lists_the_first_20_columns(tmp_path, name):
    for n, columns in ((2000, "c0, c1, [^:]* c18 and 1,981 more"), (19, "c0, c1, [^:]* c18")):
        write_rows(tmp_path / name, [{"id": 0} | {f"c{i}": "a" for i in range(n)}])
        with pytest.raises(SourceError, match=f"it has id, {columns}: --column NAME$"):
            read(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.parquet"])
def test_git_lfs_pointer_is_refused(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(SourceError, match=rf"{name} is a pointer of Git LFS, .*: git lfs pull"):
        read(str(tmp_path))


def test_duplicate_parquet_column_is_refused(tmp_path):
    values = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(values, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has 2 columns named 'text', expected one"):
        read(str(tmp_path / "a.parquet"))


def test_parquet_column_of_lists_is_reported_by_its_name(tmp_path):
    parquet.write_table(pyarrow.table({"id": [1], "tags": [["a", "b"]]}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has no column 'text'; it has id, tags: --column"):
        read(str(tmp_path / "a.parquet"))
    with pytest.raises(SourceError, match=r"row 1: column 'tags' holds \['a', 'b'\], expected a string"):
        read(str(tmp_path / "a.parquet"), "tags")


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ('{"text": "a"}', "a"),
        ('\n{"id": 1, "text": "a"}\n\n \t\n{"text": "b"}\n', "a\n\nb"),
        ('{"name": "a program"}', None),
        ('{\n  "text": "a"\n}\n', None),
        ('[{"text": "a"}]\n', None),
        ('"a"\n', None),
    ],
)
def test_json_file_holds_documents_only_if_it_is_json_lines(tmp_path, data, text):
    (tmp_path / "a.json").write_text(data)
    source = read(str(tmp_path / "a.json"))
    assert source.text == (text or data)
    (tmp_path / "a.json").write_text('{"body": "a"}\n{"body": "b"}\n')
    with pytest.raises(SourceError, match="no column 'text'; it has body"):
        read(str(tmp_path / "a.json"))


def test_json_array_on_one_line_is_recognized_without_reading_it_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 10)
    monkeypatch.setattr(documents, "_lines", None)
    (tmp_path / "a.json").write_text(json.dumps([{"text": "a"}] * 100))
    assert not documents.holds_documents(tmp_path / "a.json", "text")


@pytest.mark.parametrize("value", [[{"role": "user", "content": "hi"}], [("user", "hi")]], ids=["list", "map"])
def test_parquet_column_of_object_lists_or_maps_is_reported_by_its_name(tmp_path, value):
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string()) if isinstance(value[0], tuple) else None
    parquet.write_table(pyarrow.table({"turns": pyarrow.array([value], kind)}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match="has no column 'text'; it has turns: --column"):
        read(str(tmp_path / "a.parquet"))
    with pytest.raises(SourceError, match=r"row 1: column 'turns' holds .*user.*, expected a string"):
        read(str(tmp_path / "a.parquet"), "turns")


@given(st.lists(st.text(st.characters())))
def test_json_lines_round_trip_any_strings(tmp_path_factory, strings):
    path = tmp_path_factory.mktemp("a") / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": document}) for document in strings))
    pieces = documents.normalized(documents.pieces(path, "text"))
    text = "\n\n".join(strings).removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    assert "".join(pieces) == text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"line 3 is not JSON \(Expecting ',' delimiter\), expected an object such as {\"text\": "),
        ("[" * 100_000, r"line 3 is not JSON \(maximum recursion|line 3 is not JSON \(Stack overflow"),
        ('"b"', 'line 3 holds "b", expected an object'),
        (f'"{"b" * 999}"', 'line 3 holds "b{39}, expected an object'),
        ('{"txt": "b"}', "line 3 has no column 'text'; it has txt"),
        ("{}", "line 3 has no column 'text'; it has none"),
        ('{"meta": {}}', "line 3 has no column 'text'; it has meta"),
    ],
)
def test_invalid_json_line_is_reported_by_its_number(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(SourceError, match=message):
        read(str(tmp_path / "a.jsonl"))


@ALL_FORMATS
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"\xff"])
def test_damaged_file_is_reported_by_name(tmp_path, name, damage):
    path = write(tmp_path / name, "text", DOCUMENTS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(SourceError, match=name):
        read(str(path))


@pytest.mark.parametrize(
    ("value", "kind"),
    [(2**60, pyarrow.timestamp("ms")), (1, pyarrow.timestamp("ns")), (2**30, pyarrow.date32())],
)
def test_dates_that_python_cannot_represent_are_refused(tmp_path, value, kind):
    parquet.write_table(pyarrow.table({"text": pyarrow.array([value], kind)}), tmp_path / "a.parquet")
    with pytest.raises(SourceError, match=r"a\.parquet"):
        read(str(tmp_path / "a.parquet"))


def test_folder_of_shards_is_read_in_order(tmp_path):
    for name, text in (("1.parquet", "A"), ("0.jsonl", "B")):
        write(tmp_path / name, "body", [text, "x"])
    (tmp_path / "2.txt").write_text("C")
    source = read(str(tmp_path), "body")
    assert source.text == "B\n\nx\nA\n\nx\nC"


def test_missing_pyarrow_error_says_what_to_install(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", "text", DOCUMENTS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"a\.parquet, a Parquet file, needs pyarrow.*pip install pyarrow"):
        read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("compliant", [True, False])  # list.element, or list.item as older pyarrow wrote
def test_parquet_column_of_lists_is_listed_without_its_element(tmp_path, compliant):
    table = pyarrow.table({"tags": [["a"]]})
    parquet.write_table(table, tmp_path / "a.parquet", use_compliant_nested_type=compliant)
    with pytest.raises(SourceError, match="it has tags: --column"):
        read(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("url", ["https://host/x.jsonl#part", "https://host/x.jsonl?download=1#part"])
def test_file_name_of_a_url_has_no_query_or_fragment(url):
    assert documents.name_of(url) == "x.jsonl"


def test_a_character_broken_at_a_chunk_is_named_by_its_first_byte():
    with pytest.raises(SourceError, match=r"a\.txt is not UTF-8 text: byte 0xc3 at offset 999 \(invalid continuation"):
        list(documents.utf8([b"a" * 999 + b"\xc3", b"(b"], "a.txt"))
