"""A Subspace of a Hugging Face model trains under Trainer, generates, and is saved in kilobytes."""

import copy
from pathlib import Path

import pytest
import torch

import gradsketch as gs

transformers = pytest.importorskip("transformers")


def language_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.arange(10)
    return [{"input_ids": (ids + i) % 50, "labels": (ids + i) % 50, "note": torch.tensor(i)} for i in range(count)]


def trainer(subspace: gs.Subspace, folder: Path) -> "transformers.Trainer":
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        save_steps=6,
        eval_strategy="steps",
        eval_steps=6,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        activation_checkpointing=True,
    )
    return transformers.Trainer(model=subspace, args=arguments, train_dataset=rows(64), eval_dataset=rows(8))


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    base = language_model()
    reference = copy.deepcopy(base)
    parameters = gs.Parameters(base)
    subspace = gs.Subspace(base, parameters, gs.AFFD(parameters.n, 64))
    run = trainer(subspace, tmp_path)
    run.train()
    losses = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert losses[1] < losses[0]
    assert (tmp_path / "checkpoint-6" / "model.safetensors").stat().st_size < 2000
    for (name, now), then in zip(base.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(now, then), name

    other = gs.Subspace(reference, gs.Parameters(reference), subspace.sketch)
    trainer(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    torch.testing.assert_close(other.w, subspace.w)


def test_generation_uses_the_subspace_and_merging_keeps_it(tmp_path: Path) -> None:
    base = language_model().eval()
    parameters = gs.Parameters(base)
    prompt = torch.tensor([[1, 2, 3]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    before = base.generate(prompt, **options)
    subspace = gs.Subspace(base, parameters, gs.AFFD(parameters.n, 64))
    with torch.no_grad():
        subspace.w.normal_(generator=torch.Generator().manual_seed(0)).mul_(0.05)
    after = subspace.generate(prompt, **options)
    assert not torch.equal(before, after)
    assert torch.equal(base.generate(prompt, **options), after)
    subspace.save_pretrained(tmp_path)
    assert torch.equal(subspace.merge().generate(prompt, **options), after)
    again = gs.Subspace.from_pretrained(language_model().eval(), tmp_path)
    assert torch.equal(again.generate(prompt, **options), after)


class Tokenizer:
    """One token a character; the model below writes the alphabet."""

    pad_token_id = None
    eos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) - 96 for c in text]}

    def batch_decode(self, rows: list[list[int]], skip_special_tokens: bool) -> list[str]:
        return ["".join(chr(96 + i) for i in row if i) for row in rows]


class Alphabet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, pad_token_id):
        assert not do_sample
        assert bool((attention_mask[:, -1] == 1).all())  # padded on the left
        new = input_ids[:, -1:] + torch.arange(1, max_new_tokens + 1)
        return torch.cat([input_ids, new], dim=1)


def test_metrics_of_generated_text() -> None:
    data = [("ab", "cde"), {"prompt": "xyzabc", "answer": " def "}, {"source": "f", "target": "nothing"}]
    exact = gs.ExactMatch(Tokenizer(), data, max_new_tokens=3)
    assert exact.answers(Alphabet(), ["ab", "xyzabc"]) == ["cde", "def"]
    assert exact(Alphabet()) == pytest.approx(2 / 3)
    assert gs.ExactMatch(Tokenizer(), [("a", "b")], max_new_tokens=5, stop="c")(Alphabet()) == 1.0
    with pytest.raises(gs.InputError, match="no examples"):
        gs.ExactMatch(Tokenizer(), [])
    with pytest.raises(gs.InputError, match="prompt and answer"):
        gs.ExactMatch(Tokenizer(), ["text"])


def test_rouge() -> None:
    pytest.importorskip("rouge_score")
    rouge = gs.Rouge(Tokenizer(), [("a", "bcd")], kind="rouge1", max_new_tokens=3)
    assert rouge(Alphabet()) == pytest.approx(1.0)
    assert rouge.score("the cat sat", "the cat ran") == pytest.approx(2 / 3)


def test_accuracy_and_loss() -> None:
    model = torch.nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    data = [(torch.tensor([2.0, 0.0]), 0), (torch.tensor([0.0, 2.0]), 1), (torch.tensor([0.0, 2.0]), 0)]
    assert gs.Accuracy(gs.Classification(), data, batch_size=2)(model) == pytest.approx(2 / 3)
    expected = torch.tensor([0.0, 0.0, 2.0]).mean() + torch.tensor(1 + torch.e**-2).log()
    assert gs.Loss(gs.Classification(), data, batch_size=2)(model) == pytest.approx(float(expected), abs=1e-6)
    with pytest.raises(gs.InputError, match="labels"):
        gs.Accuracy(gs.Function(lambda m, b: m(b)), torch.ones(2, 2))(model)
