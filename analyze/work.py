"""How sums come about: where they are looked up, and who works out those that are not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analyze.cache import Where

if TYPE_CHECKING:
    from analyze.schedulers import Cluster


@dataclass(frozen=True)
class Work:
    """What all functions that sum take alike.

    `cache` as in `analyze.cache.cache_of`, all else as in `analyze.compute.compute_moments`.
    """

    cache: Where = True
    scheduler: str | Cluster = "threads"
    workers: int | None = None
    progress: Callable[[int, int], None] | None = None

    @property
    def computing(self) -> dict[str, Any]:
        """All but the cache, as keyword arguments."""
        return {"scheduler": self.scheduler, "workers": self.workers, "progress": self.progress}
