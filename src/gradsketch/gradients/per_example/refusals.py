"""What has no exact per-example gradients, each refused in one clear message."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gradsketch.errors import GradsketchError, InputError
from gradsketch.fsdp import Ranks, is_shard
from gradsketch.gradients.data import batch_length, is_out_of_memory, tensors_of
from gradsketch.gradients.fingerprints import digest
from gradsketch.gradients.tasks import Batch, Task
from gradsketch.lockstep import Lockstep
from gradsketch.stand_ins import read_instead
from gradsketch.tensor_parallel import are_added_up
from gradsketch.walks import parameters_of

__all__ = [
    "INDEPENDENT",
    "coupled",
    "reentrant",
    "refuse_coupling",
    "refuse_none",
    "refuse_other_batches",
    "refuse_other_draws",
    "refuse_other_gradients",
    "refuse_other_losses",
    "refuse_other_rows",
    "refuse_replaced",
    "refuse_sharded",
    "refuse_strangers",
    "refuse_too_large",
    "refuse_underivable",
    "refuse_unlike",
    "refuse_unsupported",
    "refuse_without_graph",
    "running_alone",
]

# What was wanted where ranks that hold parts of a model's layers do not agree, and what to do.
_SAME_ROWS = (
    "the same rows and the same random numbers on every rank over which a model is split",
    "Hand every rank the same batch, and call model.eval() or torch.manual_seed(0) first",
)
# What was wanted where examples depend on each other, and what to do.
INDEPENDENT = (
    "a loss in which no example depends on its batch mates",
    "Call model.eval() where dropout or BatchNorm is the cause, or write the loss per example",
)


def coupled(what: str, fix: str = "Call model.eval() first, or use GroupNorm") -> InputError:
    """Return the error for a layer in which an example's loss or gradient depends on its batch mates."""
    return InputError(what, "layers in which no example sees another, so that each has a gradient of its own", fix)


def reentrant() -> InputError:
    """Return the error for checkpoints of the old kind, whose parameters no graph shows."""
    return InputError(
        "a model that checkpoints activations with use_reentrant=True",
        "checkpoints that know torch.autograd.grad",
        'Type model.gradient_checkpointing_enable({"use_reentrant": False})',
    )


def refuse_coupling(example: int, together: Tensor, other: Tensor, where: str = "one example at a time") -> None:
    """Refuse a loss that is another alone, or in other company, than in this."""
    raise InputError(
        f"the loss of example {example} of the batch is {together.item():.6g} together and {other.item():.6g} {where}",
        *INDEPENDENT,
    )


@contextmanager
def running_alone(start: int, stop: int | None = None) -> Iterator[None]:
    """Refuse a loss that fails for one example alone, or for a few, though it ran in company."""
    try:
        yield
    except GradsketchError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        which = f"example {start}" if stop in (None, start + 1) else f"examples {start} to {stop - 1}"
        raise InputError(
            f"a loss that cannot be run alone for {which} of the batch ({type(error).__name__}: {error})",
            *INDEPENDENT,
        ) from error


def refuse_other_gradients(failed: Mapping[str, float], model: nn.Module, where: str = "one example at a time") -> None:
    """Refuse gradients that are others alone, or in other company, than in this, given their errors."""
    if not failed:
        return
    hooked = [name or type(model).__name__ for name, m in model.named_modules() if m._backward_hooks]
    under = f", under the backward hook of {hooked[0]!r}" if hooked else ""
    wanted, fix = INDEPENDENT
    raise InputError(
        f"gradients of {', '.join(sorted(failed)[:3])} that differ by {max(failed.values()):.1e} between examples "
        f"together and {where}{under}",
        "backward hooks that are linear in the gradient" if hooked else wanted,
        "Remove the hook, or let it treat each example alone" if hooked else fix,
    )


def refuse_other_rows(error: float) -> None:
    """Refuse rows that are not the map of the gradients they were made from, given how far they are off."""
    raise InputError(
        f"rows that differ by {error:.1e} from the sketch of autograd's own gradients, though what they were made from "
        "agrees with these",
        "rows that are sketches of gradients",
        "This is a fault of gradsketch or of the machine: please report it. Until then type method='loop'",
    )


def refuse_without_graph(losses: Tensor, task: Task) -> None:
    """Refuse losses that nothing can be differentiated by."""
    if not losses.requires_grad:
        raise InputError(
            f"losses of {task!r} that carry no gradient",
            "losses that depend on the chosen parameters",
            "Leave out .detach(), .item() and torch.no_grad() in the loss, or choose parameters that it uses",
        )


