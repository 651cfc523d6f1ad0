"""Exact inner products of per-example gradients, from the factors that layers leave behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gradsketch.errors import NonFiniteError
from gradsketch.gradients.data import batch_length
from gradsketch.gradients.parameters import Selection, bare, selected
from gradsketch.gradients.per_example.capture import Capture
from gradsketch.gradients.per_example.contributions import Consumer, Contribution, Direct, IndexedRows, Outer, wide
from gradsketch.gradients.per_example.differentiating import differentiating
from gradsketch.gradients.tasks import Batch, TaskLike, as_task
from gradsketch.linear_map import widened
from gradsketch.sketches.block_sum import as_matrix
from gradsketch.transforms.precision import full_precision

__all__ = ["gradient_gram", "inner_products"]

# Entries of one side's block of columns, or of a table of pairs of positions, that are held at once.
_BLOCK = 1 << 24


def gradient_gram(
    model: nn.Module,
    task: TaskLike,
    batch_x: Batch,
    batch_y: Batch | None = None,
    *,
    parameters: Selection = None,
    method: Literal["auto", "outer", "vmap", "loop"] = "auto",
) -> Float[Tensor, "b b2"]:
    """Return ⟨∇L(x_i), ∇L(y_j)⟩ for all pairs of examples of two batches (of one with itself by default), exactly.

    The gradients of linear layers, convolutions and embeddings are not formed: one forward and one backward pass a
    batch, then products of the layers' inputs and output gradients, ties and repeated uses included. This is the truth
    that sketches are measured against, in float32 or wider. Holds the factors of both batches at once.

    Args:
        model: left as it was found, also after an error.
        task: a Task, or a function (model, batch) → losses [b].
        batch_x: b examples, collated.
        batch_y: b2 examples, collated.
        parameters: the selection, or globs of names; by default all that are trainable.
        method: as for ``GradientSketcher``.

    Example:
        >>> model = torch.nn.Linear(30, 20)
        >>> batch = torch.randn(5, 30), torch.arange(5)
        >>> gs.gradient_gram(model, gs.Classification(), batch).shape
        torch.Size([5, 5])

    Raises:
        InputError: as ``GradientSketcher``.
        NonFiniteError: the gradient of an example is not finite.
    """
    tensors = dict(selected(model, parameters))
    capture = Capture(bare(model), as_task(task), tensors, method)
    with differentiating(capture.model, tensors):
        losses_x, x = _collected(capture, batch_x)
        losses_y, y = (losses_x, x) if batch_y is None else _collected(capture, batch_y)
    example = next(iter(tensors.values()))
    dtype = widened(example.dtype)
    gram = torch.zeros(len(losses_x), len(losses_y), dtype=dtype, device=example.device)
    with torch.no_grad(), full_precision(gram.device):
        for name, tensor in tensors.items():
            if name in x and name in y:
                gram += inner_products(x[name], y[name], tensor.shape).to(gram.device)
    if not torch.isfinite(gram).all():
        i, j = (int(place) for place in (~torch.isfinite(gram)).nonzero()[0])
        raise NonFiniteError(
            f"the gradients of example {i} of the first batch and example {j} of the second have the inner product "
            f"{gram[i, j].item()}",
            "finite gradients",
            "Sketch them with sketch_gradients, which names the example and the parameter",
        )
    return gram


def _collected(capture: Capture, batch: Batch) -> tuple[Tensor, dict[str, list[Contribution]]]:
    """Return a batch's losses and, by parameter, the contributions to its examples' gradients."""
    terms: dict[str, list[Contribution]] = {}
    formed: dict[str, Tensor] = {}

    def consume(name: str, contribution: Contribution, examples: slice) -> None:
        if examples == slice(None):
            terms.setdefault(name, []).append(contribution)
        else:  # formed one example after another
            part = contribution.dense(*as_matrix(capture.tensors[name].shape))
            if name not in formed:
                formed[name] = part.new_zeros(batch_length(batch), *part.shape[1:])
            formed[name][examples] += part

    def begin() -> Consumer:
        terms.clear()
        formed.clear()
        return consume

    losses = capture(batch, begin)
    for name, gradients in formed.items():
        terms.setdefault(name, []).append(Direct(gradients))
    return losses, terms


def inner_products(x: Sequence[Contribution], y: Sequence[Contribution], shape: Sequence[int]) -> Float[Tensor, "b b2"]:
    """Return ⟨X_i, Y_j⟩, X_i and Y_j being the sums of one parameter's contributions to examples i and j.

    The cheaper of two forms, neither of which holds a gradient: pairs of positions,
    Σ_{t,t'} ⟨left_t, left'_t'⟩⟨right_t, right'_t'⟩, where these are few, or blocks of columns of the gradients.
    """
    rows, columns = as_matrix(shape)
    left, right = _factors(x), _factors(y)
    if left is None or right is None:
        return _by_columns(x, y, rows, columns)
    (b, t, _), (c, s, _) = left.left.shape, right.left.shape
    cost_by_positions = b * t * c * s * (rows + columns)
    cost_by_columns = (b * t + c * s + b * c) * rows * columns
    return _by_positions(left, right) if cost_by_positions <= cost_by_columns else _by_columns(x, y, rows, columns)


def _factors(terms: Sequence[Contribution]) -> Outer | None:
    """Return the sum of contributions as one sum of outer products, if all of them are such."""
    outer = [term for term in terms if isinstance(term, Outer)]
    if len(outer) < len(terms):
        return None
    return Outer(torch.cat([wide(o.left) for o in outer], 1), torch.cat([wide(o.right) for o in outer], 1))


def _by_positions(x: Outer, y: Outer) -> Float[Tensor, "b b2"]:
    (b, t, _), (c, s, _) = x.left.shape, y.left.shape
    step = max(1, _BLOCK // max(1, t * c * s))
    out = []
    for start in range(0, b, step):
        left, right = (side[start : start + step].flatten(0, 1) for side in (x.left, x.right))
        pairs = (left @ y.left.flatten(0, 1).T) * (right @ y.right.flatten(0, 1).T)
        out.append(pairs.view(-1, t, c, s).sum((1, 3)))
    return torch.cat(out)


def _by_columns(x: Sequence[Contribution], y: Sequence[Contribution], rows: int, columns: int) -> Float[Tensor, "b b2"]:
    b, c = (terms[0].examples for terms in (x, y))
    out: Tensor | None = None
    step = max(1, _BLOCK // (max(b, c) * rows))
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        left, right = (_block(terms, rows, columns, start, stop).flatten(1) for terms in (x, y))
        out = left @ right.T if out is None else out.addmm_(left, right.T)
    assert out is not None  # a parameter has at least one column
    return out


def _block(terms: Sequence[Contribution], rows: int, columns: int, start: int, stop: int) -> Tensor:
    """Return columns ``start … stop-1`` of the sum of contributions, ``[b, rows, stop-start]``."""
    parts = []
    for term in terms:
        if isinstance(term, Outer | IndexedRows):
            parts.append(replace(term, right=term.right[..., start:stop]).dense(rows, stop - start))
        else:
            parts.append(term.dense(rows, columns)[..., start:stop])
    return sum(parts[1:], parts[0])
