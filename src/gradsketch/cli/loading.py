"""The options by which every command names a model, and loading it from the Hugging Face hub or a folder."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gradsketch.errors import InputError
from gradsketch.table import one_line

if TYPE_CHECKING:
    from torch import nn

    from gradsketch.gradients.tasks import Task
    from gradsketch.gradients.tasks.kinds import TaskKind

__all__ = ["ModelOptions", "load"]

# Where a folder has none of these, transformers makes up a tokenizer of a few special words, without saying so.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "*.spm", "*.codes", "merges.txt")
# Models round their vocabulary up. A tokenizer with less than this share of it was made for another one.
_LEAST_SHARE = 0.5


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
    tokenizer: str | None = None
    """Name or folder of the tokenizer (default: the model's own)."""

    def at(self, checkpoint: Path) -> ModelOptions:
        """Return the same for a checkpoint of the model: trainers save weights, and often no tokenizer beside them."""
        return replace(self, model=str(checkpoint), tokenizer=self.tokenizer or self.model)


def load(options: ModelOptions) -> tuple[nn.Module, Task]:
    """Load the model, in eval mode, with its task.

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
        tokenizer = _tokenizer(options.tokenizer or options.model, transformers.AutoTokenizer, model)
    return model.to(device).eval(), kind.make(tokenizer, model, options.max_length)


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


def _tokenizer(name: str, kind: Any, model: nn.Module) -> Any:
    """Load the tokenizer; one that was made up, or belongs to another model, would give answers about other words."""
    folder = Path(name).expanduser()
    if folder.is_dir() and not any(path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise InputError(
            f"the folder {name!r}, which holds no tokenizer",
            "tokenizer.json, or the files of another tokenizer",
            "Type --tokenizer NAME_OR_FOLDER, such as the model it was trained from",
        )
    from gradsketch.gradients.tasks.logits import known_tokens

    tokenizer = _loaded(name, kind)
    words, known = len(tokenizer), known_tokens(model) or 0
    if words < _LEAST_SHARE * known:
        raise InputError(
            f"the tokenizer of {name!r}, which knows {words:,} words where the model has {known:,}",
            "the tokenizer that the model was trained with",
            "Type --tokenizer NAME_OR_FOLDER, or save it with tokenizer.save_pretrained(folder)",
        )
    return tokenizer


def _loaded(name: str, kind: Any, **options: Any) -> Any:
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights of {name!r}, a pickle that holds more than tensors: loading it could run any program",
            "weights as .safetensors, or a torch file of tensors only",
            "If you trust who made them, load and save them with model.save_pretrained(folder) yourself",
        ) from error
    except Exception as error:  # damaged files, absent packages, a hub out of reach: each library has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{kind.__name__} cannot load {name!r}: {one_line(reason).rstrip('.:')}",
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
