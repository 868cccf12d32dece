"""Two threads for what is as fast as the memory: one core alone does not use all of its bandwidth.

Always cut in the same place, so that results do not depend on how many processors there are. Not
torch's threads: those wait for each other, spinning, where other work keeps one from running.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

Result = TypeVar("Result")

# Below this a second thread takes longer to wake than it saves.
LEAST_ELEMENTS = 1_000_000
# Halves begin at multiples of this, as the pieces of a sum do.
ALIGNMENT = 1024


def in_halves(work: Callable[[slice], Result], size: int) -> list[Result]:
    """Call `work` for both halves of `size` elements at the same time; for all of few ones."""
    if size < LEAST_ELEMENTS:
        return [work(slice(0, size))]
    middle = size // 2 // ALIGNMENT * ALIGNMENT
    first, second = slice(0, middle), slice(middle, size)
    if len(os.sched_getaffinity(0)) == 1:
        return [work(first), work(second)]
    other = _helper().submit(work, second)
    return [work(first), other.result()]


@cache
def _helper() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="straightway-half")
