"""The whole product with a model on another device: nothing is mixed with the CPU, and the numbers are the CPU's."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import gradsketch as gs
from contracts.sketch_cases import CASES
from gradsketch.attribution.build import build_index
from gradsketch.attribution.index import Index
from gradsketch.gradients.tasks import Classification
from gradsketch.kernels import trust
from kernels.pretend_device import DEVICE, MixedError, OnDevice, bare, moved, pretend_device
from kernels.test_kernel_trust import Right

sys.path.append(str(Path(__file__).parents[1] / "attribution"))
import toys

ROWS = [{"text": text} for text in toys.texts(20)]
INDEX = {"d": 64, "dtype": "float32", "shard_rows": 8, "progress": False}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """An index made on the CPU."""
    path = tmp_path_factory.mktemp("cpu") / "index"
    build_index(path, toys.TinyLM(), toys.language_task(), ROWS, **INDEX)
    return Index.open(path, task=toys.language_task())


def rows_of(index):
    return torch.cat([shard.decoded() for shard in index.stores[0]])


def close(came, want):
    torch.testing.assert_close(bare(came), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_a_mixture_of_devices_is_an_error_and_a_copy_is_not():
    with pretend_device() as device:
        x = torch.ones(3, device=DEVICE)
        assert isinstance(x, OnDevice)
        with pytest.raises(MixedError, match="shape"):
            x + torch.ones(3)
        assert device.waits == []
        assert torch.equal(x.cpu() + 1, torch.full((3,), 2.0))
        assert float(x.sum()) == 3
        assert len(device.waits) == 2


def waits(job, layers):
    """Return how often the host waits in the second call of a job on a model of so many layers."""
    torch.manual_seed(0)
    size = {"n_embd": 8, "n_head": 2, "vocab_size": 20, "n_positions": 8, "attn_implementation": "eager"}
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, bos_token_id=0, eos_token_id=0, **size)).eval()
    with pretend_device() as device:
        again = job(moved(model))
        again()
        device.waits.clear()
        again()
        return len(device.waits)


def sketching(model):
    ids = torch.arange(12).view(2, 6).to(DEVICE)
    sketcher = gs.GradientSketcher(model, gs.CausalLM(), gs.BlockSum(gs.Parameters(model), 64))
    return lambda: sketcher({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})


def multiplying(kind):
    def job(model):
        product = kind(model, gs.CausalLM(), [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6]}])
        vector = torch.ones(product.shape[1]).to(DEVICE)
        return lambda: product(vector)

    return job


@pytest.mark.parametrize(
    "job",
    [sketching, multiplying(gs.hessian), multiplying(gs.gauss_newton), multiplying(gs.fisher)],
    ids=["sketches", "hessian", "gauss_newton", "fisher"],
)
def test_layers_are_not_waited_for(job):
    """A GPU runs ahead of the host until it is asked for a number; a product asked for one of each parameter."""
    assert waits(job, 1) == waits(job, 3) <= 20


@pytest.mark.parametrize(
    "case",
    [c if c.options in ({}, {"kind": "affd"}) else pytest.param(c, marks=pytest.mark.slow) for c in CASES],
    ids=str,
)
def test_sketches_and_their_adjoints(case):
    n, d = case.fit(5001, 96)
    phi, other = case.build(n, d), case.build(n, d)
    for name, size in (("_apply", n), ("_apply_adjoint", d)):
        x = torch.randn(2, size, generator=torch.Generator().manual_seed(0))
        want = getattr(phi, name)(x)
        with pretend_device():
            for maker in (other, phi):  # phi has made its tables on the CPU
                came = getattr(maker, name)(x.to(DEVICE))
                assert isinstance(came, OnDevice)
                close(came, want)


@pytest.mark.parametrize("precondition", [None, pytest.param("kfac", marks=pytest.mark.slow)])
def test_an_index_is_built_with_the_same_numbers(tmp_path, index, precondition):
    with pretend_device():
        model = moved(toys.TinyLM())
        build_index(tmp_path / "it", model, toys.language_task(), ROWS, precondition=precondition, **INDEX)
    came = rows_of(Index.open(tmp_path / "it", task=toys.language_task()))
    if precondition is None:
        close(came, rows_of(index))
    assert len(came) == len(ROWS)


@pytest.mark.parametrize(
    "score", ["dot", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ridge", "influence", "cosine"))]
)
def test_queries_give_the_same_answers(index, score):
    question = ["the number 7 squared is 49"]
    want = index.query(toys.TinyLM(), question, score=score)
    with pretend_device():
        came = index.query(moved(toys.TinyLM()), question, score=score)
    for name, hit in {hit.id: hit for hit in want[0]}.items():
        (other,) = (each for each in came[0] if each.id == name)
        assert float(other.score) == pytest.approx(float(hit.score), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_hits_are_explained(index):
    def explained(model):
        return index.explain(model, index.query(model, ["the number 7 squared is 49"], score="dot", k=3), top=3)

    want = explained(toys.TinyLM())
    with pretend_device():
        came = explained(moved(toys.TinyLM()))
    for hit, other in zip(want[0], came[0], strict=True):
        assert hit.id == other.id
        assert [t.value for t in other.tokens] == pytest.approx([t.value for t in hit.tokens], rel=1e-3, abs=1e-5)


def problem(model):
    rows = toys.vectors(12)
    return model, Classification(), [{key: value[i] for key, value in rows.items()} for i in range(12)]


@pytest.mark.parametrize(
    "kind", ["gauss_newton", *(pytest.param(k, marks=pytest.mark.slow) for k in ("hessian", "fisher"))]
)
def test_curvature_products(kind):
    make = getattr(gs, kind)
    operator = make(*problem(toys.classifier()))
    v = torch.randn(operator.n, generator=torch.Generator().manual_seed(0))
    want = operator(v)
    with pretend_device():
        came = make(*problem(moved(toys.classifier())))(v.to(DEVICE))
        assert isinstance(came, OnDevice)
        close(came, want)


@pytest.mark.slow
@pytest.mark.parametrize("sketched", [False, True], ids=["whole", "sketched"])
def test_a_spectrum(sketched):
    def spectrum(model):
        operator = gs.hessian(*problem(model))
        phi = gs.AFFD(operator.n, 64)
        return gs.spectrum(phi @ operator @ phi.T if sketched else operator, k=2)

    want = spectrum(toys.classifier())
    with pretend_device():
        came = spectrum(moved(toys.classifier()))
    assert [float(v) for v in came.values] == pytest.approx([float(v) for v in want.values], rel=1e-3)


def test_a_subspace_trains():
    def gradient(model):
        parameters = gs.Parameters(model)
        rows = {key: value.to(next(model.parameters()).device) for key, value in toys.vectors(12).items()}
        with gs.Subspace(model, parameters, gs.AFFD(parameters.n, 16)) as subspace:
            torch.nn.functional.cross_entropy(model(rows["x"]), rows["labels"]).backward()
            return subspace.w.grad.detach()

    want = gradient(toys.classifier())
    with pretend_device():
        close(gradient(moved(toys.classifier())), want)


class OnPretendDevice(Right):
    """Launches on the pretend device."""

    def __call__(self, program, grid, *arguments, together):
        super().__call__(program, grid, *map(bare, arguments), together=together)


def test_a_sketch_on_the_device_takes_the_kernels(monkeypatch):
    device = OnPretendDevice()
    for name, value in {"_DEVICES": (DEVICE.type,), "_TENSORS": (OnDevice,), "_verdicts": {}}.items():
        monkeypatch.setattr(trust, name, value)
    monkeypatch.setattr(trust, "_triton_is_there", lambda: True)
    monkeypatch.setattr("gradsketch.kernels.blocks.start", device)
    phi = gs.AFFD(20_003, 100)
    x, w = torch.randn(2, 20_003), torch.randn(100)
    want, lifted = phi(x), phi.lift(w)
    with pretend_device():
        close(phi(x.to(DEVICE)), want)
        close(phi.lift(w.to(DEVICE)), lifted)
    assert {"fold_blocks", "add_rows", "repeat_blocks"} <= set(device.launches)
