"""K-FAC factors against formulas written out in float64, and sketches with them against gradients formed first."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from zoo import CASES

import gradsketch as gs
from gradsketch.errors import DamageError, FingerprintError, GradsketchWarning, InputError, NonFiniteError
from gradsketch.gradients.data import batch_length, batch_slice
from gradsketch.gradients.tasks import as_task
from sampled import a_third
from unchecked import errors_of


def whole(root, size):
    """A root as a matrix, whatever it is kept as."""
    return torch.eye(size).double() * root.values if root.values.ndim < 2 else root.values


def preconditioned(gradients, factors):
    """P g for the gradients of one example by name, by dense products."""
    parts = []
    for name, gradient in gradients.items():
        root, x = factors.roots[name], gradient.reshape(len(gradient) if gradient.ndim > 1 else 1, -1)
        if hasattr(root, "pairs"):
            stack = zip(x, root.pairs, strict=True)
            x = torch.stack([product(m.view(root.height, -1), pair).flatten() for m, pair in stack])
        else:
            x = product(x, root)
        parts.append(x.flatten())
    return torch.cat(parts)


def product(x, pair):
    return whole(pair.rows, x.shape[0]) @ x @ whole(pair.columns, x.shape[1])


def alone(model, task, batch, parameters):
    """Gradients of every example by name, one at a time."""
    for i in range(batch_length(batch)):
        loss = as_task(task).losses(model, batch_slice(batch, i, i + 1)).sum()
        found = torch.autograd.grad(loss, [t for _, t in parameters], allow_unused=True)
        yield {n: torch.zeros_like(t) if g is None else g for g, (n, t) in zip(found, parameters, strict=True)}


@pytest.mark.parametrize("name", a_third(CASES))
def test_a_sketch_with_factors_is_that_of_preconditioned_gradients(name):
    case, model = CASES[name], CASES[name].model()
    labels = "sampled" if isinstance(case.task, gs.CausalLM | gs.Classification) else "empirical"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)  # of parameters on the exact path, which count as well
        factors = gs.kfac(model, case.task, case.examples, labels=labels)
        parameters = gs.Parameters(model)
        phi = gs.BlockSum(parameters, 100)
        batch = case.task.collate(case.examples)
        got = gs.sketch_gradients(model, case.task, batch, phi, precondition=factors)
        loop = gs.sketch_gradients(model, case.task, batch, phi, precondition=factors, method="loop")
    gradients = alone(model, case.task, batch, parameters)
    expected = phi(torch.stack([preconditioned(g, factors) for g in gradients]))
    scale = float(expected.norm())
    assert float((got - expected).norm()) < 1e-12 * scale
    assert float((loop - expected).norm()) < 1e-12 * scale


class Tokens(nn.Module):
    """One weight per token, and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 4)

    def forward(self, x):
        return self.linear(x)


def token_losses(model, batch):
    logits = model(batch["x"])
    return (functional.cross_entropy(logits.mT, batch["y"], reduction="none") * batch["counts"]).sum(1)


def tokens(b=6, t=3):
    generator = torch.Generator().manual_seed(1)
    counts = torch.ones(b, t).double()
    counts[:3, 1:] = 0  # padding: it has inputs, and no gradient
    x, y = torch.randn(b, t, 5, generator=generator).double(), torch.randint(0, 4, (b, t), generator=generator)
    return {"x": x, "y": y, "counts": counts}


def test_the_roots_are_those_of_the_formula():
    model, batch, damping = Tokens().double(), tokens(), 0.2
    factors = gs.kfac(model, token_losses, batch, labels="empirical", damping=damping)
    errors, inputs, squares = torch.zeros(4, 4).double(), torch.zeros(5, 5).double(), torch.zeros(4).double()
    for x, y, counts in zip(*batch.values(), strict=True):
        bias = torch.zeros(4).double()
        for token in counts.nonzero()[:, 0]:
            error = model(x[token]).softmax(0) - functional.one_hot(y[token], 4)
            errors += torch.outer(error, error) / 6
            inputs += torch.outer(x[token], x[token]) / 6
            bias += error
        squares += bias**2 / 6
    mean_tokens = float(batch["counts"].sum()) / 6

    def damped(m):
        return m + damping**0.5 * m.trace() / len(m) * torch.eye(len(m)).double()

    expected = torch.linalg.inv(torch.kron(damped(errors), damped(inputs)) / mean_tokens)
    pair = factors.roots["linear.weight"]
    found = torch.kron(whole(pair.rows, 4) @ whole(pair.rows, 4), whole(pair.columns, 5) @ whole(pair.columns, 5))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    bias = factors.roots["linear.bias"]
    found = (whole(bias.rows, 1) * whole(bias.columns, 4)).diagonal() ** -2
    torch.testing.assert_close(found, squares + damping * squares.mean(), rtol=1e-9, atol=0)
    assert factors.examples == 6


