"""C that is compiled when it is first needed: kept, made again where it is damaged, done without where it cannot be."""

import os
import shutil
import subprocess
import sys

import pytest

from gradsketch.kernels import native

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")


PROGRAM = """
import torch, gradsketch as gs
phi = gs.TiledSRHT(8, 4, 16)
g, a = torch.randn(2, 5, 8), torch.randn(2, 5, 4)
assert torch.allclose(phi.outer(g, a), phi((g.mT @ a).flatten(1)), atol=1e-5)
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.compiled.cache_clear()
    yield tmp_path / "cache" / "gradsketch"
    native.compiled.cache_clear()


def test_it_is_compiled_once(cache, monkeypatch):
    assert native.compiled("tiles") is not None
    (file,) = cache.iterdir()
    native.compiled.cache_clear()
    monkeypatch.setattr(native, "_run", None)
    assert native.compiled("tiles") is not None
    assert file.suffix == ".so"


def test_a_compiler_may_have_a_wrapper(cache, monkeypatch):
    monkeypatch.setenv("CC", "env cc")
    assert native.compiled("tiles") is not None


def test_a_damaged_file_is_made_again(cache):
    native._library("tiles", ("cc",))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert native._library("tiles", ("cc",)) is not None
    assert len(file.read_bytes()) == len(whole)


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_a_compiler_that_fails_leaves_the_work_to_torch(cache, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    assert native.compiled("tiles") is None
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_folder_that_cannot_be_written_leaves_the_work_to_torch(tmp_path, cache, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    assert native.compiled("tiles") is None


def test_sketches_are_right_without_a_compiler(tmp_path):
    """In a process of its own, which finds neither a compiler nor what was compiled before."""
    environment = {**os.environ, "PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("CC", None)
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], env=environment, check=True)
    assert list(tmp_path.iterdir()) == []
