"""What decides a number is told apart, and is told alike in every process."""

import functools
import os
import subprocess
import sys
from array import array
from pathlib import Path

import pytest
import torch
from PIL import Image

import gradsketch as gs
from gradsketch.gradients.data import Batches
from gradsketch.gradients.fingerprints import code_digest, data_facts, digest, model_facts, modes_digest, task_facts


def closed_over(value):
    return lambda x: x * value


def countdown(n):
    def recursive(x):
        return x if n == 0 else recursive(x)

    return recursive


def default(x, scale=2):
    return x * scale


def other_default(x, scale=3):
    return x * scale


class Scorer:
    def score(self, x):
        return x

    def other(self, x):
        return x + 1


FUNCTIONS = [
    lambda x: x * 2,
    lambda x: x * 3,
    lambda x: x.abs(),
    lambda x: x.exp(),
    lambda x: [y * 2 for y in x],
    lambda x: [y * 3 for y in x],
    lambda x: x in {"a", "b"},
    closed_over(2),
    closed_over(2.5),
    closed_over(torch.ones(2)),
    closed_over(torch.ones(3)),
    closed_over(closed_over(1)),
    closed_over(closed_over(2)),
    countdown(1),
    countdown(2),
    default,
    other_default,
    functools.partial(default, scale=4),
    functools.partial(default, scale=5),
    functools.partial(other_default, scale=5),
    Scorer().score,
    Scorer().other,
    torch.nn.functional.relu,
    Scorer(),
]


def test_functions_that_compute_other_things_have_other_digests():
    digests = [code_digest(f) for f in FUNCTIONS]
    assert len(set(digests)) == len(digests)
    assert digests == [code_digest(f) for f in FUNCTIONS]


def test_what_changes_while_a_function_works_is_left_out():
    calls = []
    counting = closed_over(calls)
    before = code_digest(counting)
    calls.append(1)
    assert code_digest(counting) == before


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
from gradients.test_fingerprints import FUNCTIONS, Example
from gradsketch.gradients.fingerprints import code_digest, digest
print([code_digest(f) for f in FUNCTIONS], digest(Example(1)), digest({"b": 1, "a": [None, "x", 2.5]}))
print(digest({"a", "b", "c"}))
"""


class Example:
    def __init__(self, value):
        self.x, self.name = torch.full((2,), float(value)), "an example"


def test_digests_are_the_same_in_every_process():
    tests = Path(__file__).parents[1]

    def told(seed):
        environment = os.environ | {"PYTHONPATH": str(tests.parent / "src"), "PYTHONHASHSEED": seed}
        return subprocess.check_output([sys.executable, "-c", PROGRAM, str(tests)], env=environment, text=True)

    assert told("1") == told("2")


@pytest.mark.parametrize(
    "change",
    [lambda e: e[:-1], lambda e: e[::-1], lambda e: [(e[0][0] + 1, 0), *e[1:]], lambda e: [(e[0][0], 1), *e[1:]]],
    ids=["fewer", "order", "input", "label"],
)
def test_the_content_of_data_is_told_apart(change):
    examples = [(torch.arange(3.0) + i, i % 2) for i in range(4)]
    task = gs.Classification()
    facts = data_facts(Batches(task, examples))
    assert facts == data_facts(Batches(task, list(examples), 2))  # also in smaller batches
    assert facts != data_facts(Batches(task, change(examples)))
    loaders = [torch.utils.data.DataLoader(e, batch_size=2) for e in (examples, examples, change(examples))]
    same, again, other = (data_facts(Batches(task, loader)) for loader in loaders)
    assert same == again != other
    assert data_facts(Batches(task, (torch.ones(2, 3),))) != data_facts(Batches(task, (torch.zeros(2, 3),)))


def picture(width, height):
    return Image.frombytes("L", (width, height), bytes(range(8)))


def test_values_are_told_apart():
    """Bytes were hashed as their text, at a fortieth of the speed; pictures without their shape."""
    values = [
        b"x",
        "b'x'",
        ["x"],
        [b"x"],
        '["x"]',
        {"x"},
        ["1"],
        [1],
        [1.0],
        [True],
        [None],
        [],
        [[]],
        [[1], 1],
        [1, [1]],
    ]
    values += [b"", "", picture(2, 4), picture(4, 2), picture(2, 4).tobytes(), array("b", b"1"), array("B", b"1")]
    digests = [digest(value) for value in values]
    assert len(set(digests)) == len(digests)
    assert digest([1, "x"]) == digest((1, "x"))
    assert digest(b"x") == digest(bytearray(b"x")) == digest(memoryview(b"x"))


def test_objects_are_known_by_what_they_hold():
    assert digest(Example(1)) == digest(Example(1)) != digest(Example(2))


def test_models_are_told_apart_by_every_tensor_and_mode():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    seen = {str(model_facts(model))}
    for tensor in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            tensor.view(-1)[0] += 1
        seen.add(str(model_facts(model)))
    assert len(seen) == 1 + 4 + 3
    modes = [modes_digest(model.train()), modes_digest(model.eval())]
    model[1].train()
    assert modes == ["train", "eval"]
    assert modes_digest(model) not in modes


def test_a_model_open_in_a_subspace_is_known_by_what_its_modules_read():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    at_rest, parameters = model_facts(model), gs.Parameters(model)
    with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 5)) as subspace:
        assert model_facts(model) == at_rest
        with torch.no_grad():
            subspace.w.fill_(0.5)
        moved = model_facts(model)
        assert moved != at_rest
        subspace.merge()
    assert model_facts(model) == moved


def test_tasks_are_told_apart_by_options_and_code():
    tasks = [gs.Classification(), gs.Classification(max_length=5), gs.CausalLM()]
    tasks += [gs.Function(FUNCTIONS[0]), gs.Function(FUNCTIONS[1])]
    assert len({str(task_facts(task)) for task in tasks}) == len(tasks)


def test_maps_are_told_apart():
    model, task, data = torch.nn.Linear(3, 2), gs.Classification(), [(torch.ones(3), 1), (torch.zeros(3), 0)]
    G, F = (make(model, task, data) for make in (gs.gauss_newton, gs.fisher))
    H, differences = (gs.hessian(model, task, data, mode=mode) for mode in ("auto", "central-difference"))
    phi, psi = gs.AFFD(8, 4), gs.AFFD(8, 4, seed=1)
    maps = [
        H,
        G,
        F,
        differences,
        2.0 * H,
        2.0 * (2.0 * H),
        H + G,
        G + F,
        phi,
        psi,
        phi.T,
        phi @ H @ phi.T,
        psi @ H @ psi.T,
    ]
    assert len({str(m.facts()) for m in maps}) == len(maps)
    H(torch.ones(8))
    assert H.facts() == gs.hessian(model, task, data).facts()
