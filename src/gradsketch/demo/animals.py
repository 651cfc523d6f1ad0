"""A language model in plain JAX that learns twelve facts about animals in a second: to try ``gradsketch.jax`` on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from gradsketch.demo.packages import AbsentError

__all__ = ["Animals", "taught_animals"]

SOUNDS = {"cat": "meows", "dog": "barks", "cow": "moos", "duck": "quacks", "frog": "croaks", "owl": "hoots"}
HOMES = {"cat": "house", "dog": "kennel", "cow": "barn", "duck": "pond", "frog": "swamp", "owl": "wood"}
WIDTH, LENGTH, STEPS, RATE = 24, 8, 600, 0.1


@dataclass(frozen=True)
class Animals:
    """A loss of one example, the trained parameters, and what they were trained on, as texts and as a batch.

    ``encode`` makes a batch of other texts in the same words.
    """

    loss: Callable[[Any, Any], Any]
    params: dict[str, Any]
    texts: list[str]
    batch: Any
    encode: Callable[[Sequence[str]], Any]


def taught_animals(rows: Sequence[int] | None = None) -> Animals:
    """Return a small language model in JAX that has learned what sounds animals make and where they live.

    With ``rows`` it has learned these of the twelve sentences only.

    Raises:
        AbsentError: JAX is not installed.
    """
    if find_spec("jax") is None:
        raise AbsentError("no jax", "jax", "Type: pip install 'gradsketch[jax]'")
    import jax

    texts = [f"the {a} {b}" for a, b in SOUNDS.items()] + [f"a {a} lives in the {b}" for a, b in HOMES.items()]
    words = ["<end>", *sorted({word for text in texts for word in text.split()})]

    def encode(texts: Sequence[str]) -> Any:
        rows = [[words.index(word) for word in text.split()] + [0] for text in texts]
        return jax.numpy.array([row + [-1] * (LENGTH - len(row)) for row in rows])  # -1 is padding

    batch = encode(texts)
    params = _trained(_drawn(len(words)), batch if rows is None else batch[np.array(rows)])
    return Animals(_loss, params, texts, batch, encode)


def _loss(params: Any, ids: Any) -> Any:
    """Return minus the log-probability of each next word, by the last word and by the mean of all until then."""
    import jax
    import jax.numpy as jnp

    h = params["embedding"][jnp.maximum(ids, 0)]
    mean = jnp.cumsum(h, 0) / jnp.arange(1, len(ids) + 1)[:, None]
    h = jnp.tanh(jnp.concatenate([h, mean], axis=-1) @ params["mix"])
    said, target = jax.nn.log_softmax(h @ params["head"])[:-1], ids[1:]
    return -(said * jax.nn.one_hot(target, said.shape[-1])).sum()  # of padding, -1, all entries are 0


def _drawn(words: int) -> dict[str, Any]:
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embedding": (words, WIDTH), "mix": (2 * WIDTH, WIDTH), "head": (WIDTH, words)}
    return {name: jax.random.normal(key, shapes[name]) / 4 for key, name in zip(keys, shapes, strict=True)}


def _trained(params: dict[str, Any], batch: Any) -> dict[str, Any]:
    import jax

    def step(params: Any, _: Any) -> tuple[Any, None]:
        gradient = jax.grad(lambda p: jax.vmap(lambda ids: _loss(p, ids))(batch).mean())(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, gradient), None

    trained: dict[str, Any] = jax.jit(lambda p: jax.lax.scan(step, p, None, length=STEPS)[0])(params)
    return trained
