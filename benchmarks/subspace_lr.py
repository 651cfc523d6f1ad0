"""Does the default learning rate of a subspace fit every model? Against a grid, in few and in many dimensions.

The default is the best of a few short tries (gradsketch.dimension.step_length). Each cell trains from theta0 with a
learning rate that falls linearly to zero. A random net on digits, MiniLM on spam, SmolLM2's last 8 layers on countries.

Run: python benchmarks/subspace_lr.py [--only digits spam countries] [--grid 0.001 0.002 0.005]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import intrinsic_dimension
from record import write

import gradsketch as gs
from gradsketch.demo.digits import digits_net, flipped_digits


def digits() -> tuple[tuple[Any, ...], dict[str, Any], list[int]]:
    train, test = flipped_digits(share=0.0)
    task = gs.Classification()
    accuracy = gs.Accuracy(task, test, batch_size=200)
    return (digits_net(), task, train, accuracy), {"steps": 100, "batch_size": 32}, [64, 4096]


def _pretrained(setting: intrinsic_dimension.Setting, steps: int, dims: list[int]) -> Any:
    arguments = setting.model, setting.task, setting.train, setting.evaluate
    return arguments, {"steps": steps, "batch_size": 16, "parameters": setting.parameters}, dims


SETTINGS: dict[str, Callable[[], Any]] = {
    "digits": digits,
    "spam": lambda: _pretrained(intrinsic_dimension.spam(quick=True), 40, [64, 65536]),
    "countries": lambda: _pretrained(intrinsic_dimension.countries(quick=True), 18, [64, 16384]),
}


def measure(name: str, grid: list[float]) -> list[dict[str, Any]]:
    """Return metric and training loss for every dimension and learning rate, None where training diverged."""
    arguments, options, dims = SETTINGS[name]()
    cells = []
    for d in dims:
        for lr in (None, *grid):
            cell: dict[str, Any] = {"d": d, "default": lr is None, "lr": lr, "metric": None, "loss": None}
            try:
                curve = gs.dimension_curve(*arguments, [d], lr=lr, progress=False, **options)
                point = curve.points[0]
                cell |= {"lr": curve.settings["lr"], "metric": point.value, "loss": point.loss, "start": curve.start}
            except gs.NonFiniteError as error:
                cell["diverged"] = str(error)
            cells.append(cell)
            print(name, cell, flush=True)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--grid", nargs="+", type=float, default=[1e-3, 2e-3, 5e-3])
    options = parser.parse_args()
    print(write("subspace_lr", {name: measure(name, options.grid) for name in options.only}))


if __name__ == "__main__":
    main()
