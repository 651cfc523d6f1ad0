"""Building: the right rows in the right order, whatever happens on the way."""

import inspect
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution.build import Build, build_index
from gradsketch.attribution.index import Index
from gradsketch.errors import FingerprintError, InputError, NonFiniteError, StoreError
from gradsketch.gradients.data import batch_slice
from gradsketch.store import verify

SRC = Path(__file__).parents[2] / "src"
D = 128


def build(path, data, *, model=None, task=None, **options):
    model, task = model or toys.TinyLM(), task or toys.language_task()
    return build_index(path, model, task, data, **({"d": D, "progress": False, "dtype": "float32"} | options))


def sketches(index, number=0):
    return torch.cat([shard.decoded() for shard in index.stores[number]])


def exact_sketches(data, model=None, task=None):
    """Each example alone, by the engine's own route for any sketch."""
    model, task = (model or toys.TinyLM()).eval(), task or toys.language_task()
    phi = gs.BlockSum(gs.Parameters(model), D)
    return torch.cat([gs.sketch_gradients(model, task, task.collate([x]), phi, method="loop") for x in data])


def test_rows_are_the_examples_sketches_in_order(tmp_path):
    data = [text * (1 + i % 3) for i, text in enumerate(toys.texts(30))]
    index = build(tmp_path, data, shard_rows=8, batch_tokens=200)
    torch.testing.assert_close(sketches(index), exact_sketches(data), rtol=1e-4, atol=1e-5)
    assert [r["text"] for r in index.stores[0].records(range(30))] == data
    model, task = toys.TinyLM().eval(), toys.language_task()
    losses = torch.cat([task.losses(model, task.collate([text])) for text in data]).detach()
    torch.testing.assert_close(torch.cat([s.numbers("loss") for s in index.stores[0]]), losses)


def test_every_form_of_data_gives_the_same_rows(tmp_path):
    records = [{"text": text, "n": i, "tags": ["é", i]} for i, text in enumerate(toys.texts(12))]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in records), encoding="utf-8")
    (tmp_path / "texts").mkdir()
    for i, record in enumerate(records):
        (tmp_path / f"texts/{i:02}.txt").write_text(record["text"], encoding="utf-8")

    class Dataset:
        def __len__(self):
            return len(records)

        def __getitem__(self, i):
            return records[i]

    forms = [records, tmp_path / "data.jsonl", str(tmp_path / "texts"), Dataset(), toys.texts(12)]
    built = [build(tmp_path / f"index-{i}", form) for i, form in enumerate(forms)]
    for index in built:
        assert torch.equal(sketches(index), sketches(built[0]))
    assert built[1].stores[0].columns() == {"text": {"string"}, "n": {"int"}, "tags": {"json"}}
    assert built[1].stores[0].records([3])[0]["tags"] == ["é", 3]


def test_tensors_as_data(tmp_path):
    data, model, task = toys.vectors(20), toys.classifier(), toys.vector_task()
    index = build_index(tmp_path, model, task, data, d=40, dtype="float32", progress=False)
    phi = gs.BlockSum(gs.Parameters(model), 40)
    expected = torch.cat(
        [gs.sketch_gradients(model, task, batch_slice(data, i, i + 1), phi, method="loop") for i in range(20)]
    )
    torch.testing.assert_close(sketches(index), expected, rtol=1e-4, atol=1e-6)


def test_columns_of_mixed_types(tmp_path):
    rows = [{"text": "ab", "id": "x", "a": 1, "b": 1, "loss": 0.5}, {"text": "cd", "a": 0.5, "b": "two", "c": None}]
    index = build(tmp_path, rows)
    assert index.stores[0].columns() == {
        "text": {"string"}, "a": {"float"}, "b": {"json"}, "data_loss": {"float"}, "c": {"null"},
    }  # fmt: skip
    first, second = index.stores[0].records([0, 1])
    assert (first["id"], first["a"], first["b"], first["data_loss"]) == ("x", 1.0, 1, 0.5)
    assert (second["id"], second["b"], second["c"]) == ("1", "two", None)


def test_evaluation_mode_and_the_model_left_as_found(tmp_path):
    model = toys.TinyLM().train()
    model.norm.eval()
    modes = [m.training for m in model.modules()]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    index = build(tmp_path, toys.texts(5), model=model)
    torch.testing.assert_close(sketches(index), exact_sketches(toys.texts(5)), rtol=1e-4, atol=1e-5)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class CausalLM(gs.CausalLM):
    """Raises at the n-th batch, as Ctrl-C would; of the same name, so that its facts are those of the other task."""

    def __init__(self, batches):
        super().__init__(toys.Characters())
        self.batches = batches

    def losses(self, model, batch):
        self.batches -= 1
        if self.batches < 0:
            raise KeyboardInterrupt
        return super().losses(model, batch)


