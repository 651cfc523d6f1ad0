"""Rows by blocks: whatever the kind and the order of reading, row i is row i; and little is held of a large file."""

import gzip
import json
import os
import pickle
import random
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from gradsketch import InputError
from gradsketch.errors import StoreError
from gradsketch.reading import read_examples
from gradsketch.reading.lines import LineBlock
from gradsketch.reading.marks import mark_lines

COUNT = 3000
ROWS = [{"text": f"row {i} " + "x" * (i * i % 700), "n": i} for i in range(COUNT)]


def _lines():
    """JSON lines with blank ones between, some of them wide."""
    blank = ["", "   ", " " * 5000, "\t\r"]
    lines = [part for i, row in enumerate(ROWS) for part in (json.dumps(row), *(blank[i % 4 :][:1] * (i % 3 == 0)))]
    return "\n".join(lines).encode()


def _write(path):
    name, table = path.name, pa.Table.from_pylist(ROWS)
    if name.endswith(".jsonl"):
        path.write_bytes(_lines())
    elif name.endswith(".jsonl.gz"):
        half = len(_lines()) // 2
        path.write_bytes(gzip.compress(_lines()[:half]) + gzip.compress(_lines()[half:]))  # as cat a.gz b.gz
    elif name.endswith(".jsonl.zst"):
        path.write_bytes(pa.compress(_lines(), "zstd", asbytes=True))
    elif name.endswith(".csv"):
        pyarrow.csv.write_csv(table, path)
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    elif name.endswith(".feather"):
        pyarrow.feather.write_feather(table, path, chunksize=700)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table, max_chunksize=700)
    return path


KINDS = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.csv", "a.parquet", "a.feather", "a.arrow"]


@pytest.fixture(params=KINDS)
def path(request, tmp_path, monkeypatch):
    monkeypatch.setattr("gradsketch.reading.sources.PIECE", 10_000)
    monkeypatch.setattr("gradsketch.reading.blocks._KEPT_BYTES", 100_000)
    return _write(tmp_path / request.param)


def test_row_i_is_row_i_in_any_order(path):
    rows = read_examples(path)
    assert len(rows) == COUNT
    assert list(rows) == ROWS
    draw = random.Random(0)
    places = draw.choices(range(COUNT), k=40) + list(range(COUNT - 1, 0, -331)) + [5, 6, 7, 6, 5]
    assert [rows[i] for i in places] == [ROWS[i] for i in places]
    for start, stop in [(0, 0), (690, 720), (0, COUNT), (2999, 3000), (1500, 1501), (10, 2000)]:
        assert rows.read_range(start, stop) == ROWS[start:stop]
    assert rows[10:20:3] == ROWS[10:20:3]
    rows.release()
    assert rows[17] == ROWS[17]


def test_rows_go_to_another_process(path):
    """As Ray's workers and DataLoaders get them: without what was read."""
    rows = read_examples(path)
    assert rows[1700] == ROWS[1700]
    sent = pickle.dumps(rows)
    assert len(sent) < 1000
    there = pickle.loads(sent)
    assert [there[i] for i in (2999, 5, 1700)] == [ROWS[i] for i in (2999, 5, 1700)]


def test_a_packed_file_that_is_read_at_random_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("gradsketch.reading.blocks._KEPT_BYTES", 0)
    rows = read_examples(_write(tmp_path / "a.jsonl.gz"))
    passes = []
    monkeypatch.setattr(
        "pyarrow.CompressedInputStream", lambda *a, real=pa.CompressedInputStream: passes.append(1) or real(*a)
    )
    assert [rows[i] for i in range(COUNT - 1, 0, -200)] == [ROWS[i] for i in range(COUNT - 1, 0, -200)]
    assert len(passes) <= 5
    assert pickle.loads(pickle.dumps(rows))[7] == ROWS[7]
    made = []
    monkeypatch.setattr(
        "gradsketch.reading.lines.LineBlock.__init__", lambda *a, real=LineBlock.__init__: made.append(1) or real(*a)
    )
    assert rows[COUNT // 2] == ROWS[COUNT // 2]
    assert len(made) <= 1  # the copy can be read from anywhere
    monkeypatch.setattr("gradsketch.reading.lines.room_for", lambda _: False)
    rows = read_examples(tmp_path / "a.jsonl.gz")
    assert [rows[i] for i in (2000, 1000, 1500, 500, 300, 100)] == [ROWS[i] for i in (2000, 1000, 1500, 500, 300, 100)]


def _shrunk(path):
    path.write_bytes(path.read_bytes()[:100_000])


def _edited(path):
    path.write_bytes(path.read_bytes().replace(b"0", b"1"))
    os.utime(path, ns=(1, 1))  # as large as it was, within one tick of the clock


@pytest.mark.parametrize("change", [_shrunk, _edited, lambda path: path.unlink()], ids=["shrunk", "edited", "removed"])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, change):
    path = _write(tmp_path / "a.jsonl")
    rows = read_examples(path)
    change(path)
    with pytest.raises(StoreError, match=r"a\.jsonl was changed or removed while it was read"):
        rows[COUNT - 1]
    with pytest.raises(StoreError, match="was changed or removed"):
        rows.read_range(0, 5)  # no bad rows, which a build would leave out


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_that_changes_while_it_is_read_is_told(tmp_path, kind):
    path, write = tmp_path / f"a.{kind}", pa.parquet.write_table if kind == "parquet" else pa.feather.write_feather
    write(pa.table({"text": ["a", "b"]}), path)
    rows = read_examples(path)
    assert rows[1] == {"text": "b"}
    rows.release()
    write(pa.table({"text": ["x", "y", "z"]}), path)
    with pytest.raises(StoreError, match="was changed or removed"):
        rows[1]


