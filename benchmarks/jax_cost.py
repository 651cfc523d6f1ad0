"""What sketches cost in JAX on a CPU: AFFD a number, and every example's sketch beside a training step's gradient.

Run with ``python benchmarks/jax_cost.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from record import interleaved_seconds, write

import gradsketch.jax as gj

NUMBERS, LIFTED = 1 << 24, 4096
VOCABULARY, WIDTH, LAYERS, TOKENS, EXAMPLES, D = 2048, 256, 4, 128, 8, 4096


def compiled(function: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], dict[str, float]]:
    """Return the call of a compiled function, how long it took to compile, and its temporaries."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    facts = {
        "compile_s": round(time.perf_counter() - began, 2),
        "temporaries_mb": round(program.memory_analysis().temp_size_in_bytes / 1e6, 2),
    }
    return lambda: jax.block_until_ready(program(*arguments)), facts


def vectors() -> dict[str, Any]:
    x, w = jnp.ones(NUMBERS), jnp.ones(LIFTED)
    found = {}
    for name, make in (("affd", gj.affd), ("afjl", gj.afjl), ("qk", gj.qk)):
        phi = make(NUMBERS, LIFTED)
        for way, function, argument in (("apply", phi.apply, x), ("lift", phi.lift, w)):
            call, facts = compiled(function, argument)
            seconds = interleaved_seconds({"it": call}, 5)["it"]["best"]
            found[f"{name} {way}"] = {**facts, "ns_a_number": round(seconds / NUMBERS * 1e9, 2)}
    return {"n": NUMBERS, "d": LIFTED, "vector_mb": NUMBERS * 4 / 1e6, **found}


def loss(params: Any, ids: jax.Array) -> jax.Array:
    """A causal model without attention, in whose layers all parameters are matrices."""

    def layer(h: jax.Array, p: Any) -> tuple[jax.Array, None]:
        mean = jnp.cumsum(h, 0) / jnp.arange(1, TOKENS + 1)[:, None]
        return h + jax.nn.gelu(jnp.concatenate([h, mean], -1) @ p["up"]) @ p["down"], None

    h, _ = jax.lax.scan(layer, params["embedding"][ids], params["layers"])
    scores = jax.nn.log_softmax(h @ params["embedding"].T)[:-1]
    return -jnp.take_along_axis(scores, ids[1:, None], 1).sum()


def gradients() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "embedding": jax.random.normal(keys[0], (VOCABULARY, WIDTH)) / 16,
        "layers": {
            "up": jax.random.normal(keys[1], (LAYERS, 2 * WIDTH, 4 * WIDTH)) / 32,
            "down": jax.random.normal(keys[2], (LAYERS, 4 * WIDTH, WIDTH)) / 64,
        },
    }
    ids = jax.random.randint(keys[3], (EXAMPLES, TOKENS), 0, VOCABULARY)
    names = lambda path, shape: path.replace("layers", "layers.{}")  # noqa: E731
    sketches = gj.per_example(loss, gj.block_sum(params, D, names=names))
    error = sketches.audit(params, ids)
    step, step_facts = compiled(
        jax.value_and_grad(lambda p, ids: jax.vmap(lambda i: loss(p, i))(ids).mean()), params, ids
    )
    sketch, sketch_facts = compiled(sketches, params, ids)
    timed = interleaved_seconds({"step": step, "sketch": sketch}, 5)
    plain, sketched = timed["step"]["best"], timed["sketch"]["best"]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "shape": {"examples": EXAMPLES, "tokens": TOKENS, "width": WIDTH, "layers": LAYERS, "vocabulary": VOCABULARY},
        "d": D,
        "audit": error,
        "value_and_grad": {**step_facts, "seconds": round(plain, 4)},
        "per_example": {**sketch_facts, "seconds": round(sketched, 4)},
        "ratio": round(sketched / plain, 2),
    }


if __name__ == "__main__":
    print(write("jax_cost", {"jax": jax.__version__, "vectors": vectors(), "gradients": gradients()}).read_text())
