"""A toy index with a model that talks, and the page served for it."""

import threading
import time
from contextlib import contextmanager
from functools import cache

import torch

from attribution import toys
from gradsketch.attribution.build import build_index
from gradsketch.attribution.description import Description, StoredCheckpoint
from gradsketch.attribution.index import Index
from gradsketch.durable import write_file
from gradsketch.explorer.session import Session
from gradsketch.gradients.tasks import CausalLM
from gradsketch.store import Manifest, Rows, Store

D, N, TOKEN = 128, 40, "a-token-of-the-tests"


class Tokenizer(toys.Characters):
    """One token a character; decoding gives letters that encode to the same numbers."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, ids, **options):
        return "".join(chr(i + toys.VOCABULARY) if i < 63 else "~" for i in ids)


class Talker(toys.TinyLM):
    """Says the likeliest character again and again."""

    def generate(self, input_ids, max_new_tokens, **options):
        for _ in range(max_new_tokens):
            following = self(input_ids)[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, following], dim=1)
        return input_ids


@cache
def talker():
    """Return one model for all tests, because what it has proved of its gradients is remembered."""
    return Talker()


def task():
    return CausalLM(Tokenizer())


def rows(count=N):
    return [
        {"text": t, "source": f"s{i % 3}", "year": 1990 + i % 5, "id": f"row-{i}"}
        for i, t in enumerate(toys.texts(count))
    ]


def build(path, data=None, **options):
    """Build an index at two checkpoints, in float32 so that sums hold to rounding."""
    early, late = Talker(), Talker()
    with torch.no_grad():
        early.head.weight.mul_(0.5)
    files = [path.with_name(f"{path.name}-{name}.pt") for name in ("early", "late")]
    for file, model in zip(files, (early, late), strict=True):
        torch.save(model.state_dict(), file)
    options = {"d": D, "dtype": "float32", "shard_rows": 16, "checkpoints": files, "weights": [1.0, 2.0]} | options
    build_index(path, talker(), task(), rows() if data is None else data, progress=False, **options)
    return path


def stand_in(path, count=8):
    """Write an index of random numbers, which no model made."""
    store = Store.create(path / "checkpoint-0", Manifest(d=16, rows=count, shard_rows=64))
    ids, columns = (
        [f"row-{i}" for i in range(count)],
        {"text": toys.texts(count), "source": [f"s{i % 3}" for i in range(count)]},
    )
    store.write(
        0, Rows(ids, torch.randn(count, 16, generator=torch.Generator().manual_seed(0)), torch.ones(count), columns)
    )
    checkpoint = StoredCheckpoint("model", 1.0, "checkpoint-0", None)
    write_file(path / "index.json", Description(16, 0, ("weight",), (checkpoint,), "stand-in").to_json())
    return path


def session(path, model=True):
    if not model:
        return Session(Index.open(path), missing="no such model")
    return Session(Index.open(path, task=task()), talker(), loaded="a toy (CausalLM)")


@contextmanager
def served(opened):
    """Serve a session on a free port and yield the link that opens it."""
    import uvicorn

    from gradsketch.explorer.server import create_app

    config = uvicorn.Config(create_app(opened, TOKEN), port=0, log_level="error", access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/?token={TOKEN}"
    server.should_exit = True
    thread.join(timeout=10)
