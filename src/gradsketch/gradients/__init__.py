"""From a model, a task and a batch to gradients and curvature."""
