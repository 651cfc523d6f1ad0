"""The metric of an adaptive optimizer's step, from the second moments that it keeps."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from gradsketch.errors import InputError
from gradsketch.gradients.factors.factors import Factors
from gradsketch.gradients.fingerprints import digest, model_facts
from gradsketch.gradients.parameters import Selection, bare, selected
from gradsketch.linear_map import widened
from gradsketch.sketches.block_sum import as_matrix
from gradsketch.sketches.roots import Pair, Root

__all__ = ["adafactor"]


def adafactor(model: nn.Module, optimizer: torch.optim.Optimizer, *, parameters: Selection = None) -> Factors:
    """Return factors with which a product of two gradients is that of one Adam step, q · x/√v, by rows and columns.

    Adam's v is taken for r_i c_j / Σv with its own sums over rows and columns, as Adafactor keeps it, because that acts
    on a layer's factors: X ↦ r_i^(−1/4) X_ij c_j^(−1/4) (Σv)^(1/4). Half of the step goes to each side of a product. A
    vector has v itself. √v is that of the optimizer: corrected for its start, with its ε added.

    Args:
        model: the model that the optimizer trains.
        optimizer: Adam, AdamW or another that keeps ``exp_avg_sq``, after at least one step.
        parameters: the selection, or globs of names; by default all that are trainable.

    Source: N. Shazeer and M. Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018.

    Example:
        >>> model = torch.nn.Linear(20, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.randn(8, 20)).square().sum().backward()
        >>> optimizer.step()
        >>> gs.adafactor(model, optimizer).roots["weight"].columns.values.shape
        torch.Size([20])

    Raises:
        InputError: the optimizer holds no second moments of a parameter.
    """
    began, chosen = time.perf_counter(), selected(model, parameters)
    moments = _second_moments(optimizer)
    roots: dict[str, Pair | Any] = {}
    for name, parameter in chosen:
        if id(parameter) not in moments:
            raise InputError(
                f"a {type(optimizer).__name__} without second moments of {name!r}",
                "an optimizer that keeps exp_avg_sq, after a step in which the parameter had a gradient",
                "Take those of Adam or AdamW once training has begun, or leave the parameter out: parameters=...",
            )
        roots[name] = _pair(moments[id(parameter)].reshape(as_matrix(parameter.shape)))
    facts = {
        "method": "adafactor",
        "model": model_facts(bare(model)),
        "parameters": list(chosen.names),
        "moments": digest([moments[id(parameter)] for _, parameter in chosen]),
    }
    return Factors("adafactor", roots, facts, 0, time.perf_counter() - began)


def _second_moments(optimizer: torch.optim.Optimizer) -> dict[int, Tensor]:
    """Return (√v + ε)² of each parameter that has a state, by the parameter's identity."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if "exp_avg_sq" in state:
                v = state["exp_avg_sq"].detach()
                v = v.to(widened(v.dtype)) / (1 - group["betas"][1] ** float(state["step"]))
                found[id(parameter)] = (v.sqrt() + group["eps"]).square()
    return found


def _pair(v: Tensor) -> Pair:
    rows, columns = v.sum(1), v.sum(0)
    if len(rows) == 1:
        return Pair(Root(torch.ones_like(rows[0])), Root(columns**-0.25))
    return Pair(Root(rows**-0.25), Root(columns**-0.25 * v.sum() ** 0.25))
