"""Places as people hand them in: of any library, and never a mask read as ones and zeros."""

import numpy as np
import pytest
import torch

from gradsketch.errors import InputError
from gradsketch.places import as_places


@pytest.mark.parametrize("values", [
    [2, 0], (2, 0), range(2, -1, -2), torch.tensor([2, 0]), [torch.tensor(2), torch.tensor(0)], np.array([2, 0]),
    [np.int64(2), np.int64(0)],
])  # fmt: skip
def test_whole_numbers_of_any_library(values):
    places = as_places(values, 3, "row")
    assert places == [2, 0]
    assert set(map(type, places)) == {int}


@pytest.mark.parametrize("values", [
    [True, False, True], torch.tensor([True, False]), [torch.tensor(True)], np.array([True, False]), [np.True_],
    [1.0], torch.tensor([1.0]), ["1"], "1", 1, [-1], [3], [None], [[1]],
])  # fmt: skip
def test_what_is_no_place_is_refused(values):
    with pytest.raises(InputError, match="whole numbers from 0 to 2"):
        as_places(values, 3, "row")


def test_a_mask_is_told_how_it_becomes_places():
    with pytest.raises(InputError, match="enumerate"):
        as_places([True, False], 3, "row")
