"""The fast forms of AFFD and AFJL against the factors of their definition, multiplied out in float64."""

import pytest
import torch
from scipy.linalg import hadamard

import gradsketch as gs
from gradsketch.transforms import Fourier, Haar
from gradsketch.transforms.haar import PermutedHadamard


def drawn(stream, name, n, diagonal):
    draw = stream.child(name).signs if diagonal == "signs" else stream.child(name).normals
    return torch.diag(draw(0, n, dtype=torch.float64))


def sylvester(n):
    return torch.from_numpy(hadamard(n)).double() / n**0.5


@pytest.mark.parametrize("diagonal", ["signs", "gaussian"])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (64, 16), (64, 64), (512, 32), (512, 100), (256, 255)])
def test_folding_equals_the_long_transform(n, d, diagonal):
    """R_d √(n/d) H G H B and R_d √(n/d) G H B, with every factor a matrix."""
    h, scale = sylvester(n), (n / d) ** 0.5
    for kind in (gs.AFFD, gs.AFJL):
        stream = gs.Stream(5, kind.__name__)
        b, g = drawn(stream, "B", n, "signs"), drawn(stream, "G", n, diagonal)
        product = h @ g @ h @ b if kind is gs.AFFD else g @ h @ b
        phi = kind(n, d, seed=5, form="global", diagonal=diagonal)
        torch.testing.assert_close(phi.dense(), scale * product[:d], rtol=0, atol=1e-12)


def test_local_form_equals_its_factors_on_several_blocks():
    n, d, stream = 16384, 128, gs.Stream(5, "AFFD")
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    b, g = (stream.child(name).signs(0, n, dtype=torch.float64) for name in "BG")
    mixed = g * ((b * x).view(4, 4096) @ sylvester(4096)).view(-1)
    outer = (sylvester(128) @ mixed.view(128, 128) @ sylvester(128)).view(-1)
    torch.testing.assert_close(gs.AFFD(n, d, seed=5)(x), (n / d) ** 0.5 * outer[:d], rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [300_001, 1 << 19])
def test_pieces_and_padding_do_not_show(n):
    """Local and global forms of a long vector, with the transforms made by the paper's two-sided matrix product."""
    d, whole, stream = 96, 1 << 19, gs.Stream(1, "AFFD")
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(whole, dtype=torch.float64)
    padded[:n] = x * stream.child("B").signs(0, n, dtype=torch.float64)
    g = stream.child("G").signs(0, whole, dtype=torch.float64)
    left, right = sylvester(512), sylvester(1024)
    for form, mixed in (
        ("global", left @ padded.view(512, 1024) @ right),
        ("local", padded.view(-1, 4096) @ sylvester(4096)),
    ):
        outer = (left @ (g * mixed.reshape(-1)).view(512, 1024) @ right).view(-1)
        expected = (whole / d) ** 0.5 * outer[:d]
        torch.testing.assert_close(gs.AFFD(n, d, seed=1, form=form)(x), expected, rtol=0, atol=1e-10)


TRANSFORMS = {"hadamard": PermutedHadamard, "fft": lambda n, stream: Fourier(n), "haar": Haar}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("d", [16, 50])
def test_paper_forms_equal_their_factors(transform, d):
    n, scale = 128, (128 / d) ** 0.5
    for kind in (gs.AFFD, gs.AFJL):
        stream = gs.Stream(5, kind.__name__)
        b, g = drawn(stream, "B", n, "signs"), drawn(stream, "G", n, "gaussian")
        inner, outer = (TRANSFORMS[transform](n, stream.child(name)).dense() for name in ("H'", "H''"))
        mixed = g @ inner @ (torch.eye(n, dtype=torch.float64) if transform == "haar" else b)
        product = outer @ mixed if kind is gs.AFFD else mixed
        phi = kind(n, d, seed=5, form="paper", transform=transform)
        torch.testing.assert_close(phi.dense(), scale * product[:d], rtol=0, atol=1e-12)


def test_signs_inside_a_block_shorter_than_d_are_an_isometry():
    phi, x = gs.AFFD(1 << 16, 1 << 14), torch.zeros(1 << 16, dtype=torch.float64)
    x[5 * 4096 : 6 * 4096] = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(phi(x).norm() / x.norm()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("options", [{"form": "global"}, {"form": "paper"}, {"transform": "haar"}])
def test_the_memory_of_a_vector_is_used_where_allowed(options):
    """In place, because the vector is long enough for whole-vector forms and needs no padding."""
    x = torch.randn(1 << 19, generator=torch.Generator().manual_seed(0))
    phi, y = gs.AFFD(1 << 19, 16, **options), x.clone()
    assert torch.equal(phi.sketch_(y), phi(x))
    assert not torch.equal(y, x)
