"""Eigenvalues against dense eigh: accuracy, error bounds, no ghosts, resumption, and refusal of bad input."""

import math

import numpy as np
import pytest
import torch
from matrices import Matrix, rotated, spectra

import gradsketch as gs
from unchecked import errors_of

METHODS = ("sketched-basis", "full")
NAMES = tuple(spectra())


def leaders(eigenvalues, k=10):
    values = eigenvalues.double().numpy()
    return values[np.argsort(-np.abs(values))][:k]


def surplus(found, true, tolerance):
    """Count the found values that cannot be matched one to one with true ones."""
    left = list(true)
    for value in found:
        near = [t for t in left if abs(t - value) <= tolerance]
        if near:
            left.remove(min(near, key=lambda t: abs(t - value)))
    return len(found) - (len(true) - len(left))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "degenerate"])
def test_top_ten_to_1e4(name, method):
    eigenvalues = spectra()[name]
    result = gs.spectrum(rotated(eigenvalues), 10, method=method, steps=200, tolerance=1e-6)
    expected = leaders(eigenvalues)
    assert result.converged.all()
    np.testing.assert_allclose(np.sort(result.values), np.sort(expected), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_ten_of_each_sign(method):
    eigenvalues = spectra()["dense edge"]
    result = gs.spectrum(rotated(eigenvalues), 10, which="both", method=method, steps=200)
    expected = np.sort(eigenvalues.numpy())
    assert len(result.values) == 20
    assert result.converged.all()
    np.testing.assert_allclose(result.values, np.r_[expected[::-1][:10], expected[:10][::-1]], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_no_ghosts_in_200_steps(name, dtype):
    eigenvalues = spectra()[name].to(dtype)
    result = gs.spectrum(rotated(eigenvalues), 100, which="both", method="sketched-basis", steps=200)
    settled = np.array([e.value for e in result.eigenvalues if e.converged])
    assert result.copies > 20
    assert len(settled) >= 3
    assert surplus(settled, eigenvalues.double().numpy(), 1e-3 * float(eigenvalues.abs().max())) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "degenerate"])
@pytest.mark.parametrize("steps", [20, 60])
def test_errors_are_bounds(name, method, steps):
    eigenvalues = spectra()[name]
    result = gs.spectrum(rotated(eigenvalues), 15, which="both", method=method, steps=steps)
    distance = np.abs(result.values[:, None] - eigenvalues.numpy()[None, :]).min(1)
    settled = result.converged
    assert (distance[settled] <= result.errors[settled] + 1e-10).all()


def test_repeated_eigenvalues_are_never_found_more_often_than_they_occur():
    eigenvalues = spectra()["degenerate"]
    result = gs.spectrum(rotated(eigenvalues), 20, method="sketched-basis", steps=200)
    found = [round(e.value) for e in result.eigenvalues if e.converged and abs(e.value) > 5]
    assert 1 <= found.count(50) <= 3
    assert 1 <= found.count(40) <= 2
    assert 1 <= found.count(-30) <= 3


@pytest.mark.parametrize("method", METHODS)
def test_residuals_are_those_of_the_eigenvectors(method):
    operator = rotated(spectra()["dense edge"])
    result = gs.spectrum(operator, 10, method=method, steps=60, tolerance=1e-8)
    vectors = gs.eigenvectors(operator, result)
    products = operator(vectors)
    residuals = (products - torch.from_numpy(result.values)[:, None] * vectors).norm(dim=1).numpy()
    np.testing.assert_allclose(residuals / np.abs(result.values), result.residuals, rtol=0.1, atol=1e-12)


def test_sketched_eigenvectors_are_sketches_of_the_eigenvectors():
    eigenvalues = torch.cat([torch.tensor([50.0, 40, -30]), torch.randn(5000).clamp(-3, 3) / 3])
    operator = Diagonal(eigenvalues)
    result = gs.spectrum(operator, 3, method="sketched-basis")
    assert result.d == 4096
    phi = gs.AFFD(operator.n, 4096, seed=0)
    exact = phi(torch.eye(operator.n)[[0, 1, 2]])
    places = [[e.value for e in result.eigenvalues].index(v) for v in result.values]
    cosines = torch.cosine_similarity(exact, result.sketches[places]).abs()
    assert (cosines > 0.999).all()


class Diagonal(gs.LinearMap):
    is_self_adjoint = True

    def __init__(self, values):
        self.values, self.shape, self.products = values, (len(values), len(values)), 0

    def _apply(self, x):
        self.products += len(x)
        return x * self.values

    _apply_adjoint = _apply


