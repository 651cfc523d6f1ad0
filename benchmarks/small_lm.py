"""A language model of a million parameters that is trained on a few rows in seconds: retraining tells causes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import gradsketch as gs
from gradsketch.random import Stream

__all__ = ["TASK", "Row", "SmallLM", "Trained"]

BATCH, RATE = 16, 2e-3
WIDTH, LAYERS, HEADS = 144, 4, 4
TASK = gs.CausalLM()
Row = dict[str, Any]
Trained = tuple[nn.Module, list[dict[str, Tensor]]]


@dataclass(frozen=True)
class SmallLM:
    """``data`` returns training rows and questions, tokenised, and the size of the vocabulary."""

    data: Callable[[], tuple[list[Row], list[Row], int]]
    epochs: int

    def untrained(self, seed: int = 0) -> nn.Module:
        """A GPT-2 without dropout."""
        from transformers import GPT2Config, GPT2LMHeadModel

        rows, questions, words = self.data()
        torch.manual_seed(seed)
        config = GPT2Config(
            n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH, n_positions=max(len(r["input_ids"]) for r in rows + questions),
            vocab_size=words, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        return GPT2LMHeadModel(config)

    def trained(self, rows: list[int], seed: int = 0) -> Trained:
        """Return a model trained on these rows, and its weights at the end of each epoch."""
        model, states, _ = self.trained_with_optimizer(rows, seed)
        return model, states

    def trained_with_optimizer(
        self, rows: list[int], seed: int = 0
    ) -> tuple[nn.Module, list[dict[str, Tensor]], torch.optim.Optimizer]:
        """Return what ``trained`` does, and the optimiser after its last step."""
        data, model = self.data()[0], self.untrained(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        steps, step, states = self.epochs * -(-len(rows) // BATCH), 0, []
        for epoch in range(self.epochs):
            order = Stream(seed, "order", str(epoch)).permutation(len(rows)).tolist()
            for start in range(0, len(rows), BATCH):
                warm, cold = min(1.0, (step + 1) / (0.05 * steps)), 1 - 0.9 * step / steps
                for group in optimizer.param_groups:
                    group["lr"] = RATE * warm * cold
                batch = TASK.collate([data[rows[i]] for i in order[start : start + BATCH]])
                TASK.losses(model, batch).mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                step += 1
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        return model.eval(), states, optimizer

    @torch.no_grad()
    def question_losses(self, model: nn.Module) -> Tensor:
        """Return the loss of each question."""
        return TASK.losses(model, TASK.collate(self.data()[1]))

    def retrained(self, halves: int, path: Path | None) -> gs.Retrainings:
        """Return the questions' losses after training on random halves; finished halves are kept in a file."""
        rows = len(self.data()[0])
        return gs.retrain_on_subsets(
            lambda chosen: self.trained(chosen)[0], self.question_losses, rows, subsets=halves, path=path
        )
