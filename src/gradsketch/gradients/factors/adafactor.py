"""The metric of an adaptive optimizer's step, from the second moments that it keeps."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

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
        optimizer: Adam, AdamW or another that keeps ``exp_avg_sq``, after at least one step; with ``amsgrad`` the
            largest v counts, as in the step. One that was loaded must list its parameters in the order it was saved in.
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
        InputError: the optimizer holds no second moments of a parameter, those of another one in its place, or some
            that are zero or not finite.
    """
    began, chosen = time.perf_counter(), selected(model, parameters)
    kept = _second_moments(optimizer)
    moments = {name: _own(kept, optimizer, name, parameter) for name, parameter in chosen}
    roots: dict[str, Pair | Any] = {
        name: _pair(moments[name].reshape(as_matrix(parameter.shape))) for name, parameter in chosen
    }
    facts = {
        "method": "adafactor",
        "model": model_facts(bare(model)),
        "parameters": list(chosen.names),
        "moments": digest(list(moments.values())),
    }
    return Factors("adafactor", roots, facts, 0, time.perf_counter() - began)


class _Kept(NamedTuple):
    """(√v + ε)² of a parameter, and its name where the optimizer was made of named ones."""

    moments: Tensor
    name: str | None


def _second_moments(optimizer: torch.optim.Optimizer) -> dict[int, _Kept]:
    """Return what is kept of each parameter that has a state, by the parameter's identity."""
    found = {}
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for parameter, name in zip(group["params"], names, strict=True):
            state = optimizer.state.get(parameter, {})
            v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))  # the largest are those that the step takes
            if v is not None and {"betas", "eps"} <= group.keys():
                v = v.detach().to(widened(v.dtype)) / (1 - group["betas"][1] ** float(state["step"]))
                found[id(parameter)] = _Kept((v.sqrt() + group["eps"]).square(), name)
    return found


def _own(kept: dict[int, _Kept], optimizer: torch.optim.Optimizer, name: str, parameter: Tensor) -> Tensor:
    """Return the moments of one parameter, once nothing says that they are another's.

    PyTorch hands a state dict on by places, and compares neither names nor shapes.
    """
    if id(parameter) not in kept:
        raise InputError(
            f"{type(optimizer).__name__} without second moments of {name!r}",
            "an optimizer that keeps exp_avg_sq, after a step in which the parameter had a gradient",
            "Take those of Adam or AdamW once training has begun, or leave the parameter out: parameters=...",
        )
    found = kept[id(parameter)]
    came = ""
    if found.moments.shape != parameter.shape:
        came = f"second moments of shape {list(found.moments.shape)} for {name!r} of shape {list(parameter.shape)}"
    elif found.name is not None and found.name != name and not found.name.endswith(f".{name}"):
        came = f"second moments of {found.name!r} in the place of {name!r}"
    if came:
        raise InputError(
            came,
            "an optimizer whose parameters are listed in the order in which its state was saved",
            "Make it as the training did, with the same groups, and load the state again",
        )
    return found.moments


def _pair(v: Tensor) -> Pair:
    rows, columns = v.sum(1), v.sum(0)
    if len(rows) == 1:
        return Pair(Root(torch.ones_like(rows[0])), Root(columns**-0.25))
    return Pair(Root(rows**-0.25), Root(columns**-0.25 * v.sum() ** 0.25))
