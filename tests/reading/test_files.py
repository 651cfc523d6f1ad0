"""Reading examples from a file: every kind of file gives the same rows, and a bad row is named and hides no other."""

import gzip
import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest

from gradsketch import InputError
from gradsketch.reading import read_examples

ROWS = [{"text": "Grüße, 🎈", "label": 1}, {"text": 'two\nlines, "quoted"', "label": 0}, {"text": "7", "label": 2}]


def _write(path, kind):
    table = pa.Table.from_pylist(ROWS)
    lines = "\n\n".join(json.dumps(row) for row in ROWS) + "\n"
    if kind in (".jsonl", ".ndjson"):
        path.write_text(lines)
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == ".json":
        path.write_text(json.dumps(ROWS))
    elif kind == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        options = pyarrow.csv.WriteOptions(delimiter="\t" if kind == ".tsv" else ",")
        pyarrow.csv.write_csv(table, path, options)


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_gives_the_same_rows(tmp_path, kind):
    _write(path := tmp_path / f"data{kind}", kind)
    rows = read_examples(path)
    assert isinstance(rows, Sequence)
    assert len(rows) == 3
    assert list(rows) == ROWS
    assert rows[-1] == ROWS[2]
    assert rows[1:] == ROWS[1:]
    with pytest.raises(IndexError):
        rows[3]


def test_text_lines_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("one\r\n\n  \ntwo", newline="")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.md").write_text("three\nlines\n")
    (tmp_path / "other.bin").write_bytes(b"\xff")
    assert list(read_examples(tmp_path / "b.txt")) == [{"text": "one"}, {"text": "two"}]
    assert read_examples(tmp_path / "b.txt").where(1) == "b.txt, line 4"
    assert [row["path"] for row in read_examples(tmp_path)] == ["b.txt", "sub/a.md"]
    assert read_examples(tmp_path)[1]["text"] == "three\nlines\n"


def test_lines_under_the_name_of_a_list(tmp_path):
    (tmp_path / "a.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert list(read_examples(tmp_path / "a.json")) == ROWS
    assert read_examples(tmp_path / "a.json").where(2) == "a.json, line 3"


def test_a_string_is_a_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('"hello"\n')
    assert list(read_examples(str(tmp_path / "a.jsonl"))) == [{"text": "hello"}]


@pytest.mark.parametrize(
    ("name", "content", "place", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n{"text": "b"}\n', "a.jsonl, line 3", "Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n{"text": "b"}', "a.jsonl, line 2", "a JSON list where an object"),
        ("a.txt", b"a\n\xff\xfe\nb", "a.txt, line 2", "utf-8"),
        ("a.json", b'[{"text": "a"}, 3, {"text": "b"}]', "a.json, entry 2", "a JSON int"),
        ("a.csv", b'text\na\n"x,y",z\nb\n', "a.csv, line 3", "Expected 1 columns, got 2"),
    ],
)
def test_a_bad_row_is_named_and_hides_no_other(tmp_path, name, content, place, words):
    (tmp_path / name).write_bytes(content)
    rows = read_examples(tmp_path / name)
    assert (rows[0]["text"], rows[2]["text"], len(rows)) == ("a", "b", 3)
    with pytest.raises(InputError, match=f"{place}: .*{words}"):
        rows[1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "holds no example"),
        ("a.txt", b"\n\n  \n", "holds no example"),
        ("a.csv", b"text,label\n", "holds no example"),
        ("a.csv", b"", "no names of columns"),
        ("a.json", b'{"text": "a"}', "holds an object"),
        ("a.json", b"[1,", "a.json cannot be read: the list does not end behind entry 1"),
        ("a.json", b"[1, {", "a.json cannot be read: entry 2: "),
        ("a.json", b"[1, 2 3]", "no comma behind entry 2"),
        ("a.json", b"[1, 2,]", "a comma behind entry 2, which is the last"),
        ("a.json", b"[1] [2]", "behind the end of the list"),
        ("a.json", b"[", "does not end behind entry 0"),
        ("a.json", b"[,1]", "entry 1: Expecting value"),
        ("a.json", b'["a\xc3', "cannot be read: .*utf-8"),
        ("a.json", b'["a"]\xc3', "cannot be read: .*utf-8"),
        ("a.json", b"no", "holds no list"),
        ("a.json", b"", "holds no list"),
        ("a.json", b" [ ] ", "holds no example"),
        ("a.json", b'{\n"data": [{"text": "a"}]}', "holds an object"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "is in UTF-16.*iconv"),
        ("a.parquet.gz", b"no", "a packed Parquet file"),
        ("a.arrow", b"no", "cannot be read"),
        ("a.jsonl.zst", b"no", "cannot be read"),
        ("a.parquet", b"no", "cannot be read"),
        ("a.jsonl.gz", b"no", "cannot be read"),
        ("a.docx", b"no", "of a kind that is not known"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        read_examples(tmp_path / name)


def test_no_file_and_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_examples(tmp_path / "none.csv")
    with pytest.raises(InputError, match="holds no example"):
        read_examples(tmp_path)


@pytest.mark.parametrize("name", ["deep.jsonl", "deep.json"])
def test_json_nested_beyond_the_stack_is_told(tmp_path, name):
    line = "[" * 100_000
    (tmp_path / name).write_text(line if name.endswith(".json") else f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(InputError, match=rf"{name}( cannot be read|, line 2: )"):
        list(read_examples(tmp_path / name))


def test_a_gzipped_file_that_unpacks_beyond_reason_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100_000))
    assert len(read_examples(path)) == 100_000
    monkeypatch.setattr("gradsketch.reading.sources._UNPACKED_BYTES", 1000)
    with pytest.raises(InputError, match=r"unpacks to more than .* bytes"):
        read_examples(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match=r"bomb\.jsonl\.gz cannot be read"):
        read_examples(path)


def test_opened_again_in_another_process(tmp_path):
    import pickle

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = read_examples(tmp_path / "a.jsonl")
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match="does not exist"):
        pickle.loads(pickle.dumps(rows))


@pytest.mark.parametrize("line", ['{"text": "a", "text": "b"}', '{"text": "a", "meta": {"x": 1, "x": 2}}'])
def test_a_key_that_stands_twice_is_a_bad_row(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(f'{line}\n{{"text": "sound"}}\n')
    bad, sound = read_examples(tmp_path / "a.jsonl").read_range(0, 2)
    assert "a.jsonl, line 1: an object with two values of" in str(bad)
    assert sound == {"text": "sound"}
    (tmp_path / "a.json").write_text(f'[{line}, {{"text": "sound"}}]')
    bad, sound = read_examples(tmp_path / "a.json").read_range(0, 2)
    assert "a.json, entry 1: an object with two values of" in str(bad)
    assert sound == {"text": "sound"}


def _not_utf8():
    return pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"a\xff"))


def _twice_named():
    return pa.StructArray.from_arrays(
        [pa.array([1, None]), pa.array([2, None])], ["x", "x"], mask=pa.array([True, False])
    )


@pytest.mark.parametrize("column", [_not_utf8, _twice_named])
def test_a_row_of_a_table_that_python_cannot_hold_is_a_bad_row(tmp_path, column):
    table = pa.table({"text": ["a", "b"], "odd": column()})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    rows = read_examples(tmp_path / "a.arrow").read_range(0, 2)
    assert "a.arrow, row 2: " in str(rows[1])
    assert isinstance(rows[1], InputError)


def test_a_byte_order_mark_is_no_letter_of_a_text(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "lines.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_examples(tmp_path / "texts")[0]["text"] == read_examples(tmp_path / "lines.txt")[0]["text"] == "hello"
