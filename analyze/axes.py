"""The axes that all figures share: style, scales, tick labels, the end effect, the angle."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

Values = npt.NDArray[np.float64]
Scale = Literal["linear", "log", "symlog"]

GREY = "#5a5a5a"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": "black",
    "ytick.labelcolor": "black",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "ytick.minor.width": 0.4,
    "legend.frameon": False,
    "legend.fontsize": 7,
    "legend.handlelength": 1.8,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.1,
    "lines.linewidth": 1.0,
    "figure.constrained_layout.h_pad": 0.02,
    "figure.constrained_layout.w_pad": 0.03,
    "figure.dpi": 72,  # the SVG backend's, so that positions read off after saving are right
    "svg.fonttype": "path",  # the page looks the same whatever fonts the reader has
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "text.parse_math": False,  # a run may be called a$b$c
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def value_scale(values: Iterable[Values]) -> tuple[Scale, float]:
    """Choose the scale that shows these values: (scale, half-width of its linear part).

    Logarithmic when none is negative, few are 0 and the others span a decade; linear within ± the
    median size and logarithmic beyond when some are negative and a few far larger than most.
    """
    flat = np.concatenate([*values, np.empty(0)])
    flat = flat[np.isfinite(flat)]
    sizes = np.abs(flat[flat != 0])
    if not sizes.size:
        return "linear", 0.0
    if (flat >= 0).all():
        few_zeros = sizes.size > 0.9 * flat.size
        return ("log" if few_zeros and sizes.max() > 8 * sizes.min() else "linear"), 0.0
    if sizes.max() < 12 * np.median(sizes):
        return "linear", 0.0
    decade = 10.0 ** math.floor(math.log10(float(np.median(sizes))))
    return "symlog", decade * max(s for s in (1, 2, 5) if s * decade <= np.median(sizes) * 1.0001)


def number_label(value: float, digits: int = 6) -> str:
    """Write a value for reading: `0.02`, `1500`, `−3`, `2·10⁻⁵`."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.{max(digits, len(f'{abs(value):.0f}'))}g}".replace("-", "\u2212")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".").replace("-", "\u2212")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return {"1": power, "\u22121": "\u2212" + power}.get(mantissa, f"{mantissa}·{power}")


def angle_label(cosine: float) -> str:
    """Write the angle of a cosine in degrees, finer where the cosine is small: `89.43°`."""
    if abs(cosine) > 1:
        return ""
    return f"{math.degrees(math.acos(cosine)):.{4 if 0 < abs(cosine) < 0.02 else 3}g}°"


def scale_values(axes: Axes, values: Iterable[Values], *, log: bool = False) -> None:
    """Give the value axis its scale and readable ticks; with `log` a logarithmic one if it can."""
    values = list(values)
    scale, threshold = value_scale(values)
    if log and not any((v <= 0).any() for v in values):
        scale = "log"
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=threshold)
        axes.set_yticks(_symlog_ticks(*axes.get_ylim(), threshold))
        axes.yaxis.set_minor_locator(NullLocator())
    elif scale == "log":
        axes.set_yscale("log", nonpositive="mask")
        axes.set_ylim(*axes.get_ylim())
        axes.set_yticks(_log_ticks(*axes.get_ylim()))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value)))


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in each decade, or some powers of ten where the decades are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    if high < 400 * low:
        ticks = [m * 10.0**k for k in range(first, last + 1) for m in (1, 2, 5)]
    else:
        ticks = [10.0**k for k in range(first, last + 1, (last - first) // 7 + 1)]
    return [tick for tick in ticks if low <= tick <= high]


def _symlog_ticks(low: float, high: float, threshold: float) -> list[float]:
    """Zero, ± the threshold, and powers of ten beyond it: few enough not to collide."""
    first = math.ceil(math.log10(threshold) + 0.3)
    last = math.floor(math.log10(max(abs(low), abs(high), threshold)))
    powers = [10.0**k for k in range(first, last + 1, max(1, (last - first) // 3 + 1))]
    ticks = [threshold, *powers]
    return [t for t in (*(-t for t in ticks), 0.0, *ticks) if low <= t <= high]


# What the places of a figure are, as its axis says it.
PLACES = {
    "step": "step t (updates applied)",
    "epoch": "epoch",
    "lag": "lag s − t (updates)",
    "component": "component k",
}


def scale_steps(axes: Axes, steps: Values, unit: str = "step") -> None:
    """Give the axis of steps or epochs its limits: linear, or logarithmic for log-spaced rows."""
    low, high = float(steps.min()), float(steps.max())
    if steps.size > 8 and np.median(steps) < 0.15 * high:
        smallest = float(np.quantile(steps[steps > 0], 0.02)) if unit == "epoch" else 1.0
        axes.set_xscale("symlog", linthresh=smallest)
        axes.set_xlim(low, high * 1.05)
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.01 * (high - low) or 1.0
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(
            MaxNLocator(6, steps=[1, 2, 5, 10], integer=unit == "step" or high > 6)
        )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value)))
    axes.set_xlabel(PLACES[unit])


def scale_places(axes: Axes, places: Values, what: str) -> None:
    """Give an axis of lags, logarithmic, or of components its limits and whole ticks."""
    low, high = float(places.min()), float(places.max())
    if what == "lag" and high > 8 * low > 0:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.1, high * 1.1)
        axes.set_xticks(_log_ticks(low / 1.1, high * 1.1))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(low - 0.04 * (high - low) - 0.2, high + 0.04 * (high - low) + 0.2)
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value)))
    axes.set_xlabel(PLACES[what])


