"""What is asked with data, sketches or numbers that are not the index's own is refused, and is never a wrong score."""

import json

import numpy as np
import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.errors import FingerprintError, InputError, NonFiniteError
from gradsketch.reading import read_examples
from gradsketch.reading.mapped import mapped_rows

TEXTS = toys.texts(12)
DATA = [{"id": f"r{i}", "text": text} for i, text in enumerate(TEXTS)]
EXACT = {"rerank": 12, "exact": "empirical-ekfac", "k": 12}


def build(path, data, **options):
    given = {"d": 64, "shard_rows": 5, "dtype": "float32", "progress": False} | options
    return gs.build_index(path, toys.TinyLM(), toys.language_task(), data, **given)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return build(tmp_path_factory.mktemp("other"), DATA)


def listed(hits):
    return [(hit.row, round(hit.score, 4)) for hit in hits[0]]


@pytest.mark.parametrize(("data", "words"), [
    (DATA[::-1], "row 0 is not that of the index: its text"),
    (DATA[:5], "data of 5 rows"),
    ([*DATA[:3], {**DATA[3], "id": "other"}, *DATA[4:]], "its id is 'other'"),
])  # fmt: skip
def test_exact_scores_and_shares_of_tokens_need_the_data_of_the_index(index, data, words):
    with pytest.raises(InputError, match=words):
        index.query(toys.TinyLM(), TEXTS[3:4], data=data, **EXACT)
    hits = index.query(toys.TinyLM(), TEXTS[3:4], k=12)
    with pytest.raises(InputError, match=words):
        index.explain(toys.TinyLM(), hits, data=data, top=12)
    assert listed(index.query(toys.TinyLM(), TEXTS[3:4], data=DATA, **EXACT))[0][0] == 3


def test_exact_scores_need_data_of_the_same_losses_where_rows_have_no_text(tmp_path):
    model, x = toys.classifier(), toys.vectors(12)["x"]
    data = [(row, i % 3) for i, row in enumerate(x)]
    index = gs.build_index(tmp_path, model, toys.vector_task(), data, d=32, dtype="float32", progress=False)
    index.query(model, data[:1], data=data, **EXACT)
    with pytest.raises(InputError, match="with which it was indexed"):
        index.query(model, data[:1], data=[(10 * row, label) for row, label in data], **EXACT)


def test_a_column_named_as_those_that_are_renamed_stays_what_it_is(tmp_path):
    data = [{"text": text, "data_prompt": "What", "data_answer": " else", "loss": 7} for text in TEXTS]
    index = build(tmp_path, data)
    asked = [index.query(toys.TinyLM(), TEXTS[3:4], data=given, **EXACT) for given in (None, data)]
    assert listed(asked[0]) == listed(asked[1])


def test_two_fields_of_one_column_are_a_bad_row(tmp_path):
    with pytest.raises(InputError, match="two fields for the column 'data_loss'"):
        build(tmp_path, [{"text": "some text", "loss": 1, "data_loss": 2}])


def test_chosen_rows_are_written_of_the_data_of_the_index(index, tmp_path):
    found = index.select(toys.TinyLM(), TEXTS[3:4], rows=2)
    assert gs.attribution.select.Selection.from_json(found.to_json()) == found
    lines = found.write(tmp_path / "kept.jsonl", DATA).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [DATA[row] for row in sorted(found.rows)]
    with pytest.raises(InputError, match="another content or order"):
        found.write(tmp_path / "other.jsonl", DATA[::-1])
    assert not (tmp_path / "other.jsonl").exists()


@pytest.mark.parametrize("place", ["facts.jsonl", "*.jsonl", "."])
def test_chosen_rows_never_take_the_place_of_the_data(index, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps(row) + "\n" for row in DATA)
    (tmp_path / "facts.jsonl").write_text(text)
    found = index.select(toys.TinyLM(), TEXTS[3:4], rows=2)
    with pytest.raises(InputError, match="from which the data is read"):
        found.write("facts.jsonl", read_examples(place))
    assert (tmp_path / "facts.jsonl").read_text() == text


def test_rows_read_under_other_names_are_written_under_their_own(tmp_path):
    raw = [{"q": "the number", "a": text, "text": "a note"} for text in TEXTS]
    data = mapped_rows(raw, columns={"prompt": "q", "answer": "a"})
    found = build(tmp_path / "i", data).select(toys.TinyLM(), [data[3]], rows=1)
    (line,) = found.write(tmp_path / "kept.jsonl", data).read_text().splitlines()
    assert json.loads(line) == raw[found.rows[0]]


def test_copies_of_a_harmful_row_harm_too(tmp_path):
    rows = [{"text": text} for text in TEXTS]
    worst = build(tmp_path / "a", rows).select(toys.TinyLM(), TEXTS[3:4], rows=1, harmful=True, score="dot").rows[0]
    found = build(tmp_path / "b", [*rows, rows[worst], rows[worst]]).select(
        toys.TinyLM(), TEXTS[3:4], rows=3, harmful=True, score="dot"
    )
    assert (set(found.rows), found.copies) == ({worst, 12, 13}, 0)


