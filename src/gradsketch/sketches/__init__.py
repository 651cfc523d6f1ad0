"""Random linear maps R^n to R^d. The line below is the list of kinds: each module in it registers its own."""

from gradsketch.sketches import affd, afjl, block_sum, dense, ffd, fjl, qk, sjlt, tiled_srht  # noqa: F401
