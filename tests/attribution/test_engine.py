"""Workers of a Ray cluster write the same index as one process, whatever dies on the way."""

import os
import time
from pathlib import Path

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.errors import InputError, StoreError
from gradsketch.store import verify

ray = pytest.importorskip("ray")
ROWS, SHARD = 48, 8


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """One cluster for all tests, because starting one takes seconds."""
    path = os.pathsep.join(str(folder) for folder in (Path(__file__).parents[2] / "src", Path(__file__).parent))
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
    ray.init(num_cpus=2, runtime_env={"env_vars": {"PYTHONPATH": path}}, **options)
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
