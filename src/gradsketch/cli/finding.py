"""Whether the name of a model can be loaded at all: found out in two seconds, before anything heavy is imported."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradsketch.errors import InputError

__all__ = ["ADAPTER_FILE", "TOKENIZER_FILES", "found"]

ADAPTER_FILE, TOKENIZER_FILES = "adapter_config.json", ("tokenizer_config.json", "config.json")
_SECONDS = 10.0  # for one answer of a hub that is there


@lru_cache(maxsize=16)
def found(name: str, revision: str | None, files: tuple[str, ...] = ("config.json",)) -> tuple[tuple[str, Any], ...]:
    """Return the options with which ``from_pretrained`` finds a name, as pairs; one of ``files`` must be there.

    Raises:
        InputError: no such folder, nothing of that name or revision on the hub, a hub out of reach whose copy this disk
            does not have, GGUF weights, or an adapter where a model was wanted.
    """
    folder = Path(name).expanduser()
    _refuse_gguf(name, folder)
    if folder.is_dir():
        if revision is not None:
            raise InputError(f"--revision {revision} of the folder {name!r}", "a name on the hub", "Leave it out")
        _refuse_adapter(folder, files)
        return ()
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"no folder {name!r}", "a folder written by save_pretrained", "Check the path")
    if importlib.util.find_spec("huggingface_hub") is None:
        return ()  # whoever loads the model names what to install
    options = _on_hub(name, revision, files)
    return (("revision", revision), *options) if revision is not None else options


def _on_hub(name: str, revision: str | None, files: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    from gradsketch.reading.connection import hub_reached

    try:
        if hub_reached():
            HfApi().model_info(name, revision=revision, timeout=_SECONDS)
            return ()
        on_disk = any(isinstance(try_to_load_from_cache(name, file, revision=revision), str) for file in files)
    except HFValidationError as error:
        raise _none(name, "which is no folder and no name that the hub allows") from error
    except GatedRepoError:
        return ()  # whoever loads it says how to ask for access
    except RevisionNotFoundError as error:
        raise InputError(f"{name!r} without a revision {revision!r}", "a branch, tag or commit", "Check it") from error
    except RepositoryNotFoundError as error:
        raise _none(name, "which is no folder, and no model that you may see on the hub") from error
    except Exception:  # a hub that answers late or in another way: its own client tries again
        return ()
    if not on_disk:
        raise _none(name, "which is no folder and not on this disk, and the hub is out of reach")
    return (("local_files_only", True),)


def _none(name: str, what: str) -> InputError:
    return InputError(
        f"{name!r}, {what}",
        "a name on the Hugging Face hub, or a folder with config.json, weights and tokenizer",
        "Check the name and the connection, or save with model.save_pretrained(folder)",
    )


def _refuse_gguf(name: str, folder: Path) -> None:
    """Refuse weights in GGUF: transformers would unpack them to something else than what people run."""
    kinds = {path.suffix for path in folder.iterdir()} if folder.is_dir() else set()
    is_file = not kinds and name.lower().endswith("gguf")
    if is_file or (".gguf" in kinds and not {".safetensors", ".bin"} & kinds):
        raise InputError(
            f"{name!r}, weights in GGUF, which are rounded for inference and have no gradient",
            "the weights that they were made from, as safetensors",
            "Name the model on the hub that the GGUF file was made from; --load-in 4bit saves memory too",
        )


def _refuse_adapter(folder: Path, files: tuple[str, ...]) -> None:
    if files == ("config.json",) and (folder / ADAPTER_FILE).is_file() and not (folder / files[0]).is_file():
        try:
            base = str(json.loads((folder / ADAPTER_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"])
        except (OSError, ValueError, KeyError, TypeError):
            base = "NAME_OR_FOLDER"
        raise InputError(
            f"{str(folder)!r}, a PEFT adapter without the model that it belongs to",
            "the model, and the adapter beside it",
            f"Type --model {base} --adapter {folder}",
        )