def refuse_none(used: Collection[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse losses in which no chosen parameter is used."""
    if not used and tensors:
        raise InputError(
            f"losses that use none of the {len(tensors)} chosen parameters",
            "a loss computed by the model whose parameters were chosen",
            "Build the task, the parameters and the sketch from the same model, or choose other parameters",
        )


def refuse_strangers(
    model: nn.Module,
    leaves: Iterable[Tensor],
    tensors: Mapping[str, Tensor],
    used: Collection[str],
    gathered: Mapping[int, Tensor],
) -> None:
    """Refuse leaves that stand in the place of parameters: their gradients would be taken for zero."""
    own = {id(t) for t in (*parameters_of(model), *tensors.values(), *gathered.values())}
    foreign = [t for t in leaves if id(t) not in own]
    if foreign:  # an open Subspace makes what the model reads; its own parameters are no strangers
        makers = [reading.source.owner for reading in read_instead(model).values()]
        known = {id(p) for maker in makers if isinstance(maker, nn.Module) for p in maker.parameters()}
        foreign = [t for t in foreign if id(t) not in known]
    shapes = {tuple(t.shape): name for name, t in tensors.items() if name not in used}
    for leaf in foreign:
        if isinstance(leaf, nn.Parameter) or tuple(leaf.shape) in shapes:
            place = shapes.get(tuple(leaf.shape))
            raise InputError(
                f"a loss that depends on a parameter of shape {list(leaf.shape)} that is not the model's own"
                + (f", while {place!r} of that shape is not used" if place else ""),
                "a forward pass that uses the model's own parameters",
                "Switch off what swaps them meanwhile (offloading, sharding, functional_call), or move the parameters "
                "into memory first",
            )


def refuse_replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a chosen parameter that the model no longer has: its gradient would be taken for zero."""
    present = {id(t) for t in parameters_of(model)}
    for name, tensor in tensors.items():
        if id(tensor) not in present:
            raise InputError(
                f"{name!r}, which was replaced in the model after it was chosen",
                "parameters that are the model's own",
                "Build the parameters, the sketch and the sketcher anew, or load weights without assign=True",
            )


def refuse_sharded(refused: bool, came: str) -> None:
    """Refuse what takes other passes than those that all ranks of a sharded model make together."""
    if refused:
        raise InputError(
            f"{came}, of a model of which ranks hold parts",
            "gradients that one backward pass of the batch brings",
            "Leave such parameters out with Parameters(model, exclude=...), or load the model in one piece",
        )


@contextmanager
def refuse_too_large(ranks: Ranks, batch: Batch) -> Iterator[None]:
    """Refuse a batch that does not fit into memory, where ranks would have to take a smaller one together."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ranks.several or not is_out_of_memory(error):
            raise
        raise InputError(
            f"a batch of {batch_length(batch)} examples that does not fit into memory",
            "batches that do, because all ranks that hold parts of a model go in step",
            "Pass a smaller batch_tokens, or more ranks",
        ) from error


def refuse_other_batches(team: Lockstep, batch: Batch) -> None:
    """Refuse ranks over which layers are split, but that were handed batches of other shapes."""
    if not team.several:
        return
    shapes = digest([[list(tensor.shape), str(tensor.dtype)] for tensor in tensors_of(batch)])
    if not team.same(int(shapes[:15], 16)):
        raise InputError("batches of other shapes on each rank of one team", *_SAME_ROWS)


def refuse_other_draws(team: Lockstep, states: Sequence[Tensor]) -> None:
    """Refuse ranks over which layers are split, but that draw other random numbers in what each computes whole."""
    if team.several and not team.same(int(digest(list(states))[:15], 16)):
        raise InputError("random numbers that differ between the ranks over which a model is split", *_SAME_ROWS)


def refuse_other_losses(team: Lockstep, losses: Tensor, dtype: torch.dtype) -> None:
    """Refuse losses that are others on another of the ranks over which layers are split."""
    if not team.several:
        return
    first = team.first(losses.double()).to(losses)
    far = (losses - first).abs() > torch.finfo(dtype).eps ** 0.5 * (1 + first.abs())
    far = far | (torch.isfinite(losses) != torch.isfinite(first))
    if bool(far.any()):
        place = int(far.int().argmax())
        raise InputError(
            f"the loss of example {place} of the batch, which is {losses[place].item():.6g} here and "
            f"{first[place].item():.6g} on the first rank of the team",
            *_SAME_ROWS,
        )


def refuse_underivable(error: float | None) -> None:
    """Refuse a split model whose backward pass does not return the derivative of its losses, given the error."""
    if error:
        raise InputError(
            f"gradients of a split model that are off by {error:.1e} of what differences of its losses say",
            "layers whose backward pass adds up what each rank has, and that detach nothing",
            "Split other layers, with another plan, or load the model in one piece",
        )


def refuse_unlike(failed: Mapping[str, float]) -> None:
    """Refuse gradients that are others on another rank of a team, as where each has a part and none knows the whole."""
    if failed:
        raise InputError(
            f"gradients of {', '.join(sorted(failed)[:3])} that differ by {max(failed.values()):.1e} between the ranks "
            "over which a model is split",
            "parameters that every rank uses alike, or that are DTensors",
            "Name their module in the plan of parallelize_module, or leave them out with exclude=",
        )


def refuse_unsupported(tensors: Mapping[str, Tensor], *, sharded: bool = False) -> None:
    """Refuse parameters of a kind that has no gradients here; shards of a model that FSDP2 gathers have."""
    for name, tensor in tensors.items():
        for found, kind, wanted, fix in _unsupported(tensor, sharded):
            if found:
                raise InputError(f"parameter {name!r} {kind}", wanted, fix)


def _unsupported(tensor: Tensor, sharded: bool) -> tuple[tuple[bool, str, str, str], ...]:
    hooked = bool(getattr(tensor, "_post_accumulate_grad_hooks", None)) and not (sharded and are_added_up(tensor))
    return (
        (tensor.is_meta, "on the meta device", "parameters in memory", "Load the weights, or switch off offloading"),
        (
            tensor.is_complex(),
            f"of dtype {tensor.dtype}",
            "real parameters",
            "Store real and imaginary parts with torch.view_as_real",
        ),
        (
            tensor.is_inference(),
            "made in inference mode",
            "ordinary tensors",
            "Build or load the model outside torch.inference_mode()",
        ),
        (
            type(tensor.detach()) is not Tensor and not (sharded and is_shard(tensor)),
            f"of type {type(tensor).__name__}",
            "plain tensors",
            "Share the model out with fully_shard or parallelize_module, or dequantise its parameters",
        ),
        (
            hooked,
            "with a post-accumulate hook",
            "gradients as autograd computes them, which such a hook would change or use up",
            "Remove the hook meanwhile, or register it with register_hook",
        ),
    )
