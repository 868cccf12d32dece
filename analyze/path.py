"""The shape of the path: its principal components beside those of a random walk, and its length.

The components follow from the distances between the saved iterates alone: ``-J D² J / 2`` with
``D² = ‖w_i - w_j‖²`` and ``J`` the centring is the Gram matrix of the centred path (classical
scaling). Every saved row counts alike.

A walk of independent steps in many dimensions has large components too, those of cosines over the
index of the step: in the limit of many equal steps the k-th explains 6 / (π² k²) of the variance,
61, 15, 7 and 4 %. Antognini and Sohl-Dickstein, "PCA of high dimensional random walks with
comparison to neural network training", NeurIPS 2018. What a path has beyond its walk is direction.

Axes: T saved rows of weights, K groups of tensors, k components.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analyze.blas import single_threaded
from analyze.gram import compute_gram
from analyze.quantities import Values, norm, ratio
from analyze.schedulers import Cluster
from capture.store import InputError, Run, open_run
from capture.store.layout import WEIGHTS

Integers = NDArray[np.int64]

COMPONENTS = 10

# Every-step norms of the updates: by tensor, and of the whole model.
_BY_TENSOR, _OF_MODEL = "update_norm_by_tensor", "update_norm"


@dataclass(frozen=True)
class PathShape:
    """The path of one group of tensors, k components of it.

    `variance` ``[k]`` is that of the rows along a component (1/T, in weight²) and `explained` its
    share of the whole. `null_walk` ``[k]`` is that of a long walk of equal, independent steps,
    `null_steps` that of orthogonal steps as many and as long as those between this run's rows.
    `coordinates` ``[T, k]`` are the centred rows on the components. `walked` ``[T]`` is the length
    Σ‖w_{i+1} - w_i‖ of the path over the saved rows so far, `updated` ``[T]`` Σ‖u‖ over every
    update so far, NaN where that was not recorded. `displaced` is ‖w - w_first‖ of each row.

    A row with a coordinate that is not finite is left out: NaN, and the path goes on past it.
    """

    variance: Values
    explained: Values
    null_walk: Values
    null_steps: Values
    coordinates: Values
    walked: Values
    updated: Values
    displaced: Values

    @property
    def straightness(self) -> float:
        """‖w_last - w_first‖ / Σ‖u‖ from the first to the last row: 1 for a straight line."""
        return float(ratio(self.displaced[-1:], self.updated[-1:])[0])


def measure_path(
    path: str | os.PathLike[str],
    groups: Integers,
    *,
    components: int = COMPONENTS,
    scheduler: str | Cluster = "threads",
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Integers, list[PathShape]]:
    """Measure the path of a run's saved weights: its steps ``[T]``, and the shape of each group.

    `groups` is the group of each tensor, int64 ``[P]``. `InputError` where there are not two rows;
    others, and scheduler, workers and progress, are those of `analyze.gram.compute_gram`.
    """
    gram = compute_gram(
        path, WEIGHTS, groups, scheduler=scheduler, workers=workers, progress=progress
    )
    if len(gram.steps) < 2:
        raise InputError(
            f"a path needs two saved rows of weights, the run has {len(gram.steps)}",
            where=path,
            fix="wait until more is recorded, or record the run again with --every",
        )
    updates = update_lengths(open_run(path), gram.steps, groups)
    shapes = []
    for group, lengths in enumerate(updates.T):
        squares = np.zeros((len(gram.steps),) * 2)
        first, second = gram.pairs.T
        squares[first, second] = squares[second, first] = gram.sums["dd"][:, 0, group]
        shapes.append(path_shape(squares, lengths, components))
    return gram.steps, shapes


def path_shape(squares: Values, updated: Values, components: int = COMPONENTS) -> PathShape:
    """Analyse a path by the squared distances of its rows ``[T, T]``; `updated` as `PathShape`."""
    total = len(squares)
    sound = _sound_rows(squares)
    kept = np.ix_(sound, sound)
    count = min(components, total - 1)
    steps = squares[kept].diagonal(1)
    variance, axes = _principal(squares[kept])
    coordinates = np.full((total, count), np.nan)
    coordinates[sound] = _padded(axes, count)
    walked = np.full(total, np.nan)
    walked[sound] = np.append(0.0, np.cumsum(norm(steps)))[: len(sound)]
    displaced = np.full(total, np.nan)
    displaced[sound] = norm(squares[sound[:1]][:, sound].ravel())
    return PathShape(
        _padded(variance, count),
        _padded(_shares(variance), count),
        walk_shares(count),
        _padded(_shares(_principal(walk_squares(steps))[0]), count),
        coordinates,
        walked,
        updated,
        displaced,
    )


def walk_shares(count: int) -> Values:
    """6 / (π² k²) for k = 1 … `count`: shares of the variance of a long random walk."""
    return 6 / (np.pi * np.arange(1, count + 1)) ** 2


def walk_squares(steps: Values) -> Values:
    """Squared distances ``[n + 1, n + 1]`` along orthogonal steps of these squared lengths."""
    along = np.append(0.0, np.cumsum(steps))
    return np.asarray(np.abs(along[:, None] - along))


def update_lengths(run: Run, steps: Integers, groups: Integers) -> Values:
    """Σ‖u‖ over the updates before each of `steps`, from the first of them on: ``[T, K]``.

    From the every-step scalars; NaN where they do not reach, or tell no groups.
    """
    count = int(groups.max()) + 1
    names = run.scalar_names()
    if _BY_TENSOR in names:
        squares = run.scalar(_BY_TENSOR) ** 2
        lengths = np.sqrt(np.stack([squares[:, groups == k].sum(axis=1) for k in range(count)], 1))
    elif _OF_MODEL in names and count == 1:
        lengths = run.scalar(_OF_MODEL)[:, None]
    else:
        return np.full((len(steps), count), np.nan)
    sums = np.cumsum(np.pad(lengths, ((1, 0), (0, 0))), axis=0)
    known = np.where((steps < len(sums))[:, None], sums[np.minimum(steps, len(sums) - 1)], np.nan)
    return np.asarray(known - known[0])


def _sound_rows(squares: Values) -> Integers:
    """Rows with finite distances to one another: those that are not finite have none at all."""
    finite = np.isfinite(squares)
    np.fill_diagonal(finite, False)
    return np.flatnonzero(finite.any(axis=1))


def _principal(squares: Values) -> tuple[Values, Values]:
    """Variance along each component, falling, and the rows' coordinates, from squared distances."""
    if len(squares) < 2:
        return np.empty(0), np.empty((len(squares), 0))
    centred = squares - squares.mean(axis=0)
    centred = -(centred - centred.mean(axis=1)[:, None]) / 2
    with single_threaded():
        values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    # The smallest is that of the centre, 0.
    values, vectors = np.maximum(values[:0:-1], 0.0), vectors[:, :0:-1]
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return values / len(squares), vectors * signs * np.sqrt(values)


def _shares(variance: Values) -> Values:
    return ratio(variance, np.full_like(variance, variance.sum()))


def _padded(values: Values, count: int) -> Values:
    """The first `count` along the last axis, NaN where there are fewer."""
    short = max(0, count - values.shape[-1])
    widths = [(0, 0)] * (values.ndim - 1) + [(0, short)]
    return np.pad(values, widths, constant_values=np.nan)[..., :count]
