"""Per-example gradients, sketched while backward passes by."""
