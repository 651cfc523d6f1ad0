"""The options by which every command names a model, and loading it from the Hugging Face hub or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gradsketch.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from gradsketch.gradients.tasks import Task

__all__ = ["ModelOptions", "load"]

TaskName = Literal["auto", "causal-lm", "seq2seq-lm", "masked-lm", "classification"]

# Task → (class that loads the model, ends of the architecture names that mean it).
_KINDS = {
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "seq2seq-lm": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration",)),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
}


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what it is asked to do."""

    model: str
    """Name on the Hugging Face hub, or a folder written by save_pretrained."""
    task: TaskName = "auto"
    """What the loss is; auto reads it off the model's architecture."""
    max_length: int | None = None
    """Texts are cut to this many tokens (default: the tokenizer's own limit)."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the weights; sketches accumulate in float32 or wider whatever this is."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU where there is one."""


def load(options: ModelOptions) -> tuple[nn.Module, Task]:
    """Load the model, in eval mode, with its task.

    Raises:
        InputError: transformers is missing, nothing of that name can be loaded, or the task cannot be told.
    """
    transformers, torch = _imports()
    kind = options.task if options.task != "auto" else _kind_of(transformers, options.model)
    dtype = getattr(torch, options.dtype)
    model = _loaded(options.model, getattr(transformers, _KINDS[kind][0]), dtype=dtype)
    tokenizer = _loaded(options.model, transformers.AutoTokenizer)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    return model.to(device).eval(), _task(kind, tokenizer, model, options.max_length)


def _imports() -> tuple[Any, Any]:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise InputError("transformers is not installed", "it, to load models", "pip install gradsketch[hf]") from error
    return transformers, torch


def _loaded(name: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{kind.__name__} cannot load {name!r}: {str(error).strip().splitlines()[0].rstrip('.')}",
            "a name on the Hugging Face hub, or a folder with config.json, weights and tokenizer",
            "Check the name, or save with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)",
        ) from error


def _kind_of(transformers: Any, name: str) -> str:
    architectures = _loaded(name, transformers.AutoConfig).architectures or ["an unnamed architecture"]
    for kind, (_, ends) in _KINDS.items():
        if architectures[0].endswith(ends):
            return kind
    raise InputError(
        f"{name!r} is {architectures[0]}, of which no task follows",
        f"--task {' | '.join(_KINDS)}",
        "Name the task, or use the Python interface with your own loss function",
    )


def _task(kind: str, tokenizer: Any, model: Any, max_length: int | None) -> Task:
    from gradsketch.gradients.tasks import CausalLM, Classification, MaskedLM, Seq2SeqLM

    if kind == "classification":
        names = [model.config.id2label[i] for i in range(model.config.num_labels)]
        return Classification(tokenizer, classes=names, max_length=max_length)
    if kind == "seq2seq-lm":
        return Seq2SeqLM(tokenizer, max_length=max_length, max_target_length=max_length)
    if kind == "masked-lm":
        return MaskedLM(tokenizer, max_length=max_length)
    return CausalLM(tokenizer, max_length=max_length)
