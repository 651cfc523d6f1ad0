"""Second moments are kept beside a finished store, and used only where they are those of its very rows."""

import zlib

import pytest
import torch

from gradsketch.attribution import moments
from gradsketch.attribution.precondition import fit_preconditioner
from gradsketch.errors import StoreError
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, verify
from gradsketch.store.folder import LocalFolder
from stores import make_store

D = 40
ROUTES = {"primal": (90, {}), "dual": (25, {}), "low rank": (90, {"exact_size": 10, "rank": 8})}


def rows(n):
    return Stream(0, "rows").normals(0, n * D).view(n, D) * torch.arange(1, D + 1).pow(-0.7)


def solution(store, unit_length=True, **options):
    q = Stream(1, "q").normals(0, 3 * D).view(3, D)
    return fit_preconditioner(store, unit_length=unit_length, damping=0.1, **options).solve(q)


@pytest.fixture(autouse=True)
def always_worth_keeping(monkeypatch):
    monkeypatch.setattr(moments, "_WORTH_KEEPING", 0)


@pytest.fixture
def not_computed_again(monkeypatch):
    def forbid():
        def refuse(*_):
            raise AssertionError("computed again")

        monkeypatch.setattr(moments, "_computed", refuse)

    return forbid


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("unit_length", [False, True])
def test_the_second_query_reads_what_the_first_computed(tmp_path, route, unit_length, not_computed_again):
    n, options = ROUTES[route]
    store = make_store(tmp_path, rows(n))
    first = solution(store, unit_length, **options)
    not_computed_again()
    assert torch.equal(solution(Store.open(tmp_path), unit_length, **options), first)
    with pytest.raises(AssertionError, match="again"):  # the other kind of rows has a file of its own
        solution(store, not unit_length, **options)
    assert verify(store).sound
    assert verify(store).strangers == ()


def kept_file(path):
    (file,) = (path / "moments").iterdir()
    return file


@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "another"])
def test_what_is_damaged_is_computed_again(tmp_path, damage):
    store = make_store(tmp_path, rows(90))
    first = solution(store)
    file = kept_file(tmp_path)
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(
        {
            "flipped": data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :],
            "short": data[:middle],
            "empty": b"",
            "another": b"not an Arrow file",
        }[damage]
    )
    assert torch.equal(solution(store), first)
    assert zlib.crc32(kept_file(tmp_path).read_bytes()) == zlib.crc32(data)  # and repaired


def test_those_of_another_store_are_not_used(tmp_path):
    make = {"a": rows(90), "b": rows(90).flip(1)}
    manifests = {name: Manifest(d=D, rows=90, shard_rows=90, facts={"data": name}) for name in make}
    stores = {name: Store.create(tmp_path / name, manifest) for name, manifest in manifests.items()}
    for name, x in make.items():
        stores[name].write(0, Rows([""] * 90, x, torch.zeros(90), {}))
    expected = solution(stores["b"])
    solution(stores["a"])
    kept_file(tmp_path / "b").write_bytes(kept_file(tmp_path / "a").read_bytes())
    assert torch.equal(solution(stores["b"]), expected)


def test_those_of_an_unfinished_store_are_not_kept(tmp_path):
    x = rows(90)
    store = Store.create(tmp_path, Manifest(d=D, rows=90, shard_rows=45, dtype="float32"))
    for start in (0, 45):
        if start:
            solution(store)
        assert not (tmp_path / "moments").exists()
        store.write(start, Rows([""] * 45, x[start : start + 45], torch.zeros(45), {}))
    assert torch.equal(solution(store), solution(make_store(tmp_path / "whole", x, shard_rows=45)))
    assert kept_file(tmp_path)


def test_a_folder_that_cannot_be_written_is_no_hindrance(tmp_path, monkeypatch):
    store = make_store(tmp_path, rows(90))

    def refuse(*_, **__):
        raise StoreError("no room", "room", "Make some")

    monkeypatch.setattr(LocalFolder, "write", refuse)
    assert solution(store).isfinite().all()
    assert not (tmp_path / "moments").exists()


def test_what_is_done_in_no_time_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.undo()
    solution(make_store(tmp_path, rows(90)))
    assert not (tmp_path / "moments").exists()
