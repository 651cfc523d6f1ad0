"""Kronecker factors of a metric on gradients, from the same captured factors as sketches."""
