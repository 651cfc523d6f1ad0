"""Orthonormal maps R^n to R^n."""