def test_the_roots_of_a_grouped_convolution_are_those_of_whole_gradients():
    """Its gradients are formed: each is one term, with the second moments of the whole over either side."""
    torch.manual_seed(0)
    layer, damping = nn.Conv2d(4, 6, 2, groups=2, bias=False).double(), 0.2
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3).double())
    data = [(torch.randn(4, 3, 3).double(), i % 3) for i in range(9)]
    pair = gs.kfac(model, gs.Classification(), data, labels="empirical", damping=damping).roots["0.weight"]
    outputs, inputs = torch.zeros(6, 6).double(), torch.zeros(8, 8).double()
    for x, y in data:
        loss = functional.cross_entropy(model(x[None]), torch.tensor([y]))
        gradient = torch.autograd.grad(loss, layer.weight)[0].view(6, 8)
        outputs += gradient @ gradient.T / 9
        inputs += gradient.T @ gradient / 9

    def damped(m):
        return m + damping**0.5 * m.trace() / len(m) * torch.eye(len(m)).double()

    expected = torch.linalg.inv(torch.kron(damped(outputs), damped(inputs)) / outputs.trace())
    found = torch.kron(whole(pair.rows, 6) @ whole(pair.rows, 6), whole(pair.columns, 8) @ whole(pair.columns, 8))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_it_is_the_fisher_matrix_where_inputs_and_errors_are_independent():
    """Every input with every label, and the same probabilities everywhere."""
    model = nn.Linear(3, 4, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    batch = x.repeat_interleave(4, 0), torch.arange(4).repeat(7)
    damping = 1e-10
    pair = gs.kfac(model, gs.Classification(), batch, labels="empirical", damping=damping).roots["weight"]
    left, right = (torch.linalg.inv(whole(root, n)) for root, n in ((pair.rows, 4), (pair.columns, 3)))
    gradients = torch.stack(
        [g["weight"].flatten() for g in alone(model, gs.Classification(), batch, [*gs.Parameters(model)])]
    )
    exact = gradients.T @ gradients / len(gradients)
    torch.testing.assert_close(torch.kron(left @ left, right @ right), exact, rtol=0, atol=1e-4 * float(exact.max()))


class Experts(nn.Module):
    """Two experts in one stack; the sign of the first input chooses."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x):
        halves = x.unsqueeze(0) * torch.stack([x[:, :1] > 0, x[:, :1] <= 0])
        return torch.bmm(halves, self.stack).sum(0)


def test_each_expert_has_factors_of_its_own():
    x, labels = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).double(), torch.arange(20) % 4
    model, damping = Experts().double(), 0.2
    found = gs.kfac(model, gs.Classification(), (x, labels), labels="empirical", damping=damping).roots["stack"]
    sides = []
    for mine in (x[:, 0] > 0, x[:, 0] <= 0):
        errors = (model(x)[mine].softmax(1) - functional.one_hot(labels[mine], 4)).detach()
        sides.append((x[mine].T @ x[mine] / 20, errors.T @ errors / 20, float(mine.double().mean())))
    traces = [float(a.trace() * s.trace()) / share for a, s, share in sides]
    for (a, s, share), trace, pair in zip(sides, traces, found.pairs, strict=True):
        # λ has the mean of both experts for its scale, and each side has the root of it.
        more = (damping * sum(traces) / 2 / trace) ** 0.5
        parts = (m + more * m.trace() / len(m) * torch.eye(len(m)).double() for m in (a, s))
        roots = (whole(pair.rows, 3), whole(pair.columns, 4))
        expected = torch.kron(*parts).inverse() * share
        torch.testing.assert_close(torch.kron(*(root @ root for root in roots)), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
def test_factors_do_not_depend_on_the_batches(name):
    case = CASES[name]
    one, other = (gs.kfac(case.model(), case.task, case.examples, batch_tokens=tokens) for tokens in (1, 1000))
    phi = gs.BlockSum(gs.Parameters(case.model()), 100)
    x = torch.randn(3, phi.n).double()
    torch.testing.assert_close(one.before(phi)(x), other.before(phi)(x), rtol=1e-6, atol=1e-8)
    third = gs.kfac(case.model(), case.task, case.examples, seed=1)
    assert not torch.allclose(third.before(phi)(x), other.before(phi)(x), rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [gs.kfac, gs.ekfac])
def test_a_small_gradient_counts_in_any_company(method, dtype):
    """One loss is a million times the others, as a surprise is beside what a model is sure of."""
    torch.manual_seed(0)
    model, weights = nn.Linear(5, 3).to(dtype), torch.tensor([1.0] + 11 * [1e-6])
    data = [(torch.randn(5).to(dtype), i % 3, weight) for i, weight in enumerate(weights)]

    def losses(model, batch):
        return functional.cross_entropy(model(batch[0]).float(), batch[1], reduction="none") * batch[2]

    alone = method(model, losses, data, labels="empirical", batch_tokens=1).roots["weight"]
    for other in (data, data[::-1]):
        together = method(model, losses, other, labels="empirical", batch_tokens=100).roots["weight"]
        for one, two in ((alone.rows, together.rows), (alone.columns, together.columns)):
            torch.testing.assert_close(one.values, two.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [gs.kfac, gs.ekfac])
def test_gradients_whose_squares_vanish_are_refused(method):
    """Their factors would be those of no gradient at all: the metric would be the identity."""
    torch.manual_seed(0)
    model, data = nn.Linear(5, 3), [(torch.randn(5), i % 3) for i in range(12)]

    def estimated(scale, dtype=torch.float32):
        def losses(model, batch):
            return functional.cross_entropy(model(batch[0].to(dtype)), batch[1], reduction="none") * scale

        rows = whole(method(model.to(dtype), losses, data, labels="empirical").roots["weight"].rows, 3).double()
        return rows / rows.norm()

    want = estimated(1.0)
    for scale, dtype in ((1e-16, torch.float32), (1e-30, torch.float64)):
        torch.testing.assert_close(estimated(scale, dtype), want, rtol=1e-4, atol=1e-5)
    for scale in (1e-25, 1e-30):
        with pytest.raises(InputError, match="Multiply the loss by a constant"):
            estimated(scale)


class Mixed(nn.Module):
    """A body in float32 and a head in float64."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3).double()

    def forward(self, x):
        return self.head(self.body(x).tanh().double())


@pytest.mark.parametrize("method", [gs.kfac, gs.ekfac])
def test_each_parameter_keeps_its_own_precision(method):
    factors = method(Mixed(), gs.Classification(), [(torch.randn(5), i % 3) for i in range(12)])
    kinds = {name: pair.rows.values.dtype for name, pair in factors.roots.items()}
    assert kinds["head.weight"] == kinds["head.bias"] == torch.float64
    assert kinds["body.weight"] == kinds["body.bias"] == torch.float32


@pytest.mark.parametrize("method", [gs.kfac, gs.ekfac])
@pytest.mark.parametrize("damping", [1e-200, 1e80, 1e300])
def test_a_damping_that_leaves_no_numbers_is_refused(method, damping):
    """A table with a row that is never used has an eigenvalue of zero; numbers of float32 end at 1e38."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 3))
    data = [(torch.tensor([i % 5, 3]), i % 3) for i in range(12)]
    with pytest.raises(InputError, match="damping"):
        method(model, gs.Classification(), data, damping=damping)


def test_factors_that_are_no_numbers_are_refused_where_they_are_read(tmp_path):
    factors = gs.kfac(nn.Linear(5, 3), gs.Classification(), [(torch.randn(5), i % 3) for i in range(12)])
    factors.roots["weight"].rows.values[0, 0] = float("nan")
    factors.save(tmp_path / "factors.pt")
    with pytest.raises(InputError, match="factors of 'weight'"):
        gs.Factors.load(tmp_path / "factors.pt")


def test_sampled_labels_are_the_models_own():
    """The gradient of a bias is p − e_y, whose squares have the mean p (1 − p)."""
    model = nn.Linear(1, 3).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([0.0, 1.0, 2.5]))
    p = model.bias.softmax(0).detach()
    batch = torch.ones(2000, 1).double(), torch.zeros(2000, dtype=torch.long)
    root = gs.kfac(model, gs.Classification(), batch, parameters="bias", damping=1e-9).roots["bias"]
    found = (whole(root.rows, 1) * whole(root.columns, 3)).diagonal() ** -2
    torch.testing.assert_close(found, p * (1 - p), rtol=0, atol=0.02)  # four standard errors


def test_what_cannot_draw_labels_says_so():
    with pytest.raises(InputError, match="empirical"):
        gs.kfac(Tokens().double(), token_losses, tokens())
    masked = CASES["bert"]
    with pytest.raises(InputError, match="MaskedLM"):
        gs.kfac(masked.model(), masked.task, masked.examples)

    class Weighted(gs.Classification):
        def losses(self, model, batch):
            return 2 * super().losses(model, batch)

    with pytest.raises(InputError, match="Weighted"):  # twice a loss is no log-probability
        gs.kfac(nn.Linear(2, 2), Weighted(), [(torch.ones(2), 0)])


def test_corrected_eigenvalues_are_those_of_whole_gradients():
    """Row and column sums of the squares of gradients in the eigenbases, by a loop over the examples."""
    model, batch, damping = Tokens().double(), tokens(), 0.2
    first, factors = (f(model, token_losses, batch, labels="empirical", damping=damping) for f in (gs.kfac, gs.ekfac))
    bases = [
        torch.linalg.eigh(whole(r, 0))[1]
        for r in (first.roots["linear.weight"].rows, first.roots["linear.weight"].columns)
    ]
    squares = torch.zeros(4, 5).double()
    for row in range(6):
        alone = {name: value[row : row + 1] for name, value in batch.items()}
        (gradient,) = torch.autograd.grad(token_losses(model, alone).sum(), [model.linear.weight])
        squares += (bases[0].T @ gradient @ bases[1]).square() / 6
    total = float(squares.sum())
    for side, basis, sums in zip(("rows", "columns"), bases, (squares.sum(1), squares.sum(0)), strict=True):
        values = sums / total**0.5
        expected = (basis * (values + damping**0.5 * values.mean()) ** -0.5) @ basis.T
        found = getattr(factors.roots["linear.weight"], side).values
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert factors.facts["method"] == "ekfac"
    # A vector's moments are exact in the first pass already.
    torch.testing.assert_close(*(f.roots["linear.bias"].columns.values for f in (first, factors)))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bart", "convolutions", "lstm"])
def test_every_kind_of_layer_can_be_corrected(name):
    """In the eigenbases as in any basis, the squares of all gradients add up to the trace of F.

    Two uses of one matrix count alone, so that their products are missing there.
    """
    case, model = CASES[name], CASES[name].model()
    batch = case.task.collate(case.examples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradsketchWarning)
        factors = gs.ekfac(model, case.task, case.examples, labels="empirical", damping=1e-9)
    for parameter, pair in factors.roots.items():
        if hasattr(pair, "pairs") or pair.rows.values.ndim == 0:
            continue
        traces = [
            (whole(r, 1) @ whole(r, 1)).inverse().trace() if r.values.ndim == 2 else (r.values**-2).sum()
            for r in (pair.rows, pair.columns)
        ]
        found = float(traces[0] * traces[1]) if min(len(pair.rows.values), len(pair.columns.values)) else 0
        own = [g[parameter].square().sum() for g in alone(model, case.task, batch, gs.Parameters(model))]
        assert found == pytest.approx(
            float(sum(own)) / len(own),
            rel=0.1 if parameter in ("transformer.wte.weight", "model.shared.weight") else 1e-3,
        ), parameter


def test_options_are_checked():
    call = "gs.kfac(torch.nn.Linear(2, 2), gs.Classification(), [(torch.ones(2), 0)], {})"
    options = ["damping=0.0", "damping=float('nan')", "damping='auto'", "labels='drawn'"]
    for option, error in zip(options, errors_of([call.format(option) for option in options]), strict=True):
        assert error.startswith(f"InputError: {option.partition('=')[0]}"), error


class Keys(nn.Module):
    """Attention, whose keys' bias has no gradient but rounding, and a table of which some rows are never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 8)
        self.query, self.key, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 30)
        self.unused = nn.Linear(3, 3)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        weights = (self.query(x) @ self.key(x).mT).softmax(-1)
        return self.head(weights @ x) + 0 * self.unused(x[..., :3]).sum()


