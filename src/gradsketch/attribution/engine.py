"""Who writes the shards of an index, and who reads them: this process, or the workers of a Ray cluster.

A shard on disk is the only state. So a worker that dies is replaced and its shard made again, and a driver that dies is
started again by the same command. Shards are the same bits whoever writes them, and so are the answers of a query,
whoever reads them.
"""

from __future__ import annotations

import os
import platform
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from gradsketch.attribution.passes import Each, Part, here
from gradsketch.attribution.writer import ShardWriter
from gradsketch.errors import GradsketchError, InputError, StoreError
from gradsketch.gradients.per_example.audit import Audits
from gradsketch.store.folder import Folder
from gradsketch.store.manifest import MANIFEST_NAME

__all__ = ["Engine", "Local", "Ray"]

_TRIES = 3  # a shard that ends so many workers is at fault itself
_AHEAD = 4  # results a worker that may wait for an earlier one
Advance = Callable[[int], Any]
T = TypeVar("T")
Shard = tuple[int, int]  # first row, rows


@runtime_checkable
class Build(Protocol):
    """What an engine needs of a build: the arguments that make it elsewhere, and what writes a checkpoint's shards."""

    folder: Folder

    @property
    def arguments(self) -> dict[str, Any]: ...
    def writer(self, number: int) -> AbstractContextManager[ShardWriter]: ...
    def note(self, audits: Audits, number: int) -> None: ...


@dataclass(frozen=True)
class Local:
    """Every shard is written, and read, by this process."""

    def write(self, build: Build, number: int, writer: ShardWriter, shards: Iterable[Shard], on: Advance) -> None:
        """Write some shards of a checkpoint; ``on`` hears of rows done."""
        for start, count in shards:
            writer.write(start, count, on)
            build.note(writer.audits, number)

    @contextmanager
    def reading(self) -> Iterator[Each]:
        """Yield what does a pass over shards."""
        yield here


