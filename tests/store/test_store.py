"""Every store, wherever it lives: rows come back as written, damage and disagreement are named."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import hypothesis.strategies as st
import pyarrow as pa
import pyarrow.fs
import pytest
import torch
from hypothesis import given, settings

from gradsketch.errors import DamageError, FingerprintError, InputError, NonFiniteError, StoreError
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, default_shard_rows, to_faiss, to_parquet, verify
from gradsketch.store.encoding import decode, encode
from gradsketch.store.folder import LocalFolder, RemoteFolder, open_folder
from gradsketch.store.layout import require_plain
from gradsketch.store.manifest import MANIFEST_NAME
from gradsketch.store.shard import _sealed

SRC = Path(__file__).parents[2] / "src"
D, ROWS, SHARD = 24, 150, 64
COLUMNS = {"text": "string", "label": "int", "weight": "float", "seen": "bool", "tags": "json"}
# Relative to the largest entry of a row.
PRECISION = {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8, "int8": 0.51 / 127}


def manifest(**changes):
    return Manifest(**({"d": D, "rows": ROWS, "shard_rows": SHARD, "facts": {"seed": 0}} | changes))


def make_rows(start, count, scale=1.0):
    """Deterministic rows, so that whoever writes a range writes the same."""
    sketches = Stream(1, "rows").normals(start * D, count * D).view(count, D) * scale
    numbers = range(start, start + count)
    return Rows(
        [f"id-{i % 100}" for i in numbers],  # duplicates are allowed
        sketches,
        torch.arange(start, start + count).float(),
        {
            "text": [f"Übung {i} 🙂\x00" if i % 7 else None for i in numbers],
            "label": [i if i % 5 else None for i in numbers],
            "weight": [i / 3 for i in numbers],
            "seen": [i % 2 == 0 for i in numbers],
            "tags": [{"n": [i, "é"]} for i in numbers],
        },
    )


def fill(store, scale=1.0):
    for start, count in store.missing():
        store.write(start, make_rows(start, count, scale))
    return store


@pytest.fixture(params=["local", "remote", "memory"])
def folder(request, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSKETCH_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        yield LocalFolder(tmp_path / "store")
    elif request.param == "remote":
        yield RemoteFolder(pyarrow.fs.LocalFileSystem(), str(tmp_path / "store"), "test://store")
    else:
        memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
        yield RemoteFolder(pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(memory)), "/store", "memory://store")
        memory.rm("/", recursive=True)


class TestContract:
    """What holds for every kind of folder."""

    def test_rows_come_back_as_written(self, folder):
        fill(Store.create(folder, manifest()))
        store = Store.open(folder)
        shards = list(store)
        assert [(s.start, s.count) for s in shards] == [(0, 64), (64, 64), (128, 22)]
        for shard in shards:
            rows = make_rows(shard.start, shard.count)
            assert shard.column("id") == list(rows.ids)
            for name in COLUMNS:
                assert shard.column(name) == rows.columns[name]
            assert torch.equal(shard.numbers("loss"), rows.losses)
            torch.testing.assert_close(shard.numbers("gradient_norm"), rows.sketches.norm(dim=-1))
            torch.testing.assert_close(shard.decoded(), rows.sketches, atol=3 * 2**-11, rtol=0)

    def test_writing_a_shard_again_changes_nothing(self, folder):
        store = fill(Store.create(folder, manifest()))
        names = folder.names()
        store.write(64, make_rows(64, 64))
        assert folder.names() == names
        assert sum(shard.count for shard in store) == ROWS

    def test_what_is_there_is_known_without_a_listing(self, folder, monkeypatch):
        assert not folder.has(MANIFEST_NAME)
        fill(Store.create(folder, manifest()))
        monkeypatch.setattr(type(folder), "names", None)  # of sixty thousand parts, for each worker that starts
        assert folder.has(MANIFEST_NAME)
        assert not folder.has("none")
        assert Store.create(folder, manifest()).manifest == Store.open(folder).manifest

    def test_missing_ranges_are_listed_and_filled(self, folder):
        store = Store.create(folder, manifest())
        store.write(64, make_rows(64, 64))
        assert store.missing() == [(0, 64), (128, 22)]
        again = Store.create(folder, manifest())
        assert again.missing() == [(0, 64), (128, 22)]
        assert fill(again).missing() == []
        assert verify(again).sound

    def test_another_manifest_is_refused_and_named(self, folder):
        fill(Store.create(folder, manifest()))
        with pytest.raises(FingerprintError, match=r"seed is now 1\b.*seed 0"):
            Store.create(folder, manifest(facts={"seed": 1}))
        with pytest.raises(FingerprintError, match="dtype is now"):
            Store.create(folder, manifest(dtype="int8"))
        assert verify(Store.open(folder)).sound

    def test_records_in_the_order_asked_for(self, folder):
        store = fill(Store.create(folder, manifest()))
        records = store.records([149, 3, 64, 3])
        assert [r["loss"] for r in records] == [149, 3, 64, 3]
        assert records[0]["tags"] == {"n": [149, "é"]}
        assert records[0]["text"] == "Übung 149 🙂\x00"

    def test_there_is_no_store(self, folder):
        with pytest.raises(StoreError, match=r"holds no index\.json"):
            Store.open(folder)

    @pytest.mark.parametrize("rows", [0, 1])
    def test_few_rows(self, folder, rows):
        store = fill(Store.create(folder, manifest(rows=rows)))
        assert sum(shard.count for shard in Store.open(folder)) == rows
        assert verify(store).sound


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("scale", [1.0, 1e-7, 1e7, 1e-30, 0.0])
def test_precision_does_not_depend_on_the_gradients_size(tmp_path, dtype, scale):
    store = fill(Store.create(tmp_path, manifest(dtype=dtype)), scale)
    for shard in store:
        exact = make_rows(shard.start, shard.count, scale).sketches
        error = (shard.decoded() - exact).abs().amax(dim=-1)
        assert (error <= PRECISION[dtype] * exact.abs().amax(dim=-1)).all()


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=3, max_size=3), max_size=5),
    dtype=st.sampled_from(sorted(PRECISION)),
)
def test_decoding_is_encoding_undone(values, dtype):
    exact = torch.tensor(values).reshape(-1, 3)
    decoded = decode(*encode(exact, dtype), 3, dtype)
    largest = exact.abs().amax(dim=-1, keepdim=True) if exact.numel() else exact
    assert ((decoded - exact).abs() <= PRECISION[dtype] * largest + 1e-37).all()


def test_sketches_are_views_of_the_mapped_file(tmp_path):
    store = fill(Store.create(tmp_path, manifest(dtype="float32")))
    before = pa.total_allocated_bytes()
    shards = list(store)
    assert pa.total_allocated_bytes() - before < D * SHARD * 4
    assert torch.equal(shards[1].sketches, make_rows(64, 64).sketches)


def test_a_non_finite_sketch_is_named(tmp_path):
    rows = make_rows(0, 64)
    rows.sketches[5, 3] = float("nan")
    store = Store.create(tmp_path, manifest())
    with pytest.raises(NonFiniteError, match="row 5"):
        store.write(0, rows)
    assert store.ranges() == []


def test_only_whole_shards_are_taken(tmp_path):
    store = Store.create(tmp_path, manifest())
    for start, count in ((0, 63), (1, 64), (128, 64), (150, 1)):
        with pytest.raises(InputError, match="one whole shard"):
            store.write(start, make_rows(start, count))
    with pytest.raises(InputError, match="as many of each"):
        store.write(0, Rows(["a"] * 64, torch.zeros(64, D + 1), torch.zeros(64), {}))


def test_a_column_is_of_the_kind_its_values_have_in_the_shard(tmp_path):
    store = Store.create(tmp_path, manifest(rows=128))
    first, second = make_rows(0, 64), make_rows(64, 64)
    second.columns["label"][9] = "nine"
    del second.columns["seen"]
    second.columns["weight"][:] = [None] * 64
    for start, rows in ((0, first), (64, second)):
        store.write(start, rows)
    assert store.columns()["label"] == {"int", "json"}
    assert store.columns()["weight"] == {"float", "null"}
    assert store.columns()["seen"] == {"bool"}
    for shard, rows in zip(store, (first, second), strict=True):
        assert all(shard.column(name) == values for name, values in rows.columns.items())
    assert list(store)[1].column("seen") == [None] * 64


def test_a_reserved_name_is_refused(tmp_path):
    rows = make_rows(0, 64)
    rows.columns["loss"] = [0.0] * 64
    with pytest.raises(InputError, match="a metadata column 'loss'"):
        Store.create(tmp_path, manifest()).write(0, rows)


def test_why_rows_are_left_out_is_kept(tmp_path):
    store = Store.create(tmp_path, manifest(rows=64))
    rows = make_rows(0, 64)
    rows.losses[[3, 60]] = torch.nan
    store.write(0, dataclasses.replace(rows, left_out={60: "no text", 3: "ünfinished"}, digest="abc"))
    assert Store.open(tmp_path).left_out() == {3: "ünfinished", 60: "no text"}
    assert next(iter(store)).digest == "abc"


@pytest.mark.parametrize("changes", [{"d": 0}, {"rows": -1}, {"shard_rows": 0}, {"dtype": "float8"}])
def test_impossible_manifests(changes):
    with pytest.raises(InputError):
        manifest(**changes)


def test_long_texts(tmp_path):
    text = "長" * 100_000
    one = manifest(rows=2)
    store = Store.create(tmp_path, one)
    store.write(0, Rows(["a", "b"], torch.ones(2, D), torch.zeros(2), {"text": [text, ""]}))
    assert [r["text"] for r in store.records([0, 1])] == [text, ""]


class TestDamage:
    def test_every_flipped_byte_is_found(self, tmp_path):
        """Every byte of a small shard, header and padding included."""
        small = manifest(d=3, rows=2)
        store = Store.create(tmp_path, small)
        store.write(0, Rows(["a", "b"], torch.ones(2, 3), torch.zeros(2), {"text": ["x", None]}))
        file = tmp_path / "part-000000000000-000002.arrow"
        sound = file.read_bytes()
        for position in range(len(sound)):
            damaged = bytearray(sound)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            found = verify(store)
            assert not found.sound, position
            assert found.damaged[0].file == str(file)
        file.write_bytes(sound)
        assert verify(store).sound

    def test_the_rows_of_a_flipped_byte_are_named(self, tmp_path):
        big = manifest(d=256, rows=1000, shard_rows=500)
        store = Store.create(tmp_path, big)
        for start, count in store.missing():
            store.write(start, Rows(["i"] * count, torch.ones(count, 256), torch.zeros(count), {}))
        file = tmp_path / "part-000000000500-000500.arrow"
        data = bytearray(file.read_bytes())
        vectors = data.find(torch.full((600,), 1.0).half().numpy().tobytes())
        data[vectors + 130 * 512 + 7] ^= 4  # row 130 of the shard
        file.write_bytes(data)
        found = verify(store)
        assert [(d.file, d.where) for d in found.damaged] == [(str(file), "column 'sketch', rows 628–691")]
        assert "NOT SOUND" in str(found)

    @pytest.mark.parametrize("name", ["id", "scale", "gradient_norm", "loss", "tokens", *COLUMNS])
    def test_the_column_of_a_flipped_byte_is_named(self, tmp_path, name):
        store = fill(Store.create(tmp_path, manifest()))
        file = tmp_path / "part-000000000064-000064.arrow"
        data = bytearray(file.read_bytes())
        buffer = store.shard(64, 64).batch.column(name).buffers()[-1]
        place = data.find(buffer.to_pybytes())
        data[place + 3] ^= 1
        file.write_bytes(data)
        assert [d.where for d in verify(store).damaged] == [f"column {name!r}, rows 64–127"]

    @pytest.mark.parametrize("keep", [0, 10, 1000, -1])
    def test_a_truncated_shard(self, tmp_path, keep):
        store = fill(Store.create(tmp_path, manifest()))
        file = tmp_path / "part-000000000064-000064.arrow"
        file.write_bytes(file.read_bytes()[:keep])
        assert "part-000000000064" in verify(store).damaged[0].file
        if keep >= 0:
            with pytest.raises(StoreError, match="part-000000000064"):
                list(store)

    def test_a_shard_under_another_name(self, tmp_path):
        store = fill(Store.create(tmp_path, manifest()))
        shutil.copy(tmp_path / "part-000000000000-000064.arrow", tmp_path / "part-000000000064-000064.arrow")
        assert not verify(store).sound
        with pytest.raises(StoreError, match="do not agree"):
            list(store)

    def test_a_shard_of_another_index(self, tmp_path):
        store = fill(Store.create(tmp_path / "a", manifest()))
        fill(Store.create(tmp_path / "b", manifest(facts={"seed": 1})))
        shutil.copy(tmp_path / "b/part-000000000064-000064.arrow", tmp_path / "a")
        with pytest.raises(FingerprintError, match="part-000000000064"):
            list(store)
        assert not verify(store).sound

    def test_shards_of_another_grid_are_refused(self, tmp_path):
        store = fill(Store.create(tmp_path, manifest()))
        (tmp_path / "part-000000000007-000064.arrow").write_bytes(b"")
        with pytest.raises(StoreError, match="part-000000000007"):
            store.missing()
        found = verify(store)
        assert found.foreign == ("part-000000000007-000064.arrow",)
        assert not found.sound

    @pytest.mark.parametrize("text", ["", "{}", '{"format": "other"}', "[1]"])
    def test_an_unreadable_index_json(self, tmp_path, text):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(StoreError, match=r"index\.json"):
            Store.open(tmp_path)

    def test_an_edited_index_json(self, tmp_path):
        Store.create(tmp_path, manifest())
        file = tmp_path / "index.json"
        file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
        with pytest.raises(StoreError, match="changed after it was written"):
            Store.open(tmp_path)

    def test_a_newer_format(self, tmp_path):
        Store.create(tmp_path, manifest())
        file = tmp_path / "index.json"
        file.write_text(file.read_text().replace('"version": 2', '"version": 3'))
        with pytest.raises(StoreError, match="format version 3"):
            Store.open(tmp_path)


class TestFaults:
    def test_a_full_disk_leaves_a_sound_store(self, tmp_path):
        """A file-size limit stops the write in the middle, as a full disk would."""
        fill(Store.create(tmp_path, manifest(rows=64)))
        program = """
            import resource, sys, torch
            from gradsketch.store import Manifest, Rows, Store
            from gradsketch.errors import StoreError
            store = Store.create(sys.argv[1], Manifest(d=4096, rows=200, shard_rows=100))
            rows = Rows(["i"] * 100, torch.ones(100, 4096), torch.zeros(100), {})
            store.write(0, rows)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
            try:
                store.write(100, rows)
            except StoreError as error:
                print(error)
        """
        path = tmp_path / "full"
        done = run_python(program, str(path))
        assert "no room to write" in done.stdout
        assert "part-000000000100-000100.arrow" in done.stdout
        assert sorted(os.listdir(path)) == ["index.json", "part-000000000000-000100.arrow"]
        found = verify(Store.open(path))
        assert not found.damaged
        assert found.missing == ((100, 100),)

    @pytest.mark.parametrize(("number", "word"), [(errno.ENOSPC, "no room"), (errno.EROFS, "no permission")])
    def test_errors_of_the_system_are_explained(self, tmp_path, monkeypatch, number, word):
        store = Store.create(tmp_path, manifest())

        def refuse(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreError, match=word):
            store.write(0, make_rows(0, 64))
        assert os.listdir(tmp_path) == ["index.json"]

    def test_a_path_that_cannot_be_a_folder(self, tmp_path):
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file/inside", "/proc/gradsketch"):
            with pytest.raises(StoreError):
                Store.create(path, manifest())

    def test_an_unknown_kind_of_uri(self):
        with pytest.raises(StoreError, match="nonsense"):
            open_folder("nonsense://bucket/index")

    def test_what_dead_writers_left_is_removed_and_what_live_ones_write_is_kept(self, tmp_path):
        Store.create(tmp_path, manifest())
        host = os.uname().nodename
        dead, alive = (
            tmp_path / f"part-000000000000-000064.arrow.tmp-{host}-{pid}-0" for pid in (2**22 + 1, os.getpid())
        )
        dead.write_bytes(b"half")
        alive.write_bytes(b"half")
        store = Store.create(tmp_path, manifest())
        assert not dead.exists()
        assert alive.exists()
        assert store.ranges() == []

    def test_a_changed_object_is_fetched_again(self, tmp_path, monkeypatch):
        monkeypatch.setenv("GRADSKETCH_CACHE", str(tmp_path / "cache"))
        remote = RemoteFolder(pyarrow.fs.LocalFileSystem(), str(tmp_path / "store"), "test://store")
        remote.write("a", b"one")
        assert remote.read("a").to_pybytes() == b"one"
        remote.write("a", b"three")
        assert remote.read("a").to_pybytes() == b"three"


def test_a_remote_folder_is_made_once(tmp_path):
    made = []

    class Counting(pyarrow.fs.SubTreeFileSystem):
        def create_dir(self, path, *, recursive):
            made.append(path)
            super().create_dir(path, recursive=recursive)

    remote = RemoteFolder(Counting(str(tmp_path), pyarrow.fs.LocalFileSystem()), "store", "test://store")
    for name in ("a", "b", "c"):
        remote.write(name, name.encode())
    assert (remote.names(), made) == (["a", "b", "c"], ["store"])


class TestHostile:
    """Files whose author computed the right checksums for them."""

    @pytest.mark.parametrize("change", [{"rows": 10**13}, {"d": 2**40}, {"rows": -1}, {"d": "3"}])
    def test_sizes_are_bounded_before_they_are_believed(self, tmp_path, change):
        fill(Store.create(tmp_path, manifest()))
        body = json.loads((tmp_path / "index.json").read_text()) | change
        fields = {name: body[name] for name in ("d", "rows", "shard_rows", "dtype", "facts")}
        text = json.dumps(fields, sort_keys=True, ensure_ascii=False)
        body["fingerprint"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        (tmp_path / "index.json").write_text(json.dumps(body))
        with pytest.raises(StoreError, match=r"index\.json describes no store"):
            Store.open(tmp_path)

    def test_most_rows_take_no_time(self, tmp_path):
        """Nothing walks over rows that are claimed: one shard of one row, and 10^12 rows."""
        store = Store.create(tmp_path, manifest(rows=10**12, shard_rows=1))
        store.write(5, Rows(["a"], torch.ones(1, D), torch.zeros(1), {}))
        found = verify(Store.open(tmp_path))
        assert (found.rows, found.missing) == (1, ((0, 5), (6, 10**12 - 6)))
        assert store.rows_missing == 10**12 - 1
        assert [r["id"] for r in store.records([5])] == ["a"]

    def test_a_deep_index_is_refused(self, tmp_path):
        (tmp_path / "index.json").write_text("[" * 100_000)
        with pytest.raises(StoreError, match=r"index\.json"):
            Store.open(tmp_path)

    def test_offsets_out_of_the_file_are_not_followed(self, tmp_path):
        """A large_utf8 offset that leads out of the file, under a checksum that fits, kills whoever follows it."""
        store = fill(Store.create(tmp_path, manifest()))
        name = "part-000000000064-000064.arrow"
        offsets = store.shard(64, 64).batch.column("id").buffers()[1].to_pybytes()
        data = bytearray((tmp_path / name).read_bytes())
        data[data.find(offsets) + 8 * 3 + 5] ^= 0x40
        (tmp_path / name).write_bytes(_sealed(pa.py_buffer(bytes(data))))
        with pytest.raises(StoreError, match=r"000064\.arrow is damaged"):
            store.shard(64, 64)
        assert not verify(store).sound


def test_bytes_are_checked_once_in_a_process_and_again_when_they_change(tmp_path, monkeypatch):
    import gradsketch.store.store as module

    store, checked = fill(Store.create(tmp_path, manifest())), []
    check = module.require_sound
    monkeypatch.setattr(module, "require_sound", lambda data, name: checked.append(name) or check(data, name))
    for _ in range(3):
        list(Store.open(tmp_path))
    assert len(checked) == 3
    file = tmp_path / "part-000000000064-000064.arrow"
    data = bytearray(file.read_bytes())
    data[700] ^= 1
    file.write_bytes(data)
    with pytest.raises(StoreError, match="its checksum does not match"):
        list(Store.open(tmp_path))
    store.write(64, make_rows(64, 64))
    assert len(list(Store.open(tmp_path))) == 3


def test_a_damaged_copy_of_a_remote_file_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSKETCH_CACHE", str(tmp_path / "cache"))
    folder = RemoteFolder(pyarrow.fs.LocalFileSystem(), str(tmp_path / "store"), "test://store")
    store = fill(Store.create(folder, manifest()))
    before = [shard.decoded() for shard in store]
    for copy in (tmp_path / "cache").rglob("part-*"):
        copy.write_bytes(b"x" + copy.read_bytes()[1:])
    assert all(torch.equal(a, shard.decoded()) for a, shard in zip(before, store, strict=True))


class TestExport:
    @pytest.mark.parametrize("export", [to_parquet, to_faiss])
    def test_a_file_is_replaced_whole_or_not_at_all(self, tmp_path, export):
        if export is to_faiss:
            pytest.importorskip("faiss")
        store = fill(Store.create(tmp_path / "store", manifest()))
        out = tmp_path / "new" / "out"
        export(store, out)
        good = out.read_bytes()
        file = tmp_path / "store" / "part-000000000064-000064.arrow"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(StoreError, match="part-000000000064"):
            export(store, out)
        assert out.read_bytes() == good
        assert os.listdir(out.parent) == ["out"]
        with pytest.raises(StoreError, match="cannot write"):
            export(fill(Store.create(tmp_path / "other", manifest())), tmp_path / "store")

    def test_parquet(self, tmp_path):
        store = fill(Store.create(tmp_path / "store", manifest()))
        table = pa.parquet.read_table(to_parquet(store, tmp_path / "out.parquet"))
        assert table.column_names == ["row", "id", "sketch", "gradient_norm", "loss", "tokens", *COLUMNS]
        assert table["row"].to_pylist() == list(range(ROWS))
        assert table["text"].to_pylist()[:64] == make_rows(0, 64).columns["text"]
        sketches = torch.tensor(table["sketch"].to_pylist())
        assert torch.equal(sketches, torch.cat([shard.decoded() for shard in store]))

    def test_parquet_loses_no_column_and_no_digit(self, tmp_path):
        store = Store.create(tmp_path / "store", Manifest(d=4, rows=3, shard_rows=1))
        columns = {"row": ["mine", "two", None], "large": [2**53 + 1, 0.5, None], "small": [1, 0.5, None]}
        for place in range(3):
            own = {name: values[place : place + 1] for name, values in columns.items()}
            store.write(place, Rows([f"r{place}"], torch.ones(1, 4), torch.zeros(1), own))
        table = pa.parquet.read_table(to_parquet(store, tmp_path / "out.parquet"))
        assert table["row"].to_pylist() == [0, 1, 2]
        assert table["metadata_row"].to_pylist() == columns["row"]
        assert [None if text is None else json.loads(text) for text in table["large"].to_pylist()] == columns["large"]
        assert table["small"].to_pylist() == [1.0, 0.5, None]

    def test_faiss_finds_what_an_exact_product_finds(self, tmp_path):
        faiss = pytest.importorskip("faiss")
        store = fill(Store.create(tmp_path / "store", manifest()))
        index = faiss.read_index(str(to_faiss(store, tmp_path / "out.faiss")))
        rows = torch.cat([shard.decoded() for shard in store])
        scores, found = index.search(rows[70:71].numpy(), 3)
        exact = torch.nn.functional.cosine_similarity(rows, rows[70:71]).topk(3)
        assert found[0].tolist() == exact.indices.tolist()
        assert scores[0][0] == pytest.approx(float(rows[70].norm()), rel=1e-3)

    @pytest.mark.parametrize("export", [to_parquet, to_faiss])
    def test_nothing_to_export(self, tmp_path, export):
        if export is to_faiss:
            pytest.importorskip("faiss")
        with pytest.raises(InputError, match="no rows"):
            export(Store.create(tmp_path, manifest()), tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "d", "dtype", "expected"),
    [(20_000, 4096, "float16", 1000), (10**6, 4096, "float16", 2048), (140, 4096, "float16", 64), (0, 8, "int8", 64)],
)
def test_shard_sizes(rows, d, dtype, expected):
    assert default_shard_rows(rows, d, dtype) == expected
    assert default_shard_rows(10**9, 1 << 30, dtype) == 1


def run_python(program, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_a_packed_shard_is_refused_before_it_is_unpacked(tmp_path, codec):
    store = Store.create(tmp_path, Manifest(d=4096, rows=1000, shard_rows=1000, dtype="float32"))
    store.write(0, Rows([""] * 1000, torch.zeros(1000, 4096), torch.zeros(1000), {}))
    (file,) = tmp_path.glob("part-*")
    options, sink = pa.ipc.IpcWriteOptions(compression=codec), pa.BufferOutputStream()
    with pa.ipc.open_file(file) as reader, pa.ipc.new_file(sink, reader.schema, options=options) as writer:
        writer.write_batch(reader.get_batch(0))
    packed = _sealed(sink.getvalue())  # as whoever means harm would
    for written in (packed.to_pybytes(), packed.to_pybytes().replace(b"crc32=", b"crc33=")):
        file.write_bytes(written)
        assert len(written) < 1 << 18
        pool = pa.system_memory_pool()
        before, usual = pool.max_memory(), pa.default_memory_pool()
        pa.set_memory_pool(pool)
        try:
            with pytest.raises(DamageError):
                Store.open(tmp_path).shard(0, 1000)
            assert not verify(Store.open(tmp_path)).sound
        finally:
            pa.set_memory_pool(usual)
        assert pool.max_memory() - before < 1 << 20


def test_a_shard_with_dictionaries_is_refused(tmp_path):
    column = pa.array(["x"]).dictionary_encode()
    with pa.ipc.new_file(tmp_path / "a.arrow", pa.schema([("text", column.type)])) as writer:
        writer.write_table(pa.table({"text": column}))
    with pytest.raises(ValueError, match="dictionaries"):
        require_plain(pa.py_buffer((tmp_path / "a.arrow").read_bytes()))


def test_flipped_bytes_of_a_layout_are_a_value_error_or_none(tmp_path):
    store = fill(Store.create(tmp_path, manifest()))
    (file, *_) = sorted(tmp_path.glob("part-*"))
    data = file.read_bytes()
    require_plain(data)
    draw = random.Random(0)
    for _ in range(300):
        flipped = bytearray(data)
        for _ in range(3):
            flipped[draw.randrange(len(data) - 2000, len(data))] ^= 1 << draw.randrange(8)
        with contextlib.suppress(ValueError):
            require_plain(bytes(flipped))
    assert len(store.ranges()) > 1
