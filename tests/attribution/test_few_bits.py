"""An index of rows in few bits answers as one of float16 does, but for the rounding."""

import pytest
import torch
import toys

import gradsketch as gs
from gradsketch.cli.main import main
from gradsketch.errors import InputError

D, ROWS = 1536, 60


@pytest.fixture(scope="module")
def indexes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("indexes")
    model, task = toys.TinyLM(), toys.language_task()
    return {
        dtype: gs.build_index(folder / dtype, model, task, toys.texts(ROWS), d=D, dtype=dtype, progress=False)
        for dtype in ("float16", "int8", "int4", "sign")
    }


def scores(index, **options):
    hits = index.query(toys.TinyLM(), toys.texts(ROWS)[7:9], k=ROWS, **options)
    found = torch.zeros(2, ROWS)
    for number, answer in enumerate(hits):
        for hit in answer:
            found[number, hit.row] = hit.score
    return found


# Least correlation with the scores of float16. What rounding adds to so few rows is amplified by (F + λI)⁻¹.
LEAST = {"int8": (0.9999, 0.999), "int4": (0.99, 0.97), "sign": (0.85, 0.2)}


@pytest.mark.parametrize("score", ["dot", "cosine", "ridge", "influence"])
@pytest.mark.parametrize("dtype", LEAST)
def test_scores(indexes, score, dtype):
    exact, found = scores(indexes["float16"], score=score), scores(indexes[dtype], score=score)
    r = float(torch.corrcoef(torch.stack([exact.flatten(), found.flatten()]))[0, 1])
    assert r > LEAST[dtype][score in ("ridge", "influence")]
    if score == "cosine":
        assert found.argmax(dim=1).tolist() == [7, 8]


@pytest.mark.parametrize("dtype", ["int4", "sign"])
def test_coarse_and_explained(indexes, dtype):
    assert scores(indexes[dtype], coarse=300, score="cosine").argmax(dim=1).tolist() == [7, 8]
    index, model = indexes[dtype], toys.TinyLM()
    hits = index.explain(model, index.query(model, toys.texts(ROWS)[7], k=1, score="dot"), top=1)
    hit = hits[0][0]
    assert sum(token.value for token in hit.tokens) + hit.beyond_tokens == pytest.approx(hit.score, rel=1e-4)


def test_self_influence(indexes):
    exact, found = (indexes[dtype].self_influence("ridge").values for dtype in ("float16", "int8"))
    torch.testing.assert_close(found, exact, rtol=0.05, atol=0.01)
    for dtype in ("int4", "sign"):
        with pytest.raises(InputError, match=f"stored as {dtype}.*--store int8"):
            indexes[dtype].self_influence()


def test_bytes(indexes):
    """Of files, text and all."""
    size = {
        dtype: sum(file.stat().st_size for file in index.folder.path.glob("checkpoint-0/*.arrow"))
        for dtype, index in indexes.items()
    }
    assert size["sign"] < size["int4"] / 2 < size["int8"] / 3 < size["float16"] / 5


def test_on_the_command_line(indexes, tmp_path, capsys):
    assert main(["verify", str(indexes["int4"].folder.path)]) == 0
    assert main(["export", str(indexes["int4"].folder.path), "--parquet", str(tmp_path / "rows.parquet")]) == 0
