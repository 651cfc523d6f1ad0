"""Tasks: causal LM, seq2seq, masked LM, classification, or any function."""

from gradsketch.gradients.tasks.base import Batch, Function, LossFunction, Task, TaskLike, as_task
from gradsketch.gradients.tasks.causal_lm import CausalLM
from gradsketch.gradients.tasks.classification import Classification
from gradsketch.gradients.tasks.encoded import Encoded
from gradsketch.gradients.tasks.masked_lm import MaskedLM
from gradsketch.gradients.tasks.seq2seq_lm import Seq2SeqLM

__all__ = [
    "Batch",
    "CausalLM",
    "Classification",
    "Encoded",
    "Function",
    "LossFunction",
    "MaskedLM",
    "Seq2SeqLM",
    "Task",
    "TaskLike",
    "as_task",
]
