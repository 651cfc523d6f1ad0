"""SIGTERM saves what Ctrl-C saves."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
PROGRAM = """
    import os, signal, sys
    from dataclasses import dataclass
    import torch
    import gradsketch as gs
    from gradsketch import cli
    from gradsketch.cli.command import Command
    from gradsketch.cli.main import register

    class Sending(gs.LinearMap):
        is_self_adjoint, shape, products = True, (200, 200), 0

        def _apply(self, x):
            Sending.products += 1
            if Sending.products == 20:
                os.kill(os.getpid(), Sending.sent)
                os.kill(os.getpid(), Sending.sent) if Sending.sent == signal.SIGTERM else None
            return x * torch.linspace(-3, 9, 200)

        _apply_adjoint = _apply

    @dataclass(frozen=True)
    class Options:
        pass

    def run(options):
        path = f"{sys.argv[1]}/{Sending.sent.name}/run"
        gs.spectrum(Sending(), 4, resume=path, steps=100, tolerance=1e-12, method="full", progress=False)
        return 0

    register(Command("sending", "sends itself a signal", Options, run))
    gs.spectrum  # imported once, and the runs are forked
    for sent in (signal.SIGINT, signal.SIGTERM):
        os.mkdir(f"{sys.argv[1]}/{sent.name}")
        pid = os.fork()
        if pid == 0:
            Sending.sent = sent
            sys.stderr = open(f"{sys.argv[1]}/{sent.name}.txt", "w")
            sys.exit(cli.main(["sending"]))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def test_sigterm_saves_what_ctrl_c_saves(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["130", "143"], done.stderr
    terminated = (tmp_path / "SIGTERM.txt").read_text()
    assert terminated.splitlines()[-1] == "gradsketch sending: terminated"
    assert len(terminated.splitlines()) == 2
    assert (tmp_path / "SIGINT/run").stat().st_size == (tmp_path / "SIGTERM/run").stat().st_size > 0


SWALLOWING = """
    import os, signal, sys
    from dataclasses import dataclass
    from gradsketch import cli
    from gradsketch.cli.command import Command
    from gradsketch.cli.main import register

    sent = getattr(signal, sys.argv[1])

    @dataclass(frozen=True)
    class Options:
        pass

    def run(options):
        try:
            os.kill(os.getpid(), sent)
        except BaseException:
            pass
        raise RuntimeError("half of a library")

    register(Command("swallowing", "fails after a signal", Options, run))
    sys.exit(cli.main(["swallowing"]))
"""


@pytest.mark.parametrize(("name", "code", "word"), [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "terminated")])
def test_a_signal_that_a_library_swallows_is_what_ended_the_run(name, code, word):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SWALLOWING), name],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
    )
    assert (done.returncode, done.stderr) == (code, f"\ngradsketch swallowing: {word}\n")
