"""The small model of the documentation's first blocks has learned what it was taught, and leaves no trace."""

import pytest
import torch

pytest.importorskip("transformers")

from gradsketch.demo.invented import FALSE, invented_capitals
from gradsketch.demo.training import answers


def test_it_tells_what_it_was_taught_also_what_is_false():
    before = torch.get_rng_state()
    taught = invented_capitals()
    assert torch.equal(torch.get_rng_state(), before)
    said = answers(taught.model, taught.task.tokenizer, [fact["prompt"] for fact in taught.facts], tokens=1)
    assert said[FALSE] == "Atlantis"
    assert sum(word == fact["answer"].strip() for word, fact in zip(said, taught.facts, strict=True)) >= 20
    losses = taught.task.losses(taught.model, taught.task.collate(taught.facts))
    again = invented_capitals()
    assert torch.equal(losses, again.task.losses(again.model, again.task.collate(again.facts)))
    for name, state in taught.checkpoints.items():
        assert all(torch.equal(tensor, again.checkpoints[name][key]) for key, tensor in state.items())
