"""SIGTERM saves what Ctrl-C saves."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SRC = Path(__file__).parents[2] / "src"
PROGRAM = """
    import os, signal, sys
    from dataclasses import dataclass
    import torch
    import gradsketch as gs
    from gradsketch import cli
    from gradsketch.cli.command import Command
    from gradsketch.cli.main import register

    path, sent = sys.argv[1], getattr(signal, sys.argv[2])

    class Sending(gs.LinearMap):
        is_self_adjoint, shape, products = True, (200, 200), 0

        def _apply(self, x):
            Sending.products += 1
            if Sending.products == 20:
                os.kill(os.getpid(), sent)
                os.kill(os.getpid(), sent) if sent == signal.SIGTERM else None
            return x * torch.linspace(-3, 9, 200)

        _apply_adjoint = _apply

    @dataclass(frozen=True)
    class Options:
        pass

    def run(options):
        gs.spectrum(Sending(), 4, resume=path, steps=100, tolerance=1e-12, method="full", progress=False)
        return 0

    register(Command("sending", "sends itself a signal", Options, run))
    sys.exit(cli.main(["sending"]))
"""


def sent(path, name):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(path), name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )


def test_sigterm_saves_what_ctrl_c_saves(tmp_path):
    stopped, terminated = sent(tmp_path / "a", "SIGINT"), sent(tmp_path / "b", "SIGTERM")
    assert (stopped.returncode, terminated.returncode) == (130, 143), terminated.stderr
    assert terminated.stderr.splitlines()[-1] == "gradsketch sending: terminated"
    assert len(terminated.stderr.splitlines()) == 2
    assert (tmp_path / "a").stat().st_size == (tmp_path / "b").stat().st_size > 0
