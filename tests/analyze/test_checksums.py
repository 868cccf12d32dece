"""The checksum inside the kernels must be the crc32c of the package that wrote the store."""

import numpy as np
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from analyze import checksums
from analyze.moments import GEOMETRY, MOMENTS, WITHOUT_GRADIENT, segment_moments

needs_fast_checksums = pytest.mark.skipif(
    not checksums.AVAILABLE, reason="this processor has no wide carry-less multiplication"
)


@needs_fast_checksums
@given(
    # Around the folded block (64 or 32 values), and many of them with or without a rest.
    size=st.one_of(st.integers(1, 300), st.integers(9_000, 9_300)),
    dtype=st.sampled_from(["f4", "f8"]),
    seed=st.integers(0, 1000),
)
def test_both_checksums_are_the_packages(size: int, dtype: str, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 256, (2, size * np.dtype(dtype).itemsize), "u1")
    gradient, weights = bits.view(dtype)
    found = segment_moments(
        gradient, weights, weights, np.array([0, size]), check_weights=True, check_gradient=True
    )
    assert found.weights_checksum == crc32c(bits[1])
    assert found.gradient_checksum == crc32c(bits[0])


@needs_fast_checksums
@pytest.mark.parametrize("moments", [MOMENTS, GEOMETRY, WITHOUT_GRADIENT])
@pytest.mark.parametrize(
    ("check_weights", "check_gradient"), [(True, False), (False, True), (True, True)]
)
def test_checksums_and_sums_do_not_depend_on_each_other(
    moments: tuple[str, ...], check_weights: bool, check_gradient: bool
) -> None:
    gradient, weights, reference = np.random.default_rng(0).standard_normal((3, 1000), "f4")
    cuts = np.array([0, 3, 500, 1000])
    found = segment_moments(
        gradient,
        weights,
        reference,
        cuts,
        moments=moments,
        check_weights=check_weights,
        check_gradient=check_gradient,
    )
    assert found.weights_checksum == (crc32c(weights) if check_weights else None)
    assert found.gradient_checksum == (crc32c(gradient) if check_gradient else None)
    unchecked = segment_moments(gradient, weights, reference, cuts, moments=moments)
    assert found.sums.tobytes() == unchecked.sums.tobytes()


@needs_fast_checksums
def test_every_single_bit_counts() -> None:
    weights = np.arange(150, dtype="f4")  # 600 bytes: two folded blocks, then single words
    sound = crc32c(weights)
    for bit in range(weights.nbytes * 8):
        damaged = weights.view("u1").copy()
        damaged[bit // 8] ^= 1 << bit % 8
        values = damaged.view("f4")
        cuts = np.array([0, values.size])
        found = segment_moments(None, values, weights, cuts, check_weights=True)
        assert found.weights_checksum != sound


def test_nothing_is_said_of_bytes_that_were_not_to_be_checked() -> None:
    values = np.ones(5, "f4")
    found = segment_moments(values, values, values, np.array([0, 5]))
    assert (found.weights_checksum, found.gradient_checksum) == (None, None)