def test_lines_are_those_that_python_sees():
    draw = random.Random(1)
    for _ in range(200):
        data = bytes(draw.choices(b"ab \t\r\n\n\n\x0b", k=draw.randrange(60)))
        cut = sorted(draw.choices(range(len(data) + 1), k=3))
        pieces = [data[a:b] for a, b in zip([0, *cut], [*cut, len(data)], strict=True)]
        marks = mark_lines(piece for piece in pieces if piece)
        lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
        assert marks.count == len(lines)
        for row, start, number in zip(marks.rows, marks.starts, marks.lines, strict=True):
            assert (number, data[start:].split(b"\n")[0]) == lines[row]


def test_marks_of_many_lines_take_little_memory():
    marks = mark_lines(b"x\n" * 500_000 for _ in range(20))
    assert marks.count == 10_000_000
    assert marks.rows.nbytes + marks.starts.nbytes + marks.lines.nbytes < 3_000_000


@pytest.mark.parametrize("lines", [1, 3])
def test_a_line_without_end_is_a_bad_row_and_not_the_end_of_memory(tmp_path, monkeypatch, lines):
    monkeypatch.setattr("gradsketch.reading.lines.LONGEST", 1_000_000)
    long = b'"' + b"x" * 30_000_000 + b'"\n'
    (tmp_path / "a.jsonl").write_bytes(b'"one"\n' + long * lines + b'"two"\n')
    rows = read_examples(tmp_path / "a.jsonl")
    tracemalloc.start()
    found = rows.read_range(0, len(rows))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()
    assert (found[0], found[-1]) == ({"text": "one"}, {"text": "two"})
    assert [
        str(row).startswith(f"a.jsonl, line {i + 2}: a line of more than") for i, row in enumerate(found[1:-1])
    ] == [True] * lines


@pytest.mark.parametrize("groups", [1, 60])
def test_a_parquet_file_is_never_held_whole(tmp_path, monkeypatch, groups):
    """60 MB of letters that do not shrink, in many row groups and in one."""
    monkeypatch.setattr("gradsketch.reading.blocks._KEPT_BYTES", 10_000_000)
    letters = np.random.default_rng(0).integers(97, 123, (6000, 10_000), dtype=np.uint8)
    table = pa.table({"text": [row.tobytes().decode() for row in letters]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=6000 // groups, use_dictionary=False)
    del table
    before, most = pa.total_allocated_bytes(), 0
    rows = read_examples(tmp_path / "a.parquet")
    tracemalloc.start()
    for start in range(0, 6000, 50):
        assert rows.read_range(start, start + 50)[0]["text"].encode() == letters[start].tobytes()
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 25_000_000
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_damaged_row_group_hides_no_other(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"{i:0300d}" for i in range(3000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, compression="gzip", use_dictionary=False)
    place = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[place : place + 2000] = bytes(2000)
    path.write_bytes(data)
    found = read_examples(path).read_range(0, 3000)
    bad = [i for i, row in enumerate(found) if isinstance(row, InputError)]
    assert bad == list(range(1000, 2000))
    assert found[2999] == {"text": f"{2999:0300d}"}
    assert str(found[1500]).startswith("a.parquet, row 1501: ")


def test_what_python_has_no_type_for_becomes_text(tmp_path):
    table = pa.table(
        {
            "far": pa.array([253402300800, None], pa.timestamp("s")),
            "when": pa.array([1, None], pa.duration("us")),
            "text": pa.array(["a", "b"], pa.large_string()).dictionary_encode(),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second = read_examples(tmp_path / "a.parquet")
    assert first["far"] == "10000-01-01 00:00:00.000"
    assert (first["text"], second["far"], second["when"]) == ("a", None, None)
