"""Every quantity on a pair of saved steps as a value, and the sums it follows from.

Notation, with everything summed over the coordinates of one group of tensors; i is the earlier row
of a pair, j the later one, and both are of the same stream and batch:

    w  the weights               w*  the reference          e = w - w*
    g  the gradient at w of the mean loss that the optimizer minimises, unclipped where the clip
       factor is known           u  the update w_{t+1} - w_t, in the stream `updates`
    g⊥ = g - e ⟨g, e⟩ / ‖e‖²     the part of a gradient that is orthogonal to its own e

A ratio whose denominator is 0 is NaN, never 0. Sources: `dist` and `sim` are dist_k and sim_k of
Guille-Escuret, Naganuma, Fatras and Mitliagkas, "No Wrong Turns", ICML 2024; γ(t, s) is our own.
The angle from three lengths: W. Kahan, "Miscalculating Area and Angles of a Needle-like Triangle",
2014.

Axes: T rows, N pairs, B batches, P tensors, K groups, R references.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from analyze import quantities
from analyze.chain import SUMS as STORED
from analyze.gram import Gram
from analyze.moment_table import StreamMoments
from analyze.moments import MOMENTS
from analyze.pair_null import NULL_SUMS
from analyze.quantities import Quantity, Sums, Values, norm, ratio
from analyze.sums import sum_groups
from capture.store import MismatchError, Run
from capture.store.layout import ITERATES, UPDATES
from capture.streams import PROBES

# Streams whose batches hold the same samples at every step, treated in the same way.
SAME_SAMPLES = tuple(PROBES)

# What a sum is called, and what it is. In the stream `updates`, u stands in the place of g.
SUMS = {
    **STORED,
    "uu": "⟨u_i, u_j⟩",
    **{f"uu_{row}": f"‖u_{row}‖²" for row in "ij"},
    **{f"gg_{row}": f"‖g_{row}‖²" for row in "ij"},
    **{f"ge_{row}": f"⟨g_{row}, e_{row}⟩" for row in "ij"},
    **{f"ee_{row}": f"‖e_{row}‖²" for row in "ij"},
    **{f"ww_{row}": f"‖w_{row}‖²" for row in "ij"},
    "null_ge": "⟨g_i, w_i - w_j⟩ if all gradients were orthogonal",
    "null_gg": "‖g_i‖², from the every-step scalars",
    "null_ee": "‖w_i - w_j‖² if all gradients were orthogonal",
}

# Below this share of ‖g‖², what is orthogonal to e is what rounding left, of a float32 gradient.
_RESOLVED = 1e-12
# Pairs that are evaluated at a time, over all their batches, groups and references.
_SLAB = 2**18


def _dot_of_dists(s: Sums) -> Values:
    """⟨e_i, e_j⟩; its error is one of float64 relative to the larger of ‖e_i‖² and ‖e_j‖²."""
    return (s["ee_i"] + s["ee_j"] - s["dd"]) / 2


def _dot_of_weights(s: Sums) -> Values:
    """⟨w_i, w_j⟩; its error is one of float64 relative to the larger of ‖w_i‖² and ‖w_j‖²."""
    return (s["ww_i"] + s["ww_j"] - s["dd"]) / 2


def _angle_of_weights(s: Sums) -> Values:
    """The angle at 0 of the triangle 0, w_i, w_j from its sides, in degrees, by Kahan's formula.

    Of iterates that are close the cosine has no digits left but those of 1; their distance has.
    """
    one, other, across = (norm(s[name]) for name in ("ww_i", "ww_j", "dd"))
    long, short = np.maximum(one, other), np.minimum(one, other)
    least = np.where(across > short, short - (long - across), across - (long - short))
    opposite = ((long - short) + across) * np.maximum(least, 0.0)
    around = (long + (short + across)) * np.maximum((long - across) + short, 0.0)
    angle = np.degrees(2 * np.arctan2(np.sqrt(opposite), np.sqrt(around)))
    return np.where(short == 0, np.nan, angle)


def _sim(s: Sums) -> Values:
    i_with_ej, j_with_ei = s["ge_i"] - s["gd"], s["ge_j"] - s["dg"]
    along_i, along_j = ratio(s["ge_i"], s["ee_i"]), ratio(s["ge_j"], s["ee_j"])
    dot = s["gg"] - along_i * j_with_ei - along_j * i_with_ej
    dot = dot + along_i * along_j * _dot_of_dists(s)
    return ratio(dot, *(norm(_orthogonal(s, row)) for row in "ij"))


def _orthogonal(s: Sums, row: str) -> Values:
    """‖g⊥‖² of one row; NaN where it is too little to be known."""
    left = s[f"gg_{row}"] - ratio(s[f"ge_{row}"] ** 2, s[f"ee_{row}"])
    return np.where(left > _RESOLVED * s[f"gg_{row}"], left, np.nan)


# In the order of the table's columns.
PAIR_QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "dist", "‖w_i - w_j‖, dist_k of the paper", "weight", ("dd",), lambda s: norm(s["dd"])
    ),
    Quantity(
        "cosine_dist",
        "⟨e_i, e_j⟩ / (‖e_i‖ ‖e_j‖)",
        "1",
        ("ee_i", "ee_j", "dd"),
        lambda s: ratio(_dot_of_dists(s), norm(s["ee_i"]), norm(s["ee_j"])),
    ),
    Quantity(
        "dot_weights",
        "⟨w_i, w_j⟩ = (‖w_i‖² + ‖w_j‖² - ‖w_i - w_j‖²) / 2",
        "weight²",
        ("ww_i", "ww_j", "dd"),
        _dot_of_weights,
    ),
    Quantity(
        "cosine_weights",
        "⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖)",
        "1",
        ("ww_i", "ww_j", "dd"),
        lambda s: ratio(_dot_of_weights(s), norm(s["ww_i"]), norm(s["ww_j"])),
    ),
    Quantity(
        "angle_weights_deg",
        "arccos(⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖)), from ‖w_i‖, ‖w_j‖ and ‖w_i - w_j‖ after Kahan",
        "degrees",
        ("ww_i", "ww_j", "dd"),
        _angle_of_weights,
    ),
    Quantity(
        "dot_grad",
        "⟨g_i, g_j⟩; g unclipped where the clip factor is known, the store keeps what entered the "
        "step",
        "loss²/weight²",
        ("gg", "gg_i"),
        lambda s: s["gg"],
    ),
    Quantity(
        "cosine_grad",
        "⟨g_i, g_j⟩ / (‖g_i‖ ‖g_j‖)",
        "1",
        ("gg", "gg_i", "gg_j"),
        lambda s: ratio(s["gg"], norm(s["gg_i"]), norm(s["gg_j"])),
    ),
    Quantity(
        "sim",
        "cosine between g_i - e_i ⟨g_i, e_i⟩ / ‖e_i‖² and the same of j, sim_k of the paper; NaN "
        "where less than 1e-6 of a gradient is orthogonal to its e",
        "1",
        ("gg", "gd", "dg", "dd", "gg_i", "gg_j", "ge_i", "ge_j", "ee_i", "ee_j"),
        _sim,
    ),
    Quantity(
        "gamma",
        "γ(i, j) = ⟨g_i, w_i - w_j⟩ / (‖g_i‖ ‖w_i - w_j‖), positive where a step along -g_i starts "
        "out towards where the path came later",
        "1",
        ("gd", "gg_i", "dd"),
        lambda s: ratio(s["gd"], norm(s["gg_i"]), norm(s["dd"])),
    ),
    Quantity(
        "gamma_null",
        "γ(i, j) if all gradients of the path were orthogonal; of the minibatch gradients only, "
        "which made the path",
        "1",
        NULL_SUMS,
        lambda s: ratio(s["null_ge"], norm(s["null_gg"]), norm(s["null_ee"])),
    ),
    Quantity(
        "gamma_back",
        "γ(j, i) = ⟨g_j, w_j - w_i⟩ / (‖g_j‖ ‖w_j - w_i‖), positive where a step along -g_j starts "
        "out back to where the path came from; 0 if all gradients of the path were orthogonal",
        "1",
        ("dg", "gg_j", "dd"),
        lambda s: ratio(s["dg"], norm(s["gg_j"]), norm(s["dd"])),
    ),
    Quantity(
        "smoothness",
        "‖g_i - g_j‖ / ‖w_i - w_j‖, of streams with the same samples at both steps only",
        "loss/weight²",
        ("hh", "dd"),
        lambda s: ratio(norm(s["hh"]), norm(s["dd"])),
    ),
    Quantity("dot_step", "⟨u_i, u_j⟩", "weight²", ("uu",), lambda s: s["uu"]),
    Quantity(
        "cosine_step",
        "⟨u_i, u_j⟩ / (‖u_i‖ ‖u_j‖)",
        "1",
        ("uu", "uu_i", "uu_j"),
        lambda s: ratio(s["uu"], norm(s["uu_i"]), norm(s["uu_j"])),
    ),
)


class PairMeasure:
    """The quantities of all pairs of one stream, from their products and the moments of the rows.

    `gram` and `groups` ``[P]`` belong together; `moments` are those of the same run and stream with
    R references. `scale` ``[T]`` takes a stored gradient to g; `null` maps the names of
    `analyze.pair_null.NULL_SUMS` to ``[N, K]``, where there is a null. `MismatchError` where the
    moments lack a step.
    """

    def __init__(
        self,
        run: Run,
        gram: Gram,
        moments: StreamMoments,
        groups: NDArray[np.int64],
        scale: Values,
        null: Mapping[str, Values],
    ) -> None:
        self.shape = (len(gram.pairs), gram.batches or 1, int(groups.max()) + 1)
        self._gram, self._scale = gram, scale[:, None, None, None]
        self._null = null
        array = moments.array[_rows_of(run, gram.steps, moments)]
        if moments.batches is None:
            array = array[:, None]
        named = dict(zip(MOMENTS, np.moveaxis(array, -1, 0), strict=True))
        self._rows = {
            name: np.moveaxis(values, 2, 3)  # [T, B, K, R]
            for name, values in sum_groups(named, groups, self.shape[-1]).items()
        }

    def slabs(self) -> Iterator[tuple[slice, dict[str, Values]]]:
        """Evaluate some pairs after others: their places, and each quantity ``[n, B, K, R]``."""
        count, *others = self.shape
        references = self._rows["ee"].shape[-1]
        size = max(1, _SLAB // max(1, int(np.prod(others)) * references))
        for start in range(0, count, size):
            part = slice(start, min(start + size, count))
            yield part, evaluate(self._sums(part), (part.stop - part.start, *others, references))

    def _sums(self, part: slice) -> dict[str, Values]:
        name, (first, second) = self._gram.stream, self._gram.pairs[part].T
        pairs = {key: values[part, ..., None] for key, values in self._gram.sums.items()}
        ends = {"i": first, "j": second}
        points = {
            f"{key}_{end}": self._rows[key][rows]
            for key in ("ee", "ww")
            for end, rows in ends.items()
        }
        if name in ITERATES:
            return {"dd": pairs["dd"], **points}
        squares = {end: self._rows["gg"][rows] for end, rows in ends.items()}
        if name == UPDATES:
            products = {"uu": pairs["gg"], **{f"uu_{end}": v for end, v in squares.items()}}
            return {"dd": pairs["dd"], **points, **products}
        with np.errstate(all="ignore"):
            scale_i, scale_j = self._scale[first], self._scale[second]
            sums = {
                "dd": pairs["dd"],
                "gg": pairs["gg"] * scale_i * scale_j,
                "gd": pairs["gd"] * scale_i,
                "dg": pairs["dg"] * scale_j,
                **points,
            }
            for end, scale in (("i", scale_i), ("j", scale_j)):
                sums[f"gg_{end}"] = squares[end] * scale**2
                sums[f"ge_{end}"] = self._rows["ge"][ends[end]] * scale
        sums |= {key: values[part, None, :, None] for key, values in self._null.items()}
        # There the scale is a sign at most, which both have.
        return {**sums, "hh": pairs["hh"]} if name in SAME_SAMPLES else sums


def evaluate(sums: Mapping[str, Values], shape: tuple[int, ...]) -> dict[str, Values]:
    """Evaluate the quantities whose sums are there, float64 of `shape`, to which sums broadcast."""
    found = quantities.evaluate(sums, PAIR_QUANTITIES)
    return {name: np.broadcast_to(values, shape) for name, values in found.items()}


def _rows_of(run: Run, steps: NDArray[np.int64], moments: StreamMoments) -> NDArray[np.int64]:
    """Rows of the moments that are of these steps: a run still recording may have more by now."""
    rows = np.minimum(np.searchsorted(moments.steps, steps), max(0, len(moments.steps) - 1))
    if len(moments.steps) < len(steps) or not np.array_equal(moments.steps[rows], steps):
        raise MismatchError(
            f"the rows of {moments.stream!r} changed while they were measured",
            where=run.path,
            fix="measure again when nothing writes to the run",
        )
    return rows
