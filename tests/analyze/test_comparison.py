"""Comparisons of updates with their null, and of what a table of a comparison gives back."""

import json
from pathlib import Path

import numpy as np
import pytest

from analyze.compare import compare_runs
from analyze.comparison import read_comparison
from analyze.comparison_text import comparison_text
from capture.store.errors import InputError
from tests.analyze.comparable import config_of, table_of
from tests.analyze.test_compare import cell, written


def test_the_null_of_updates_is_compared_too(tmp_path: Path) -> None:
    """γ/γ⁰ = 2 and η*/a_t = 3 throughout, in the table and in words."""
    tables = [
        table_of(
            run,
            np.full(100, np.nan),
            stream="updates",
            cosine_update=-2 * null,
            cosine_update_null=-null,
            lolr_update=np.full(100, 6.0),
            lolr_update_null=np.full(100, 2.0),
        )
        for run, null in (("a", np.linspace(0.1, 0.2, 100)), ("b", np.full(100, 0.1)))
    ]
    comparison = compare_runs(written(tmp_path, *tables), ["run"], align="steps")
    frame = comparison.table().to_pandas()
    for part in ("early", "middle", "late"):
        own = {
            name: cell(frame, part=part, quantity=name, by_run="a").value
            for name in ("descent_update_ratio", "lolr_update_ratio", "lolr_update_null")
        }
        assert list(own.values()) == pytest.approx([2, 3, 2])
    head = next(x for x in comparison_text(comparison).splitlines() if x.startswith("part"))
    assert head.split() == ["part", "run", "n", "-cos(u,", "e)", "γ/γ⁰", "η*/a_t"]


def test_a_table_of_a_comparison_gives_it_back(tmp_path: Path) -> None:
    tables = [
        table_of(run, np.linspace(0.1, 0.5, 60), total=60, config=config_of("sgd", seed))
        for seed, run in enumerate(("a", "b"))
    ]
    comparison = compare_runs(written(tmp_path, *tables), ["optimizer"])
    again = read_comparison(comparison.table())
    assert comparison_text(again) == comparison_text(comparison)
    assert again.table().equals(comparison.table(), check_metadata=True)


def test_a_table_of_another_comparison_is_refused(tmp_path: Path) -> None:
    table = compare_runs(
        written(tmp_path, *(table_of(run, np.full(60, 0.1), total=60) for run in "ab")), ["run"]
    ).table()
    facts = json.loads(table.schema.metadata[b"straightway"])
    for change, words in (
        ({"comparison": 1}, "not a table of this version of `analyze compare`"),
        ({"blocks": [{}]}, "damaged"),
        ({"groups": []}, "damaged"),
    ):
        document = json.dumps(facts | change).encode()
        with pytest.raises(InputError, match=words):
            read_comparison(table.replace_schema_metadata({b"straightway": document}))
