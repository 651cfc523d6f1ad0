"""Stores of given rows."""

import torch

from gradsketch.store import Manifest, Rows, Store


def make_store(path, x, dtype="float32", shard_rows=64):
    store = Store.create(path, Manifest(d=x.shape[1], rows=len(x), shard_rows=shard_rows, dtype=dtype))
    for start, count in store.missing():
        ids = [str(i) for i in range(start, start + count)]
        store.write(start, Rows(ids, x[start : start + count], torch.arange(start, start + count).float(), {}))
    return store
