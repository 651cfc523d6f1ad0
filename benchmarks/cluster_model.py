"""What do 8, 64 and 512 workers bring, where does a listing of parts end, and what do a billion rows cost?

    python benchmarks/cluster_model.py [--rows 1e9] [--parameters 7e9] [...] [--quick]

Measured on this machine: the seconds a part takes beside the model (encoded, and written to disk), the driver's seconds
for a call of an actor and for a task, a worker's start, a listing of so many parts, and how often an index in an object
store is asked for what. Assumed, each by an option: the model, the GPU, and what the object store takes. A simulation
draws from both: every part waits for the driver, is computed, encoded, looked up and uploaded; workers die and start
again. Writes results/cluster_model.json.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.fs
import torch
from record import RESULTS, write
from scale import Hashed
from torch import nn

import gradsketch as gs
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store
from gradsketch.store import folder as folders
from gradsketch.store.encoding import row_bytes
from gradsketch.store.shard import encode_shard

WORKERS, PARTS_EACH = (8, 64, 512), 60
OPTIONS: dict[str, tuple[float, str]] = {
    "rows": (1e9, "rows in all"),
    "tokens": (512, "tokens a row"),
    "parameters": (7e9, "parameters of the model"),
    "flops": (4e14, "operations a second that a GPU reaches in training, of 1e15 that it has"),
    "step": (1.2, "a sketch's cost in training steps"),
    "small": (2000, "rows a second of a worker with a small encoder, for comparison"),
    "d": (4096, "numbers a row"),
    "part_bytes": (2**24, "bytes of sketches a part"),
    "bandwidth": (2.5e8, "bytes a second that one worker uploads"),
    "store_bandwidth": (1e10, "bytes a second that the object store takes in all"),
    "latency": (0.04, "median seconds of a request to the object store"),
    "spread": (0.6, "spread of its logarithm"),
    "requests": (3500, "requests a second that the store takes under one prefix"),
    "page": (1000, "keys a page of a listing"),
    "listing": (10, "seconds that a listing may take"),
    "death_hours": (500, "hours between deaths of a worker"),
    "start": (300, "seconds until a new worker holds the model"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (value, text) in OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"{text} ({value:g})")
    parser.add_argument("--quick", action="store_true", help="few measurements, written to no file")
    arguments = parser.parse_args()
    assumed = {name: getattr(arguments, name) for name in OPTIONS}
    measured = measurements(assumed, quick=arguments.quick)
    results = {"assumed": assumed, "measured": measured, **model(assumed, measured)}
    print(json.dumps(results, indent=1))
    if not arguments.quick:
        print(write("cluster_model", results))


# --- measured ---


def measurements(assumed: dict[str, float], *, quick: bool) -> dict[str, Any]:
    count = 5 if quick else 100
    folder = Path(tempfile.mkdtemp())
    try:
        found: dict[str, Any] = {"part": part_seconds(folder / "parts", assumed, count)}
        found["operations"] = operations(folder / "operations")
        found["listings"] = [
            listing(folder / str(files), files) for files in ((1000,) if quick else (10**3, 10**4, 10**5))
        ]
        found["ray"] = ray_seconds(20 if quick else 500)
    finally:
        shutil.rmtree(folder)
    scale = json.loads((RESULTS / "scale.json").read_text())["results"]
    stored = max((s for s in scale["stores"] if s["dtype"] == "int8"), key=lambda s: s["rows"])
    found["row_seconds_beside_the_model"] = scale["builds"][-1]["build_microseconds_a_row"] / 1e6
    found["row_seconds_of_going_on"] = scale["builds"][-1]["again_microseconds_a_row"] / 1e6
    found["scan_bytes_a_second"] = stored["bytes"] / stored["warm_query_seconds"]
    return found


def part_seconds(folder: Path, assumed: dict[str, float], count: int) -> dict[str, list[float]]:
    """Return the seconds of encoding a part, and of writing and flushing its bytes, once for each of so many."""
    d = int(assumed["d"])
    rows = int(assumed["part_bytes"]) // row_bytes(d, "int8")
    store = Store.create(folder, Manifest(d=d, rows=rows * count, shard_rows=rows, dtype="int8"))
    sketches = Stream(0, "benchmark").normals(0, rows * d).view(rows, d)
    found: dict[str, list[float]] = {"encode": [], "write": []}
    torch.set_num_threads(1)
    encode_shard(Rows(["0"], sketches[:1], torch.zeros(1), {}), 0, store.manifest)  # the first use imports a lot
    for start, many in store.missing():
        ids = [str(i) for i in range(start, start + many)]
        used = time.process_time()  # of a core, whoever else is at work here
        data = encode_shard(Rows(ids, sketches, torch.zeros(many), {"text": ids}), start, store.manifest)
        found["encode"].append(time.process_time() - used)
        began = time.perf_counter()
        store.folder.write(f"{start}.arrow", data)
        found["write"].append(time.perf_counter() - began)
        found["bytes"] = [float(len(data))]
    return found


class Counting:
    """An object store that counts what it is asked for; a local folder is behind it."""

    def __init__(self) -> None:
        self.inner, self.calls = pyarrow.fs.LocalFileSystem(), Counter[str]()

    def get_file_info(self, what: Any) -> Any:
        self.calls["listings" if isinstance(what, pyarrow.fs.FileSelector) else "look-ups"] += 1
        return self.inner.get_file_info(what)

    def open_input_file(self, path: str) -> Any:
        self.calls["reads"] += 1
        return self.inner.open_input_file(path)

    def open_output_stream(self, path: str) -> Any:
        self.calls["writes"] += 1
        return self.inner.open_output_stream(path)

    def create_dir(self, path: str, *, recursive: bool) -> None:
        self.calls["folders made"] += 1
        self.inner.create_dir(path, recursive=recursive)


@contextmanager
def counted(folder: Path) -> Iterator[Counting]:
    """Let the URIs of this block stand for a folder, and count."""
    store = Counting()

    def opened(path: str | Path) -> folders.Folder:
        return folders.RemoteFolder(store, str(folder), str(path))  # type: ignore[arg-type]

    with (
        mock.patch("gradsketch.attribution.build.open_folder", opened),
        mock.patch("gradsketch.attribution.index.open_folder", opened),
        mock.patch.dict("os.environ", {"GRADSKETCH_CACHE": f"{folder}-cache"}),
    ):
        yield store


def operations(folder: Path) -> dict[str, dict[str, float]]:
    """Return how often an object store is asked for what: once a run, and once for every part of it."""
    torch.manual_seed(0)
    model, task, few, many = nn.Linear(32, 64), Hashed(), 4, 44
    found: dict[str, dict[str, Counter[str]]] = {}

    def asked(rows: list[Any]) -> Any:
        return gs.Index.open("s3://index", task=task).query(model, rows, score="cosine")

    for parts in (few, many):
        rows = [{"id": str(i), "text": f"The square of {i} is {i * i}.", "kind": i % 64} for i in range(parts * 8)]
        with counted(folder / str(parts)) as store:
            steps: dict[str, Callable[[], Any]] = {
                "build": lambda rows=rows: gs.build_index(
                    "s3://index", model, task, rows, d=64, shard_rows=8, progress=False
                ),
                "question": lambda rows=rows: gs.Index.open("s3://index", task=task).query(
                    model, rows[:1], score="cosine"
                ),
            }
            for name, step in steps.items():
                store.calls.clear()
                step()
                found.setdefault(name, {})[str(parts)] = Counter(store.calls)
    return {
        f"{name}, {what}": {
            kind: value
            for kind in ("listings", "look-ups", "reads", "writes", "folders made")
            if (value := of(counts[str(few)][kind], counts[str(many)][kind]))
        }
        for name, counts in found.items()
        for what, of in (
            ("a part", lambda a, b: round((b - a) / (many - few), 2)),
            ("once", lambda a, b: round(a - few * (b - a) / (many - few), 2)),
        )
    }


def listing(folder: Path, files: int) -> dict[str, float]:
    """Time what a driver does with a folder of so many parts before it begins."""
    manifest = Manifest(d=64, rows=files * 8, shard_rows=8)
    store = Store.create(folder, manifest)
    for start, count in manifest.shard_ranges():
        (folder / f"part-{start:012d}-{count:06d}.arrow").touch()
    began = time.perf_counter()
    assert not store.missing()
    return {"parts": files, "seconds": time.perf_counter() - began}


def ray_seconds(count: int) -> dict[str, Any]:
    """Return a worker's seconds to start, and the driver's for each call of an actor and for each task."""
    import ray

    from gradsketch.attribution.passes import parts_of

    engine = gs.Ray(workers=2)
    began = time.perf_counter()
    with engine.reading() as each:
        cluster = time.perf_counter() - began
        began = time.perf_counter()
        list(each(len, [[(0, 1)], [(1, 1)]]))
        start = time.perf_counter() - began
        parts = parts_of([(i, 1) for i in range(count)], 1)
        began, tasks = time.perf_counter(), []
        for _ in each(len, parts):
            tasks.append(time.perf_counter() - began)
            began = time.perf_counter()
        actors = [ray.remote(num_cpus=0)(Idle).remote() for _ in range(2)]
        ray.get([actor.done.remote() for actor in actors])
        running, calls = {actor.done.remote(): actor for actor in actors}, []
        for _ in range(count):
            began = time.perf_counter()
            [done], _ = ray.wait(list(running), num_returns=1)
            actor = running.pop(done)
            ray.get(done)
            running[actor.done.remote()] = actor
            calls.append(time.perf_counter() - began)
    return {"cluster": cluster, "start": start, "task": tasks, "call": calls}


class Idle:
    def done(self) -> int:
        return 0


# --- modelled ---


def model(assumed: dict[str, float], measured: dict[str, Any]) -> dict[str, Any]:
    row = 6 * assumed["parameters"] * assumed["tokens"] * assumed["step"] / assumed["flops"]
    bytes_a_row = row_bytes(int(assumed["d"]), "int8")
    rows_a_part = int(assumed["part_bytes"]) // bytes_a_row
    parts = -(-int(assumed["rows"]) // rows_a_part)
    runs = [
        simulated(assumed, measured, workers, name, rows_a_part * seconds)
        for name, seconds in (("7B", row), ("small encoder", 1 / assumed["small"]))
        for workers in WORKERS
    ]
    for run in runs:
        run["rows_a_second"] = run["parts_a_second"] * rows_a_part
        run["hours"] = assumed["rows"] / run["rows_a_second"] / 3600
    return {
        "parts": {"rows": rows_a_part, "count": parts},
        "runs": runs,
        "questions": [question(assumed, measured, workers, parts) for workers in WORKERS],
        "listing": listing_limits(assumed, measured, parts),
        "cost": cost(assumed, measured, row, bytes_a_row),
    }


def simulated(
    assumed: dict[str, float], measured: dict[str, Any], workers: int, name: str, compute: float
) -> dict[str, Any]:
    """Simulate a build by so many workers, each of which takes parts of ``compute`` seconds of the model."""
    chance = random.Random(0)
    driver = link = requests = 0.0  # when each is free again
    calls = sum(measured["operations"]["build, a part"].values())
    size, encoded = measured["part"]["bytes"][0], measured["part"]["encode"]
    # A worker is free, or has a part to send. A run does not begin in step for long.
    events = [(chance.uniform(0, compute), worker, True) for worker in range(workers)]
    heapq.heapify(events)
    spent: Counter[str] = Counter()
    done = deaths = 0
    while done < PARTS_EACH * workers:
        now, worker, is_free = heapq.heappop(events)
        if is_free:
            driver = max(driver, now) + chance.choice(measured["ray"]["call"])
            spent["waiting for the driver"] += driver - now
            # Parts differ as much as they differ here to encode.
            busy = compute * chance.choice(encoded) / statistics.mean(encoded)
            if chance.random() < 1 - math.exp(-busy / 3600 / assumed["death_hours"]):
                lost, deaths = chance.uniform(0, busy) + assumed["start"], deaths + 1
                spent["lost with workers"] += lost
                heapq.heappush(events, (driver + lost, worker, True))
                continue
            encode = chance.choice(encoded)
            spent["model"], spent["encoding"] = spent["model"] + busy, spent["encoding"] + encode
            heapq.heappush(events, (driver + busy + encode, worker, False))
            continue
        requests = max(requests, now) + calls / assumed["requests"]
        asked = requests - now + sum(latency(chance, assumed) for _ in range(round(calls)))
        link = max(link, now + asked) + size / assumed["store_bandwidth"]
        sent = max(link - now - asked, size / assumed["bandwidth"])
        spent["requests"], spent["upload"] = spent["requests"] + asked, spent["upload"] + sent
        done += 1
        heapq.heappush(events, (now + asked + sent, worker, True))
    total = sum(spent.values())
    return {
        "model": name,
        "workers": workers,
        "seconds_a_part": compute,
        "parts_a_second": workers * done / total,
        "efficiency": spent["model"] / total,
        "deaths": deaths,
        "shares": {kind: seconds / total for kind, seconds in spent.items()},
    }


def latency(chance: random.Random, assumed: dict[str, float]) -> float:
    return assumed["latency"] * chance.lognormvariate(0, assumed["spread"])


def question(assumed: dict[str, float], measured: dict[str, Any], workers: int, parts: int) -> dict[str, float]:
    """Return what bounds eight questions over all parts: the tasks, the object store, and the driver."""
    size = measured["part"]["bytes"][0]
    each = size / measured["scan_bytes_a_second"] + size / assumed["bandwidth"] + 2 * assumed["latency"]
    bounds = {
        "tasks": parts * each / workers,
        "store": parts * size / assumed["store_bandwidth"],
        "driver": parts / 8 * statistics.mean(measured["ray"]["task"]),
    }
    return {"workers": workers, **bounds, "seconds": max(bounds.values())}


def listing_limits(assumed: dict[str, float], measured: dict[str, Any], parts: int) -> dict[str, float]:
    page = assumed["latency"] * math.exp(assumed["spread"] ** 2 / 2)
    disk = measured["listings"][-1]["seconds"] / measured["listings"][-1]["parts"]
    return {
        "seconds_in_an_object_store": parts / assumed["page"] * page,
        "seconds_on_disk": parts * disk,
        "parts_within_the_limit": assumed["listing"] / page * assumed["page"],
        "rows_within_the_limit": assumed["listing"] / page * assumed["page"] * assumed["rows"] / parts,
        "hours_of_going_on": assumed["rows"] * measured["row_seconds_of_going_on"] / 3600,
    }


def cost(assumed: dict[str, float], measured: dict[str, Any], row: float, bytes_a_row: int) -> dict[str, float]:
    return {
        "gpu_seconds_a_row": row,
        "gpu_hours": assumed["rows"] * row / 3600,
        "core_hours_beside": assumed["rows"] * measured["row_seconds_beside_the_model"] / 3600,
        "bytes": assumed["rows"] * bytes_a_row,
        "terabytes": assumed["rows"] * bytes_a_row / 1e12,
    }


if __name__ == "__main__":
    main()
