"""Tiny random models of every architecture transformers builds, and a battery that measures sketches of them.

Shared by the tests beside it and by ``benchmarks/architectures.py``. One entry in the module of a group adds an
architecture.
"""
