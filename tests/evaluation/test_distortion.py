"""What a user is told about a sketch on their own model: right, how good, at what cost, which d."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradsketch import BlockSum, Classification, InputError, Parameters, distortion
from gradsketch.errors import GradsketchWarning
from gradsketch.sketches.affd import AFFD


def _examples(count=40):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(20, generator=generator), i % 5) for i in range(count)]


def _model(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Dropout(dropout), nn.Linear(40, 30), nn.Linear(30, 5))


@pytest.fixture(scope="module")
def result():
    model = _model()
    return distortion(model, Classification(), _examples(), BlockSum(Parameters(model), 1024), repeats=1)


def test_sizes_are_nested_and_quality_grows(result):
    assert [q.d for q in result.qualities] == [256, 512, 1024]
    assert result.qualities[0].pearson < result.qualities[-1].pearson
    for q in result.qualities:
        assert q.pearson_interval[0] <= q.pearson <= q.pearson_interval[1]
        assert 0.3 < q.noise < 3


def test_gradients_are_verified(result):
    assert result.right
    assert result.gradient_error < 1e-5
    assert result.verified == 3


def test_exact_values_are_those_of_autograd(result):
    """The reported r at the largest size, from gradients formed one by one."""
    model, task, examples = _model(), Classification(), _examples()
    parameters = Parameters(model)
    rows = []
    for example in examples:
        loss = task.losses(model, task.collate([example])).sum()
        parts = torch.autograd.grad(loss, list(dict(parameters).values()))
        rows.append(parameters.flatten(dict(zip(parameters.names, parts, strict=True))))
    exact, sketches = torch.stack(rows), BlockSum(parameters, 1024)(torch.stack(rows))
    i, j = torch.triu_indices(40, 40, 1)
    pairs = torch.stack([(exact @ exact.T)[i, j], (sketches @ sketches.T)[i, j]])
    assert result.qualities[-1].pearson == pytest.approx(torch.corrcoef(pairs)[0, 1].item(), abs=1e-5)


def test_cost_and_recommendation(result):
    assert result.cost_ratio == result.seconds / result.reference_seconds > 0
    predicted = replace(result, wanted=0.9999)  # more than any measured size reaches
    assert predicted.sufficient is None
    assert predicted.recommended >= predicted.needed
    assert math.log2(predicted.recommended).is_integer()
    assert json.loads(result.to_json())["recommended"] == result.recommended


def test_the_table_says_it_in_words(result):
    table = str(result)
    assert "agree with autograd" in table
    assert "noise·√d" in table
    assert f"recommended  d = {result.recommended:,} for r ≥ 0.95" in table
    assert all(len(line) < 120 for line in table.splitlines())


def test_a_model_whose_gradients_are_random_is_found_out():
    model = _model(dropout=0.5).train()
    with pytest.warns(GradsketchWarning, match="one draw"):
        found = distortion(model, Classification(), _examples(8), BlockSum(Parameters(model), 256), repeats=1)
    assert not found.right
    assert "DO NOT AGREE" in str(found)
    assert "model.eval()" in str(found)
    assert model.training


def test_any_sketch_and_part_of_the_parameters():
    model = _model()
    parameters = Parameters(model, include="0.*")
    whole = distortion(
        model, Classification(), _examples(12), AFFD(parameters.n, 512), parameters=parameters, repeats=1
    )
    assert whole.right
    assert whole.parameters == parameters.n == 840
    part = distortion(model, Classification(), _examples(12), BlockSum(parameters, 512), repeats=1)
    assert part.right
    assert part.parameters == 840


def test_bad_input():
    model = _model()
    with pytest.raises(InputError, match="at least three examples"):
        distortion(model, Classification(), _examples(2), BlockSum(Parameters(model), 256), repeats=1)


def test_a_wanted_r_out_of_range_is_refused_before_anything_is_measured():
    def never(model, batch):
        raise AssertionError("the model was run")

    model = _model()
    with pytest.raises(InputError, match=r"a wanted Pearson r of 1\.5"):
        distortion(model, never, _examples(8), BlockSum(Parameters(model), 256), wanted=1.5)


def test_a_size_that_was_measured_to_do_is_recommended_over_a_larger_prediction(result):
    enough = [q for q in result.qualities if q.d >= 512]
    wanted = min(q.pearson_interval[0] for q in enough)
    found = replace(result, wanted=wanted, needed=4000.0)
    assert found.sufficient == found.recommended == next(q.d for q in enough if q.pearson_interval[0] >= wanted)
    assert f"d = {found.recommended:,} for r ≥ {wanted:g} (measured" in str(found)
    assert replace(found, needed=100.0).recommended == 128


class TestFewBits:
    def test_r_falls_with_the_bits_and_grows_with_the_size(self, result):
        found = {(each.d, each.dtype): each for each in result.stored}
        assert [found[256, dtype].bytes for dtype in ("float16", "int8", "int4", "sign")] == [512, 256, 128, 32]
        for d in (256, 512, 1024):
            r = [found[d, dtype].pearson for dtype in ("float16", "int8", "int4", "sign")]
            assert r[0] == pytest.approx(next(q.pearson for q in result.qualities if q.d == d), abs=1e-3)
            assert r[1] == pytest.approx(r[0], abs=0.005)
            assert abs(r[0] - r[2]) < 0.05
            assert 0.01 < r[2] - r[3] < 0.4
        assert found[1024, "int4"].pearson > found[256, "float16"].pearson

    def test_the_cheapest_that_is_sure_to_do(self, result):
        wanted = replace(result, wanted=0.8)
        assert wanted.cheapest.pearson_interval[0] >= 0.8
        assert not [
            each for each in result.stored if each.bytes < wanted.cheapest.bytes and each.pearson_interval[0] >= 0.8
        ]
        assert f"--store {wanted.cheapest.dtype}: {wanted.cheapest.bytes} bytes a row" in str(wanted)
        assert replace(result, wanted=0.9999).cheapest is None
        assert "none of these is sure to reach" in str(replace(result, wanted=0.9999))