@pytest.mark.parametrize("batches", [0, 3, 8, 12])
def test_an_interrupted_build_goes_on_where_it_stopped(tmp_path, batches):
    data = toys.texts(40)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "a", data, task=CausalLM(batches), shard_rows=8, batch_tokens=100)
    files = sorted((tmp_path / "a").rglob("*.arrow"))
    times = [file.stat().st_mtime_ns for file in files]
    assert len(files) < 5
    index = build(tmp_path / "a", data, shard_rows=8, batch_tokens=100)
    assert [file.stat().st_mtime_ns for file in files] == times  # finished shards were not made again
    whole = build(tmp_path / "b", data, shard_rows=8, batch_tokens=100)
    torch.testing.assert_close(sketches(index), sketches(whole), rtol=1e-5, atol=1e-6)
    assert verify(index.stores[0]).sound


KILLED = """
    import os, signal, sys, time, random
    sys.path.insert(0, sys.argv[1])
    import torch, toys
    from gradsketch.attribution.build import build_index
    from gradsketch.store import Store, verify
    path, kills = sys.argv[2], int(sys.argv[3])
    model, task = toys.TinyLM(), toys.language_task()

    def run():
        build_index(path, model, task, toys.texts(60), d=64, shard_rows=4, progress=False)

    def shards():
        folder = os.path.join(path, "checkpoint-0")
        return len([n for n in os.listdir(folder) if n.endswith(".arrow")]) if os.path.isdir(folder) else 0

    run()                                    # imports and allocates everything once
    os.rename(path, path + "-whole")
    random.seed(0)
    for _ in range(kills):
        before, pid = shards(), os.fork()
        if pid == 0:
            try:
                run()
            finally:
                os._exit(0)
        deadline = time.monotonic() + 10
        while shards() == before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.02))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        found = verify(Store.open(os.path.join(path, "checkpoint-0")))
        assert not found.damaged, str(found)
    run()
    whole, killed = (Store.open(os.path.join(p, "checkpoint-0")) for p in (path + "-whole", path))
    assert verify(killed).sound and killed.missing() == []
    for a, b in zip(whole, killed, strict=True):
        assert a.column("id") == b.column("id") and a.column("text") == b.column("text")
        torch.testing.assert_close(a.decoded(), b.decoded(), rtol=2e-3, atol=1e-4)
"""


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_builds_lose_nothing(tmp_path, kills):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(Path(__file__).parent), str(tmp_path / "i"), str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_an_index_in_an_object_store(tmp_path, monkeypatch):
    """Built, resumed, asked and verified at a URI, with no local file but the cache."""
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem()
    monkeypatch.setenv("GRADSKETCH_CACHE", str(tmp_path / "cache"))
    uri, data = "fsspec+memory://bucket/facts", toys.texts(20)
    build(uri, data, shard_rows=8)
    memory.rm("/bucket/facts/checkpoint-0/part-000000000008-000008.arrow")
    index = build(uri, data, shard_rows=8)
    assert torch.equal(sketches(index), sketches(build(tmp_path / "local", data, shard_rows=8)))
    assert verify(index.stores[0]).sound
    hit = Index.open(uri, task=toys.language_task()).query(toys.TinyLM(), data[7], k=1)[0][0]
    assert (hit.row, hit.text) == (7, data[7])
    with pytest.raises(FingerprintError, match="seed is now 1"):
        build(uri, data, shard_rows=8, seed=1)
    memory.rm("/", recursive=True)


def test_workers_share_the_work(tmp_path):
    data = toys.texts(40)
    for i in (1, 0):
        options = {"shard_rows": 8, "progress": False, "d": D, "dtype": "float32"}
        index = build_index(tmp_path, toys.TinyLM(), toys.language_task(), data, worker=(i, 2), **options)
        done = [start for start, _ in index.stores[0].ranges()]
        assert done == ([8, 24] if i == 1 else [0, 8, 16, 24, 32])
    torch.testing.assert_close(sketches(index), exact_sketches(data), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="worker"):
        build(tmp_path, data, worker=(2, 2))


def changed_model():
    model = toys.TinyLM()
    with torch.no_grad():
        model.head.weight[0, 0] += 1e-3
    return model


