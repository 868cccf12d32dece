"""The arithmetic of the quantities, against dense vectors and numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from analyze.moments import MOMENTS
from analyze.quantities import QUANTITIES, SUMS, evaluate
from analyze.sums import adam_sums, gradient_sums, sum_groups, unclipping, update_sums

Values = NDArray[np.float64]

# ‖g‖ = 5, ‖e‖ = 10, ⟨g, e⟩ = 30, Σ g² e² = 900.
G, E = np.array([3.0, 4.0]), np.array([10.0, 0.0])
# With w = (1, 1) and λ = 1: h = (4, 5), ‖h‖² = 41, ⟨h, e⟩ = 40.
W = np.array([1.0, 1.0])


def moments_of(g: Values, w: Values, e: Values) -> dict[str, Values]:
    sums = (g @ e, g @ g, e @ e, (g * e) @ (g * e), g @ w, w @ e, w @ w)
    return {name: np.array([value]) for name, value in zip(MOMENTS, sums, strict=True)}


def gradient(g: Values, w: Values, e: Values, decay: float = 0.0, scale: float = 1.0) -> Any:
    return evaluate(gradient_sums(moments_of(g, w, e), np.array([decay]), np.array([scale])))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norm_dist", 10.0),
        ("norm_grad", 5.0),
        ("dot_prod", 30.0),
        ("rsi", 0.3),
        ("eb", 0.5),
        ("cosine", 0.6),
        ("angle_deg", 53.13010235415598),
        ("lolr", 1.2),
        ("z", 1.0),
        ("norm_grad_wd", np.sqrt(41)),
        ("dot_prod_wd", 40.0),
        ("rsi_wd", 0.4),
        ("eb_wd", np.sqrt(41) / 10),
        ("cosine_wd", 4 / np.sqrt(41)),
        ("angle_deg_wd", 51.34019174590991),
        ("lolr_wd", 40 / 41),
    ],
)
def test_a_gradient_worked_out_by_hand(name: str, expected: float) -> None:
    # A handful of float64 operations: a few units in the last place.
    assert gradient(G, W, E, decay=1.0)[name] == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("norm_dist", 10.0),
        ("norm_update", 5.0),
        ("dot_prod_update", 30.0),
        ("cosine_update", 0.6),
        ("lolr_update", -1.2),
    ],
)
def test_an_update_worked_out_by_hand(name: str, expected: float) -> None:
    found = evaluate(update_sums(moments_of(G, W, E)))
    assert found[name] == pytest.approx(expected, rel=1e-15)


def test_the_null_worked_out_by_hand() -> None:
    sums = {"null_ge": np.array([6.0]), "null_gg": np.array([4.0]), "null_ee": np.array([25.0])}
    found = evaluate(sums)
    assert found["cosine_null"] == pytest.approx(0.6, rel=1e-15)
    assert found["lolr_null"] == 1.5
    assert found.keys() == {"cosine_null", "lolr_null"}


def test_adams_metric_worked_out_by_hand() -> None:
    """M = diag(2, 8): ‖e‖²_M = 200, ‖g‖²_{M⁻¹} = 4.5 + 2, ⟨g, e⟩ = 30."""
    sums = {"adam_ee": np.array([200.0]), "adam_gg": np.array([6.5]), "adam_ge": np.array([30.0])}
    found = evaluate(sums)
    assert found["norm_dist_adam"] == pytest.approx(np.sqrt(200), rel=1e-15)
    assert found["norm_grad_adam"] == pytest.approx(np.sqrt(6.5), rel=1e-15)
    assert found["cosine_adam"] == pytest.approx(30 / np.sqrt(1300), rel=1e-15)
    assert found["lolr_adam"] == pytest.approx(60 / 13, rel=1e-15)
    assert len(found) == 4


def test_tensors_without_second_moments_are_left_out_of_every_sum() -> None:
    dot, dist, grad = np.array([[3.0, 4.0, 5.0]]), np.array([[2.0, 0, 0]]), np.array([[8.0, 0, 0]])
    known = np.array([[True, False, False]])
    found = adam_sums(dot, dist, grad, known, np.array([0, 0, 1]), 2)
    assert found["adam_ge"][0, 0] == 3
    assert (found["adam_ee"][0, 0], found["adam_gg"][0, 0]) == (2, 8)
    assert all(np.isnan(values[0, 1]) for values in found.values())
    # What is not finite where there are second moments stays so.
    dist[0, 0] = np.nan
    assert np.isnan(adam_sums(dot, dist, grad, known, np.zeros(3, np.int64), 1)["adam_ee"]).all()


def test_an_update_has_no_gradient_quantities_and_a_gradient_none_of_updates() -> None:
    of_update = evaluate(update_sums(moments_of(G, W, E))).keys()
    of_gradient = gradient(G, W, E).keys()
    of_weights = {"norm_dist", "norm_weight", "cosine_reference", "dist_radial", "dist_tangential"}
    assert of_update & of_gradient == of_weights
    both = of_update | of_gradient | {"cosine_null", "lolr_null", "own_share"}
    both |= {"path_length", "straightness", "loss_gap", "star_convexity", "aiming"}
    both |= {"cosine_update_null", "lolr_update_null"}
    both |= {"norm_dist_adam", "norm_grad_adam", "cosine_adam", "lolr_adam"}
    assert both == {quantity.name for quantity in QUANTITIES}


def test_along_and_across_the_sphere_by_hand() -> None:
    """w = (0, 2), e = (3, 4), g = (1, 1): along w lie 4 of e and 1 of g."""
    w, e, g = np.array([0.0, 2.0]), np.array([3.0, 4.0]), np.array([1.0, 1.0])
    found = gradient(g, w, e)
    assert (found["norm_weight"], found["dist_radial"]) == (2, 4)
    assert found["dist_tangential"] == pytest.approx(3, rel=1e-15)
    assert found["cosine_radial"] == pytest.approx(4 / (5 * np.sqrt(2)), rel=1e-15)
    assert found["cosine_tangential"] == pytest.approx(3 / (5 * np.sqrt(2)), rel=1e-15)
    # w* = w - e = (-3, -2)
    assert found["cosine_reference"] == pytest.approx(-2 / np.sqrt(13), rel=1e-15)


def test_losses_by_hand() -> None:
    """f(x) = x² has g = 2x: from x = 3 to 0, ⟨g, e⟩ = 18 = 2 (f(3) - f(0))."""
    found = evaluate({"ge": np.array([18.0]), "gap": np.array([9.0])})
    assert (found["loss_gap"], found["star_convexity"], found["aiming"]) == (9, 9, 2)
    flat = evaluate({"ge": np.array([18.0]), "gap": np.array([0.0])})
    assert np.isnan(flat["aiming"])


def test_the_own_share_is_arithmetic() -> None:
    found = evaluate(
        {
            "ge": np.array([4.0]),
            "gg": np.array([2.0]),
            "null_ge": np.array([6.0]),
            "null_gg": np.array([2.0]),
        }
    )
    assert found["own_share"] == 1.5 == found["lolr_null"] / found["lolr"]


def test_a_straight_path_has_straightness_1() -> None:
    found = evaluate({"ee": np.array([25.0]), "path": np.array([5.0])})
    assert (found["path_length"], found["straightness"]) == (5, 1)


def test_the_step_of_lolr_lands_closest() -> None:
    rate = gradient(G, W, E)["lolr"][0]
    closest = np.linalg.norm(E - rate * G)
    for other in (rate * 0.99, rate * 1.01):
        assert np.linalg.norm(E - other * G) > closest
    # One plain step with it contracts the squared distance by exactly 1 - γ².
    assert closest**2 == pytest.approx(100 * (1 - 0.6**2), rel=1e-15)


def test_the_cosine_is_rsi_over_eb() -> None:
    found = gradient(G, W, E, decay=0.5)
    for suffix in ("", "_wd"):
        quotient = found[f"rsi{suffix}"] / found[f"eb{suffix}"]
        assert quotient == pytest.approx(found[f"cosine{suffix}"], rel=1e-15)


PARTS = ("cosine_radial", "cosine_tangential")


@pytest.mark.parametrize(
    ("g", "e", "undefined"),
    [
        (np.zeros(2), E, {"cosine", "angle_deg", "lolr", "z", *PARTS}),
        (G, np.zeros(2), {"rsi", "eb", "cosine", "angle_deg", "z", *PARTS}),
        (np.array([0.0, 1.0]), np.array([1.0, 0.0]), {"z"}),
    ],
    ids=["gradient 0", "at w*", "no coordinate in common"],
)
def test_a_ratio_by_a_zero_norm_is_nan_and_never_0(
    g: Values, e: Values, undefined: set[str]
) -> None:
    # Warnings are errors in this suite: numpy may not complain either.
    found = gradient(g, W, e)
    plain = {name for name in found if not name.endswith("_wd")}
    assert {name for name in plain if np.isnan(found[name])} == undefined


def test_at_rest_the_update_has_no_direction() -> None:
    found = evaluate(update_sums(moments_of(np.zeros(2), W, E)))
    assert found["norm_update"] == 0
    assert np.isnan(found["cosine_update"])
    assert np.isnan(found["lolr_update"])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_but_nan_follows_from_a_non_finite_gradient(bad: float) -> None:
    with np.errstate(invalid="ignore"):
        found = gradient(np.array([bad, 1.0]), W, E)
    of_weights = {"norm_dist", "norm_weight", "cosine_reference", "dist_radial", "dist_tangential"}
    assert found["norm_dist"] == 10
    assert {name for name, values in found.items() if not np.isnan(values).any()} == of_weights


def test_rounding_beyond_1_gives_an_angle_of_0() -> None:
    sums = {"ge": np.array([1.0 + 4e-16]), "gg": np.array([1.0]), "ee": np.array([1.0])}
    assert evaluate(sums)["angle_deg"] == 0


def test_without_decay_the_wd_columns_are_the_plain_ones_bit_for_bit() -> None:
    draw = np.random.default_rng(0).standard_normal
    found = gradient(draw(50), draw(50), draw(50))
    for name, values in found.items():
        if name.endswith("_wd"):
            assert values.tobytes() == found[name.removesuffix("_wd")].tobytes()


def test_without_decay_a_nan_weight_does_not_reach_the_norm_of_the_gradient() -> None:
    found = gradient(G, np.array([np.nan, 1.0]), np.array([np.nan, 1.0]))
    assert found["norm_grad"] == found["norm_grad_wd"] == 5


def test_unknown_decay_gives_nan_in_the_wd_columns_alone() -> None:
    found = gradient(G, W, E, decay=np.nan)
    assert {name for name in found if np.isnan(found[name])} == {
        name for name in found if name.endswith("_wd")
    }


def test_a_clipped_gradient_is_taken_back_to_its_length() -> None:
    # 0.25 is a power of two: exact.
    clipped, plain = gradient(0.25 * G, W, E, 0.5, scale=1 / 0.25), gradient(G, W, E, 0.5)
    assert {name: values[0] for name, values in clipped.items()} == {
        name: values[0] for name, values in plain.items()
    }


def test_where_the_clip_factor_is_not_known_the_gradient_stays_as_stored() -> None:
    factors = np.array([0.5, 1.0, np.nan, 0.0, -1.0, np.inf])
    assert unclipping(factors).tolist() == [2.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_every_need_is_a_sum_that_is_explained() -> None:
    assert {need for quantity in QUANTITIES for need in quantity.needs} == set(SUMS)


def test_names_are_unique_and_every_quantity_has_formula_and_unit() -> None:
    assert len({quantity.name for quantity in QUANTITIES}) == len(QUANTITIES)
    assert all(quantity.formula and quantity.unit for quantity in QUANTITIES)


@given(st.integers(1, 40), st.lists(st.integers(0, 40), max_size=5), st.integers(0, 2**32 - 1))
def test_how_tensors_are_split_changes_no_quantity(size: int, cuts: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed).standard_normal
    g, w, e = draw((3, size))
    places = sorted({cut for cut in cuts if 0 < cut < size})
    parts = [
        moments_of(*part) for part in zip(*(np.split(v, places) for v in (g, w, e)), strict=True)
    ]
    by_tensor = {name: np.concatenate([part[name] for part in parts]) for name in MOMENTS}
    decay = np.full(len(parts), 0.1)
    sums = gradient_sums(by_tensor, decay, np.ones(1))
    found = evaluate(sum_groups(sums, np.zeros(len(parts), np.int64), 1))
    h = g + 0.1 * w
    # The products of up to 40 numbers of size 1 are rounded to 1e-14; the rest follows from them.
    assert found["dot_prod"] == pytest.approx(g @ e, abs=1e-12)
    assert found["norm_grad_wd"] == pytest.approx(np.linalg.norm(h), rel=1e-7, abs=1e-7)
    assert found["dot_prod_wd"] == pytest.approx(h @ e, abs=1e-12)


@given(st.floats(1e-3, 1e3), st.integers(0, 2**32 - 1))
def test_scaling_the_gradient_scales_what_it_should(factor: float, seed: int) -> None:
    g, w, e = np.random.default_rng(seed).standard_normal((3, 20))
    before, after = gradient(g, w, e), gradient(factor * g, w, e)
    powers = {"norm_dist": 0, "norm_grad": 1, "dot_prod": 1, "rsi": 1, "eb": 1, "cosine": 0}
    powers |= {"lolr": -1, "z": 0}
    for name, power in powers.items():
        # Cancellation in ⟨g, e⟩ may cost digits that the scaling rounds differently.
        assert after[name] == pytest.approx(before[name] * factor**power, rel=1e-9)
