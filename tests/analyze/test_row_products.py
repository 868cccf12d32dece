"""The compiled products of rows beside numpy, and what their bytes do not depend on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze import chain
from analyze.chain import Piece, batch_sums, chain_sums, direct_sums
from analyze.row_products import LANES, PANEL, add_products

Values = NDArray[np.float64]


def padded(rows: Values, length: int) -> Values:
    """The rows with rows of zeros up to whole panels, and zeros up to `length` coordinates."""
    count, width = rows.shape
    return np.pad(rows, ((0, -count % PANEL), (0, length - width)))


def piece_of(weights: Values, gradients: Values) -> Piece:
    """Rows in memory of this process as compiled loops see those of a run."""
    piece = object.__new__(Piece)
    piece.like, piece.count = np.empty(0, weights.dtype), weights.shape[1]
    piece.weights = np.array([row.ctypes.data for row in weights], np.uint64)
    addresses = [row.ctypes.data for batch in gradients for row in batch]
    piece.gradients = np.array(addresses, np.uint64).reshape(len(gradients), len(weights))
    return piece


@given(
    rows=st.integers(1, 13),
    others=st.integers(1, 13),
    blocks=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_numpy(rows: int, others: int, blocks: int, seed: int) -> None:
    draw = np.random.default_rng(seed).standard_normal
    length = blocks * LANES
    left, right = padded(draw((rows, length)), length), padded(draw((others, length)), length)
    out = np.ones((len(left), len(right)))
    add_products(left, right, length, False, out)
    # Sums of at most 320 products of numbers near 1.
    np.testing.assert_allclose(out, 1 + left @ right.T, rtol=1e-12, atol=1e-12)
    square = np.zeros((len(left), len(left)))
    add_products(left, left, length, True, square)
    np.testing.assert_allclose(np.triu(square), np.triu(left @ left.T), rtol=1e-12, atol=1e-12)


def test_a_product_does_not_depend_on_the_other_rows() -> None:
    rows = padded(np.random.default_rng(0).standard_normal((11, 333)), 336)
    whole = np.zeros((len(rows), len(rows)))
    add_products(rows, rows, 336, False, whole)
    assert (whole == whole.T).all()
    for i, j in ((0, 10), (3, 4), (7, 7)):
        alone = np.zeros((2 * PANEL, 2 * PANEL))
        two = padded(rows[[i, j]], 336)
        two = np.concatenate([two, two])
        add_products(two, two, 336, False, alone)
        assert alone[0, 1] == alone[1, 0] == whole[i, j]


def test_a_product_is_the_sum_by_lanes_and_halves() -> None:
    """Written out with exact integers, whose sums cannot tell; then with one that can."""
    length = 4 * LANES
    row = np.zeros((PANEL, length))
    # In one lane 1e16 swallows 1 if it comes first; in another lane it does not.
    row[0, 0], row[0, LANES], row[0, 1] = 1e8, 1.0, 1.0
    out = np.zeros((PANEL, PANEL))
    add_products(row, row, length, True, out)
    assert out[0, 0] == (1e16 + 1.0) + 1.0
    row[0, [LANES, 1]] = 0.0, 2.0
    out[:] = 0
    add_products(row, row, length, True, out)
    assert out[0, 0] == 1e16 + 4.0


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 1023, 1024, 1025, 3000])
def test_all_ways_agree_on_any_length(width: int, dtype: str) -> None:
    draw = np.random.default_rng(width).standard_normal
    weights, gradients = draw((6, width)).astype(dtype), draw((3, 6, width)).astype(dtype)
    piece = piece_of(weights, gradients)
    pairs = np.argwhere(np.triu(np.ones((6, 6)), 1))
    found, direct = chain_sums(piece, pairs), direct_sums(piece, pairs)
    np.testing.assert_allclose(found, direct, rtol=1e-11, atol=1e-11 * width)
    g = np.float64(gradients)
    expected = np.einsum("bnc,dnc->nbd", g, g)
    np.testing.assert_allclose(batch_sums(piece, slice(0, 6)), expected, rtol=1e-12, atol=1e-11)
    np.testing.assert_array_equal(
        batch_sums(piece, slice(2, 4)), batch_sums(piece, slice(0, 6))[2:4]
    )


def test_only_the_rows_of_the_pairs_are_loaded() -> None:
    """An address that is none is never followed."""
    weights = np.random.default_rng(1).standard_normal((4, 20))
    piece = piece_of(weights, np.empty((0, 4, 20)))
    piece.weights[2] = 0
    found = direct_sums(piece, np.array([[0, 3], [1, 3]]))
    expected = [((weights[i] - weights[3]) ** 2).sum() for i in (0, 1)]
    np.testing.assert_allclose(found.ravel(), expected, rtol=1e-13)


def test_a_tile_is_whole_lanes() -> None:
    assert chain.TILE % LANES == 0
