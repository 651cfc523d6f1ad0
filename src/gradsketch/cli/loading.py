"""The options by which every command names a model, and loading it from the Hugging Face hub or a folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradsketch.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from gradsketch.gradients.tasks import Task
    from gradsketch.gradients.tasks.kinds import TaskKind

__all__ = ["ModelOptions", "load"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what it is asked to do."""

    model: str
    """Name on the Hugging Face hub, or a folder written by save_pretrained."""
    task: str = "auto"
    """What the loss is: causal-lm, classification, …; auto reads it off the model's architecture."""
    max_length: int | None = None
    """Texts are cut to this many tokens (default: the tokenizer's own limit)."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the weights; sketches accumulate in float32 or wider whatever this is."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU where there is one."""


def load(options: ModelOptions, *, tokenizer: str | None = None) -> tuple[nn.Module, Task]:
    """Load the model, in eval mode, with its task; ``tokenizer`` names the model whose tokenizer it shares.

    Raises:
        InputError: transformers is missing, nothing of that name can be loaded, it lacks weights for the task, the task
            cannot be told, or there is no such device.
    """
    if options.model.startswith((".", "/", "~")) and not Path(options.model).expanduser().is_dir():
        raise InputError(f"no folder {options.model!r}", "a folder written by save_pretrained", "Check the path")
    device = _device(options.device)
    from gradsketch.demo.weights import quiet_transformers
    from gradsketch.gradients.tasks.kinds import task_kind

    known = None if options.task == "auto" else task_kind(options.task)
    with quiet_transformers() as transformers:
        kind = known or _kind_of(transformers, options.model)
        model = _model(options, getattr(transformers, kind.loader))
        texts = _loaded(tokenizer or options.model, transformers.AutoTokenizer)
    return model.to(device).eval(), kind.make(texts, model, options.max_length)


def _device(name: str) -> str:
    import torch

    best = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "auto":
        return best
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"--device {name} ({reason})", "a device of this machine", f"Type --device {best}") from error
    return name


def _model(options: ModelOptions, kind: Any) -> nn.Module:
    """Load the model; weights that are not in its files would be drawn at random, and so would every answer."""
    import torch

    from gradsketch.gradients.tasks.kinds import names

    dtype = getattr(torch, options.dtype)
    model, found = _loaded(options.model, kind, dtype=dtype, output_loading_info=True)
    random = sorted(set(found["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if random:
        raise InputError(
            f"{options.model!r} without weights for {random[0]} ({len(random)} of {type(model).__name__})",
            "a model that was trained for this task",
            f"Name another task ({' | '.join(names())}), or fine-tune and save the model first",
        )
    result: nn.Module = model
    return result


def _loaded(name: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{kind.__name__} cannot load {name!r}: {str(error).strip().splitlines()[0].rstrip('.')}",
            "a name on the Hugging Face hub, or a folder with config.json, weights and tokenizer",
            "Check the name, or save with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)",
        ) from error


def _kind_of(transformers: Any, name: str) -> TaskKind:
    from gradsketch.gradients.tasks.kinds import names, of_architecture

    architectures = _loaded(name, transformers.AutoConfig).architectures or ["an unnamed architecture"]
    kind = of_architecture(architectures[0])
    if kind is None:
        raise InputError(
            f"{name!r} is {architectures[0]}, of which no task follows",
            f"--task {' | '.join(names())}",
            "Name the task, or use the Python interface with your own loss function",
        )
    return kind
