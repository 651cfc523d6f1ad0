"""A selection of parameters: ordered, ties once, flatten and unflatten inverse, fingerprints that tell."""

import pytest
import torch
from torch import nn

import gradsketch as gs
from gradsketch import InputError, Parameters


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def test_ties_count_once_in_the_models_order():
    parameters = Parameters(Tied())
    assert parameters.names == ("embed.weight", "norm.weight", "norm.bias")
    assert (parameters.n, len(parameters)) == (21, 3)
    assert parameters.shapes["embed.weight"] == (5, 3)
    assert repr(parameters) == "Parameters(3 tensors, n=21)"


@pytest.mark.parametrize(
    ("include", "exclude", "names"),
    [
        ("head.*", (), ["embed.weight"]),  # by any of its names
        ("*", "head.*", ["norm.weight", "norm.bias"]),
        (["norm.*", "embed.*"], "*.bias", ["embed.weight", "norm.weight"]),
    ],
)
def test_globs(include, exclude, names):
    assert list(Parameters(Tied(), include, exclude).names) == names


def test_frozen_parameters_are_left_out_unless_asked_for():
    model = Tied()
    model.norm.requires_grad_(False)
    assert Parameters(model).names == ("embed.weight",)
    assert Parameters(model, frozen=True).n == 21
    assert Parameters(model, exclude="norm.*").names == ("embed.weight",)


@pytest.mark.parametrize(
    ("change", "include", "exclude", "words"),
    [
        (lambda m: m, "nrom.*", (), "'nrom.*' matches no parameter.*such as embed.weight"),
        (lambda m: m, "*", "nrom.*", "'nrom.*' matches no parameter"),
        (lambda m: m.norm.requires_grad_(False), ["norm.*", "embed.*"], (), "'norm.*' matches only frozen"),
        (lambda m: m.requires_grad_(False), "*", (), "only frozen"),
        (lambda m: m, "*", "*", "none of 3 parameters is selected"),
    ],
)
def test_selections_of_nothing(change, include, exclude, words):
    model = Tied()
    change(model)
    with pytest.raises(InputError, match=words.replace("*'", r"\*'")):
        Parameters(model, include, exclude)


def test_a_model_without_parameters():
    with pytest.raises(InputError, match="none of 0 parameters"):
        Parameters(nn.ReLU())


def test_a_lazy_module_without_shapes():
    with pytest.raises(InputError, match=r"'0.weight' of a lazy module.* Call the model on a batch once"):
        Parameters(nn.Sequential(nn.LazyLinear(4)))


def test_flatten_and_unflatten_are_inverse():
    parameters = Parameters(Tied())
    vectors = torch.randn(2, 4, parameters.n)
    tensors = parameters.unflatten(vectors)
    assert tensors["norm.bias"].shape == (2, 4, 3)
    assert torch.equal(parameters.flatten({name: t[1, 2] for name, t in tensors.items()}), vectors[1, 2])
    assert torch.equal(parameters.unflatten(parameters.flatten())["embed.weight"], dict(parameters)["embed.weight"])
    assert parameters.flatten(dtype=torch.float64).dtype == torch.float64
    assert not parameters.flatten().requires_grad
    with pytest.raises(InputError, match=r"length 20.*length n=21"):
        parameters.unflatten(torch.zeros(20))


def test_fingerprint():
    torch.manual_seed(0)
    model = Tied()
    parameters = Parameters(model)
    facts, content = parameters.fingerprint(), parameters.fingerprint(content=True)
    assert facts != Parameters(model, exclude="norm.bias").fingerprint()
    assert facts != Parameters(Tied().double()).fingerprint()
    with torch.no_grad():
        model.norm.bias[0] += 1e-6
    assert parameters.fingerprint() == facts
    assert parameters.fingerprint(content=True) != content
    assert len(Parameters(Tied().bfloat16()).fingerprint(content=True)) == 16


def test_compiled_models_keep_their_names():
    model = Tied()
    assert Parameters(torch.compile(model)).fingerprint(content=True) == Parameters(model).fingerprint(content=True)


def test_every_parameters_argument_follows_one_rule(tmp_path):
    model, task, data = nn.Linear(4, 3), gs.Classification(), [(torch.randn(4), i % 3) for i in range(8)]
    batch = task.collate(data)
    metric = gs.Loss(task, data)
    sketch = gs.BlockSum(Parameters(model, "bias"), 2)
    uses = {
        "sketch_gradients": lambda p: gs.sketch_gradients(model, task, batch, sketch, parameters=p),
        "gradient_gram": lambda p: gs.gradient_gram(model, task, batch, parameters=p),
        "hessian": lambda p: gs.hessian(model, task, data, p) @ torch.ones(3),
        "gauss_newton": lambda p: gs.gauss_newton(model, task, data, p) @ torch.ones(3),
        "fisher": lambda p: gs.fisher(model, task, data, p) @ torch.ones(3),
        "loss_gradient": lambda p: gs.loss_gradient(model, task, data, p),
        "distortion": lambda p: gs.distortion(model, task, data, sketch, parameters=p).parameters,
        "Subspace": lambda p: gs.Subspace(model, p, gs.AFFD(3, 2)).close(),
        "build_index": lambda p: (
            gs.build_index(tmp_path / str(len(list(tmp_path.iterdir()))), model, task, data, d=2, parameters=p).d
        ),
        "fine_tune": lambda p: gs.fine_tune(model, task, data, metric, steps=1, parameters=p).d,
    }
    for name, use in uses.items():
        wanted, *others = [use(p) for p in (Parameters(model, "bias"), "bias", ["bi*"], ("bias",))]
        for other in others:
            torch.testing.assert_close(other, wanted, msg=name)
        with pytest.raises(InputError, match="matches no parameter"):
            use("nrom")