CHANGES = {
    "data": ({"data": [*toys.texts(19), "another text"]}, "data"),
    "one row less": ({"data": toys.texts(19)}, "rows is now 19"),
    "model": ({"model": changed_model()}, "weights"),
    "task": ({"task": toys.language_task(reduction="sum")}, '"reduction": "sum"'),
    "seed": ({"seed": 1}, "seed is now 1"),
    "d": ({"d": 64}, "d is now 64"),
    "dtype": ({"dtype": "int8"}, "dtype is now"),
    "parameters": ({"parameters": "head.*"}, "parameters is now"),
    "checkpoints": ({"weights": [2.0]}, "checkpoints is now"),
    "columns": ({"data": [{"text": t, "n": 1} for t in toys.texts(20)]}, "data is now"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_going_on_with_something_else_is_refused(tmp_path, change):
    """Also where the index is finished: nothing is written, and the message names the difference."""
    index = build(tmp_path, toys.texts(20), shard_rows=8)
    (tmp_path / "checkpoint-0/part-000000000008-000008.arrow").unlink()
    options, message = CHANGES[change]
    with pytest.raises(FingerprintError) as error:
        build(tmp_path, **({"data": toys.texts(20), "shard_rows": 8} | options))
    assert message in str(error.value)
    assert len(index.stores[0].ranges()) == 2


def test_a_changed_file_is_refused(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("\n".join(toys.texts(20)))
    build(tmp_path / "index", file, shard_rows=8)
    (tmp_path / "index/checkpoint-0/part-000000000008-000008.arrow").unlink()
    file.write_text("\n".join(toys.texts(20)).replace("361", "362"))  # the last row, which is indexed already
    with pytest.raises(FingerprintError, match="data is now"):
        build(tmp_path / "index", file, shard_rows=8)


class TestBadRows:
    ROWS = ('{"text": "one"}', "not json", '{"text": "two"}', '{"text": ""}', '{"text": "three"}')

    @pytest.fixture
    def file(self, tmp_path):
        (tmp_path / "data.jsonl").write_text("\n".join(self.ROWS))
        return tmp_path / "data.jsonl"

    def test_are_listed_by_line(self, tmp_path, file):
        with pytest.raises(InputError, match=r"2 of 5 rows.*data\.jsonl, line 2.*data\.jsonl, line 4.*skip_bad"):
            build(tmp_path / "index", file)
        assert not (tmp_path / "index").exists()

    def test_are_left_out_on_request(self, tmp_path, file):
        index = build(tmp_path / "index", file, skip_bad=True)
        assert [r["text"] for r in index.stores[0].records(range(5))] == ["one", None, "two", None, "three"]
        assert [hit.id for hit in index.query(toys.TinyLM(), "one", k=5)[0]] == ["0", "4", "2"]
        assert list(index.left_out) == [1, 3]
        assert index.left_out[1].startswith("data.jsonl, line 2: ")
        assert "an empty text" in index.left_out[3]

    def test_a_gradient_that_is_not_finite(self, tmp_path):
        data, model = toys.vectors(8), toys.classifier()
        data["x"][5, 2] = float("nan")
        options = {"task": toys.vector_task(), "model": model, "d": 40}
        with pytest.raises(NonFiniteError, match="example 5: its"):
            build(tmp_path / "a", data, **options)
        index = build(tmp_path / "a", data, skip_bad=True, **options)
        hits = index.query(model, {k: v[:1] for k, v in data.items()}, k=8)
        assert sorted(hit.row for hit in hits[0]) == [0, 1, 2, 3, 4, 6, 7]
        assert torch.isnan(index.self_influence().values).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(tmp_path, rows):
    index = build(tmp_path, toys.texts(rows))
    assert len(index) == rows
    for score in ("ridge", "influence", "cosine", "dot"):
        hits = index.query(toys.TinyLM(), "the number 0 squared is 0", score=score)
        assert [hit.row for hit in hits[0]] == list(range(rows))
    assert len(index.self_influence().ids) == rows


def test_long_and_foreign_texts_and_duplicate_ids(tmp_path):
    rows = [{"text": "長い文" * 33_334, "id": "same"}, {"text": "Übung 🙂", "id": "same"}]
    index = build(tmp_path, rows, task=toys.language_task(max_length=20))
    hits = index.query(toys.TinyLM(), [{"text": "Übung 🙂"}], k=5)
    assert [hit.id for hit in hits[0]] == ["same", "same"]
    assert hits[0][0].text == "Übung 🙂"
    assert len(hits[0][1].text) == 100_002


class TestCheckpoints:
    def states(self):
        model, states = toys.TinyLM(), []
        for i in range(3):
            with torch.no_grad():
                model.mix.weight.add_(0.1 * i)
            states.append({n: t.clone() for n, t in model.state_dict().items()})
        return states

    def test_each_has_its_own_sketches(self, tmp_path):
        model, states = toys.TinyLM(), self.states()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        index = build(tmp_path, toys.texts(6), model=model, checkpoints=states, weights=[0.5, 0.25, 2.0])
        for number, state in enumerate(states):
            there = toys.TinyLM()
            there.load_state_dict(state)
            torch.testing.assert_close(
                sketches(index, number), exact_sketches(toys.texts(6), there), rtol=1e-4, atol=1e-5
            )
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())

    def test_from_files(self, tmp_path):
        states = self.states()
        torch.save(states[0], tmp_path / "a.pt")
        safetensors = pytest.importorskip("safetensors.torch")
        (tmp_path / "b").mkdir()
        safetensors.save_file(states[1], tmp_path / "b/model.safetensors")
        paths = [tmp_path / "a.pt", str(tmp_path / "b")]
        from_files = build(tmp_path / "x", toys.texts(6), checkpoints=paths)
        in_memory = build(tmp_path / "y", toys.texts(6), checkpoints=states[:2])
        for number in range(2):
            assert torch.equal(sketches(from_files, number), sketches(in_memory, number))
        opened = Index.open(tmp_path / "x", task=toys.language_task())
        hits = opened.query(toys.TinyLM(), toys.texts(1), score="dot", k=3)
        assert hits[0][0].score == in_memory.query(toys.TinyLM(), toys.texts(1), score="dot", k=3)[0][0].score
        with pytest.raises(InputError, match="in memory"):
            Index.open(tmp_path / "y")

    @pytest.mark.parametrize(
        ("checkpoints", "weights", "message"),
        [
            ([], None, "no checkpoint"),
            ([{"head.weight": torch.zeros(1)}], None, "does not fit"),
            ([{"nothing": torch.zeros(1)}], None, "does not fit"),
            (["/nowhere/at/all.pt"], None, "holds no weights"),
            (None, [1.0, 2.0], "2 weights"),
            (None, [float("nan")], "finite"),
        ],
    )
    def test_bad_ones(self, tmp_path, checkpoints, weights, message):
        model = toys.TinyLM()
        before = {n: t.clone() for n, t in model.state_dict().items()}
        with pytest.raises(InputError, match=message):
            build(tmp_path / "i", toys.texts(3), model=model, checkpoints=checkpoints, weights=weights)
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


class TestPlan:
    def test_says_what_will_be_done_and_touches_nothing(self, tmp_path):
        data = toys.texts(200)
        plan = Build(tmp_path / "i", toys.TinyLM(), toys.language_task(), data, d=1024).plan()
        assert (plan.rows, plan.missing, plan.d) == (200, 200, 1024)
        assert plan.tokens == sum(len(text) for text in data)
        assert plan.seconds > 0
        assert not (tmp_path / "i").exists()
        assert "200 examples" in str(plan)
        build(tmp_path / "i", data, d=1024, dtype="float16")
        size = sum(file.stat().st_size for file in (tmp_path / "i").rglob("*.arrow"))
        assert plan.bytes == pytest.approx(size, rel=0.1)

    def test_a_disk_that_is_too_small_is_refused_before_anything_is_done(self, tmp_path, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 0, 1000))
        with pytest.raises(StoreError, match="1 kB free"):
            build(tmp_path / "i", toys.texts(50))

    def test_progress_is_shown_only_when_asked_for(self, tmp_path, capsys):
        build(tmp_path / "a", toys.texts(5))
        assert capsys.readouterr() == ("", "")
        build(tmp_path / "b", toys.texts(5), progress=True)
        shown = capsys.readouterr()
        assert shown.out == ""
        assert "5 examples" in shown.err
        assert "d=128" in shown.err


@pytest.mark.parametrize(
    ("data", "fix"), [(iter(["a"]), r"list\("), (3, r"list\("), ({"train": ["a"]}, r'data\["train"\]')]
)
def test_data_that_cannot_be_used(tmp_path, data, fix):
    with pytest.raises(InputError, match=fix):
        build(tmp_path, data)


def test_a_path_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        build(tmp_path / "i", tmp_path / "nothing.jsonl")


def test_an_example_that_a_data_set_cannot_read_is_a_bad_row(tmp_path):
    class Damaged(list):
        def __getitem__(self, place):
            if place == 2:
                raise OSError("no such image")
            return super().__getitem__(place)

    data = Damaged(toys.texts(4))
    with pytest.raises(InputError, match=r"1 of 4 rows .*example 2 .*OSError: no such image"):
        build(tmp_path / "a", data)
    assert build(tmp_path / "b", data, skip_bad=True).left_out == {
        2: "example 2: an example that cannot be read (OSError: no such image)"
    }


def test_one_signature():
    """What a build takes is written once."""
    assert inspect.signature(build_index).parameters == inspect.signature(Build).parameters
    with pytest.raises(TypeError, match="shard_row"):
        build_index("x", toys.TinyLM(), toys.language_task(), [], shard_row=3)
