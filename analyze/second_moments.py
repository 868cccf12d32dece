"""Adam's metric, and where the states that were kept of a training hold it.

Adam's update is ``w_{t+1} = w_t - η M⁻¹ m̂`` with ``M = diag(√v̂ + ε)``, v̂ the average of squared
gradients, its bias corrected, and ε that of the parameter group. This is steepest descent where
lengths are taken as ‖x‖²_M = Σᵢ Mᵢ xᵢ²: among all d, ⟨g, d⟩ + ‖d‖²_M / 2η is least at -η M⁻¹ g. In
the coordinates x̃ = M^½ x, g̃ = M^-½ g that step is plain gradient descent, with

    ⟨g̃, ẽ⟩ = ⟨g, e⟩      ‖ẽ‖ = ‖e‖_M = √(Σᵢ Mᵢ eᵢ²)      ‖g̃‖ = ‖g‖_{M⁻¹} = √(Σᵢ gᵢ² / Mᵢ)

so all that is known of plain gradient descent holds of these. γ_M = ⟨g, e⟩ / (‖g‖_{M⁻¹} ‖e‖_M)
lies in [-1, 1] by Cauchy and Schwarz. ‖e - η M⁻¹ g‖²_M = ‖e‖²_M - 2η ⟨g, e⟩ + η² ‖g‖²_{M⁻¹} is
least at η*_M = ⟨g, e⟩ / ‖g‖²_{M⁻¹}, and one such step contracts it by exactly 1 - γ²_M.

**Which v.** A row of step t has the weights w_t and gradients at w_t. The state kept after t
updates holds the average v_t that update t - 1 divided by; update t first blends its own g_t² in.
Here M is made of v_t: it is fixed before g_t is drawn, so it is one metric for the minibatch
and for every other batch at w_t, and no gradient shrinks its own norm. (With g_t blended in, M at
step 0 would be |g_0|, and γ_M would speak of signs alone.) What update t divided by differs from
it by a part 1 - β₂ of v. At step 0 nothing was averaged, so there is no metric. v is of what
entered the updates: clipped where they were, coupled weight decay included.

**Variants.** AMSGrad divides by the largest v so far, `max_exp_avg_sq`, and by today's correction.
NAdam has the M of Adam. RAdam adds ε before the correction, M = (√v + ε) / √(1 - β₂ᵏ), and
in its first steps does not divide at all: there it has no metric. A factor that is the same for all
coordinates, such as RAdam's rectification, belongs to the learning rate.

**Tensors without second moments** (never given a gradient, or not in the optimizer) do not move:
M⁻¹ is 0 there. They are left out of all sums, that of ⟨g, e⟩ too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analyze.optimizer import read_optimizer
from capture.store import DamagedError, Run, Tensor
from capture.store.errors import RESTORE
from capture.store.kept_states import KeptState, StateTensor
from capture.store.layout import METADATA

# torch's optimizers that divide by the root of `exp_avg_sq`, in a way that is written down above.
FAMILY = ("Adam", "AdamW", "NAdam", "RAdam")

# The attribute of a run that names the parameters of each group in the optimizer's own order.
ORDER = "optimizer_parameters"
_UNCERTAIN = "no metric: which second moments belong to which tensor is not recorded"

# The id of each tensor in the optimizer's state, and the options of its parameter group.
Places = Mapping[str, tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Diagonal:
    """The diagonal of M for one tensor: √(v / `correction`) + `eps`, v being `average`."""

    average: StateTensor
    correction: float
    eps: float

    def read(self, state: KeptState, start: int, stop: int) -> NDArray[np.float64]:
        """Compute M for the coordinates `start` to `stop` of the tensor, float64."""
        average = state.read(self.average, start, stop).astype(np.float64)
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(average / self.correction) + self.eps)


def unusable(run: Run) -> str | None:
    """Why the optimizer of a run gives no metric, as far as the run's attributes tell."""
    facts = read_optimizer(run)
    if facts.name not in FAMILY:
        return f"no metric: none is known of {facts.name}, as there is of {', '.join(FAMILY)}"
    if facts.decay == "unknown":
        return f"no metric: the optimizer is not known to be torch's own {facts.name}"
    return None