@dataclass(frozen=True)
class Ray:
    """Workers of a Ray cluster: actors that hold the model write one shard after another, and tasks read them.

    Without an address a cluster is started on this machine, and ended with the run. ``workers``: by default one per
    CPU, or per share of a GPU. Each writer gets the model once, and moves it to its GPU where it has one. A reader has
    as many threads as this process, because the last bits of a product depend on them, and by default there are so many
    times fewer readers.

    Example:
        >>> engine = gs.Ray(workers=4)
        >>> index = gs.build_index("runs/facts", model, task, "facts.jsonl", engine=engine)  # doctest: +SKIP
        >>> hits = index.query(model, ["Paris is"], engine=engine)                           # doctest: +SKIP

    Raises:
        InputError: Ray is not installed, the cluster has no room for a worker, or readers were given GPUs.
        StoreError: a shard ended three workers.
    """

    workers: int | None = None
    gpus_per_worker: float = 0.0
    address: str | None = None

    def write(self, build: Build, number: int, writer: ShardWriter, shards: Iterable[Shard], on: Advance) -> None:
        """Write some shards of a checkpoint; ``on`` hears of rows done."""
        pending = deque(shards)
        if pending:
            with self._cluster() as ray:
                _Pool(ray, self, build, number).write(pending, on)

    @contextmanager
    def reading(self) -> Iterator[Each]:
        """Yield what does a pass over shards: tasks, each of which does one part."""
        if self.gpus_per_worker:
            raise InputError(
                f"gpus_per_worker={self.gpus_per_worker:g} for reading shards, which CPUs do",
                "workers without GPUs",
                "Leave out gpus_per_worker (--gpus-per-worker) here",
            )
        with self._cluster() as ray:
            yield _Tasks(ray, self.count(ray, threads=torch.get_num_threads()))

    @contextmanager
    def _cluster(self) -> Iterator[Any]:
        try:
            import ray
        except ImportError as error:
            raise InputError("no module named ray", "Ray", "Run pip install 'gradsketch[ray]'") from error
        own = not ray.is_initialized()
        if own:
            self._begin(ray)
        try:
            yield ray
        finally:
            if own:
                ray.shutdown()

    def _begin(self, ray: Any) -> None:
        options = self.options()
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if "address" not in options:
                raise
            raise InputError(
                f"no Ray cluster at {options['address']} ({error})", "a cluster that runs", "Look at it with ray status"
            ) from error

    def options(self) -> dict[str, Any]:
        """Return what a cluster is found, or started, with."""
        address = self.address or os.environ.get("RAY_ADDRESS")
        if address:
            return {"address": address}
        # By default Ray's workers run when nobody else wants the processor, and end where they take a minute to start.
        # Beside other work they then start again and again, and never come to their own.
        patient = {"worker_niceness": 0, "worker_register_timeout_seconds": 600}
        return {"num_cpus": self.workers, "include_dashboard": False, "_system_config": patient}

    def count(self, ray: Any, threads: int = 1) -> int:
        """Return how many workers the cluster has room for."""
        kind, share = ("GPU", self.gpus_per_worker) if self.gpus_per_worker else ("CPU", 1)
        room = int(ray.cluster_resources().get(kind, 0) / share)
        wanted = min(room, max(1, room // threads)) if self.workers is None else self.workers
        if not 0 < wanted <= room:
            raise InputError(
                f"a cluster with room for {room} workers of {share:g} {kind} each, where {wanted} were asked for",
                "room for every worker",
                "Pass fewer workers or a smaller gpus_per_worker, or add machines",
            )
        return wanted


Engine = Local | Ray


class _Worker:
    """What an actor holds: a build, and the checkpoint whose weights its model has."""

    def prepare(
        self, kind: Any, arguments: dict[str, Any], number: int, name: int, on_gpu: bool, directory: str
    ) -> int:
        _stand_in(directory)
        if on_gpu:
            arguments["model"].to("cuda")
        self.build, self.number = kind(**arguments, worker=(name, name + 1), progress=False), number
        _require_seen(self.build.folder)
        self.writer = ExitStack().enter_context(self.build.writer(number))
        return 0

    def write(self, start: int, count: int) -> int:
        self.writer.write(start, count)
        self.build.note(self.writer.audits, self.number)
        return count


def _stand_in(directory: str) -> None:
    """Go where the driver stands, so that its relative paths hold; a machine may lack that directory."""
    with suppress(OSError):
        os.chdir(directory)


def _require_seen(folder: Folder) -> None:
    """Refuse a machine on which an index would be begun that the driver never sees."""
    if not folder.has(MANIFEST_NAME):
        raise StoreError(
            f"{folder.uri}, where a worker on {platform.node()} finds no index",
            "a folder that all machines share",
            "Put the index on a shared disk or in an object store, as s3://bucket/index",
        )


class _Pool:
    """Actors, each with one shard at a time."""

    def __init__(self, ray: Any, engine: Ray, build: Build, number: int) -> None:
        self.ray, self.engine, self.kind, self.number = ray, engine, type(build), number
        self.actor = ray.remote(num_cpus=1, num_gpus=engine.gpus_per_worker, max_restarts=0)(_Worker)
        self.arguments = ray.put(build.arguments)  # the model is sent once to each machine
        self.begun, self.directory = 0, os.getcwd()

    def write(self, pending: deque[Shard], on: Advance) -> None:
        """Write the shards; an actor that dies is replaced, and what it was at is made again."""
        deaths = _Deaths()
        running: dict[Any, tuple[Any, Shard | None]] = {}  # None while an actor prepares
        for _ in range(min(self.engine.count(self.ray), len(pending))):
            running |= self._begun()
        while running:
            [done], _ = self.ray.wait(list(running), num_returns=1)
            actor, shard = running.pop(done)
            try:
                on(self.ray.get(done))
            except self.ray.exceptions.RayTaskError as error:
                raise _own_error(error) from error
            except self.ray.exceptions.RayActorError as error:
                if shard is not None:
                    pending.appendleft(shard)
                deaths.add(shard, error)
                running |= self._begun()
                continue
            if shard is None:
                deaths.begun()
            if pending:
                shard = pending.popleft()
                running[actor.write.remote(*shard)] = (actor, shard)

    def _begun(self) -> dict[Any, tuple[Any, Shard | None]]:
        self.begun += 1
        actor, on_gpu = self.actor.remote(), bool(self.engine.gpus_per_worker)
        ready = actor.prepare.remote(self.kind, self.arguments, self.number, self.begun, on_gpu, self.directory)
        return {ready: (actor, None)}


class _Tasks:
    """Tasks that do the parts of a pass, so many at once; one whose worker dies is begun again."""

    def __init__(self, ray: Any, count: int) -> None:
        self.ray, self.count, self.threads, self.directory = ray, count, torch.get_num_threads(), os.getcwd()
        self.task = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(_done)

    def __call__(self, work: Callable[[Part], T], parts: Sequence[Part], /) -> Iterator[T]:
        """Yield what is done of each part, in order; while one is waited for, others go on."""
        sent = self.ray.put(work)  # once to each machine
        ordered: deque[Any] = deque()
        running: list[Any] = []
        for part in parts:
            while len(running) >= self.count:
                _, running = self.ray.wait(running, num_returns=1)
            running.append(self.task.remote(sent, part, self.threads, self.directory))
            ordered.append(running[-1])
            while ordered[0] not in running or len(ordered) > _AHEAD * self.count:
                yield self._got(ordered.popleft())
        while ordered:
            yield self._got(ordered.popleft())

    def _got(self, result: Any) -> Any:
        try:
            return self.ray.get(result)
        except self.ray.exceptions.RayTaskError as error:
            raise _own_error(error) from error
        except self.ray.exceptions.RayError as error:
            raise StoreError(
                f"a part of the pass over the shards ended its workers: {str(error).strip().splitlines()[0]}",
                "workers that live through it",
                "Look at Ray's logs; where memory ran out, pass fewer workers",
            ) from error


def _done(work: Callable[[Part], T], part: Part, threads: int, directory: str) -> T:
    _stand_in(directory)
    torch.set_num_threads(threads)
    return work(part)


def _own_error(error: Any) -> Exception:
    """Return what a worker raised, where it is an error of this library, or one that says what it was."""
    if isinstance(error.cause, GradsketchError):
        return error.cause
    reason = f"{type(error.cause).__name__}: {str(error.cause).strip().splitlines()[0]}"
    return StoreError(
        f"a worker ended with {reason}",
        "workers that can import and run what this process can",
        "Install the same packages on every machine, and keep the task's class in a module",
    )


class _Deaths:
    """How many workers each shard has ended, and how many ended in a row while they started."""

    def __init__(self) -> None:
        self.counts: Counter[Shard | None] = Counter()

    def begun(self) -> None:
        """Note that workers do start here: in a long run, machines that were lost meanwhile add up."""
        self.counts[None] = 0

    def add(self, shard: Shard | None, error: Exception) -> None:
        """Note a death at a shard, or at the start.

        Raises:
            StoreError: it was one too many, so that what the worker was at is at fault itself.
        """
        self.counts[shard] += 1
        if self.counts[shard] >= _TRIES:
            at = "starting" if shard is None else f"the shard of rows {shard[0]} to {shard[0] + shard[1] - 1}"
            raise StoreError(
                f"{at} ended {self.counts[shard]} workers: {str(error).splitlines()[0]}",
                "workers that live through every shard",
                "Look at Ray's logs; where memory ran out, pass a smaller shard_rows or batch_tokens, or fewer workers",
            ) from error
