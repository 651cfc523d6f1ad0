"""Every table, in the order of the page. A new one is a script and a line here."""

from __future__ import annotations

from benchmarks.paper import (
    fig02_hessian_evolution,
    fig03_fig04_memory_time,
    peers,
    table01_layers,
    table02_dense_per_layer,
    table03_table08_gradients,
    table04_ratios,
    table06_least_d,
    table07_least_d_eigenvalues,
    table09_products,
    table10_intrinsic_dimension,
    table11_dense_on_the_fly,
    theorems,
)
from benchmarks.paper.table import Table

__all__ = ["TABLES"]

TABLES: dict[str, Table] = {
    module.TABLE.name: module.TABLE
    for module in (
        table01_layers,
        table02_dense_per_layer,
        table03_table08_gradients,
        table04_ratios,
        table06_least_d,
        table07_least_d_eigenvalues,
        table09_products,
        table10_intrinsic_dimension,
        table11_dense_on_the_fly,
        fig02_hessian_evolution,
        fig03_fig04_memory_time,
        theorems,
        peers,
    )
}
