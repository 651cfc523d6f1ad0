"""int4 and sign: several numbers in a byte."""

import math

import pytest
import torch

from gradsketch.errors import NonFiniteError
from gradsketch.random import Stream
from gradsketch.store import Manifest, Rows, Store, verify
from gradsketch.store.encoding import DTYPES, decode, encode, row_bytes, stored_count, stored_width, turned, unpacked

# Relative distance of a stored normal row from the row, and its cosine with it: the noise of a step over root 12 and of
# clipping at three root mean squares; the mean of |x|.
DISTANCE = {"int4": 0.13, "sign": 0.76}
COSINE = {"int4": 0.992, "sign": math.sqrt(2 / math.pi)}


def normals(rows, d, name="rows"):
    return Stream(7, name).normals(0, rows * d).view(rows, d)


@pytest.mark.parametrize(("dtype", "expected"), [("int4", 2048), ("sign", 512), ("int8", 4096), ("float16", 8192)])
def test_bytes_of_a_row(dtype, expected):
    assert row_bytes(4096, dtype) == expected
    assert encode(normals(2, 4096), dtype)[0].nbytes == 2 * expected


@pytest.mark.parametrize("dtype", DISTANCE)
@pytest.mark.parametrize("d", [1, 3, 200, 256, 300, 4096, 5000])
def test_rows_of_every_length(dtype, d):
    x = normals(50, d)
    stored, scale = encode(x, dtype)
    assert stored.shape[1] == row_bytes(d, dtype) == stored_width(d, dtype)
    found = decode(stored, scale, d, dtype)
    assert found.shape == x.shape
    if d in (256, 4096):
        torch.testing.assert_close((found * x).sum(dim=1), x.square().sum(dim=1), rtol=1e-5, atol=0)
        distance = (found - x).norm(dim=1) / x.norm(dim=1)
        assert distance.mean() == pytest.approx(DISTANCE[dtype], rel=0.1)
        assert torch.cosine_similarity(found, x).mean() == pytest.approx(COSINE[dtype], rel=0.005)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [3, 256, 700])
def test_products_of_turned_vectors_are_those_of_sketches(dtype, d):
    x, q = normals(20, d), normals(4, d, "questions")
    stored, scale = encode(x, dtype)
    turned_products = turned(q, dtype) @ (unpacked(stored, stored_count(d, d, dtype), dtype) * scale[:, None]).T
    rows = decode(stored, scale, d, dtype)
    # What rounding puts into the padding counts in the one product and not in the other.
    tolerance = 1e-4 if d in (256, 4096) or dtype not in DISTANCE else 0.15
    assert ((turned_products - q @ rows.T).abs() <= tolerance * q.norm(dim=1)[:, None] * x.norm(dim=1)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_numbers_are_those_of_the_first_part_of_a_sketch(dtype):
    x = normals(20, 12_288)
    stored, _ = encode(x, dtype)
    assert torch.equal(unpacked(stored, 8192, dtype), unpacked(stored, 12_288, dtype)[:, :8192])
    assert torch.equal(turned(x[:, :8192].contiguous(), dtype), turned(x, dtype)[:, :8192])


@pytest.mark.parametrize(("width", "d", "expected"), [
    (4096, 4096, 4096), (1, 4096, 4096), (4097, 12_288, 8192), (4096, 12_288, 4096), (5, 5, 64), (100, 100, 128),
    (200, 1000, 512), (600, 1000, 768), (1000, 1000, 1024), (4100, 5000, 4608), (5000, 5000, 5056),
])  # fmt: skip
def test_whole_blocks_are_read(width, d, expected):
    assert stored_count(width, d, "int4") == stored_count(width, d, "sign") == expected
    assert stored_count(width, d, "int8") == width


def test_what_is_packed():
    steps = torch.tensor([[7.0, -7, 1, 0, -3, 2, 3] + [0.0] * 249])
    steps *= 7 / 3 / steps.square().mean().sqrt()  # a step is 3/7 of the root mean square
    x = decode_turn(steps)
    assert torch.equal(unpacked(encode(x, "int4")[0], 256, "int4"), steps.round().clamp(-7, 7))
    signs = (2 * (normals(1, 256) > 0) - 1).float()
    x = decode_turn(signs * 3)
    assert torch.equal(unpacked(encode(x, "sign")[0], 256, "sign"), signs)
    torch.testing.assert_close(decode(*encode(x, "sign"), 256, "sign"), x)


def decode_turn(steps):
    """Return the sketch that ``turned`` makes these numbers of: it is an orthogonal matrix."""
    return steps @ turned(torch.eye(256), "int4").T


def test_a_few_large_entries_do_not_spoil_the_others():
    """Without the turn the few are clipped, and all others round to zero."""
    x = normals(30, 4096)
    x[:, :16] *= 100
    for dtype in DISTANCE:
        found = decode(*encode(x, dtype), 4096, dtype)
        assert torch.cosine_similarity(found, x).mean() == pytest.approx(COSINE[dtype], abs=0.01)


@pytest.mark.parametrize("dtype", DISTANCE)
def test_zeros_stay_zeros(dtype):
    assert not decode(*encode(torch.zeros(3, 100), dtype), 100, dtype).any()
    assert len(encode(torch.zeros(0, 100), dtype)[0]) == 0


@pytest.mark.parametrize("dtype", DISTANCE)
@pytest.mark.parametrize("scale", [1e-30, 1e-7, 1e12])
def test_products_are_not_biased(dtype, scale):
    """Rows that agree with a direction to some extent: the mean of estimate over truth is one, whatever their size."""
    direction = normals(1, 2048, "direction")
    x = normals(400, 2048) + 0.5 * direction
    estimates = decode(*encode(x * scale, dtype), 2048, dtype) @ direction.T / scale
    assert float((estimates / (x @ direction.T)).mean()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("dtype", DISTANCE)
def test_in_a_store(tmp_path, dtype):
    store, x = Store.create(tmp_path, Manifest(d=100, rows=70, shard_rows=64, dtype=dtype)), normals(70, 100)
    for start, count in store.missing():
        rows = x[start : start + count]
        store.write(start, Rows([str(i) for i in range(count)], rows, torch.zeros(count), {}))
    assert verify(store).sound
    torch.testing.assert_close(
        torch.cat([s.decoded() for s in Store.open(tmp_path)]), decode(*encode(x, dtype), 100, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_near_the_end_of_float32_are_stored_or_refused(dtype):
    for size in (1e30, 1e36, 1e37, 9e37, 2e38, 3.4e38):
        row = torch.zeros(1, 128)
        row[0, 3] = size
        try:
            stored, scale = encode(row, dtype)
        except NonFiniteError:
            assert size > 5e36
            continue
        assert size < 1e37
        found = decode(stored, scale, 128, dtype)
        assert float((found.double() * row.double()).sum()) == pytest.approx(size**2, rel=0.01)