def test_rounding_is_not_taken_for_a_gradient():
    model, rows = Keys(), [{"input_ids": [i, 1 + i % 3, 2, 3]} for i in range(12)]
    factors = gs.kfac(model, gs.CausalLM(), rows)
    batch = gs.CausalLM().collate(rows)
    for name, most in (("key.bias", 1e-4), ("unused.weight", 1e-4), ("query.weight", 1e3)):
        own = gs.BlockSum(gs.Parameters(model, name), 8)
        norms = gs.sketch_gradients(model, gs.CausalLM(), batch, own, precondition=only(factors, name)).norm(dim=1)
        assert float(norms.max()) < most, name
    table = factors.roots["embedding.weight"].rows.values
    # A row that the sample did not use gets more weight than any other, and not without bound.
    assert 1 < float(table[25] / table[2]) < (1 + 4 / 12 * 30 / 0.1**0.5) ** 0.5 * 2


def only(factors, name):
    return gs.Factors(factors.method, {name: factors.roots[name]}, factors.facts, factors.examples, factors.seconds)


def test_what_is_saved_is_what_comes_back(tmp_path):
    case = CASES["mixtral"]
    factors = gs.kfac(case.model(), case.task, case.examples)
    factors.save(tmp_path / "factors.pt")
    again = gs.Factors.load(tmp_path / "factors.pt")
    assert again.fingerprint == factors.fingerprint
    assert (again.method, again.facts, again.examples) == ("kfac", factors.facts, 5)
    phi = gs.BlockSum(gs.Parameters(case.model()), 100)
    x = torch.randn(2, phi.n).double()
    torch.testing.assert_close(again.before(phi)(x), factors.before(phi)(x), rtol=0, atol=0)
    data = bytearray((tmp_path / "factors.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "factors.pt").write_bytes(data)
    with pytest.raises(DamageError, match=r"factors\.pt"):
        gs.Factors.load(tmp_path / "factors.pt")


def test_facts_name_what_decides_the_numbers():
    case = CASES["mlp"]
    facts = gs.kfac(case.model(), case.task, case.examples).facts
    for other in (
        gs.kfac(case.model(1), case.task, case.examples),
        gs.kfac(case.model(), case.task, case.examples[:3]),
        gs.kfac(case.model(), case.task, case.examples, labels="empirical"),
        gs.kfac(case.model(), case.task, case.examples, seed=4),
        gs.kfac(case.model(), case.task, case.examples, damping=0.3),
        gs.kfac(case.model(), case.task, case.examples, parameters="0.*"),
    ):
        assert sum(facts[name] != other.facts[name] for name in facts) == 1


def test_factors_and_sketches_must_fit():
    model, other = nn.Linear(4, 3), nn.Linear(4, 5)
    rows = [(torch.randn(4), i % 3) for i in range(6)]
    factors = gs.kfac(model, gs.Classification(), rows)
    with pytest.raises(InputError, match="sides"):
        factors.before(gs.BlockSum(gs.Parameters(other), 8))
    with pytest.raises(InputError, match="without"):
        only(factors, "bias").before(gs.BlockSum(gs.Parameters(model), 8))
    with pytest.raises(InputError, match="BlockSum"):
        gs.GradientSketcher(
            model, gs.Classification(), gs.AFFD(15, 8), parameters=gs.Parameters(model), precondition=factors
        )


def test_factors_of_other_weights_are_refused():
    model, task = nn.Linear(4, 3), gs.Classification()
    factors = gs.kfac(model, task, [(torch.randn(4), i % 3) for i in range(6)])
    phi = gs.BlockSum(gs.Parameters(model), 8)
    gs.GradientSketcher(model, task, phi, precondition=factors)
    model.weight.data[0, 0] += 1e-3
    with pytest.raises(FingerprintError, match=r"model is now .* Make the factors with the weights that are sketched"):
        gs.GradientSketcher(model, task, phi, precondition=factors)
    with pytest.raises(FingerprintError, match="model is now"):
        gs.sketch_gradients(model, task, (torch.randn(2, 4), torch.tensor([0, 1])), phi, precondition=factors)


def test_a_gradient_that_is_not_finite_is_an_error():
    model = nn.Linear(4, 3)
    with pytest.raises(NonFiniteError, match="weight"):
        gs.kfac(model, gs.Classification(), [(torch.full((4,), torch.inf), 0)], labels="empirical")


def test_the_model_is_left_as_it_was():
    model = CASES["gpt2"].model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    gs.kfac(model, CASES["gpt2"].task, CASES["gpt2"].examples)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert bool((model.lm_head.weight.grad == 1).all())