def test_the_share_of_the_gradient_is_exact():
    eigenvalues = torch.cat([torch.tensor([50.0, 40, 5]), torch.rand(5000)])
    gradient = torch.zeros(5003)
    gradient[[0, 1, 2, 100]] = torch.tensor([1.0, 2.0, 1.0, 2.0])
    result = gs.spectrum(Diagonal(eigenvalues), 3, method="sketched-basis", gradient=gradient, tolerance=1e-5)
    assert result.outliers == 2
    assert result.gradient_in_outliers == pytest.approx(0.5, abs=1e-4)
    assert [e.gradient_share for e in result.positive] == pytest.approx([0.1, 0.4, 0.1], abs=1e-4)


def test_products_are_counted():
    operator = rotated(spectra()["one-sided"])
    result = gs.spectrum(operator, 10, method="sketched-basis")
    assert result.hvps == operator.products
    operator.products = 0
    phi = gs.AFFD(400, 256)
    assert gs.spectrum(phi @ operator @ phi.T, 5).hvps == operator.products


def test_auto_chooses_by_memory_and_k():
    small, large = Diagonal(torch.rand(1000)), Diagonal(torch.rand(100_000))
    large.values[:3] = torch.tensor([50.0, 40, 30])
    assert gs.spectrum(small, 3).method == "full"
    chosen = gs.spectrum(large, 3, memory=1 << 20)
    assert chosen.method == "sketched-basis"
    assert "GiB" in chosen.reason
    assert gs.spectrum(large, 100, steps=100, memory=1 << 20).method == "sketched-operator"


def test_paper_quantities():
    eigenvalues = torch.cat([torch.tensor([10.0, 6, 3, 1.5, -4, -2]), torch.rand(500) / 10])
    result = gs.spectrum(Diagonal(eigenvalues), 4, tolerance=1e-4)
    assert result.r_neg == pytest.approx(0.4, rel=1e-4)
    assert result.outliers == 3
    np.testing.assert_allclose(result.ratios[:4], [1, 0.6, 0.3, 0.15], rtol=1e-4)


def test_the_zero_operator_and_the_identity_have_one_distinct_eigenvalue():
    zero = gs.spectrum(Diagonal(torch.zeros(300)), 2, method="sketched-basis")
    assert len(zero.eigenvalues) == 0
    assert zero.r_neg == 0
    one = gs.spectrum(Diagonal(torch.ones(300)), 2, method="sketched-basis")
    assert [e.value for e in one.eigenvalues] == pytest.approx([1.0])
    assert "closed" in one.notes[0]
    twice = gs.spectrum(Diagonal(torch.ones(300)), 2, method="full")
    assert [e.value for e in twice.eigenvalues] == pytest.approx([1.0, 1.0])


def test_one_dimension():
    assert gs.spectrum(Diagonal(torch.tensor([-3.0])), 1).values == pytest.approx([-3.0])


class Mortal(Diagonal):
    """Dies at a given product."""

    def __init__(self, values, lifetime):
        super().__init__(values)
        self.lifetime = lifetime

    def _apply(self, x):
        if self.products >= self.lifetime:
            raise KeyboardInterrupt
        return super()._apply(x)

    _apply_adjoint = _apply


@pytest.mark.parametrize("method", ["sketched-basis", "full", "sketched-operator"])
def test_an_interrupted_run_goes_on_where_it_stopped(method, tmp_path):
    values = torch.cat([spectra()["dense edge"].float(), torch.zeros(5000)])
    gradient = torch.randn(len(values), generator=torch.Generator().manual_seed(0))
    options = {"method": method, "gradient": gradient, "sketch": 2048, "probes": 0}
    whole = gs.spectrum(Diagonal(values), 5, **options)
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        gs.spectrum(Mortal(values, 20), 5, resume=path, **options)
    operator = Diagonal(values)
    resumed = gs.spectrum(operator, 5, resume=path, **options)
    assert resumed.alphas == whole.alphas
    assert resumed.eigenvalues == whole.eigenvalues
    assert resumed.hvps == whole.hvps
    assert operator.products == whole.hvps - 20
    assert torch.equal(resumed.sketches, whole.sketches)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("method", ["sketched-basis", "full", "sketched-operator"])
