"""The scripts for clusters type commands that gradsketch takes, one share for each job."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradsketch.cli.index import IndexOptions
from gradsketch.cli.run_file import parse

FOLDER = Path(__file__).parents[2] / "examples/cluster"


@pytest.fixture
def typed(tmp_path):
    """Run a shell command where gradsketch writes down what it was given; return the options that it stands for."""
    program = tmp_path / "gradsketch"
    program.write_text(f'#!{sys.executable}\nimport sys\nprint("\\n".join(sys.argv[1:]))\n')
    program.chmod(0o755)

    def options(command, **variables):
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **variables}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        name, *arguments = done.stdout.splitlines()
        assert name == "index"
        return parse(IndexOptions, name, arguments)

    return options


def test_slurm(typed):
    script = FOLDER / "slurm.sh"
    jobs = range(8)
    assert f"--array=0-{jobs[-1]}" in script.read_text()
    given = {"MODEL": "./my model", "DATA": "facts.jsonl", "INDEX": "runs/facts", "SLURM_ARRAY_TASK_COUNT": "8"}
    found = [typed(["bash", str(script)], SLURM_ARRAY_TASK_ID=str(job), **given) for job in jobs]
    assert [options.work.share() for options in found] == [(job, 8) for job in jobs]
    assert {(options.path, options.model.model) for options in found} == {("runs/facts", "./my model")}


def test_kubernetes(typed):
    yaml = pytest.importorskip("yaml")
    spec = yaml.safe_load((FOLDER / "kubernetes.yaml").read_text())["spec"]
    container = spec["template"]["spec"]["containers"][0]
    variables = {each["name"]: each["value"] for each in container["env"]}
    assert int(variables["WORKERS"]) == spec["completions"] == spec["parallelism"]
    command = [*container["command"], *container["args"]]
    found = [typed(command, JOB_COMPLETION_INDEX=str(job), **variables) for job in range(spec["completions"])]
    assert [options.work.share() for options in found] == [(job, 8) for job in range(8)]
