"""Workers of a Ray cluster write the same index as one process, and find the same rows, whatever dies on the way."""

import contextlib
import os
import time
from pathlib import Path

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution.build import Build
from gradsketch.attribution.engine import _Deaths, _Worker
from gradsketch.attribution.passes import SHARDS_A_SUM
from gradsketch.errors import DamageError, InputError, StoreError
from gradsketch.store import verify

ray = pytest.importorskip("ray")
ROWS, SHARD = 48, 8


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, because starting one takes seconds."""
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parents[2] / "src", Path(__file__).parent))
    options = {"log_to_driver": False, "logging_level": "ERROR", **gs.Ray(workers=2).options()}
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": path}}, **options)
    yield
    ray.shutdown()


class Deadly(gs.CausalLM):
    """Ends its process where it meets a text, the first so many times; of the same name, and so of the same facts."""

    def __init__(self, text, folder, times):
        super().__init__(toys.Characters())
        self.text, self.folder, self.times = text, folder, times

    def encode(self, example):
        marks = len(list(self.folder.iterdir()))
        if example == self.text and marks < self.times and os.environ.get("RAY_RAYLET_PID"):
            (self.folder / str(time.monotonic_ns())).touch()
            os._exit(1)
        return super().encode(example)


Deadly.__name__ = "CausalLM"


def build(path, task=None, engine=None, data=None, **options):
    given = {"d": 64, "shard_rows": SHARD, "dtype": "float32", "progress": False} | options
    data = toys.texts(ROWS) if data is None else data
    return gs.build_index(path, toys.TinyLM(), task or toys.language_task(), data, engine=engine, **given)


def bytes_of(path):
    return {file.name: file.read_bytes() for file in sorted(path.glob("checkpoint-*/*"))}


def test_the_same_bytes_as_one_process_writes(tmp_path):
    torch.set_num_threads(1)
    build(tmp_path / "here")
    index = build(tmp_path / "there", engine=gs.Ray(workers=2))
    assert bytes_of(tmp_path / "there") == bytes_of(tmp_path / "here")
    assert index.audits.audited > 0
    assert len(list((tmp_path / "there").glob("audits-*"))) == 2  # of two workers


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced(tmp_path):
    (tmp_path / "marks").mkdir()
    task = Deadly(toys.texts(ROWS)[20], tmp_path / "marks", times=2)
    index = build(tmp_path / "index", task=task, engine=gs.Ray(workers=2))
    assert len(list((tmp_path / "marks").iterdir())) == 2
    assert verify(index.stores[0]).sound
    build(tmp_path / "here")
    assert bytes_of(tmp_path / "index") == bytes_of(tmp_path / "here")


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_named(tmp_path):
    (tmp_path / "marks").mkdir()
    task = Deadly(toys.texts(ROWS)[20], tmp_path / "marks", times=99)
    with pytest.raises(StoreError, match="rows 16 to 23 ended 3 workers"):
        build(tmp_path / "index", task=task, engine=gs.Ray(workers=2))


def test_machines_lost_in_a_long_run_do_not_add_up():
    deaths = _Deaths()
    for _ in range(5):
        deaths.add(None, RuntimeError("lost"))
        deaths.add(None, RuntimeError("lost"))
        deaths.begun()
    deaths.add((0, 8), RuntimeError("lost"))
    deaths.begun()
    deaths.add((0, 8), RuntimeError("lost"))
    with pytest.raises(StoreError, match="rows 0 to 7 ended 3 workers: lost"):
        deaths.add((0, 8), RuntimeError("lost"))


@pytest.mark.slow  # as all that starts workers of its own; that workers do start is seen above
def test_errors_of_workers_are_our_own(tmp_path):
    data = toys.texts(ROWS)
    data[30] = ""
    with pytest.raises(InputError, match=r"example 30 \(an empty text\)"):
        build(tmp_path, data=data, engine=gs.Ray(workers=2))


def test_more_workers_than_there_is_room_for(tmp_path):
    with pytest.raises(InputError, match="room for 2 workers of 1 CPU each, where 5 were asked for"):
        build(tmp_path, engine=gs.Ray(workers=5))


def test_a_finished_index_starts_no_worker(tmp_path):
    build(tmp_path)
    build(tmp_path, engine=gs.Ray(workers=5))


def questions(index):
    """Everything that reads shards, by options of a query, as pairs of a name and what comes out."""
    model, asked = toys.TinyLM(), index.sketch(toys.TinyLM(), ["the number 7", "squared is 40"])

    def hits(**options):
        found = index.query(model, asked, **options)
        return [(kind, hit.row, hit.id, hit.score, hit.text) for one in found for kind, hit in one.both_ends()]

    def selected(**options):
        found = index.select(model, ["the number 7", "squared is 40"], alike=0.9, **options)
        return found.rows, found.ids, found.values.tolist(), found.tokens.tolist(), found.copies, found.data

    yield "ridge", lambda **engine: hits(k=5, opponents=3, **engine)
    yield "auto", lambda **engine: hits(score="influence", damping="auto", **engine)
    yield "filter", lambda **engine: hits(score="cosine", where={"id": [str(i) for i in range(30)]}, **engine)
    yield "function", lambda **engine: hits(score="dot", where=lambda row: row["loss"] > 3.5, **engine)
    yield "coarse", lambda **engine: hits(coarse=16, opponents=2, **engine)
    yield "rerank", lambda **engine: hits(k=2, rerank=4, **engine)
    yield "scores", lambda **engine: index.scores(model, asked, **engine).tolist()
    yield "select", lambda **engine: selected(tokens=200, **engine)
    yield "ranks", lambda **engine: selected(rows=4, aggregate="rank", harmful=True, **engine)


def test_the_same_rows_and_scores_as_one_process_finds(tmp_path):
    build(tmp_path, shard_rows=1, data=toys.texts(2 * SHARDS_A_SUM + 1))  # several parts of a sum, and of a scan
    for name, ask in questions(gs.Index.open(tmp_path, task=toys.language_task())):
        assert repr(ask(engine=gs.Ray(workers=2))) == repr(ask()), name


def test_readers_have_as_many_threads_as_this_process(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with gs.Ray().reading() as each:
        assert list(each(lambda part: torch.get_num_threads(), [[(0, 1)]])) == [3]


def test_parts_come_in_order_however_long_they_take():
    def slow_at_first(part):
        time.sleep(0.3 if part[0][0] == 0 else 0)
        return part[0][0]

    parts = [[(start, 1)] for start in range(20)]
    with gs.Ray(workers=2).reading() as each:
        assert list(each(slow_at_first, parts)) == list(range(20))
        assert list(each(slow_at_first, [])) == []


@pytest.mark.slow
def test_a_reader_that_dies_is_replaced(tmp_path):
    def deadly(part):
        with contextlib.suppress(FileExistsError):
            (tmp_path / str(part[0][0])).mkdir()  # once
            os._exit(1)
        return part[0][0]

    with gs.Ray(workers=2).reading() as each:
        assert list(each(deadly, [[(0, 1)], [(1, 1)]])) == [0, 1]


def test_errors_of_readers_are_our_own(tmp_path):
    index = build(tmp_path)
    shard = sorted((tmp_path / "checkpoint-0").glob("*.arrow"))[3]
    shard.write_bytes(shard.read_bytes()[:-9] + b"!" + shard.read_bytes()[-8:])
    with pytest.raises(DamageError, match=shard.name):
        index.query(toys.TinyLM(), ["the number 7"], engine=gs.Ray(workers=2))


def test_readers_need_no_gpu():
    with pytest.raises(InputError, match="reading shards, which CPUs do"), gs.Ray(gpus_per_worker=1.0).reading():
        pass


def test_a_cluster_that_is_not_there(monkeypatch):
    def init(**options):
        raise ConnectionError(f"Could not find any running Ray instance ({options['address']}).")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    for engine in (gs.Ray(address="auto"), gs.Ray()):
        monkeypatch.setenv("RAY_ADDRESS", "auto")  # which Ray itself would follow
        with pytest.raises(InputError, match="no Ray cluster at auto"), engine.reading():
            pass


@pytest.mark.slow
def test_workers_stand_in_the_folder_of_this_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = build("index", engine=gs.Ray(workers=2))
    assert len(list((tmp_path / "index/checkpoint-0").glob("*.arrow"))) == ROWS // SHARD
    assert index.query(toys.TinyLM(), ["the number 7"], k=1, engine=gs.Ray(workers=2))[0][0].rank == 1


def test_a_machine_without_the_folder_is_told(tmp_path):
    arguments = {
        "path": tmp_path / "elsewhere",
        "model": toys.TinyLM(),
        "task": toys.language_task(),
        "data": ["x"],
        "d": 64,
    }
    with pytest.raises(StoreError, match=r"elsewhere, where a worker on .* finds no index"):
        _Worker().prepare(Build, arguments, 0, 1, False, str(tmp_path))
