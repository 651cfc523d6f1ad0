"""kill -9 at random moments of a run and of its saves: it goes on where it was, and finds the same numbers."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
# One process imports torch once and forks the runs, which it kills: a kill costs milliseconds, not an import.
PROGRAM = """
    import os, random, signal, sys, time
    import torch
    import gradsketch as gs
    from gradsketch.spectra import resume

    path, kills = sys.argv[1], int(sys.argv[2])
    resume._SECONDS, resume._SHARE = 0.0, 1e9  # save after every product, so that kills fall into saves too
    values = torch.cat([torch.linspace(1, 9, 40), -torch.linspace(1, 7, 40), torch.zeros(5000)])

    class Slow(gs.LinearMap):
        is_self_adjoint, shape = True, (len(values), len(values))

        def _apply(self, x):
            time.sleep(0.004)
            return x * values

        _apply_adjoint = _apply

    def run(file):
        gradient = torch.ones(len(values))
        return gs.spectrum(Slow(), 5, method=sys.argv[3], sketch=2048, gradient=gradient, resume=file, probes=0,
                           progress=False)

    def steps():
        return len(torch.load(path)["state"]["lanczos"]["alphas"]) if os.path.exists(path) else 0

    whole = run(None)
    random.seed(0)
    done = [0]
    for _ in range(kills):
        pid = os.fork()
        if pid == 0:
            try:
                run(path)
            finally:
                os._exit(0)
        deadline = time.monotonic() + 5
        while steps() == done[-1] and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.01))
        os.kill(pid, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != -signal.SIGKILL:
            break  # a machine so busy that the run was over first
        done.append(steps())
    assert len(done) > 1 and done == sorted(set(done)), f"{done} of {whole.steps}"
    again = run(path)
    assert (again.alphas, again.betas, again.hvps) == (whole.alphas, whole.betas, whole.hvps)
    assert again.eigenvalues == whole.eigenvalues and torch.equal(again.sketches, whole.sketches)
"""


@pytest.mark.parametrize("method", ["sketched-basis", pytest.param("full", marks=pytest.mark.slow)])
def test_a_killed_run_finds_the_same(method, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "run"), "4", method],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
