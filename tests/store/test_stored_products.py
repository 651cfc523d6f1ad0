"""Products with stored rows: the kernel for CPUs gives what the decoded sketches give, whatever it is asked for."""

import shutil

import pytest
import torch

from gradsketch.errors import GradsketchWarning
from gradsketch.kernels import native, trust
from gradsketch.store import products as module
from gradsketch.store.encoding import DTYPES, decode, encode
from gradsketch.store.products import products

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler here")
SHAPES = ((1, 1, 1), (2, 4, 8), (3, 5, 7), (67, 9, 75), (64, 8, 1024), (130, 64, 200), (5, 65, 64), (65, 3, 4160))


def numbers(rows, m, d):
    generator = torch.Generator().manual_seed(rows * d + m)
    return torch.randn(rows, d, generator=generator), torch.randn(m, d, generator=generator)


def wanted_and_error(stored, scale, dtype, directions):
    """Products in float64 of the decoded rows, and what float32 sums may differ by."""
    rows, d = decode(stored, scale, directions.shape[1], dtype).double(), directions.double()
    return d @ rows.T, 1e-6 * d.abs() @ rows.abs().T + 1e-6 * d.norm(dim=1, keepdim=True) * rows.norm(dim=1)


@pytest.mark.parametrize("by", [pytest.param("kernel", marks=needs_compiler), "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_those_of_the_decoded_rows(dtype, by):
    for shape in SHAPES:
        sketches, directions = numbers(*shape)
        stored, scale = encode(sketches, dtype)
        if by == "torch":
            with trust.switched_off():
                found = products(stored, dtype, directions)
        else:
            found = products(stored, dtype, directions)
        wanted, error = wanted_and_error(stored, scale, dtype, directions)
        assert ((found.double() * scale - wanted).abs() <= error).all(), shape


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_numbers_are_those_torch_takes(dtype):
    sketches, directions = numbers(50, 6, 300)
    stored, _ = encode(sketches, dtype)
    for width in (1, 13, 64, 100, 300):
        with trust.switched_off():
            wanted = products(stored, dtype, directions, width)
        torch.testing.assert_close(products(stored, dtype, directions, width), wanted, rtol=1e-4, atol=1e-3)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_product_does_not_depend_on_what_else_is_asked_for(dtype, threads):
    sketches, directions = numbers(131, 11, 333)
    stored, _ = encode(sketches, dtype)
    together = products(stored, dtype, directions)
    for row, vector in ((0, 0), (1, 3), (64, 4), (130, 10), (77, 8)):
        alone = products(stored[row : row + 1], dtype, directions[vector : vector + 1])
        assert torch.equal(alone, together[vector : vector + 1, row : row + 1])
    for count in (1, 2):
        threads(count)
        assert torch.equal(products(stored, dtype, directions), together)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """Kernels compiled here and now, whose trials are not yet known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_verdicts", {})
    native.compiled.cache_clear()
    yield monkeypatch
    native.compiled.cache_clear()


@needs_compiler
@pytest.mark.parametrize("options", ["-mno-avx512f", "-mno-avx512f -mno-avx2 -mno-fma", "-mno-avx"])
def test_processors_of_fewer_instructions(fresh, options):
    fresh.setenv("CC", f"cc {options}")
    for dtype in DTYPES:
        sketches, directions = numbers(67, 9, 200)
        stored, scale = encode(sketches, dtype)
        wanted, error = wanted_and_error(stored, scale, dtype, directions)
        found = products(stored, dtype, directions)
        assert native.compiled("stored") is not None
        assert ((found.double() * scale - wanted).abs() <= error).all(), dtype


@needs_compiler
def test_half_numbers_near_zero_keep_their_value_without_the_instruction(fresh):
    """Subnormal numbers, the smallest normal one and the largest, of both signs."""
    fresh.setenv("CC", "cc -mno-avx")
    bits = torch.tensor([0, 1, 2, 0x3FF, 0x400, 0x7BFF, 0x3C00, 0x3555], dtype=torch.int16)
    stored = torch.cat([bits, bits | torch.tensor(-0x8000, dtype=torch.int16)]).view(torch.float16)[None]
    found = products(stored, "float16", torch.eye(16)).flatten()
    assert torch.equal(found, stored[0].float())


@needs_compiler
def test_a_kernel_that_differs_is_left_with_a_warning(fresh):
    right = module._by_kernel
    fresh.setattr(module, "_by_kernel", lambda *arguments: right(*arguments) * 1.001)
    sketches, directions = numbers(20, 3, 64)
    stored, _ = encode(sketches, "int8")
    with pytest.warns(GradsketchWarning, match="The kernel stored"):
        found = products(stored, "int8", directions)
    with trust.switched_off():
        assert torch.equal(found, products(stored, "int8", directions))


def test_nothing_is_compiled_where_there_is_no_compiler(fresh):
    fresh.setenv("CC", "no-such-compiler")
    sketches, directions = numbers(20, 3, 64)
    stored, scale = encode(sketches, "int4")
    wanted, error = wanted_and_error(stored, scale, "int4", directions)
    assert ((products(stored, "int4", directions).double() * scale - wanted).abs() <= error).all()
