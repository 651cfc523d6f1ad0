"""Sketches in JAX."""
from gradsketch.jax.sketches import affd, afjl, qk, srht
