"""What numbers must be: said by name, with what was found."""

import math

import numpy as np
import pytest
import torch

from agd_fast.checking import LARGEST_SEED, is_finite, number_range, require_seed, require_whole


@pytest.mark.parametrize("value", [0, -1, 1.5, 2.0, "3", True, math.nan])
def test_whole_numbers_are_ints_from_the_lowest_on(value):
    with pytest.raises(ValueError, match=f"steps must be an int of at least 1, found {value!r}"):
        require_whole(size=1, steps=value)
    require_whole(size=1, steps=None)


@pytest.mark.parametrize("value", [-1, 1.5, LARGEST_SEED + 1, 2**63 - 1])
def test_seeds_leave_room_for_what_comes_of_them(value):
    require_seed(LARGEST_SEED)
    torch.manual_seed(LARGEST_SEED * 1_000_003)
    with pytest.raises(ValueError, match=f"seed must be an int of at least 0 and at most .*, found {value}"):
        require_seed(value)


@pytest.mark.parametrize(
    "value", [5, "ab", "19", (1, 6, 7), (1,), (1, math.inf), (-math.inf, 2), (math.nan, 2), (2, 1), (3, 3), None]
)
def test_ranges_are_two_finite_numbers(value):
    assert_no_range(value)


@pytest.mark.parametrize("value", [("1", "9"), {1: 0, 6: 0}, torch.tensor([1.0, 6.0]), np.array([1.0, 6.0])])
def test_ranges_are_sequences_of_numbers(value):
    assert_no_range(value)


def assert_no_range(value):
    assert number_range("guidance_range", [1, 6]) == (1.0, 6.0)
    with pytest.raises(ValueError, match=r"guidance_range must be \(low, high\), two finite numbers with low < high, found "):
        number_range("guidance_range", value)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.float64])
def test_finite_numbers_of_every_width(dtype):
    values = torch.tensor([1.0, math.inf, math.nan], dtype=torch.float64).to(dtype)
    assert is_finite(values).tolist() == [True, False, False]
