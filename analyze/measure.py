"""From the moments of a run to its quantities: clip factor, weight decay, null, groups of tensors.

Axes: N rows of one stream (steps × batches), P tensors, K groups of tensors, R references.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from analyze.adam import AdamMoments
from analyze.moment_table import MOMENTS
from analyze.optimizer import group_scalar, own_path, read_optimizer
from analyze.quantities import Sums, Values, evaluate
from analyze.references import is_mean, iterate_of
from analyze.sums import (
    adam_sums,
    gradient_sums,
    position_sums,
    sum_groups,
    unclipping,
    update_sums,
)
from capture.store.errors import UsageError
from capture.store.layout import ITERATES, UPDATES, WEIGHTS
from capture.store.reader import Run

Integers = NDArray[np.int64]

_UPDATE_NORMS = "update_norm_by_tensor"
_DECAY = {
    "coupled": "coupled: the _wd columns are of g + λw, λ by parameter group",
    "decoupled": "decoupled, no part of the gradient: _wd equals the plain columns; the update "
    "columns show its effect",
    "unknown": "of an unknown kind: the _wd columns are NaN where weight_decay is not 0",
    "missing": "not recorded: the _wd columns are NaN",
}


class Measure:
    """The arithmetic of one run, on moments that were summed before.

    `decay_note` says what became of weight decay, `nulls` what the null of each reference rests
    on or why there is none, `undefined` counts the NaN in each quantity where it applies. `adam`
    are the sums in Adam's metric, for the same references in the same order.
    """

    def __init__(
        self, run: Run, adam: AdamMoments | None = None, weight_decay: float | None = None
    ) -> None:
        self.run = run
        self._adam = adam
        self.nulls: dict[str, str] = {}
        self.undefined: Counter[str] = Counter()
        # What all rows share, whichever of them are asked for.
        self._scalars: dict[str, Values | None] = {}
        self._nulls_by_group: dict[tuple[str, str, bytes], dict[str, Values]] = {}
        self._ways: dict[bytes, Values | None] = {}
        self._optimizer = read_optimizer(run)
        self._path = own_path(run)
        self._sign = -1.0 if self._optimizer.maximize else 1.0
        self._decay, self.decay_note = (
            self._read_decay() if weight_decay is None else self._chosen_decay(weight_decay)
        )

    def quantities(
        self,
        stream: str,
        steps: Integers,
        moments: Values,
        references: Sequence[str],
        groups: Integers,
    ) -> dict[str, Values]:
        """Compute the quantities that apply to a stream, each float64 ``[N, K, R]``.

        `steps` is ``[N]``, ascending; `moments` float64 ``[N, R, P, 7]`` in the order of
        `MOMENTS`; `groups` gives the group of each tensor, int64 ``[P]``.
        """
        count = int(groups.max()) + 1
        parts = []
        for index, reference in enumerate(references):
            named = dict(zip(MOMENTS, np.moveaxis(moments[:, index], -1, 0), strict=True))
            sums = self._sums(stream, steps, named)
            grouped = sum_groups(sums, groups, count)
            if stream in ("minibatch", "updates"):
                grouped |= self._grouped_null(stream, reference, steps, groups, count)
            # An average of the weights goes a way of its own.
            if stream == WEIGHTS or stream not in ITERATES:
                grouped |= self._path_sums(reference, steps, groups, count)
            if count == 1:
                grouped |= self._gap_sums(stream, reference, steps)
            found = evaluate(grouped)
            self._count_undefined(found)
            parts.append(found | self._in_metric(stream, steps, sums, index, groups))
        names = list(dict.fromkeys(name for part in parts for name in part))
        nothing = np.full((len(steps), count), np.nan)
        return {
            name: np.stack([part.get(name, nothing) for part in parts], axis=-1) for name in names
        }

    def scalar(self, name: str, steps: Integers) -> Values:
        """An every-step scalar at `steps`, float64 ``[N]``; NaN where it was not recorded."""
        values = self._recorded(name)
        if values is None:
            return np.full(len(steps), np.nan)
        inside = steps < len(values)
        return np.where(inside, np.append(values, np.nan)[np.where(inside, steps, -1)], np.nan)

    def gradient_scale(self, stream: str, steps: Integers) -> Values:
        """What takes the stored gradients of a stream to g, float64 ``[N]``; 1 where it has none.

        Minibatch gradients may have been clipped, and a loss maximised.
        """
        if stream in (*ITERATES, UPDATES):
            return np.ones(len(steps))
        scale = np.full(len(steps), self._sign)
        if stream == "minibatch":
            scale *= unclipping(self.scalar("clip_factor", steps))
        return scale

    def _recorded(self, name: str) -> Values | None:
        """An every-step scalar, read once; `None` where there is none of this name."""
        if name not in self._scalars:
            there = name in self.run.scalar_names()
            self._scalars[name] = self.run.scalar(name) if there else None
        return self._scalars[name]

    def _count_undefined(self, found: Mapping[str, Values]) -> None:
        self.undefined.update({n: int(np.isnan(values).sum()) for n, values in found.items()})

    def _in_metric(
        self, stream: str, steps: Integers, sums: Sums, reference: int, groups: Integers
    ) -> dict[str, Values]:
        """Quantities in Adam's metric ``[N, K]``, NaN at steps without one; empty without any."""
        metric = None if self._adam is None else self._adam.streams.get(stream)
        if metric is None:
            return {}
        rows = np.flatnonzero(np.isin(steps, metric.steps))
        entry, place = metric.entries[reference], np.searchsorted(metric.steps, steps[rows])
        batches = self.run.stream(stream).batches or 1
        grad = entry.grad.reshape(len(metric.steps), batches, -1)[place, rows % batches]
        scale = self.gradient_scale(stream, steps[rows])[:, None]
        count = int(groups.max()) + 1
        found = evaluate(
            adam_sums(
                sums["ge"][rows],
                entry.dist[place],
                grad * scale**2,
                entry.known[place] != 0,
                groups,
                count,
            )
        )
        self._count_undefined(found)
        quantities = {name: np.full((len(steps), count), np.nan) for name in found}
        for name, values in found.items():
            quantities[name][rows] = values
        return quantities

    def _sums(self, stream: str, steps: Integers, moments: dict[str, Values]) -> dict[str, Values]:
        if stream in ITERATES:
            return position_sums(moments)
        if stream == "updates":
            return update_sums(moments)
        scale = self.gradient_scale(stream, steps)
        return gradient_sums(moments, self._decay_at(steps), scale[:, None])

    def _grouped_null(
        self, stream: str, reference: str, steps: Integers, groups: Integers, count: int
    ) -> dict[str, Values]:
        """`_null_sums` by group ``[N, K]``, worked out once for all rows of the stream."""
        key, every = (stream, reference, groups.tobytes()), self.run.stream(stream).steps
        if key not in self._nulls_by_group:
            sums = self._null_sums(stream, reference, every)
            self._nulls_by_group[key] = sum_groups(sums, groups, count)
        rows = np.searchsorted(every, steps)
        return {name: values[rows] for name, values in self._nulls_by_group[key].items()}

    def _null_sums(self, stream: str, reference: str, steps: Integers) -> dict[str, Values]:
        """The null of updates, or of the unclipped gradient, by tensor ``[N, P]``.

        Empty without one.
        """
        end, self.nulls[reference] = self._null_end(reference)
        if end is None or isinstance(self._path, str):
            return {}
        null = self._path.null(steps, end)
        if stream == "updates":
            return {
                "null_ue": null.update_dot,
                "null_uu": null.update_square,
                "null_ee": null.dist,
            }
        scale = unclipping(self.scalar("clip_factor", steps))[:, None]
        return {
            "null_ge": null.dot * scale,
            "null_gg": null.grad * scale**2,
            "null_ee": null.dist,
        }

    def _path_sums(
        self, reference: str, steps: Integers, groups: Integers, count: int
    ) -> dict[str, Values]:
        """Length of the run's own path between w and w* ``[N, K]``; empty where w* is not on it."""
        end, so_far = self._iterate(reference), self._way(groups, count)
        if end is None or so_far is None or end >= len(so_far):
            return {}
        inside = np.minimum(steps, len(so_far) - 1)
        return {"path": np.abs(so_far[end] - so_far[inside])}

    def _way(self, groups: Integers, count: int) -> Values | None:
        """Length of the run's path up to each step ``[S + 1, K]``, `None` where not recorded."""
        key = groups.tobytes()
        if key not in self._ways:
            norms = self._recorded(_UPDATE_NORMS)
            self._ways[key] = None
            if norms is not None and norms.ndim == 2 and norms.shape[1] == len(groups):
                squares = sum_groups({"square": norms**2}, groups, count)["square"]
                start = np.zeros((1, count))
                self._ways[key] = np.concatenate([start, np.cumsum(np.sqrt(squares), axis=0)])
        return self._ways[key]

    def _gap_sums(self, stream: str, reference: str, steps: Integers) -> dict[str, Values]:
        """f(w) - f(w*) of each row's own batch ``[N, 1]``; empty where a loss is not kept."""
        end, recorded = self._iterate(reference), self.run.stream(stream)
        if end is None or recorded.losses is None or end not in recorded.steps:
            return {}
        losses = recorded.losses.reshape(len(recorded), -1)
        rows = np.searchsorted(recorded.steps, steps[:: losses.shape[1]])
        gap = losses[rows] - losses[recorded.row_of(end)]
        return {"gap": self._sign * gap.reshape(-1, 1)}

    def _iterate(self, reference: str) -> int | None:
        """Step of a w* that is an iterate of this run's own path, else `None`."""
        return iterate_of(reference, self.run.final_step)

    def _null_end(self, reference: str) -> tuple[int | None, str]:
        """Step N of a w* that has a null, else `None`; and what the null rests on, or why not."""
        if isinstance(self._path, str):
            return None, self._path
        if is_mean(reference):
            return None, "no null: w* is a mean, no iterate of this run's own path"
        end, total = self._iterate(reference), len(self._path.grad_norms)
        if end is None:
            return None, "no null: w* is not known to be an iterate of this run's own path"
        if end > total:
            return None, f"no null: the every-step scalars end before step {end}, at {total}"
        step, why = self._path.unsound(), "the run's norms are not finite"
        if step is None:
            return end, self._path.assumption()
        if step < end:
            return None, f"no null: {why} at step {step}"
        return end, f"{self._path.assumption()}; no null from step {step} on, {why}"

    def _read_decay(self) -> tuple[Values, str]:
        """Coupled λ of each step and parameter group ``[S, G + 1]``, with a note on what it is.

        The last column, 0, is for tensors that the optimizer does not update.
        """
        kind, groups = self._optimizer.decay, self._optimizer.groups
        known = "group_weight_decay" in self.run.scalar_names()
        values = group_scalar(self.run, "group_weight_decay", groups) if known else np.empty((0, 0))
        if not len(values):
            fill = 0.0 if kind == "decoupled" else np.nan
            values = np.full((1, int(groups.max(initial=0)) + 1), fill)
            kind = "missing" if np.isnan(fill) else kind
        none = not values.any()
        if kind == "decoupled":
            values = np.zeros_like(values)
        elif kind == "unknown":
            values = np.where(values == 0, 0.0, np.nan)
        note = "none" if none else _DECAY[kind]
        return np.append(values, np.zeros((len(values), 1)), axis=1), note

    def _chosen_decay(self, value: float) -> tuple[Values, str]:
        """λ as asked for, for every tensor that the optimizer updates; as `_read_decay`."""
        if not (np.isfinite(value) and value >= 0):
            raise UsageError(f"{value:g} is no weight decay", fix="give a number of at least 0")
        decay = np.full((1, int(self._optimizer.groups.max(initial=0)) + 2), value)
        decay[:, -1] = 0.0
        return decay, f"λ = {value:g} for every tensor, as asked for and not as trained"

    def _decay_at(self, steps: Integers) -> Values:
        """λ of each tensor ``[N, P]``; at w_T, from which no update was taken, the last one."""
        at = self._decay[np.minimum(steps, len(self._decay) - 1)]
        return np.asarray(at[:, self._optimizer.groups])
