"""kill -9 at 102 random moments of a build, a spectrum and a search: nothing lost, doubled or different in a bit.

``-m slow`` makes them all and writes benchmarks/results/kills.json; the sample makes nine and writes nothing.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One process imports torch once and forks the runs, which it kills: a kill costs milliseconds, not an import.
PROGRAM = """
    import json, os, random, signal, sys, time
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/attribution"]
    import torch, toys
    import gradsketch as gs
    from gradsketch.attribution.build import build_index
    from gradsketch.spectra import resume
    from gradsketch.store import Store, verify
    from dimension.problems import LOSS, ONE, Hidden, losses

    torch.set_num_threads(1)
    root, kills = sys.argv[2], int(sys.argv[3])
    resume._SECONDS, resume._SHARE = 0.0, 1e9  # save after every product, so that kills fall into saves too
    random.seed(0)

    def build(path):
        model, task = toys.TinyLM(), toys.language_task()
        build_index(path, model, task, toys.texts(160), d=64, shard_rows=4, progress=False)

    def shards(path):
        folder = os.path.join(path, "checkpoint-0")
        names = sorted(n for n in os.listdir(folder) if n.endswith(".arrow")) if os.path.isdir(folder) else []
        return {n: open(os.path.join(folder, n), "rb").read() for n in names}

    values = torch.cat([torch.linspace(1, 9, 40), -torch.linspace(1, 7, 40), torch.zeros(2000)])

    class Slow(gs.LinearMap):
        is_self_adjoint, shape = True, (len(values), len(values))

        def _apply(self, x):
            time.sleep(0.002)
            return x * values

        _apply_adjoint = _apply

    def spectrum(path):
        os.makedirs(path, exist_ok=True)
        found = gs.spectrum(Slow(), 5, sketch=512, method="sketched-basis", gradient=torch.ones(len(values)), steps=70,
                            tolerance=1e-12, resume=path + "/run", probes=0, progress=False)
        return json.loads(found.to_json())

    def search(path):
        torch.manual_seed(0)
        model = torch.nn.Sequential(Hidden(600, 12), torch.nn.Dropout(0.3)).train()
        found = gs.intrinsic_dimension(model, losses, ONE, LOSS, target=0.05, d_min=2, d_max=64, check_every=5,
                                       lr=2e-2, resume=path, seeds=(0, 1), progress=False)
        return json.loads(found.to_json())

    def timeless(value):
        if isinstance(value, dict):
            return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "peak_bytes", "crc32")}
        return [timeless(v) for v in value] if isinstance(value, list) else value

    def outcome(work, path):
        out = work(path)
        return shards(path) if work is build else timeless(out)

    def sound(work, path, right):
        # After a kill every finished shard is whole and the one that belongs there.
        if work is build and os.path.exists(os.path.join(path, "checkpoint-0", "index.json")):
            found = verify(Store.open(os.path.join(path, "checkpoint-0")))
            assert not found.damaged and not found.foreign and not found.strangers, str(found)
            assert all(right[name] == data for name, data in shards(path).items())

    report = {}
    for work in (build, spectrum, search):
        right = outcome(work, f"{root}/{work.__name__}-warm")  # imports and allocates everything once
        began = time.monotonic()
        assert outcome(work, f"{root}/{work.__name__}-whole") == right
        took = time.monotonic() - began
        killed = finished = torn = different = 0
        number = 0
        path = f"{root}/{work.__name__}-{number}"
        while killed < kills:
            pid = os.fork()
            if pid == 0:
                try:
                    work(path)
                finally:
                    os._exit(0)
            time.sleep(random.uniform(0.02, 0.7 * took))
            os.kill(pid, signal.SIGKILL)
            if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL:
                killed += 1
                names = [n for _, _, files in os.walk(path) for n in files]
                torn += any(".tmp-" in n for n in names)
                sound(work, path, right)
                if random.random() < 0.6:
                    continue
            finished += 1
            different += outcome(work, path) != right
            number += 1
            path = f"{root}/{work.__name__}-{number}"
        report[work.__name__] = {"kills": killed, "torn files seen": torn, "runs finished": finished,
                                 "runs that differ in a bit": different}
    print(json.dumps(report))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(34, marks=pytest.mark.slow)])
def test_killed_work_goes_on_to_the_same_bits(tmp_path, kills):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(ROOT / "tests"), str(tmp_path), str(kills)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    if kills > 3:
        (ROOT / "benchmarks/results/kills.json").write_text(json.dumps(report, indent=1) + "\n")
    assert all(found["kills"] == kills and found["runs that differ in a bit"] == 0 for found in report.values()), report