def test_other_ready_sketches_of_the_same_rows_are_refused(tmp_path):
    phi = gs.BlockSum(gs.Parameters(toys.TinyLM()), 16)
    first, second = torch.randn(2, 5, 16)
    made = gs.index_sketches(tmp_path, first, torch.zeros(5), TEXTS[:5], phi, dtype="float32")
    again = gs.index_sketches(tmp_path, first.requires_grad_(), torch.zeros(5), TEXTS[:5], phi, dtype="float32")
    for index in (made, again):
        torch.testing.assert_close(next(iter(index.stores[0])).decoded(), first.detach())
    with pytest.raises(FingerprintError, match="sketches"):
        gs.index_sketches(tmp_path, second, torch.zeros(5), TEXTS[:5], phi, dtype="float32")
    with pytest.raises(FingerprintError, match="sketches"):
        gs.index_sketches(tmp_path, first, torch.ones(5), TEXTS[:5], phi, dtype="float32")
    half = gs.index_sketches(tmp_path / "half", second.bfloat16(), torch.zeros(5), TEXTS[:5], phi, dtype="float32")
    torch.testing.assert_close(next(iter(half.stores[0])).decoded(), second.bfloat16().float())


def scaled(tmp_path, scales):
    """Return an index of gradients s·x, a question of the size ``scales[0]``, and the exact gradients in float64."""
    model, x = torch.nn.Linear(4, 1, bias=False), toys.vectors(len(scales))["x"][:, :4]
    rows = [{"x": row, "s": torch.tensor(scale)} for row, scale in zip(x, scales, strict=True)]

    def losses(model, batch):
        return batch["s"] * model(batch["x"])[:, 0]

    index = gs.build_index(tmp_path, model, losses, rows, d=4, dtype="float32", progress=False)
    return index, model, rows, torch.tensor(scales, dtype=torch.float64)[:, None] * x.double()


def test_a_score_beyond_float32_is_an_error_and_no_row_that_is_missing(tmp_path):
    index, model, rows, exact = scaled(tmp_path, [1e20, 1e30, 1.0])
    for options in ({}, {"coarse": 2}, {"opponents": 2}):
        with pytest.raises(NonFiniteError, match="beyond what float32 holds"):
            index.query(model, rows[:1], score="dot", **options)
    with pytest.raises(NonFiniteError, match="beyond what float32 holds"):
        index.scores(model, rows[:1], score="dot")
    found = index.scores(model, rows[:1], score="cosine")[0]
    unit = exact / exact.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found.double(), unit @ unit[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "sound"), [(1e-25, False), (1e-12, True), (1e12, True), (1e25, False)])
def test_influence_of_gradients_whose_squares_float32_lacks_is_refused(tmp_path, size, sound):
    index, model, rows, exact = scaled(tmp_path, [size] * 5)
    if not sound:
        with pytest.raises(InputError, match="does not hold the squares"):
            index.query(model, rows[:1], score="influence")
        return
    second = exact.T @ exact / 5
    damped = second + second.trace() / 4 * torch.eye(4, dtype=torch.float64)
    expected = exact @ torch.linalg.solve(damped, exact[0]) / 5
    torch.testing.assert_close(
        index.scores(model, rows[:1], score="influence")[0].double(), expected, rtol=1e-4, atol=1e-6
    )


def where(tmp_path, values, condition, **options):
    """Return the rows that a condition lets through."""
    rows = [{"text": text, **value} for text, value in zip(TEXTS, values, strict=False)]
    hits = build(tmp_path, rows, **options).query(toys.TinyLM(), TEXTS[:1], k=20, where=condition)
    return sorted(hit.row for hit in hits[0])


@pytest.mark.parametrize(("wanted", "rows"), [(1, [0]), (True, [1]), ([1, True], [0, 1]), ("1", [2])])
def test_true_is_not_the_number_one(tmp_path, wanted, rows):
    assert where(tmp_path, [{"a": 1}, {"a": True}, {"a": "1"}], {"a": wanted}) == rows


@pytest.mark.parametrize("wanted", [np.array([1, 2]), torch.tensor([1, 2]), [np.int64(1), torch.tensor(2)]])
def test_arrays_of_wanted_values(tmp_path, wanted):
    assert where(tmp_path, [{"a": 1}, {"a": 2}, {"a": 3}], {"a": wanted}) == [0, 1]


def test_a_function_sees_every_column_in_every_shard(tmp_path):
    assert where(tmp_path, [{"a": 1}, {}, {}], lambda record: record["a"] is None, shard_rows=1) == [1, 2]


def test_integers_that_a_float_would_round_stay_what_they_are(tmp_path):
    large = 2**53 + 1
    assert where(tmp_path, [{"a": large}, {"a": 0.5}, {"a": large - 1}], {"a": large}) == [0]


def test_no_row_is_no_question(index):
    with pytest.raises(InputError, match="no row"):
        index.stored([])
