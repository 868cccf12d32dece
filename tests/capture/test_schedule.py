"""The forms of a schedule, against sets written out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.schedule import parse_schedule
from capture.store.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (10, [0, 10, 20]),
        ("10", [0, 10, 20]),
        ("every:10", [0, 10, 20]),
        ("epoch", [0, 7, 14, 21, 28]),
        ("bursts:12:1,2,5", [0, 1, 2, 5, 12, 13, 14, 17, 24, 25, 26, 29]),
        # A lag longer than the period reaches past the next burst.
        ("bursts:12:20", [0, 12, 20, 24]),
        ("epoch + 15", [0, 7, 14, 15, 21, 28]),
        ("log:5", [0, 1, 3, 9, 29]),
        ("log:1", [0]),
        ("log:2", [0, 29]),
    ],
)
def test_steps_of_each_form(text, expected):
    schedule = parse_schedule(text, total_steps=30, steps_per_epoch=7)
    assert schedule.steps(30) == expected
    assert [step for step in range(30) if schedule.due(step)] == expected


def test_an_epoch_is_recognised_by_its_length_or_by_the_loop():
    by_length = parse_schedule("epoch", steps_per_epoch=7)
    by_loop = parse_schedule("epoch")
    assert by_length.due(14)
    assert not by_length.due(15)
    assert by_loop.due(0)
    assert not by_loop.due(14)
    assert by_loop.due(15, epoch_start=True)
    with pytest.raises(UsageError, match="steps per epoch is not known"):
        by_loop.steps(30)


@given(st.integers(1, 300), st.integers(1, 3000))
def test_log_spaced_steps_are_as_many_as_asked_distinct_and_inside(count, total):
    steps = parse_schedule(f"log:{count}", total_steps=total).steps(total)
    assert len(set(steps)) == len(steps) == min(count, total)
    assert steps[0] == 0
    assert steps[-1] == (total - 1 if count > 1 else 0)


def test_log_spaced_steps_grow_by_a_constant_factor():
    steps = parse_schedule("log:40", total_steps=100_000).steps(100_000)
    late = [step for step in steps if step > 1000]
    factors = [after / before for before, after in pairwise(late)]
    # Rounding moves a step above 1000 by less than 0.05 percent, a factor by less than twice that.
    assert max(factors) / min(factors) < 1.002


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "none of the forms"),
        ("0", "at least 1, found '0'"),
        ("-5", "none of the forms"),
        ("1.5", "none of the forms"),
        ("every:x", "found 'x'"),
        ("log", "found ''"),
        ("epochs", "did you mean 'epoch'"),
        ("burst:51:1", "did you mean 'bursts'"),
        ("bursts:51", "found ''"),
        ("bursts:0:1", "found '0'"),
        ("epoch+", "none of the forms"),
    ],
)
def test_a_schedule_that_is_none_says_why_and_shows_the_forms(text, words):
    with pytest.raises(UsageError, match="write 10, log:50, epoch, bursts") as caught:
        parse_schedule(text, total_steps=100)
    assert words in str(caught.value)


def test_log_spacing_needs_the_length_of_the_run():
    with pytest.raises(UsageError, match="total_steps"):
        parse_schedule("log:50")


@pytest.mark.parametrize("text", ["3", "epoch", "bursts:7:1,2,5", "log:9+epoch", "every:4+11"])
def test_masks_in_pieces_are_the_whole_mask(text):
    schedule = parse_schedule(text, total_steps=40, steps_per_epoch=6)
    due = [schedule.due(step) for step in range(40)]
    assert schedule.mask(40).tolist() == due
    for start, stop in [(0, 1), (1, 40), (5, 13), (12, 40), (39, 40)]:
        assert schedule.mask(stop, start).tolist() == due[start:stop]


def test_too_many_listed_steps_are_refused():
    with pytest.raises(UsageError, match="at most 1,000,000 steps"):
        parse_schedule("log:1000001", total_steps=10**9)
