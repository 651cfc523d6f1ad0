"""What is known not to be right and fast, and why; what turns out better than it says here fails, and gets erased."""

__all__ = ["REFUSED", "SLOW", "TORCH_WRONG"]

# Refused by name, and why that is right or has to stay for now.
REFUSED = {
    "vision/bit-classes": "standardises its weights with a batch norm in training mode",
}

# At least a twentieth of the parameters takes the slow path.
SLOW: frozenset[str] = frozenset()

# Autograd on one row alone is wrong: torch 2.13 gives another gradient of a batch norm in eval mode for a single row.
# In a batch of several the gradients agree with finite differences.
TORCH_WRONG = {"vision/cvt-classes"}
