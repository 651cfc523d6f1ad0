"""kill -9 at random moments, with two writers at once: no row is lost, duplicated or corrupt."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
# One process imports torch once and forks the writers, which it kills: a kill costs milliseconds, not an import.
PROGRAM = """
    import functools, json, os, random, signal, sys, time
    import torch
    from gradsketch.random import Stream
    from gradsketch.store import Manifest, Rows, Store, verify
    from gradsketch.store.shard import encode_shard

    path, kills, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    D, SHARD, ROWS = 256, 64, 64 * 40 + 3
    manifest = Manifest(d=D, rows=ROWS, shard_rows=SHARD)

    @functools.cache
    def rows(start, count):
        sketches = Stream(0, "rows").normals(start * D, count * D).view(count, D)
        texts = [f"row {i}" * 50 for i in range(start, start + count)]
        return Rows([str(i) for i in range(start, start + count)], sketches, torch.zeros(count), {"text": texts})

    def write_missing(backwards):
        store = Store.create(path, manifest)
        missing = store.missing()
        for start, count in reversed(missing) if backwards else missing:
            store.write(start, rows(start, count))

    def writer(backwards):
        pid = os.fork()
        if pid == 0:
            try:
                write_missing(backwards)
            finally:
                os._exit(0)
        return pid

    def check(store):
        found = verify(store)
        assert not found.damaged and not found.strangers, str(found)
        ids = []
        for shard in store:
            expected = rows(shard.start, shard.count)
            assert (shard.decoded() - expected.sketches).abs().max() < 2**-8
            assert shard.column("text") == expected.columns["text"]
            ids += shard.column("id")
        assert len(ids) == len(set(ids)) == found.rows
        return found.rows

    def wait_for_a_change(before):
        deadline = time.monotonic() + 5
        while set(os.listdir(path)) == before and time.monotonic() < deadline:
            time.sleep(0.0005)

    random.seed(seed)
    for start, count in manifest.shard_ranges():
        rows(start, count)
    encode_shard(rows(0, SHARD), 0, manifest)  # the first use imports a lot
    os.makedirs(path)
    killed, torn, progress = 0, 0, []
    while killed < kills:
        before = set(os.listdir(path))
        pids = [writer(False), writer(True)]
        wait_for_a_change(before)
        for pid in pids:
            time.sleep(random.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        torn += any(".tmp-" in name for name in os.listdir(path))
        if os.path.exists(path + "/index.json"):
            progress.append(check(Store.open(path)))
            if progress[-1] == ROWS:
                for name in os.listdir(path):
                    os.remove(os.path.join(path, name))
    write_missing(False)
    assert check(Store.open(path)) == ROWS
    left = [name for name in os.listdir(path) if ".tmp-" in name]
    print(json.dumps({"killed": killed, "torn": torn, "progress": progress, "left": left}))
"""


@pytest.mark.parametrize(
    ("kills", "seed"), [(20, 0), pytest.param(400, 1, marks=pytest.mark.slow)], ids=["20 kills", "400 kills"]
)
def test_killed_writers_lose_nothing(tmp_path, kills, seed):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "store"), str(kills), str(seed)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["killed"] >= kills
    assert max(report["progress"]) > 0  # the writers did get somewhere between the kills
    assert report["torn"] > 0  # and some died in the middle of a file
    assert report["left"] == []
