"""Loading anything of transformers by name or folder, and what is said where that fails."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from gradsketch.cli.finding import found
from gradsketch.errors import InputError
from gradsketch.table import one_line

__all__ = ["explained", "pretrained"]


def pretrained(
    name: str, kind: Any, revision: str | None = None, files: tuple[str, ...] = ("config.json",), **options: Any
) -> Any:
    """Load something of transformers by name or folder, without running code that lies beside it.

    Raises:
        InputError: it cannot be loaded.
    """
    where = dict(found(name, revision, files))
    return explained(
        name, kind.__name__, lambda: kind.from_pretrained(name, trust_remote_code=False, **where, **options)
    )


def explained(name: str, kind: str, load: Callable[[], Any]) -> Any:
    """Call ``load``, and say in one sentence why it cannot load something of this name.

    Raises:
        InputError: it cannot.
    """
    try:
        return load()
    except pickle.UnpicklingError as error:
        raise InputError(
            f"the weights of {name!r}, a pickle that holds more than tensors: loading it could run any program",
            "weights as .safetensors, or a torch file of tensors only",
            "If you trust who made them, load and save them with model.save_pretrained(folder) yourself",
        ) from error
    except Exception as error:  # damaged files, absent packages, a hub out of reach: each library has errors of its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{kind} cannot load {name!r}: {one_line(reason).rstrip('.:')}",
            "a name on the Hugging Face hub, or a folder with config.json, weights and tokenizer",
            "Check the name, or save with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)",
        ) from error
