"""The quantities of whole vectors by dense float64 numpy, and the groups of `recorded.TABLE`."""

import numpy as np
from numpy.linalg import norm

from tests.analyze.recorded import Values

# The columns of the contract, in order.
COLUMNS = [
    *("run", "stream", "step", "epoch", "batch", "group", "reference", "num_parameters"),
    *("norm_dist", "norm_grad", "dot_prod", "rsi", "eb", "cosine", "angle_deg", "lolr"),
    *("cosine_null", "lolr_null", "z"),
    *("norm_grad_wd", "dot_prod_wd", "rsi_wd", "eb_wd", "cosine_wd", "angle_deg_wd", "lolr_wd"),
    *("norm_update", "dot_prod_update", "cosine_update", "lolr_update"),
    *("cosine_update_null", "lolr_update_null", "own_share"),
    *("norm_weight", "cosine_reference", "dist_radial", "dist_tangential"),
    *("cosine_radial", "cosine_tangential", "path_length", "straightness"),
    *("loss_gap", "star_convexity", "aiming"),
    *("norm_dist_adam", "norm_grad_adam", "cosine_adam", "lolr_adam"),
    *("loss", "lr", "clip_factor", "nonfinite"),
]

# Coordinates of each group of `TABLE`.
GROUPS: dict[str, dict[str, list[int]]] = {
    "model": {"model": list(range(25))},
    "layer": {
        "body.0": list(range(16)),
        "head": list(range(16, 24)),
        "scale": [24],
    },
    "tensor": {
        "body.0.weight": list(range(12)),
        "body.0.bias": list(range(12, 16)),
        "head.weight": list(range(16, 24)),
        "scale": [24],
    },
    "kind": {
        "matrix": [*range(12), *range(16, 24)],
        "bias": list(range(12, 16)),
        "scalar": [24],
    },
}
# The parameter group of each coordinate; the last one is not updated.
PARAMETER_GROUP = np.repeat([0, 1, 0, -1], [12, 4, 8, 1])


def angle(a: Values, b: Values) -> float:
    """Angle in degrees by half-angle tangents, which keep all digits near 0° and 180°."""
    x, y = a / norm(a), b / norm(b)
    return float(np.degrees(2 * np.arctan2(norm(x - y), norm(x + y))))


def dense_position(w: Values, reference: Values) -> dict[str, float]:
    """Every quantity of the weights alone, one line each."""
    e, along = w - reference, w / norm(w)
    return {
        "norm_dist": norm(e),
        "norm_weight": norm(w),
        "cosine_reference": w @ reference / norm(w) / norm(reference),
        "dist_radial": e @ along,
        "dist_tangential": norm(e - along * (e @ along)),
    }


def dense_gradient(g: Values, w: Values, reference: Values, decay: Values) -> dict[str, float]:
    """Every quantity of a gradient, one line each."""
    e, h = w - reference, g + decay * w
    along = w / norm(w)
    return {
        **dense_position(w, reference),
        "cosine_radial": (along * (g @ along)) @ (along * (e @ along)) / norm(g) / norm(e),
        "cosine_tangential": (
            (g - along * (g @ along)) @ (e - along * (e @ along)) / norm(g) / norm(e)
        ),
        "norm_grad": norm(g),
        "dot_prod": g @ e,
        "rsi": g @ e / norm(e) ** 2,
        "eb": norm(g) / norm(e),
        "cosine": g @ e / norm(g) / norm(e),
        "angle_deg": angle(g, e),
        "lolr": g @ e / norm(g) ** 2,
        "z": g @ e / norm(g * e),
        "norm_grad_wd": norm(h),
        "dot_prod_wd": h @ e,
        "rsi_wd": h @ e / norm(e) ** 2,
        "eb_wd": norm(h) / norm(e),
        "cosine_wd": h @ e / norm(h) / norm(e),
        "angle_deg_wd": angle(h, e),
        "lolr_wd": h @ e / norm(h) ** 2,
    }


def dense_update(u: Values, w: Values, reference: Values) -> dict[str, float]:
    """Every quantity of an update, one line each."""
    e = w - reference
    return {
        **dense_position(w, reference),
        "norm_update": norm(u),
        "dot_prod_update": u @ e,
        "cosine_update": u @ e / norm(u) / norm(e),
        "lolr_update": -(u @ e) / norm(u) ** 2,
    }
