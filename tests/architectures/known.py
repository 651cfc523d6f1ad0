"""What is known not to be right and fast, and why. A row that is better than said here fails, so that it gets erased."""

__all__ = ["REFUSED", "SLOW"]

# Refused by name, and why that is right or has to stay for now.
REFUSED = {
    "vision/bit-classes": "standardises its weights with a batch norm in training mode",
}

# At least a twentieth of the parameters takes the slow path.
SLOW: frozenset[str] = frozenset()