def add_epoch_axis(axes: Axes, each: float) -> None:
    """Repeat the axis of steps below itself in epochs of `each` updates."""
    low, high = axes.get_xlim()
    epochs = axes.twiny()
    threshold = getattr(axes.xaxis.get_transform(), "linthresh", None)
    if threshold is None:
        locator = MaxNLocator(6, steps=[1, 2, 5, 10])
        ticks = np.asarray(locator.tick_values(low / each, high / each))
    else:
        first = math.floor(math.log10(threshold / each))
        last = math.floor(math.log10(high / each))
        ticks = np.array([0.0, *(10.0**k for k in range(first, last + 1))])
        epochs.set_xscale("symlog", linthresh=threshold)
    inside = [tick for tick in ticks if max(low, 0) <= tick * each <= high]
    epochs.set_xlim(low, high)
    epochs.xaxis.set_major_locator(FixedLocator([tick * each for tick in inside]))
    epochs.xaxis.set_minor_locator(NullLocator())
    epochs.xaxis.set_major_formatter(FuncFormatter(lambda value, _: number_label(value / each, 4)))
    epochs.spines["bottom"].set_position(("outward", 31))
    epochs.spines["bottom"].set_visible(True)
    epochs.xaxis.set_ticks_position("bottom")
    epochs.xaxis.set_label_position("bottom")
    epochs.set_xlabel(PLACES["epoch"])
    epochs.grid(visible=False)


def mark_ends(axes: Axes, ends: tuple[tuple[float, float], ...], *, shade: bool = True) -> None:
    """Mark the end effect, shaded or from a dotted line on, and name it above the axes."""
    for first, last in ends:
        if shade:
            axes.axvspan(first, last, color="#777777", alpha=0.16, lw=0, zorder=0.5)
        else:
            axes.axvline(first, color="black", lw=0.9, ls=":")
    if ends:
        axes.annotate(
            "end effect",
            (max(last for _, last in ends), 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 1),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=6.5,
            color=GREY,
            annotation_clip=False,
        )


def add_angle_axis(axes: Axes) -> None:
    """Repeat the cosine's ticks on the right as angles in degrees."""
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    right = axes.twinx()
    threshold = getattr(axes.yaxis.get_transform(), "linthresh", None)
    right.set_yscale(axes.get_yscale(), **({} if threshold is None else {"linthresh": threshold}))
    right.yaxis.set_major_locator(FixedLocator(ticks))
    right.yaxis.set_minor_locator(NullLocator())
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: angle_label(value)))
    right.set_ylim(low, high)
    right.set_ylabel("angle arccos γ")
    right.grid(visible=False)
    right.spines["right"].set_visible(True)
