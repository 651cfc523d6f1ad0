"""Tasks: causal LM, seq2seq, masked LM, classification, or any function."""

from gradsketch.gradients.tasks.base import Batch, Function, Task, as_task

__all__ = ["Batch", "Function", "Task", "as_task"]
