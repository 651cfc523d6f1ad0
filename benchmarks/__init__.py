"""Benchmarks: one file a claim. A package, so that no other distribution's ``benchmarks`` stands in its place."""
