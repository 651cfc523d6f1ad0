"""A model whose layers tensor parallelism splits over ranks gives what it gives in one piece."""

from pathlib import Path

import pytest

from launch import run

MODELS = pytest.param("transformers", marks=pytest.mark.slow)


@pytest.mark.parametrize("part", ["sketches", "refusals", "failures", "indexes", MODELS])
def test_ranks(part: str, tmp_path: Path) -> None:
    run("ranks_tensor_parallel", part, tmp_path)
