"""Loading a model, its tokenizer and its task from the Hugging Face hub or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsketch.cli.finding import TOKENIZER_FILES
from gradsketch.cli.model import ModelOptions
from gradsketch.cli.padding import pad_alike
from gradsketch.cli.pretrained import pretrained
from gradsketch.cli.weights import load_weights
from gradsketch.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from gradsketch.gradients.tasks import Task
    from gradsketch.gradients.tasks.kinds import TaskKind

__all__ = ["ModelOptions", "load"]

# Where a folder has none of these, transformers makes up a tokenizer of a few special words, without saying so.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "*.spm", "*.codes", "merges.txt")
# Models round their vocabulary up. A tokenizer with less than this share of it was made for another one.
_LEAST_SHARE = 0.5


def load(options: ModelOptions) -> tuple[nn.Module, Task]:
    """Load the model, in eval mode, with its task.

    Raises:
        InputError: transformers is missing, nothing of that name can be loaded, it lacks weights for the task, the task
            cannot be told, or there is no such device.
    """
    only_here = options.find()
    device = _device(options.device)
    from gradsketch.demo.weights import quiet_transformers
    from gradsketch.gradients.tasks.kinds import task_kind
    from gradsketch.reading.connection import offline

    known = None if options.task == "auto" else task_kind(options.task)
    with offline(only_here), quiet_transformers() as transformers:
        kind = known or _kind_of(transformers, options)
        model = load_weights(options, getattr(transformers, kind.loader), device)
        tokenizer = _tokenizer(options, transformers.AutoTokenizer, model)
    pad_alike(tokenizer, model)
    return model, _with_turns(kind.make(tokenizer, model, options.max_length), options)


def _with_turns(task: Task, options: ModelOptions) -> Task:
    from gradsketch.gradients.tasks import CausalLM

    if isinstance(task, CausalLM):
        task.turns = options.turns
    elif options.turns != "all":
        raise InputError(f"--turns with the task {type(task).__name__}", "--task causal-lm", "Leave --turns out")
    return task


def _device(name: str) -> str:
    import torch

    best = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "auto":
        return best
    try:
        torch.empty(0, device=name, dtype=torch.float32)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"--device {name} ({reason})", "a device of this machine", f"Type --device {best}") from error
    return name


def _tokenizer(options: ModelOptions, kind: Any, model: nn.Module) -> Any:
    """Load the tokenizer; one that was made up, or belongs to another model, would give answers about other words."""
    name, revision = options.tokenizer or options.model, None if options.tokenizer else options.revision
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise InputError(
            f"the folder {name!r}, which holds no tokenizer",
            "tokenizer.json, or the files of another tokenizer",
            "Type --tokenizer NAME_OR_FOLDER, such as the model it was trained from",
        )
    from gradsketch.gradients.tasks.logits import known_tokens

    tokenizer = pretrained(name, kind, revision, TOKENIZER_FILES)
    words, known = len(tokenizer), known_tokens(model) or 0
    if words < _LEAST_SHARE * known:
        raise InputError(
            f"the tokenizer of {name!r}, which knows {words:,} words where the model has {known:,}",
            "the tokenizer that the model was trained with",
            "Type --tokenizer NAME_OR_FOLDER, or save it with tokenizer.save_pretrained(folder)",
        )
    return tokenizer


def _kind_of(transformers: Any, options: ModelOptions) -> TaskKind:
    from gradsketch.gradients.tasks.kinds import names, of_architecture

    config = pretrained(options.model, transformers.AutoConfig, options.revision)
    architectures = config.architectures or ["an unnamed architecture"]
    kind = of_architecture(architectures[0])
    if kind is None:
        raise InputError(
            f"{options.model!r} is {architectures[0]}, of which no task follows",
            f"--task {' | '.join(names())}",
            "Name the task, or use the Python interface with your own loss function",
        )
    return kind