@pytest.mark.parametrize("lifetime", [3, 9, 17, 26, 38])
def test_a_resumed_run_stops_where_the_whole_one_does(method, lifetime, tmp_path):
    """Copies, restarts and the search of the complement included: memory holds 40 vectors of the 44 to 70 products."""
    values = torch.cat([torch.tensor([9.0, 9.0, -8.0, -8.0, 8.0]), spectra()["dense edge"].float() / 4])
    options = {"method": method, "tolerance": 1e-5, "memory": 0, "probes": 0, "sketch": 300, "steps": 200}
    whole = gs.spectrum(Diagonal(values), 10, **options)
    assert whole.steps > 38
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        gs.spectrum(Mortal(values, lifetime), 10, resume=path, **options)
    resumed = gs.spectrum(Diagonal(values), 10, resume=path, **options)
    assert (resumed.alphas, resumed.betas) == (whole.alphas, whole.betas)
    assert (resumed.steps, resumed.hvps, resumed.eigenvalues) == (whole.steps, whole.hvps, whole.eigenvalues)
    assert (resumed.confidence, resumed.settled_after) == (whole.confidence, whole.settled_after)
    assert torch.equal(resumed.sketches, whole.sketches)


def test_an_interrupted_run_is_not_taken_up_after_a_step_of_training(tmp_path):
    model, data = model_and_data()
    task = gs.Classification()

    def run(lifetime=None):
        operator = gs.hessian(model, task, data)
        if lifetime is not None:
            operator._apply = Dying(operator._apply, lifetime)
        return gs.spectrum(operator, 5, resume=tmp_path / "run", progress=False)

    with pytest.raises(KeyboardInterrupt):
        run(lifetime=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 - 1e-3)
    with pytest.raises(gs.FingerprintError, match="model is now"):
        run()


class Dying:
    """A function that can be called so many times."""

    def __init__(self, function, lifetime):
        self.function, self.left = function, lifetime

    def __call__(self, x):
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return self.function(x)


@pytest.mark.parametrize("memory", [0, 1 << 28])
def test_eigenvectors_of_a_run_with_restarts_and_a_gradient(memory):
    values = torch.cat([torch.tensor([9.0, 9.0, -8.0, -8.0, 8.0]), spectra()["dense edge"].float() / 4])
    operator, gradient = rotated(values), torch.ones(len(values))
    result = gs.spectrum(operator, 10, method="full", memory=memory, gradient=gradient, tolerance=1e-4, progress=False)
    vectors = gs.eigenvectors(operator, result, gradient=gradient)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(10), atol=1e-4, rtol=0)
    products = vectors @ operator(vectors).T
    torch.testing.assert_close(products, torch.diag(torch.from_numpy(result.values).float()), atol=5e-3, rtol=0)
    shares = (vectors @ gradient).square() / gradient.square().sum()
    assert [e.gradient_share for e in result.asked] == pytest.approx(shares.tolist(), abs=1e-5)
    with pytest.raises(gs.InputError, match="Type gradient=g"):
        gs.eigenvectors(operator, result)


@pytest.mark.parametrize("d", [1, 8, 64])
def test_a_sketch_in_which_copies_cannot_be_told_is_refused(d):
    operator = Diagonal(torch.rand(400))
    with pytest.raises(gs.InputError, match=rf"copies of eigenvalues are not told.*type steps={d}"):
        gs.spectrum(operator, 2, method="sketched-basis", sketch=d)
    with pytest.raises(gs.InputError, match="at least one dimension"):
        gs.spectrum(operator, 2, sketch=0)


@pytest.mark.parametrize("d", [100, 128, 256])
@pytest.mark.parametrize("seed", range(3))
def test_small_sketches_find_no_ghosts_and_give_shares(d, seed):
    values = spectra()["two-sided"].float()
    gradient = torch.randn(400, generator=torch.Generator().manual_seed(seed))
    result = gs.spectrum(Diagonal(values), 8, method="sketched-basis", sketch=d, seed=seed, gradient=gradient)
    assert surplus(result.values[result.converged], values.double().numpy(), 0.02) == 0
    assert all(0 <= e.gradient_share <= 1 for e in result.eigenvalues)
    assert 0 <= result.gradient_in_outliers <= 1


@pytest.mark.parametrize("seed", range(8))
def test_a_gradient_among_outliers_lies_in_them_once(seed):
    """Each length comes from a sketch of 64 numbers, so that the shares of a half each may sum to more than all."""
    values, gradient = torch.full((400,), 0.01), torch.zeros(400)
    values[:2], gradient[:2] = torch.tensor([2.0, 1.0]), 1.0
    result = gs.spectrum(
        Diagonal(values), 2, method="sketched-basis", sketch=64, steps=20, seed=seed, gradient=gradient
    )
    assert 0.5 < result.gradient_in_outliers <= 1


