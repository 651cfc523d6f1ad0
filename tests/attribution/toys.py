"""Models and data that take milliseconds: a causal LM over characters, and a classifier of vectors."""

import torch
from torch import nn

from gradsketch.gradients.tasks import CausalLM, Classification
from gradsketch.gradients.tasks.tokens import PROBES
from gradsketch.random import Stream

VOCABULARY = 64


class Characters:
    """A tokenizer: one token a character, some of which share a number."""

    is_fast = True

    def __call__(self, text, *, truncation=False, max_length=None, **options):
        ids, offsets = [ord(c) % VOCABULARY for c in text], [(i, i + 1) for i in range(len(text))]
        return {"input_ids": ids[:max_length], "offset_mapping": offsets[:max_length]}

    def decode(self, ids):
        return "".join(chr(i + VOCABULARY) for i in ids)

    def get_vocab(self):
        return {chr(i + VOCABULARY): i for i in range(VOCABULARY)}


class TinyLM(nn.Module):
    """An embedding, an average of what came before, and a head."""

    def __init__(self, width=12):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.mix = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        steps = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return self.head(self.dropout(self.norm(torch.tanh(self.mix(x.cumsum(dim=1) / steps)))))


def language_task(**options):
    return CausalLM(Characters(), **options)


def texts(count):
    return [f"the number {i} squared is {i * i}" for i in range(count)]


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def vectors(count):
    x = Stream(0, "vectors").normals(0, count * 6).view(count, 6)
    return {"x": x, "labels": torch.arange(count) % 3}


def vector_task():
    return Classification()


class Counting(Characters):
    """Remembers every text it was given."""

    def __init__(self):
        self.seen = []

    def __call__(self, text, **options):
        if text not in PROBES:  # by which a fingerprint tells tokenizers apart
            self.seen.append(text)
        return super().__call__(text, **options)


Counting.__name__ = "Characters"  # its facts in an index are those of the ordinary one
