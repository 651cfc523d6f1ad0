"""What is known not to be right and fast, and why; what turns out better than it says here fails, and gets erased."""

__all__ = ["REFUSED", "SLOW", "TORCH_WRONG"]

# Refused by name, and why that is right or has to stay for now.
REFUSED = {
    "encoder/canine-classes": "its loss in float64 is not finite for one of the rows",
    "encoder/nystromformer": "its attention divides by a maximum over the whole batch",
    "vision/cvt-classes": "torch 2.13 has another gradient of a batch norm in eval mode for one row than for several",
    "vision/levit-classes": "keeps a part of its graph from one forward pass to the next",
}

# At least a twentieth of the parameters takes the exact path.
SLOW = frozenset(
    """
    causal/reformer encoder/mra encoder/reformer
    """.split()
)

# Autograd on one row alone is wrong.
TORCH_WRONG: set[str] = set()
