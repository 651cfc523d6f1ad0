"""One command for the day there is a GPU: ``make gpu``, or ``python -m benchmarks.on_gpu``.

It installs nothing and runs with the torch, Triton and transformers it finds. Each section runs in a process of its own
with a time limit, so that a crash or a hang costs one section, and all of it ends within ten minutes. What was measured
is written after every row: benchmarks/results/gpu.json, and gpu.md to read. ``--device cpu --quick`` tries the script
itself on any machine.
"""
