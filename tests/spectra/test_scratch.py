"""Krylov vectors on disk: no copies, errors that hold, runs that go on, disks that are full or lie."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import gradsketch as gs
from gradsketch.durable import record_checksum
from gradsketch.spectra import scratch as scratch_module
from gradsketch.transforms import Hadamard

SRC = Path(__file__).parents[2] / "src"
N = 1 << 15


class Dense(gs.LinearMap):
    """Eigenvalues of two long tails above a bulk, with eigenvectors that are spread over all entries."""

    is_self_adjoint, shape = True, (N, N)

    def __init__(self, dtype=torch.float32, lifetime=None):
        generator = torch.Generator().manual_seed(0)
        ranks = torch.arange(1, 201, dtype=torch.float64)
        tails = torch.cat([700 * ranks**-0.7, -250 * ranks**-0.6])
        bulk = 0.2 * torch.randn(N - len(tails), generator=generator, dtype=torch.float64)
        signs = 2.0 * torch.randint(0, 2, (N,), generator=generator) - 1
        self.eigenvalues = torch.cat([tails, bulk]).numpy()
        self.values, self.signs = torch.cat([tails, bulk]).to(dtype), signs.to(dtype)
        self.rotation, self.dtype, self.left = Hadamard(N), dtype, lifetime

    def _apply(self, x):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.rotation(self.values * self.rotation(x * self.signs)) * self.signs

    _apply_adjoint = _apply

    def ends(self, k):
        ordered = np.sort(self.eigenvalues)
        return np.r_[ordered[::-1][:k], ordered[:k][::-1]]


def run(operator, k=12, **options):
    options = {"which": "both", "method": "sketched-basis", "sketch": 2048, "steps": 120, "progress": False, **options}
    return gs.spectrum(operator, k, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_product_goes_to_copies(dtype, tmp_path):
    operator = Dense(dtype)
    result = run(operator, tolerance=5e-3, scratch=tmp_path)
    assert result.converged.all()
    assert result.copies == 0
    assert (np.abs(result.values - operator.ends(12)) <= result.errors).all()
    np.testing.assert_allclose(result.values, operator.ends(12), rtol=5e-4)
    if dtype == torch.float32:  # float64 keeps vectors orthogonal for longer by itself
        without = run(operator, tolerance=5e-3)
        assert without.copies > 5
        assert without.steps > result.steps + 5
    assert result.steps * N <= result.disk_bytes <= 1.02 * result.steps * N
    assert "of them on disk" in str(result)


def test_nothing_is_left_in_the_folder(tmp_path):
    run(Dense(), scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_eigenvectors_are_orthogonal_and_have_the_stated_residuals(tmp_path):
    operator = Dense()
    result = run(operator, k=6, tolerance=1e-2, scratch=tmp_path)
    with pytest.raises(gs.InputError, match="no scratch folder"):
        gs.eigenvectors(operator, result)
    vectors = gs.eigenvectors(operator, result, scratch=tmp_path)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(12), atol=1e-3, rtol=0)
    for vector, value, residual in zip(vectors, result.values, result.residuals, strict=True):
        assert float((operator(vector) - float(value) * vector).norm()) <= 1.1 * residual * abs(value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("n", [40, 300])
def test_what_is_too_coarse_for_a_short_vector_is_part_of_the_error(n, tmp_path):
    generator = torch.Generator().manual_seed(n)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    values = torch.cat([torch.linspace(9, 5, 10), torch.linspace(-1, 1, n - 10)]).double()
    matrix = ((basis * values) @ basis.T).float()

    class Small(gs.LinearMap):
        is_self_adjoint, shape = True, (n, n)

        def _apply(self, x):
            return x @ matrix

        _apply_adjoint = _apply

    result = gs.spectrum(Small(), 5, method="sketched-basis", scratch=tmp_path, steps=min(n, 60), progress=False)
    exact = torch.linalg.eigvalsh(matrix.double()).numpy()
    for found in result.asked:
        assert np.abs(exact - found.value).min() <= found.error + 1e-5


def test_auto_takes_the_folder_only_where_vectors_do_not_fit(tmp_path):
    assert gs.spectrum(Dense(), 2, scratch=tmp_path, progress=False).method == "full"
    result = gs.spectrum(Dense(), 2, scratch=tmp_path, memory=1 << 20, progress=False)
    assert result.method == "sketched-basis"
    assert "a byte a number on disk" in result.reason
    assert result.disk_bytes > 0


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    whole = run(Dense(), scratch=tmp_path)
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(Dense(lifetime=20), scratch=tmp_path, resume=path)
    resumed = run(Dense(), scratch=tmp_path, resume=path)
    assert (resumed.alphas, resumed.betas, resumed.hvps) == (whole.alphas, whole.betas, whole.hvps)
    assert resumed.eigenvalues == whole.eigenvalues
    assert torch.equal(resumed.sketches, whole.sketches)


def interrupted(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(Dense(lifetime=20), scratch=tmp_path, resume=tmp_path / "run")
    (vectors,) = tmp_path.glob("*.krylov")
    return vectors


def test_vectors_that_are_gone_are_asked_for(tmp_path):
    interrupted(tmp_path).unlink()
    with pytest.raises(gs.StoreError, match="does not hold the 19 vectors"):
        run(Dense(), scratch=tmp_path, resume=tmp_path / "run")


def test_vectors_that_are_not_what_was_written_are_refused(tmp_path):
    vectors = interrupted(tmp_path)
    data = bytearray(vectors.read_bytes())
    data[5 * N] ^= 1
    vectors.write_bytes(data)
    with pytest.raises(gs.StoreError, match="vector 4 is not what was written"):
        run(Dense(), scratch=tmp_path, resume=tmp_path / "run")


def test_a_run_with_vectors_is_not_taken_up_without_them(tmp_path):
    interrupted(tmp_path)
    with pytest.raises(gs.FingerprintError, match="orthogonalized"):
        run(Dense(), resume=tmp_path / "run")


def test_folders_that_do_not_serve_are_named(tmp_path, monkeypatch):
    with pytest.raises(gs.InputError, match=r"(?s)nowhere.*mkdir -p"):
        run(Dense(), scratch=tmp_path / "nowhere")
    usage = type("Usage", (), {"free": 1_000_000})()
    monkeypatch.setattr(scratch_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(gs.InputError, match=r"0\.0 GB free.*up to 120 vectors of n = 32,768"):
        run(Dense(), scratch=tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file size")
def test_a_disk_that_is_full_says_so(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * N, hard))
    try:
        with pytest.raises(gs.StoreError, match="no room to write") as caught:
            run(Dense(), scratch=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.__cause__.errno == errno.EFBIG


def test_a_disk_that_loses_what_it_holds_gives_no_wrong_number(tmp_path, monkeypatch):
    """Vectors read back as noise leave copies, which sketches tell as ever."""
    read = scratch_module.StoredVectors._read

    def noisy(self, target, at):
        read(self, target, at)
        if target.dtype == torch.int8:
            target.copy_(torch.randint(-127, 128, target.shape, dtype=torch.int8))

    monkeypatch.setattr(scratch_module.StoredVectors, "_read", noisy)
    operator = Dense()
    with contextlib.suppress(gs.InputError):  # "changed between products" is as good
        for found in run(operator, scratch=tmp_path).asked:
            if found.converged:
                assert np.abs(operator.eigenvalues - found.value).min() <= found.error


def test_spectra_over_checkpoints_leave_no_vectors(tmp_path):
    folder = tmp_path / "scratch"
    folder.mkdir()
    gs.spectrum_over(
        {0: Dense(), 1: Dense()}, 2, directory=tmp_path / "out", scratch=folder, method="sketched-basis", progress=False
    )
    assert list(folder.iterdir()) == []


def test_a_result_written_before_there_were_folders_is_read():
    result = run(Dense(), k=2)
    record = json.loads(result.to_json())
    del record["disk_bytes"], record["crc32"]
    assert gs.Spectrum.from_json(json.dumps({**record, "crc32": record_checksum(record)})) == result


def test_a_killed_process_leaves_no_vectors(tmp_path):
    program = """
        import os, signal, sys
        import torch
        sys.path.insert(0, sys.argv[2])
        from test_scratch import Dense, run

        class Deadly(Dense):
            def _apply(self, x):
                self.left = 99 if self.left is None else self.left - 1
                if self.left < 80:
                    os.kill(os.getpid(), signal.SIGKILL)
                return Dense._apply(self, x)

        run(Deadly(), scratch=sys.argv[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), str(tmp_path), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": str(SRC)},
        check=False,
    )
    assert done.returncode == -9
    assert list(tmp_path.iterdir()) == []