def find_places(run: Run, tree: Any) -> Places | str:
    """Find the tensors of a run in the optimizer's state in a kept `tree`.

    By the order that the run tells. Runs of earlier versions do not: there it is certain only with
    one parameter group that has as many tensors as the run trains; else the words say why not.
    """
    try:
        groups = [(list(group["params"]), group) for group in tree["optimizer"]["param_groups"]]
    except (KeyError, TypeError) as error:
        raise _unlike(run) from error
    names = run.attributes.get(ORDER)
    if names is None:
        if len(groups) > 1:
            return f"{_UNCERTAIN}, and there are {len(groups)} parameter groups"
        trained, count = run.table.parameters, len(groups[0][0])
        if len(trained) != count or any(tensor.group is None for tensor in trained):
            return f"{_UNCERTAIN}, and there are {count} in the optimizer, {len(trained)} trained"
        names = [list(run.table.names)]
    if not _fits(names, groups):
        raise _unlike(run)
    return {
        name: (index, group)
        for listed, (indices, group) in zip(names, groups, strict=True)
        for name, index in zip(listed, indices, strict=True)
    }


def find_diagonals(run: Run, places: Places, state: KeptState) -> list[Diagonal | None] | str:
    """Find M of every tensor ``[P]``, `None` where it has none.

    In words, why none of it can be told: shapes that do not fit where the order is a guess.
    `DamagedError` where it is none and they do not fit.
    """
    found: list[Diagonal | None] = []
    rectified = read_optimizer(run).name == "RAdam"
    for tensor in run.table.parameters:
        index, options = places.get(tensor.name, (-1, {}))
        try:
            moments = state.tree["optimizer"]["state"].get(index, {})
            diagonal = _diagonal(state, moments, options, rectified=rectified)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _unlike(run) from error
        if diagonal is not None and state.shape(diagonal.average) != tensor.shape:
            if run.attributes.get(ORDER) is not None:
                raise _unlike(run)
            return f"{_UNCERTAIN}, and {_shapes(tensor, state.shape(diagonal.average))}"
        found.append(diagonal)
    return found


def _diagonal(
    state: KeptState, moments: Mapping[str, Any], options: Mapping[str, Any], *, rectified: bool
) -> Diagonal | None:
    updates = state.number(moments.get("step", 0))
    if "exp_avg_sq" not in moments or updates <= 0:
        return None
    beta, eps = (state.number(value) for value in (options["betas"][1], options["eps"]))
    correction = 1 - beta**updates
    if rectified:
        # Liu et al., "On the variance of the adaptive learning rate", ICLR 2020: ρ_∞ and ρ_k.
        longest = 2 / (1 - beta) - 1
        if longest - 2 * updates * beta**updates / correction <= 5:
            return None
        eps /= correction**0.5
    average = moments["max_exp_avg_sq" if "max_exp_avg_sq" in moments else "exp_avg_sq"]
    return Diagonal(average, correction, eps)


def _fits(names: Any, groups: list[tuple[list[Any], Any]]) -> bool:
    """Whether what the run tells of the order is one, and one of as many parameters."""
    return (
        isinstance(names, list)
        and len(names) == len(groups)
        and all(
            isinstance(listed, list)
            and len(listed) == len(indices)
            and all(isinstance(name, str) for name in listed)
            for listed, (indices, _) in zip(names, groups, strict=True)
        )
    )


def _shapes(tensor: Tensor, found: tuple[int, ...]) -> str:
    return f"{tensor.name!r} has shape {list(tensor.shape)} where they have {list(found)}"


def _unlike(run: Run) -> DamagedError:
    return DamagedError(
        "the states that were kept are not of the optimizer that the run's attributes tell of",
        where=run.path / METADATA,
        fix=RESTORE,
    )
