"""What comes in by a pipe is read like a file, as many times as it takes."""

import gc
import gzip
import io
import os
import pickle
import threading
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet
import pytest

from gradsketch import InputError
from gradsketch.reading import read_examples

LINES = b'{"text": "a"}\n\n{bad\n{"text": "b"}\n'


def _parquet():
    file = io.BytesIO()
    pyarrow.parquet.write_table(pa.table({"text": ["a", "b"]}), file)
    return file.getvalue()


def _arrow():
    file = io.BytesIO()
    with pa.ipc.new_stream(file, pa.schema([("text", pa.string())])) as stream:
        stream.write_table(pa.table({"text": ["a", "b"]}))
    return file.getvalue()


@pytest.fixture
def piped(monkeypatch):
    def pipe(data, *, at_terminal=False):
        stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: at_terminal)
        monkeypatch.setattr("sys.stdin", stdin)

    return pipe


@pytest.mark.parametrize(
    ("place", "data"),
    [
        ("-", b'{"text": "a"}\n{"text": "b"}\n'),
        ("-", b'\n"a"\n"b"'),
        ("-", b'[{"text": "a"}, {"text": "b"}]'),
        ("-", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n', mtime=0)),
        ("-", pa.compress(b'{"text": "a"}\n{"text": "b"}\n', "zstd", asbytes=True)),
        ("-", _parquet()),
        ("-", _arrow()),
        ("-.csv", b"text\na\nb\n"),
        ("-.txt.gz", gzip.compress(b"a\nb\n", mtime=0)),
    ],
)
def test_standard_input(piped, place, data):
    piped(data)
    rows = read_examples(place)
    assert [row["text"] for row in rows] == [row["text"] for row in rows] == ["a", "b"]
    assert rows.path == place


@pytest.mark.parametrize("data", [b"text,label\na,1\n", b"plain words\n", b""])
def test_a_kind_that_does_not_show_is_asked_for(piped, data):
    piped(data)
    with pytest.raises(InputError, match=r"first bytes do not tell.*--data -\.csv"):
        read_examples("-")


def test_nothing_piped(piped):
    piped(b"", at_terminal=True)
    with pytest.raises(InputError, match="nothing piped into it"):
        read_examples("-")


def test_a_bad_row_of_a_pipe_is_named(piped):
    piped(LINES)
    rows = read_examples("-")
    assert (rows[0], rows[2]) == ({"text": "a"}, {"text": "b"})
    with pytest.raises(InputError, match="a pipe, in another process"):
        pickle.loads(pickle.dumps(rows))
    with pytest.raises(InputError, match=r"stdin\.jsonl, line 3: "):
        rows[1]


@pytest.mark.parametrize("kind", ["named", "of a shell"])
def test_other_pipes(tmp_path, kind):
    if kind == "named":
        path = tmp_path / "pipe.jsonl"
        os.mkfifo(path)
        threading.Thread(target=path.write_bytes, args=(LINES,), daemon=True).start()
        assert len(read_examples(path)) == 3
        return
    ends = os.pipe()
    os.write(ends[1], LINES)
    os.close(ends[1])
    rows = read_examples(f"/dev/fd/{ends[0]}")
    os.close(ends[0])
    assert (len(rows), rows[2]) == (3, {"text": "b"})


def test_the_copy_goes_when_its_rows_go_and_leaves_room_on_the_disk(piped, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    piped(LINES)
    rows = read_examples("-")
    assert len(list(tmp_path.iterdir())) == 1
    assert rows[0] == {"text": "a"}
    del rows
    gc.collect()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("gradsketch.reading.sources.room_for", lambda _: False)
    piped(LINES)
    with pytest.raises(InputError, match="Set TMPDIR"):
        read_examples("-")
