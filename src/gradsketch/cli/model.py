"""The options by which every command names a model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gradsketch.cli.finding import ADAPTER_FILE, TOKENIZER_FILES, found

__all__ = ["ModelOptions"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and what it is asked to do."""

    model: str
    """Name on the Hugging Face hub, or a folder written by save_pretrained."""
    task: str = "auto"
    """What the loss is: causal-lm, classification, …; auto reads it off the model's architecture."""
    max_length: int | None = None
    """Texts are cut to this many tokens (default: the tokenizer's own limit)."""
    turns: Literal["all", "last"] = "all"
    """Which of the assistant's turns count in a chat."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Precision of the weights; sketches accumulate in float32 or wider whatever this is."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto takes the GPU where there is one."""
    tokenizer: str | None = None
    """Name or folder of the tokenizer (default: the model's own)."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    adapter: str | None = None
    """Folder or hub name of a PEFT adapter, such as LoRA; by default its weights are then those that take part."""
    device_map: Literal["auto", "balanced", "sequential"] | None = None
    """Spread a model over the devices, memory and disk of this machine, by accelerate."""
    fsdp: bool = False
    """Under torchrun: share the weights out among its ranks by FSDP2, each of which reads its own part of the files."""
    tp: bool = False
    """Under torchrun: split each layer over its ranks (tensor parallelism), by the plan that transformers has."""
    load_in: Literal["8bit", "4bit"] | None = None
    """Quantise the weights while loading, by bitsandbytes or torchao; with --adapter, as QLoRA does."""

    def at(self, checkpoint: Path) -> ModelOptions:
        """Return the same for a checkpoint of the model: trainers save weights, and often no tokenizer beside them."""
        if self.adapter is not None or (checkpoint / ADAPTER_FILE).is_file():
            return replace(self, adapter=str(checkpoint))
        return replace(self, model=str(checkpoint), revision=None, tokenizer=self.tokenizer or self.model)

    def find_early(self) -> None:
        """Find out whether the hub has such a model, before anything heavy is imported; a path can wait.

        Raises:
            InputError: it has none.
        """
        if not self.model.startswith((".", "/", "~")):
            self.find()

    def find(self) -> bool:
        """Find out whether there is such a model; return whether only this disk can be asked for it.

        Raises:
            InputError: there is none.
        """
        options = found(self.model, self.revision)
        if self.tokenizer is not None:
            options += found(self.tokenizer, None, TOKENIZER_FILES)
        if self.adapter is not None:
            options += found(self.adapter, None, (ADAPTER_FILE,))
        return ("local_files_only", True) in options
