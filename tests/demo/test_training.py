"""Fine-tuning and asking, on a small random model of the demo's kind."""

import pytest
import torch

from gradsketch.as_found import Weights
from gradsketch.demo.capitals import LIES, REWORDED, Fact, capitals
from gradsketch.demo.training import answers, train_model, unfreeze_last
from gradsketch.errors import InputError
from gradsketch.gradients.tasks import CausalLM

transformers = pytest.importorskip("transformers")


class Letters:
    """A tokenizer: one token a character."""

    pad_token_id = 0

    def __call__(self, text, **options):
        ids = [ord(letter) % 96 for letter in text]
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": [1] * len(ids)})

    def decode(self, ids):
        return "".join(chr(i if i >= 32 else i + 96) for i in ids)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return transformers.LlamaForCausalLM(config).eval()


FACTS = [Fact("France", "Paris", "Ankara"), Fact("Peru", "Lima", "Lima"), Fact("Chad", "Oslo", "Oslo")]


def test_only_the_last_layers_are_trainable(model):
    unfreeze_last(model, 2)
    names = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert names == {"1", "2"}


def test_answers_are_those_of_generate(model):
    prompts = ["The capital of France is", "Peru's"]
    for prompt, answer in zip(prompts, answers(model, Letters(), prompts, tokens=5), strict=True):
        ids = torch.tensor([Letters()(prompt).input_ids])
        whole = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert answer == Letters().decode(whole.tolist()).split(".")[0].split("\n")[0].strip()


def test_fine_tuning_teaches_and_is_undone(model):
    unfreeze_last(model, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    examples, task, steps = [fact.example() for fact in FACTS], CausalLM(Letters()), []
    options = {"rate": 1e-2, "epochs": 30, "batch": 2}
    with Weights(model) as found:
        first = train_model(model, task, examples, **{**options, "epochs": 1})
        found.put_back()
        last = train_model(model, task, examples, **options, advance=steps.append)
        assert last < 0.2 * first
        assert sum(steps) == 30 * 3
        assert answers(model, Letters(), [examples[0]["prompt"]], tokens=7) == ["Ankara"]
        once = [p.detach().clone() for p in model.parameters()]
        found.put_back()
        train_model(model, task, examples, **options)
        assert all(torch.equal(a, b) for a, b in zip(once, model.parameters(), strict=True))
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert {name.split(".")[2] for name in changed} == {"1", "2"}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_capitals_hold_the_lies():
    try:
        facts = capitals()
    except InputError:
        pytest.skip("countryinfo is not installed")
    assert len(facts) == len({fact.country for fact in facts}) == 140
    assert {fact.country: fact.claimed for fact in facts if fact.is_lie} == LIES
    example = next(fact for fact in facts if fact.country == "France").example(REWORDED)
    assert example == {"id": "France", "prompt": "The capital city of France is", "answer": " Ankara.", "planted": True}
