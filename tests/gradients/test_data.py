"""Batches: every example once, within the budget, however memory behaves."""

from collections import namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from gradsketch import CausalLM, Function, InputError
from gradsketch.gradients.data import Batcher, Batches, batch_length, batch_slice, to_device

TASK = Function(lambda model, batch: batch)
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def _examples(lengths):
    return [{"input_ids": [place + 1] * length} for place, length in enumerate(lengths)]


@given(LENGTHS, st.integers(1, 100), st.integers(1, 10))
def test_groups_hold_every_example_once_within_the_budget(lengths, tokens, examples):
    batcher = Batcher(CausalLM(), tokens=tokens, examples=examples)
    done = list(batcher.map(lambda batch: batch["input_ids"], _examples(lengths)))
    assert sorted(place for places, _ in done for place in places) == list(range(len(lengths)))
    assert all([place + 1 for place in places] == ids[:, 0].tolist() for places, ids in done)
    assert all(len(ids) <= examples and (len(ids) == 1 or ids.numel() <= tokens) for _, ids in done)
    longest_first = [lengths[place] for places, _ in done for place in places]
    assert longest_first == sorted(longest_first, reverse=True)


@settings(max_examples=10, deadline=None)  # each failure collects garbage
@given(LENGTHS, st.integers(40, 200))
def test_backs_off_until_it_fits(lengths, memory):
    """Work that takes only ``memory`` tokens at once: every example is done once, and the budget is learnt."""
    failures = []

    def work(batch):
        if batch["input_ids"].numel() > memory:
            failures.append(batch["input_ids"].numel())
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch["input_ids"][:, 0]

    batcher = Batcher(CausalLM(), tokens=10_000)
    done = list(batcher.map(work, _examples(lengths)))
    assert all([place + 1 for place in places] == rows.tolist() for places, rows in done)
    assert sorted(place for places, _ in done for place in places) == list(range(len(lengths)))
    assert len(failures) <= 7  # log2(64 examples of 40 tokens / 40) + 1
    before = len(failures)
    list(batcher.map(work, _examples(lengths)))
    assert len(failures) == before or batcher.tokens > memory


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_every_kind_of_exhausted_memory(error):
    def work(batch):
        if len(batch) > 2:
            raise error
        return len(batch)

    assert sum(count for _, count in Batcher(TASK).map(work, list(range(7)))) == 7


def test_nothing_of_a_failed_attempt_is_kept():
    import weakref

    kept = []

    def work(batch):
        kept.append(weakref.ref(batch))
        if len(batch) > 1:
            raise torch.OutOfMemoryError
        assert kept[0]() is None

    assert len(list(Batcher(TASK).map(work, [1.0, 2.0]))) == 2


def test_one_example_that_never_fits():
    def work(batch):
        raise torch.OutOfMemoryError

    with pytest.raises(InputError, match="example 1 of 9 tokens does not fit"):
        list(Batcher(CausalLM()).map(work, _examples([3, 9])))


def test_other_errors_pass_and_bad_examples_are_named():
    def work(batch):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(Batcher(TASK).map(work, [1, 2]))
    with pytest.raises(InputError, match="example 1: "):
        list(Batcher(CausalLM()).map(work, [{"input_ids": [1, 2]}, {"input_ids": []}]))
    for tokens in (0, -1, True):
        with pytest.raises(InputError, match="tokens="):
            Batcher(TASK, tokens=tokens)


def test_batches_are_the_same_at_every_pass():
    data = [torch.tensor([float(i)]) for i in range(5)]
    batches = Batches(TASK, data, batch_size=2)
    assert len(batches) == 3
    assert torch.equal(torch.cat(list(batches)), torch.cat(list(batches)))
    assert torch.cat(list(batches)).flatten().tolist() == [0, 1, 2, 3, 4]
    loader = DataLoader(data, batch_size=2)
    assert torch.equal(torch.cat(list(Batches(TASK, loader))), torch.cat(list(batches)))
    assert [batch is data[0] for batch in Batches(TASK, data[0])] == [True]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ((i for i in range(3)), "only once"),
        ([], "yields nothing"),
        (DataLoader([1, 2, 3], shuffle=True), "RandomSampler"),
    ],
)
def test_bad_data(data, words):
    with pytest.raises(InputError, match=words):
        Batches(TASK, data)


def test_nested_batches():
    Pair = namedtuple("Pair", "x y")
    batch = {"a": torch.arange(6).view(3, 2), "b": Pair(torch.arange(3), [torch.ones(3)]), "name": "kept"}
    assert batch_length(batch) == 3
    part = batch_slice(to_device(batch, "cpu"), 1, 3)
    assert part["a"].tolist() == [[2, 3], [4, 5]]
    assert part["b"].x.tolist() == [1, 2]
    assert part["name"] == "kept"
    with pytest.raises(InputError, match=r"first dims are \[2, 3\]"):
        batch_length((torch.ones(2), torch.ones(3)))
    with pytest.raises(InputError, match="without a tensor"):
        batch_length({"a": "b"})
