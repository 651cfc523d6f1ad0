"""kill -9 of Ray's workers and of drivers at 30 random moments of a build: no row lost or doubled, no process left.

Writes benchmarks/results/ray_kills.json.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import toys

import gradsketch as gs
from gradsketch.store import Store, verify
from processes import left_behind, marked

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
KILLS, ALONE = 30, 3  # of which so many are of drivers that started their own cluster
ROWS, SHARD, SECONDS_A_ROW = 64, 4, 0.1


class Slow(gs.CausalLM):
    """Takes its time over a row, so that kills fall into the work; of the same name, and so of the same facts."""

    def encode(self, example):
        time.sleep(SECONDS_A_ROW if os.environ.get("RAY_RAYLET_PID") else 0)
        return super().encode(example)


Slow.__name__ = "CausalLM"


def build(path, engine=None):
    task = Slow(toys.Characters())
    return gs.build_index(
        path, toys.TinyLM(), task, toys.texts(ROWS), d=64, shard_rows=SHARD, engine=engine, progress=False
    )


class Runs:
    """Drivers that build, one after another, each with a mark that its processes inherit."""

    def __init__(self, folder):
        self.folder, self.number, self.found = folder, 0, Counter()
        build(folder / "right")
        self.right = self.shards(folder / "right")

    def start(self, code, *arguments, **options):
        self.number += 1
        self.mark = f"GRADSKETCH_TEST={os.getpid()}-{self.number}"
        name, _, value = self.mark.partition("=")
        paths = os.pathsep.join(str(path) for path in (ROOT / "src", ROOT / "tests", ROOT / "tests/attribution"))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", name: value}
        environment |= {"RAY_AUTH_MODE": "token"}  # as the cluster's
        return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=environment, **options)

    def driver(self, path, address):
        code = "import sys, test_ray_kills as t; t.build(sys.argv[1], t.gs.Ray(2, 0.0, sys.argv[2] or None))"
        return self.start(code, path, address, stderr=(self.folder / f"driver-{self.number + 1}.log").open("w"))

    def shards(self, path):
        return {file.name: file.read_bytes() for file in (path / "checkpoint-0").glob("*.arrow")}

    def finished(self, driver):
        """Whether a driver came to its end; else it was killed, or kills were too many for it, which it said."""
        if driver.returncode not in (0, -signal.SIGKILL):
            self.found["runs that gave up"] += 1
            told = (self.folder / f"driver-{self.number}.log").read_text()
            assert "ended 3 workers" in told, told
        return driver.returncode == 0

    def check(self, path, finished):
        """Compare every finished shard with the one that belongs there; count rows lost and rows doubled."""
        if not (path / "checkpoint-0/index.json").exists():
            return
        store = Store.open(path / "checkpoint-0")
        assert not (told := verify(store)).damaged, str(told)
        ids = Counter(id_ for shard in store for id_ in shard.column("id"))
        self.found["rows doubled"] += sum(count > 1 for count in ids.values())
        self.found["shards that differ in a bit"] += sum(self.right[n] != data for n, data in self.shards(path).items())
        if finished:
            self.found["runs finished"] += 1
            self.found["rows lost"] += ROWS - len(ids)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def cluster(runs):
    """Start a cluster that outlives the drivers; return its process and its address."""
    code = """
import ray, gradsketch as gs
ray.init(log_to_driver=False, logging_level="ERROR", **gs.Ray(workers=2).options())
print(ray.get_runtime_context().gcs_address, flush=True)
input()
"""
    process = runs.start(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


@pytest.mark.slow
def test_kills_at_random_lose_and_double_nothing(runs):
    chance, found = random.Random(0), runs.found
    holder, address = cluster(runs)
    cluster_mark, path, driver = runs.mark, runs.folder / "index-0", None
    while found["kills of workers"] + found["kills of drivers"] < KILLS - ALONE:
        driver = driver or runs.driver(path, address)
        time.sleep(chance.uniform(0.2, 3))
        actors = [pid for pid, command in marked(cluster_mark).items() if command.startswith("ray::_Worker")]
        if driver.poll() is None and actors and chance.random() < 0.7:
            found["kills of workers"] += killed(chance.choice(actors))
        elif driver.poll() is None and actors and chance.random() < 0.5:
            found["kills of drivers"] += killed(driver.pid)
        if driver.poll() is not None:
            runs.check(path, runs.finished(driver))
            path, driver = runs.folder / f"index-{found['runs finished']}", None
    if driver is not None:
        driver.wait()
        runs.check(path, runs.finished(driver))
    holder.communicate("\n")
    left, slowest = left_behind(cluster_mark), 0
    for number in range(ALONE):
        path = runs.folder / f"alone-{number}"
        driver = runs.driver(path, "")
        while not any(command.startswith("ray::_Worker") for command in marked(runs.mark).values()):
            assert driver.poll() is None
            time.sleep(0.2)
        time.sleep(chance.uniform(0, 8))
        found["kills of drivers"] += killed(driver.pid)
        driver.wait()
        began = time.monotonic()
        left |= left_behind(runs.mark)
        slowest = max(slowest, round(time.monotonic() - began))
        runs.check(path, False)
        assert runs.driver(path, "").wait() == 0
        left |= left_behind(runs.mark)
        runs.check(path, True)
    report = {**dict.fromkeys(("rows lost", "rows doubled", "shards that differ in a bit"), 0), **found}
    report |= {"kills": found["kills of workers"] + found["kills of drivers"], "processes left behind": len(left)}
    report |= {"seconds until all processes of a killed driver had ended": slowest}
    (ROOT / "benchmarks/results/ray_kills.json").write_text(json.dumps(report, indent=1) + "\n")
    assert not left
    assert report["kills"] >= KILLS
    assert not any(report[name] for name in ("rows lost", "rows doubled", "shards that differ in a bit")), report


def killed(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
