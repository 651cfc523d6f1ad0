"""What an architecture is here, and the table of all of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._pytree import tree_map

import gradsketch as gs
from architectures.batches import Batches
from architectures.tiny import tiny_config

__all__ = ["Architecture", "Group", "architectures"]

Group = Literal["causal", "encoder", "seq2seq", "vision", "speech", "multimodal"]
GROUPS: tuple[Group, ...] = "causal", "encoder", "seq2seq", "vision", "speech", "multimodal"


@dataclass(frozen=True)
class Architecture:
    """A model class with the fields of its configuration that shrinking by name gets wrong, a task and batches.

    ``dtype`` is float32 for models that narrow to it themselves. ``training`` is for those that have a backward pass
    in training mode only.
    """

    group: Group
    model_type: str
    model: str
    task: gs.Task
    batches: Batches
    overrides: Mapping[str, Any] = field(default_factory=dict)
    head: str = ""
    dtype: torch.dtype = torch.float64
    training: bool = False

    @property
    def name(self) -> str:
        """Group and model type, and the head where one model type has several."""
        return f"{self.group}/{self.model_type}" + (f"-{self.head}" if self.head else "")

    def build(self, dtype: torch.dtype, experts: str) -> nn.Module:
        """Return the model with every parameter and statistic random, none left at 0 or 1."""
        torch.manual_seed(0)
        config = tiny_config(self.model_type, self.overrides)
        config._experts_implementation = experts
        model: nn.Module = self._class()(config).to(dtype).train(self.training)
        _randomise(model)
        return model

    def inputs(self, dtype: torch.dtype) -> list[gs.Batch]:
        """Return the batches in the precision of the model."""
        return [tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, batch) for batch in self.batches()]

    def _class(self) -> Any:
        import transformers

        if hasattr(transformers, self.model):
            return getattr(transformers, self.model)
        package = self.model_type.replace("-", "_")
        return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), self.model)


def architectures() -> dict[str, Architecture]:
    """Return every architecture by name."""
    modules = [importlib.import_module(f"architectures.{group}") for group in GROUPS]
    return {entry.name: entry for module in modules for entry in module.ENTRIES}


def _randomise(model: nn.Module) -> None:
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64) * 0.2 + (p.ndim == 1) * p)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(generator=random)
                module.running_var.uniform_(0.5, 1.5, generator=random)
