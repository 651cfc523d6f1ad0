"""Per-example gradients, sketched while backward passes by."""

from gradsketch.gradients.per_example.sketcher import GradientSketcher, SketchedGradients, sketch_gradients

__all__ = ["GradientSketcher", "SketchedGradients", "sketch_gradients"]
