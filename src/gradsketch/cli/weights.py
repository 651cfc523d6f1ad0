"""Weights of a model: whole or quantised, on one device or spread over several, with an adapter or without."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradsketch.cli.finding import ADAPTER_FILE, found
from gradsketch.cli.pretrained import explained, pretrained
from gradsketch.cli.sharing import shared_out, split
from gradsketch.errors import GradsketchWarning, InputError

if TYPE_CHECKING:
    from torch import nn

    from gradsketch.cli.model import ModelOptions

__all__ = ["load_weights"]


def load_weights(options: ModelOptions, kind: Any, device: str) -> nn.Module:
    """Load a model in eval mode; weights that are not in its files would be drawn at random, and so would every answer.

    Raises:
        InputError: it cannot be loaded, lacks weights, or a package for what was asked is missing.
    """
    import torch

    dtype = getattr(torch, options.dtype)
    how = {"dtype": dtype, **_placed(options, device), **_quantised(options, device)}
    load = shared_out if options.fsdp else split if options.tp else pretrained
    model, report = load(options.model, kind, options.revision, output_loading_info=True, **how)
    missing = set(report["missing_keys"]) & {name for name, _ in model.named_parameters()}
    if options.adapter is not None:
        model = _with_adapter(model, options.adapter)
        missing -= _brought(model)
    _refuse_random(options.model, type(model).__name__, sorted(missing))
    if options.load_in is not None and options.adapter is None:
        _tell_what_takes_part(model, options.load_in)
    if "device_map" not in how and not (options.fsdp or options.tp):
        model = model.to(device)
    result: nn.Module = model.eval()
    return result


def _placed(options: ModelOptions, device: str) -> dict[str, Any]:
    """Return where the weights go, for accelerate; nothing where the whole model simply goes to one device."""
    if options.fsdp or options.tp:
        _refuse_beside_ranks(options, "--fsdp" if options.fsdp else "--tp")
    if options.device_map is None and options.load_in is None:
        return {}
    _require("accelerate", "--device-map and --load-in")
    if options.device_map is not None and options.device != "auto":
        raise InputError(
            f"--device-map {options.device_map} with --device {options.device}", "one of them", "Leave --device out"
        )
    return {"device_map": options.device_map or {"": device}}


def _refuse_beside_ranks(options: ModelOptions, flag: str) -> None:
    others = {
        "--tp": options.fsdp and options.tp,
        "--device-map": options.device_map is not None,
        "--load-in": options.load_in is not None,
        "--adapter": options.adapter is not None,
        f"--device {options.device}": options.device != "auto",
    }
    for other, given in others.items():
        if given:
            raise InputError(f"{flag} with {other}", "one of them", "Leave one out")


def _quantised(options: ModelOptions, device: str) -> dict[str, Any]:
    """Return what transformers needs to quantise while it loads: bitsandbytes where it is there, or else torchao."""
    if options.load_in is None:
        return {}
    import torch
    import transformers

    is_8bit = options.load_in == "8bit"
    if not is_8bit and device == "cpu" and options.device_map is None:
        raise InputError(
            "--load-in 4bit on the CPU, where 4-bit weights let no gradient through", "a GPU", "Type --load-in 8bit"
        )
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of every product that it casts its input
    if importlib.util.find_spec("bitsandbytes") is not None:
        how = {"load_in_8bit": True} if is_8bit else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        compute = {} if is_8bit else {"bnb_4bit_compute_dtype": getattr(torch, options.dtype)}
        return {"quantization_config": transformers.BitsAndBytesConfig(**how, **compute)}
    _require("torchao", f"--load-in {options.load_in}", "bitsandbytes")
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    kind = Int8WeightOnlyConfig() if is_8bit else Int4WeightOnlyConfig()
    return {"quantization_config": transformers.TorchAoConfig(kind)}


def _require(package: str, what: str, better: str | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise InputError(
            f"{what} without {f'{better} or ' if better else ''}{package}",
            "the package that does it",
            f"Type: pip install {better or package}",
        )


def _with_adapter(model: nn.Module, name: str) -> nn.Module:
    """Return the model with an adapter, whose weights are then the ones that are trainable."""
    _require("peft", f"--adapter {name}")
    import peft

    where = dict(found(name, None, (ADAPTER_FILE,)))
    if Path(name).expanduser().is_dir() and not (Path(name).expanduser() / ADAPTER_FILE).is_file():
        raise InputError(f"the folder {name!r} without {ADAPTER_FILE}", "what PEFT's save_pretrained wrote", "Check it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of the adapter's weights is looked at below
        result: nn.Module = explained(
            name, "PeftModel", lambda: peft.PeftModel.from_pretrained(model, name, is_trainable=True, **where)
        )
    _refuse_other_adapter(name, result, set(peft.load_peft_weights(name, device="cpu", **where)))
    return result


def _refuse_other_adapter(name: str, model: nn.Module, files: set[str]) -> None:
    """Refuse an adapter whose weights are not those that the model has room for: PEFT would draw or drop them."""
    import peft

    own = set(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    foreign = sorted(files - own - model.state_dict().keys())
    if own - files or foreign:
        odd = f"without {min(own - files)}" if own - files else f"with {foreign[0]}, which this model does not have"
        raise InputError(f"the adapter {name!r} {odd}", "one that was trained with this model and task", "Check both")


def _brought(model: nn.Module) -> set[str]:
    """Return the names that the model's own weights have of which the adapter brings a copy of its own."""
    copies = (name for name, _ in model.named_parameters() if ".modules_to_save." in name)
    return {name.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for name in copies}


def _refuse_random(name: str, kind: str, missing: list[str]) -> None:
    from gradsketch.gradients.tasks.kinds import names

    if missing:
        raise InputError(
            f"{name!r} without weights for {missing[0]} ({len(missing)} of {kind})",
            "a model that was trained for this task",
            f"Name another task ({' | '.join(names())}), or fine-tune and save the model first",
        )


def _tell_what_takes_part(model: nn.Module, load_in: str) -> None:
    """Say which share of a quantised model has a gradient at all."""
    whole = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    warnings.warn(
        f"--load-in {load_in}: what is quantised has no gradient, so that {len(whole)} tensors of {sum(whole):,} "
        "numbers take part, such as embeddings and norms. Type --adapter to attribute to an adapter's weights",
        GradsketchWarning,
        stacklevel=2,
    )