def test_a_gradient_that_is_zero_is_said_and_left_out():
    result = gs.spectrum(Diagonal(torch.rand(50)), 2, gradient=torch.zeros(50))
    assert result.gradient_in_outliers is None
    assert any("gradient is zero" in note for note in result.notes)


class Shifted(Diagonal):
    """Products by differences that truncate: off by an error along each eigenvector that only the operator knows."""

    mode = "central-difference"

    def __init__(self, values, errors):
        super().__init__(values + errors)
        self.errors = errors

    def error_along(self, vector):
        return float((self.errors * vector).norm())


def test_errors_hold_what_differences_truncate():
    values = torch.cat([torch.tensor([9.0, 8.0, -7.0]), torch.rand(300) / 10])
    errors = torch.zeros(303)
    errors[:3] = torch.tensor([-0.3, 0.1, 0.0])
    result = gs.spectrum(Shifted(values, errors), 3, progress=False, tolerance=1e-5)
    assert (np.abs(result.values - [8.7 + 0.3, 8.1 - 0.1, -7]) <= result.errors + 1e-4).all()
    np.testing.assert_allclose(result.errors, [0.3, 0.1, 0], atol=1e-3)
    sketched = gs.spectrum(Shifted(values, errors), 3, method="sketched-basis", progress=False)
    assert any("truncation" in note for note in sketched.notes)


def test_a_finished_run_can_be_extended(tmp_path):
    values = torch.cat([spectra()["dense edge"].float(), torch.zeros(5000)])
    path = tmp_path / "run.pt"
    first = gs.spectrum(Diagonal(values), 3, method="sketched-basis", sketch=2048, resume=path)
    operator = Diagonal(values)
    again = gs.spectrum(operator, 3, method="sketched-basis", sketch=2048, resume=path)
    assert again.eigenvalues == first.eigenvalues
    assert operator.products == 1  # which shows that the file belongs to this operator
    more = gs.spectrum(operator, 8, method="sketched-basis", sketch=2048, resume=path)
    assert more.converged.all()
    assert operator.products == 1 + more.hvps - first.hvps


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    values = torch.rand(5000)
    gs.spectrum(Diagonal(values), 2, method="sketched-basis", steps=20, resume=path)
    with pytest.raises(gs.FingerprintError, match="seed"):
        gs.spectrum(Diagonal(values), 2, method="sketched-basis", steps=20, resume=path, seed=1)
    with pytest.raises(gs.InputError, match="changed between products"):
        gs.spectrum(Diagonal(values.flip(0)), 2, method="sketched-basis", steps=30, resume=path)


def test_a_finished_run_of_another_operator_or_gradient_is_refused(tmp_path):
    path, values = tmp_path / "run.pt", torch.rand(5000)
    options = {"method": "sketched-basis", "steps": 20, "resume": path, "gradient": values}
    first = gs.spectrum(Diagonal(values), 2, **options)
    assert gs.spectrum(Diagonal(values * (1 + 1e-4)), 2, **options).values.tolist() == first.values.tolist()
    with pytest.raises(gs.FingerprintError, match=r"the first product is now.*delete .*run\.pt to start again"):
        gs.spectrum(Diagonal(1.5 * values), 2, **options)
    with pytest.raises(gs.FingerprintError, match="the gradient's first overlap"):
        gs.spectrum(Diagonal(values), 2, **options | {"gradient": values.flip(0)})


def model_and_data():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 10), torch.nn.BatchNorm1d(10), torch.nn.Linear(10, 2)).eval()
    return model, [(torch.randn(20), i % 2) for i in range(32)]


