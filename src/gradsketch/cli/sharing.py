"""A model too large for one device: torchrun's ranks share it out while it is loaded, by FSDP2 or layer by layer."""

from __future__ import annotations

import atexit
import os
import time
from typing import Any

from gradsketch.cli.pretrained import pretrained
from gradsketch.errors import InputError

__all__ = ["layers_of", "shared_out", "split"]

_LAST_TENSORS = 0.1  # seconds
_NO_PLAN = "has no `fsdp_plan`"  # what transformers says of models that it does not know how to share out
_NO_SPLIT = "has no `tp_plan`"  # or to split


def shared_out(name: str, kind: Any, revision: str | None = None, **options: Any) -> Any:
    """Load a model of transformers as ``pretrained`` does, each rank its own part of the weights.

    Where transformers does not know the model's layers, each rank loads the whole first, and keeps its part.

    Raises:
        InputError: no torchrun, a transformers that cannot do this, or a model that cannot be loaded.
    """
    ranks, config = _joined("--fsdp"), _config_of("--fsdp")
    try:
        model, *more = pretrained(name, kind, revision, distributed_config=config(fsdp_size=ranks), **options)
        if _has_layers_apart(model) or ranks == 1:
            return model, *more
        del model  # before it is loaded again
    except InputError as error:
        if _NO_PLAN not in str(error):
            raise
    model, *more = pretrained(name, kind, revision, **options)
    return _sharded(model), *more


def split(name: str, kind: Any, revision: str | None = None, **options: Any) -> Any:
    """Load a model of transformers as ``pretrained`` does, each rank its own part of every layer.

    Raises:
        InputError: no torchrun, a transformers that cannot do this, a model that it has no plan for, or that cannot
            be loaded.
    """
    ranks, config = _joined("--tp"), _config_of("--tp")(tp_plan="auto")
    try:
        model, *more = pretrained(name, kind, revision, distributed_config=config, **options)
    except InputError as error:
        if _NO_SPLIT not in str(error):
            raise
        raise InputError(
            f"--tp with {name!r}, for whose layers transformers has no plan", "a model that it can split", "Type --fsdp"
        ) from error
    _require_even_heads(model.config.get_text_config(), ranks)
    return model, *more


def _require_even_heads(config: Any, ranks: int) -> None:
    """Refuse ranks that cannot have as many whole heads each: transformers fails in the middle of a layer."""
    for heads in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, heads, None)
        if count is not None and count % ranks:
            raise InputError(f"--tp for {heads} = {count} on {ranks} ranks", "a divisor as the ranks", "Type --fsdp")


def _config_of(flag: str) -> Any:
    try:
        from transformers.distributed import DistributedConfig
    except ImportError as error:
        raise InputError(
            f"{flag} with a transformers that cannot load weights in parts",
            "a newer one",
            "Type: pip install -U transformers",
        ) from error
    return DistributedConfig


def _has_layers_apart(model: Any) -> bool:
    from gradsketch.fsdp import units_of

    return len(units_of(model)) != 1


def _joined(flag: str) -> int:
    """Join the other ranks; return how many there are."""
    import torch

    if "TORCHELASTIC_RUN_ID" not in os.environ:
        raise InputError(
            f"{flag} without torchrun",
            "ranks to share the model out among",
            "Type: torchrun --nproc-per-node 2 -m -- gradsketch …",
        )
    if not torch.distributed.is_initialized():
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(_left)
    return torch.distributed.get_world_size()


def _left() -> None:
    """Leave the other ranks."""
    import torch

    torch.distributed.destroy_process_group()
    # A thread of Gloo that lets go of its last tensors needs the interpreter, and aborts the process if that has ended.
    time.sleep(_LAST_TENSORS)


def _sharded(model: Any) -> Any:
    """Share out a model that is loaded, layer by layer."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(kind, (torch.distributed.get_world_size(),))
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def layers_of(model: Any) -> list[Any]:
    """Return the layers of a model's stacks, but none inside another: its data may not take it on every rank."""
    import torch

    found: list[Any] = []
    for child in model.children():
        found += child if isinstance(child, torch.nn.ModuleList) else layers_of(child)
    return found
