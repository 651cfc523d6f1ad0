"""The sketch store: immutable, checksummed shards on disk."""
