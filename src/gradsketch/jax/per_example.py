"""Sketches of every example's gradient, from one backward pass through any JAX loss, unchanged.

The loss is traced once, and its jaxpr is interpreted with a *slot* more: a vector of d zeros. Wherever a parameter is
used, the result passes through ``_watch``, which changes nothing forwards. Backwards it adds to the slot's cotangent
the sketch of what this use gives to the parameter's gradient. So the gradient by the slot is the sketch, and JAX itself
adds up the uses, through scans, checkpoints and branches.

A use that a rule (``rules.py``) knows never forms the gradient. Any other primitive is differentiated by itself, and
what it gives is formed and sketched: exact for every primitive that has a derivative, and listed by ``slow`` where a
matrix is formed. Nothing is left out, because every use is one or the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend import core
from jaxtyping import Float

from gradsketch.errors import InputError, NonFiniteError
from gradsketch.jax.block_sum import BlockSum
from gradsketch.jax.random import normals
from gradsketch.jax.rules import RULES, Contribution, View, followed
from gradsketch.jax.tiling import Tables
from gradsketch.random import Stream

__all__ = ["PerExample", "per_example"]

Loss = Callable[[Any, Any], Float[Array, ""]]

_CALLS = ("jit", "pjit", "closed_call", "core_call")
_CHECKPOINTS = ("checkpoint", "remat2", "remat")
# Relative difference of two float32 results that are the same but for rounding; wider for narrower parameters.
_TOLERANCE = {"float64": 1e-4, "float32": 1e-3, "bfloat16": 5e-2, "float16": 5e-2}


def per_example(loss: Loss, sketch: BlockSum) -> PerExample:
    """Return a function ``(params, batch) → [b, d]``: the sketch of the gradient of each example's loss.

    Args:
        loss: ``loss(params, example) → scalar``, in JAX, for one example.
        sketch: made by ``block_sum`` for these parameters.

    Example:
        >>> loss = lambda params, example: jnp.square(params["w"] @ example[0] - example[1]).sum()
        >>> params, batch = {"w": jnp.ones((2, 8))}, (jnp.ones((5, 8)), jnp.zeros((5, 2)))
        >>> sketches = gj.per_example(loss, gj.block_sum(params, 4))
        >>> sketches(params, batch).shape
        (5, 4)
    """
    return PerExample(loss, sketch)


class PerExample:
    """A pure function ``(params, batch) → [b, d]``. Every leaf of the batch has the examples in its first axis.

    The first call outside a transformation with parameters and examples of these shapes is audited: see ``audit``.
    """

    def __init__(self, loss: Loss, sketch: BlockSum) -> None:
        self.loss, self.sketch = loss, sketch
        self._compiled = jax.jit(self._losses_and_sketches)
        self._audited: set[Any] = set()

    def __call__(self, params: Any, batch: Any) -> Float[Array, "b d"]:
        """Return the sketches.

        Raises:
            InputError: other parameters than the sketch's, a loss that is no scalar; or the audit failed.
        """
        return self.with_losses(params, batch)[1]

    def with_losses(self, params: Any, batch: Any) -> tuple[Float[Array, " b"], Float[Array, "b d"]]:
        """Return the losses, which come at no cost, and the sketches."""
        leaves = self._checked(params, batch)
        losses, sketches = self._compiled(params, batch)
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, sketches))):
            key = jax.tree.structure(batch), tuple((jnp.shape(leaf)[1:], jnp.result_type(leaf)) for leaf in leaves)
            if key not in self._audited:
                self._compare(params, batch, sketches)
                self._audited.add(key)
        return losses, sketches

    def audit(self, params: Any, batch: Any) -> float:
        """Hold a weighted sum of the examples' sketches against the sketch of the weighted loss's gradient.

        It costs one gradient of the batch. Returns the relative difference.

        Raises:
            InputError: they differ by more than rounding.
            NonFiniteError: a loss or a gradient is not finite.
        """
        self._checked(params, batch)
        return self._compare(params, batch, self._compiled(params, batch)[1])

    def _compare(self, params: Any, batch: Any, sketches: Array) -> float:
        weights = normals(Stream(0, "audit"), len(sketches))
        found, wanted = weights.astype(sketches.dtype) @ sketches, self._of_weighted_loss(params, batch, weights)
        size, difference = float(jnp.linalg.norm(wanted)), float(jnp.linalg.norm(found - wanted))
        if not math.isfinite(size + difference):
            raise NonFiniteError(
                "a gradient that is not finite, in this batch",
                "finite losses and gradients",
                "Find the example with jax.grad(loss)(params, example), or set jax_debug_nans",
            )
        error = difference / size if size else difference
        allowed = max(_TOLERANCE[str(leaf.dtype)] for leaf in jax.tree.leaves(self.sketch.like) if _is_real(leaf))
        if error > allowed:
            raise InputError(
                f"sketches that are {error:.1e} off the gradient's own",
                f"a relative difference below {allowed:g}",
                "Check that the loss is a function of its arguments alone; if it is, please report this model",
            )
        return error

    def slow(self, params: Any, batch: Any) -> Mapping[str, str]:
        """Return the matrices whose gradients are formed, one for each example, with the primitive that uses them."""
        self._checked(params, batch)
        reasons: dict[str, str] = {}
        example = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
        slot = jax.ShapeDtypeStruct((self.sketch.d,), jnp.float32)
        jax.eval_shape(partial(self._of_slot, reasons), slot, params, example)
        return reasons

    def _checked(self, params: Any, batch: Any) -> list[Any]:
        self.sketch.checked(params)
        leaves: list[Any] = jax.tree.leaves(batch)
        if len({jnp.shape(leaf)[:1] for leaf in leaves}) != 1 or not jnp.shape(leaves[0])[:1] > (0,):
            raise InputError(
                f"a batch whose leaves have the shapes {[jnp.shape(leaf) for leaf in leaves]}",
                "examples in the first axis of every leaf, at least one",
                "Stack examples with jnp.stack",
            )
        return leaves

    def _losses_and_sketches(self, params: Any, batch: Any) -> tuple[Array, Array]:
        wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
        slot = jnp.zeros(self.sketch.d, jnp.float64 if wide else jnp.float32)
        one = jax.value_and_grad(partial(self._of_slot, {}))
        losses, sketches = jax.vmap(one, in_axes=(None, None, 0))(slot, params, batch)
        return losses, sketches

    def _of_slot(self, reasons: dict[str, str], slot: Array, params: Any, example: Any) -> Array:
        """Return the loss of an example, as a function of the slot."""
        closed = jax.make_jaxpr(self.loss)(params, example)
        if [aval.shape for aval in closed.out_avals] != [()]:
            raise InputError(
                f"a loss of shape {[aval.shape for aval in closed.out_avals]}",
                "one number for one example",
                "Sum over its tokens, and leave the batch to per_example",
            )
        arguments = jax.tree.leaves((params, example))
        views: list[View | None] = [
            None if leaf is None else View.whole(leaf, jnp.ndim(value))
            for leaf, value in zip(self.sketch.leaves, jax.tree.leaves(params), strict=True)
        ]
        views += [None] * (len(arguments) - len(views))
        interpreter = _Interpreter(slot, reasons)
        outs, marks = interpreter.run(closed.jaxpr, closed.consts, arguments, views)
        return interpreter.escaped(outs, marks)[0]

    @partial(jax.jit, static_argnums=0)
    def _of_weighted_loss(self, params: Any, examples: Any, weights: Array) -> Array:
        def total(leaves: list[Array]) -> Array:
            values = iter(leaves)
            own = [next(values) if _is_real(leaf) else leaf for leaf in jax.tree.leaves(params)]
            tree = jax.tree.unflatten(jax.tree.structure(params), own)
            return weights @ jax.vmap(lambda example: self.loss(tree, example))(examples).astype(weights.dtype)

        real = [leaf for leaf in jax.tree.leaves(params) if _is_real(leaf)]
        gradients = iter(jax.grad(total)(real))
        tree = [next(gradients) if _is_real(leaf) else leaf for leaf in jax.tree.leaves(params)]
        return self.sketch.apply(jax.tree.unflatten(jax.tree.structure(params), tree))


class _Interpreter:
    """Evaluates a jaxpr, and watches every use of a parameter."""

    def __init__(self, slot: Array, reasons: dict[str, str]) -> None:
        self.slot, self.reasons = slot, reasons

    def run(
        self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any], views: Sequence[View | None]
    ) -> tuple[list[Any], list[View | None]]:
        """Return the results, and which of them are views of parameters."""
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        marks: dict[Any, View | None] = dict(zip(jaxpr.invars, views, strict=True))

        def read(variable: Any) -> tuple[Any, View | None]:
            if isinstance(variable, core.Literal):
                return variable.val, None
            return values[variable], marks.get(variable)

        for eqn in jaxpr.eqns:
            ins, seen = zip(*map(read, eqn.invars), strict=True) if eqn.invars else ((), ())
            outs, found = self.equation(eqn, list(ins), list(seen))
            values.update(zip(eqn.outvars, outs, strict=True))
            marks.update(zip(eqn.outvars, found, strict=True))
        results, seen_there = zip(*map(read, jaxpr.outvars), strict=True)
        return list(results), list(seen_there)

    def equation(self, eqn: Any, ins: list[Any], views: list[View | None]) -> tuple[list[Any], list[View | None]]:
        """Evaluate one equation."""
        name, unseen = eqn.primitive.name, [None] * len(eqn.outvars)
        if not any(views):
            return _bind(eqn, ins), list(unseen)
        if name in _CALLS:
            inner = eqn.params["jaxpr"]
            return self.run(inner.jaxpr, inner.consts, ins, views)
        if name in _CHECKPOINTS:
            return self.checkpoint(eqn, ins, views), list(unseen)
        if name == "cond":
            return self.branches(eqn, ins, views), list(unseen)
        if name == "scan":
            return self.scan(eqn, ins, views), list(unseen)
        outs = _bind(eqn, ins)
        if (view := followed(eqn, views)) is not None:
            return outs, [view]
        return self.used(eqn, ins, outs, views), list(unseen)

    def used(self, eqn: Any, ins: list[Any], outs: list[Any], views: list[View | None]) -> list[Any]:
        """Watch what one equation makes of each parameter among its inputs."""
        for place, view in enumerate(views):
            if view is None or not any(_is_real(out) for out in outs):
                continue
            rule = RULES.get(eqn.primitive.name)
            contribution = None if rule is None or sum(v is not None for v in views) > 1 else rule(eqn, place, view)
            if contribution is None:
                contribution = self.formed(partial(_bind, eqn), place, view, eqn.primitive.name)
            outs = _watch(contribution, self.slot, outs, (ins, view.tables))
        return outs

    def formed(self, f: Callable[[list[Any]], list[Any]], place: int, view: View, name: str) -> Contribution:
        """Return how to form what a function's input gets, and sketch it."""
        if min(view.leaf.shape.rows.size, view.leaf.shape.columns.size) > 1:
            self.reasons.setdefault(view.leaf.layout.path, name)

        def contribution(cotangents: list[Any], arrays: tuple[list[Any], Tables | None]) -> Array:
            ins, tables = arrays

            def of_input(value: Array) -> list[Any]:
                return f([*ins[:place], value, *ins[place + 1 :]])

            (cotangent,) = jax.vjp(of_input, ins[place])[1](cotangents)
            return view.leaf.gradient(view.back(cotangent), tables)

        return contribution

    def escaped(self, values: list[Any], views: Sequence[View | None]) -> list[Any]:
        """Return values that leave for where no view is followed: each parameter among them is used as it is."""
        return [
            value
            if view is None
            else _watch(self.formed(list, 0, view, "use as a whole"), self.slot, [value], ([value], view.tables))[0]
            for value, view in zip(values, views, strict=True)
        ]

    def checkpoint(self, eqn: Any, ins: list[Any], views: list[View | None]) -> list[Any]:
        """Evaluate a checkpoint as one, so that its activations are made again backwards."""
        tables = [None if view is None else view.tables for view in views]

        def inside(slot: Array, ins: list[Any], tables: list[Tables | None]) -> list[Any]:
            interpreter = _Interpreter(slot, self.reasons)
            seen = [view and view.with_tables(own) for view, own in zip(views, tables, strict=True)]
            return interpreter.escaped(*interpreter.run(eqn.params["jaxpr"], [], ins, seen))

        again = jax.checkpoint(inside, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
        return list(again(self.slot, ins, tables))

    def branches(self, eqn: Any, ins: list[Any], views: list[View | None]) -> list[Any]:
        """Evaluate a choice between branches."""
        (which,) = self.escaped(ins[:1], views[:1])

        def made(branch: Any) -> Callable[[list[Any]], list[Any]]:
            return lambda rest: self.escaped(*self.run(branch.jaxpr, branch.consts, rest, views[1:]))

        return list(lax.switch(which, [made(branch) for branch in eqn.params["branches"]], ins[1:]))

    def scan(self, eqn: Any, ins: list[Any], views: list[View | None]) -> list[Any]:
        """Evaluate a scan: parameters stacked by layer are followed into its body, and their tables with them."""
        consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
        before = consts + carries
        inner = eqn.params["jaxpr"]
        layers = [None if view is None else view.layer() for view in views[before:]]
        kept = [None if layer is not None else view for layer, view in zip(layers, views[before:], strict=True)]
        carry = self.escaped(ins[consts:before], views[consts:before])
        xs = self.escaped(ins[before:], kept)
        tables = [None if layer is None else layer.tables for layer in layers]

        def body(carry: list[Any], part: tuple[list[Any], list[Tables | None]]) -> tuple[list[Any], list[Any]]:
            seen = [layer and layer.with_tables(own) for layer, own in zip(layers, part[1], strict=True)]
            marks = [*views[:consts], *[None] * carries, *seen]
            outs = self.escaped(*self.run(inner.jaxpr, inner.consts, [*ins[:consts], *carry, *part[0]], marks))
            return outs[:carries], outs[carries:]

        options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
        last, ys = lax.scan(body, carry, (xs, tables), **options)
        return [*last, *ys]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch(contribution: Contribution, slot: Array, values: list[Any], arrays: Any) -> list[Any]:
    """Return the values; backwards, add to the slot's cotangent what their cotangents contribute."""
    return values


def _watched(contribution: Contribution, slot: Array, values: list[Any], arrays: Any) -> tuple[list[Any], Any]:
    return values, (slot, arrays)


def _contributed(contribution: Contribution, kept: Any, cotangents: list[Any]) -> tuple[Array, list[Any], None]:
    slot, arrays = kept
    return contribution(cotangents, arrays).astype(slot.dtype), cotangents, None


_watch.defvjp(_watched, _contributed)


def _bind(eqn: Any, ins: list[Any]) -> list[Any]:
    """Evaluate an equation as JAX does, derivative rules of the user's own included."""
    outs = eqn.primitive.bind(*ins, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


def _is_real(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jnp.floating))
