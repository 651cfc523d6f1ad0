"""Random linear maps R^n to R^d."""
