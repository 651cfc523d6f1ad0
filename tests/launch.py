"""Two ranks of a process group, each a process that runs a module of the tests."""

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from gradsketch.errors import GradsketchWarning

TESTS = Path(__file__).parent
PYTHONPATH = f"{TESTS.parent / 'src'}{os.pathsep}{TESTS}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def run(module: str, *arguments: object) -> None:
    """Run a module of the tests on two ranks."""
    environment = os.environ | {
        "PYTHONPATH": PYTHONPATH,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
    }
    program = [sys.executable, "-m", module, *map(str, arguments)]
    ranks = [
        subprocess.Popen(program, env=environment | {"RANK": str(r)}, stderr=subprocess.PIPE, text=True) for r in (0, 1)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:  # none waits for another that has failed
            rank.kill()


def as_rank(work: Callable[[], None]) -> NoReturn:
    """Do the work of one rank, in the process that runs the module."""
    warnings.simplefilter("error", GradsketchWarning)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    work()
    dist.barrier()  # nobody takes the group down while another's thread still uses it
    dist.destroy_process_group()
    # At the end of the interpreter a thread of Gloo that lets go of its last tensors aborts the process.
    os._exit(0)
