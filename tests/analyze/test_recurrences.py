"""Linear recurrences, all steps at once: against one step after another."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analyze.recurrences import Floats, solve


def one_by_one(factors: Floats, terms: Floats, start: Floats) -> Floats:
    states = [start]
    for step in range(terms.shape[1]):
        states.append(factors[..., step] @ states[-1] + terms[:, step])
    return np.stack(states, axis=1)


@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.integers(1, 3),
    steps=st.integers(0, 40),
    columns=st.integers(1, 3),
)
def test_all_steps_at_once_are_the_steps_one_by_one(
    seed: int, size: int, steps: int, columns: int
) -> None:
    draw = np.random.default_rng(seed).uniform
    # Rows that sum to less than 1, so that no state grows and rounding stays where it is.
    factors = draw(-1, 1, (size, size, steps)) / size
    terms, start = draw(-1, 1, (size, steps, columns)), draw(-1, 1, (size, columns))
    expected = one_by_one(factors, terms, start)
    assert solve(factors, terms, start) == pytest.approx(expected, rel=1e-12, abs=1e-13)


def test_whole_numbers_come_out_exactly() -> None:
    """Fibonacci's, 60 of them; the 60th has 13 digits."""
    factors = np.repeat(np.array([[1.0, 1.0], [1.0, 0.0]])[..., None], 60, axis=2)
    found = solve(factors, np.zeros((2, 60, 1)), np.array([[1.0], [0.0]]))[1, :, 0]
    numbers = [0, 1]
    while len(numbers) < 61:
        numbers.append(numbers[-2] + numbers[-1])
    assert found.tolist() == numbers


@pytest.mark.parametrize("broken", [0, 1, 6, 7, 12])
def test_what_is_not_finite_reaches_no_earlier_state(broken: int) -> None:
    factors, terms = np.full((1, 1, 13), 0.5), np.ones((1, 13, 1))
    whole = solve(factors, terms, np.zeros((1, 1)))
    terms[0, broken] = np.nan
    found = solve(factors, terms, np.zeros((1, 1)))
    assert (found[:, : broken + 1] == whole[:, : broken + 1]).all()
    assert np.isnan(found[:, broken + 1 :]).all()
