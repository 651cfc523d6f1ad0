"""The sketch store: immutable, checksummed shards on disk."""

from gradsketch.store.export import to_faiss, to_parquet
from gradsketch.store.manifest import Manifest
from gradsketch.store.shard import Rows, Shard
from gradsketch.store.store import Store, default_shard_rows
from gradsketch.store.verify import Damage, Verification, verify

__all__ = [
    "Damage",
    "Manifest",
    "Rows",
    "Shard",
    "Store",
    "Verification",
    "default_shard_rows",
    "to_faiss",
    "to_parquet",
    "verify",
]