def changed(model, name):
    with torch.no_grad():
        (dict(model.named_parameters()) | dict(model.named_buffers()))[name].view(-1)[0] += 1e-3


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("weight", "model"),
        ("frozen weight", "model"),
        ("buffer", "model"),
        ("mode", "modes"),
        ("data", "data"),
        ("task", "task"),
        ("curvature", "curvature"),
        ("parameters", "parameters"),
        ("precision", "dtype"),
    ],
)
@pytest.mark.filterwarnings("ignore:the loss of example")  # BatchNorm in training mode, for the mode that differs
def test_a_finished_run_of_other_work_is_refused(name, differs, tmp_path):
    model, data = model_and_data()
    task, make, include = gs.Classification(), gs.hessian, ["0.*"]

    def run():
        operator = make(model, task, data, gs.Parameters(model, include))
        return gs.spectrum(operator, 2, resume=tmp_path / "run", steps=8, progress=False)

    first = run()
    assert run().eigenvalues == first.eigenvalues
    if name in ("weight", "frozen weight", "buffer"):
        changed(model, {"weight": "0.weight", "frozen weight": "2.weight", "buffer": "1.running_var"}[name])
    elif name == "mode":
        model[1].train()
    elif name == "data":
        data[3] = (data[3][0] + 1e-3, data[3][1])
    elif name == "task":
        task = gs.Classification(max_length=7)
    elif name == "curvature":
        make = gs.gauss_newton
    elif name == "parameters":
        include = ["2.*", "0.weight"]
    else:
        model.double()
        data = [(x.double(), y) for x, y in data]
    with pytest.raises(gs.FingerprintError, match=f"{differs} is now"):
        run()


def test_a_damaged_checkpoint_is_told(tmp_path):
    path = tmp_path / "run"
    gs.spectrum(Diagonal(torch.rand(50)), 2, resume=path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(gs.StoreError, match=r"run is damaged.*delete it to start again"):
        gs.spectrum(Diagonal(torch.rand(50)), 2, resume=path)


def test_json_round_trip(tmp_path):
    result = gs.spectrum(Diagonal(torch.cat([torch.tensor([9.0, -8.0]), torch.rand(300)])), 2, gradient=torch.ones(302))
    again = gs.Spectrum.from_json(result.to_json(tmp_path / "s.json"))
    assert again == result
    assert torch.equal(again.sketches, result.sketches)
    assert (tmp_path / "s.json").exists()
    assert "R_NEG" in str(again)


def test_an_asymmetric_map_is_found_out():
    matrix = rotated(spectra()["two-sided"]).matrix
    skew = torch.randn(400, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    skew = (skew - skew.T) * matrix.norm() / (skew - skew.T).norm()
    for share in (0.1, 1.0):
        with pytest.raises(gs.InputError, match=r"not self-adjoint|changed between"):
            gs.spectrum(Matrix(matrix + share * skew), 5)


def test_a_random_map_is_found_out():
    class Dropping(Diagonal):
        def _apply(self, x):
            return super()._apply(x) * (torch.rand(self.n) > 0.1)

        _apply_adjoint = _apply

    torch.manual_seed(0)
    with pytest.raises(gs.InputError, match=r"not self-adjoint|changed between"):
        gs.spectrum(Dropping(torch.rand(5000)), 5)


def test_nan_in_a_product_is_an_error():
    with pytest.raises(gs.NonFiniteError):
        gs.spectrum(Diagonal(torch.tensor([1.0, float("nan"), 2.0])), 1)


def test_bad_input_is_named():
    operator = Diagonal(torch.rand(50))
    for arguments, message in [
        ({"k": 51}, "1 ≤ k ≤ n"),
        ({"k": 0}, "1 ≤ k ≤ n"),
        ({"k": 5, "steps": 3}, "at least k steps"),
        ({"k": 5, "tolerance": 0.0}, "between 0 and 1"),
        ({"k": 2, "gradient": torch.full((50,), math.nan)}, "not finite"),
        ({"k": 2, "gradient": torch.ones(51)}, r"shape \[51\]"),
        ({"k": 2, "sketch": gs.AFFD(60, 8)}, "n=50"),
        ({"k": 20, "sketch": gs.AFFD(50, 8), "method": "sketched-operator"}, "k ≤ d"),
    ]:
        with pytest.raises(gs.InputError, match=message):
            gs.spectrum(operator, **arguments)
    with pytest.raises(gs.InputError, match="its own adjoint"):
        gs.spectrum(Matrix(torch.rand(5, 5), is_self_adjoint=False), 1)
    phi = gs.AFFD(50, 16)
    with pytest.raises(gs.InputError, match="sketched already"):
        gs.spectrum(phi @ operator @ phi.T, 2, method="full")


def test_bad_types_are_named():
    answers = errors_of(
        [
            "gs.spectrum(torch.eye(3), 1)",
            "(lambda phi: gs.spectrum(phi.T @ phi, 1, which='top'))(gs.AFFD(8, 8))",
            "(lambda phi: gs.spectrum(phi.T @ phi, 1, method='arnoldi'))(gs.AFFD(8, 8))",
        ]
    )
    for answer, text in zip(answers, ["gradsketch.hessian", "'magnitude' or 'both'", "sketched-basis"], strict=True):
        assert text in answer
