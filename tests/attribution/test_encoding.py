"""A text is tokenised once a build and once a query, whatever passes over it."""

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.attribution import parts as parts_module
from gradsketch.attribution.build import Build, build_index
from gradsketch.attribution.index import Index

D = 64
TEXTS = [text * (1 + i % 3) for i, text in enumerate(toys.texts(20))]


@pytest.fixture
def counting():
    return gs.CausalLM(toys.Counting())


def build(path, task, data=TEXTS, **options):
    return build_index(path, toys.TinyLM(), task, data, **({"d": D, "shard_rows": 8, "progress": False} | options))


def sketches(index):
    return torch.cat([shard.decoded() for shard in index.stores[0]])


def test_once_a_build(tmp_path, counting):
    """Checking, batching by length and collating share one reading."""
    build(tmp_path, counting, batch_tokens=100)
    assert counting.tokenizer.seen == TEXTS


def test_a_plan_reads_a_few_rows_spread_over_the_data(tmp_path, counting):
    many = [f"{text} {i}" for i in range(200) for text in TEXTS]
    plan = Build(tmp_path, toys.TinyLM(), counting, many, d=D).plan()
    assert len(counting.tokenizer.seen) == plan.sampled == 256
    assert {many.index(text) // 500 for text in counting.tokenizer.seen} == set(range(8))
    assert plan.tokens == pytest.approx(sum(map(len, many)), rel=0.05)
    assert f"about {plan.tokens:,} tokens (from 256 rows)" in str(plan)


def two_states():
    later = toys.TinyLM()
    with torch.no_grad():
        later.head.weight += 0.1
    return [toys.TinyLM().state_dict(), later.state_dict()]


def test_once_a_build_of_several_checkpoints(tmp_path, counting):
    build(tmp_path, counting, checkpoints=two_states())
    assert counting.tokenizer.seen == TEXTS


def test_once_a_resumed_build(tmp_path, counting):
    index = build(tmp_path, toys.language_task())
    before = sketches(index)
    (tmp_path / "checkpoint-0/part-000000000008-000008.arrow").unlink()
    assert torch.equal(sketches(build(tmp_path, counting)), before)
    assert (
        counting.tokenizer.seen == TEXTS[8:16] + TEXTS[:8]
    )  # what is missing, and eight rows whose losses are compared


def test_once_a_query(tmp_path, counting):
    states = two_states()
    build(tmp_path, toys.language_task(), checkpoints=states)
    Index.open(tmp_path, task=counting, checkpoints=states).query(toys.TinyLM(), TEXTS[:3], opponents=2)
    assert counting.tokenizer.seen == [*TEXTS[:3], TEXTS[0]]  # and a row whose loss is compared


def test_rows_beyond_the_memory_kept_for_them_are_read_again(tmp_path, counting, monkeypatch):
    """For every further checkpoint."""
    whole = build(tmp_path / "a", toys.language_task(), checkpoints=two_states())
    monkeypatch.setattr(parts_module, "_KEPT_BYTES", 4000)
    index = build(tmp_path / "b", counting, checkpoints=two_states())
    assert torch.equal(sketches(index), sketches(whole))
    assert counting.tokenizer.seen[:20] == TEXTS
    again = counting.tokenizer.seen[20:]
    assert again == TEXTS[-len(again) :]
    assert 0 < len(again) < 20


class Reversed(gs.CausalLM):
    """A collate of its own, which expects raw texts."""

    def collate(self, examples):
        return super().collate([text[::-1] for text in examples])


class Chat(gs.CausalLM):
    """An encode of its own over the inherited one."""

    def encode(self, example):
        return super().encode(f"user: {example}")


class Plain(gs.Task):
    """Neither encode nor collate: losses alone, and a length that wants the raw example."""

    def losses(self, model, batch):
        return toys.vector_task().losses(model, batch)

    def length(self, example):
        return len(example["x"])


@pytest.mark.parametrize("kind", [Reversed, Chat])
def test_tasks_that_build_on_another(tmp_path, kind):
    task = kind(toys.Counting())
    index = build(tmp_path, task, dtype="float32")
    model, phi = toys.TinyLM().eval(), gs.BlockSum(gs.Parameters(toys.TinyLM()), D)
    alone = [gs.sketch_gradients(model, task, task.collate([text]), phi) for text in TEXTS]
    torch.testing.assert_close(sketches(index), torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert index.query(model, TEXTS[4], k=1, score="cosine")[0][0].score == pytest.approx(1, abs=1e-4)


def test_a_task_of_losses_and_length_alone(tmp_path):
    data = toys.vectors(10)
    rows = [{"x": x, "labels": label} for x, label in zip(data["x"], data["labels"], strict=True)]
    index = build_index(tmp_path, toys.classifier(), Plain(), rows, d=40, dtype="float32", progress=False)
    expected = build_index(tmp_path / "b", toys.classifier(), toys.vector_task(), rows, d=40, dtype="float32")
    assert torch.equal(sketches(index), sketches(expected))
    assert Build(tmp_path / "c", toys.classifier(), Plain(), rows, d=40).plan().tokens == 60
