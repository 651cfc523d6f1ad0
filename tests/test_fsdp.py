"""A model that FSDP2 shares out among ranks gives what it gives in one piece."""

from pathlib import Path

from launch import run


def test_sketches(tmp_path: Path) -> None:
    run("ranks", tmp_path)


def test_curvature(tmp_path: Path) -> None:
    run("ranks_curvature", tmp_path)


def test_subspaces(tmp_path: Path) -> None:
    run("ranks_subspace", tmp_path)
