"""The kinds of tables that `analyze` writes as Parquet, told by their metadata and columns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

METADATA_KEY = b"straightway"

# By the name of the kind: the command that writes it, in words.
WRITERS: Mapping[str, str] = {
    "compute": "`analyze compute`",
    "pairs": "`analyze pairs`",
    "noise": "`analyze pairs --noise`",
    "pca": "`analyze pca`",
    "coverage": "`analyze coverage`",
    "compare": "`analyze compare`",
}
# A column that no other kind has.
_OWN: Mapping[str, str] = {
    "norm_dist": "compute",
    "step_to": "pairs",
    "noise_scale": "noise",
    "component": "pca",
    "never_share": "coverage",
    "quantity": "compare",
}


def kind_of(schema: pa.Schema) -> str | None:
    """Name the kind of table that has this schema, one of `WRITERS`; `None` where none of ours."""
    document = facts_in(schema)
    if document is None:
        return None
    named = document.get("kind")
    if isinstance(named, str) and named in WRITERS:
        return named
    return next((kind for column, kind in _OWN.items() if column in schema.names), None)


def facts_in(schema: pa.Schema) -> dict[str, Any] | None:
    """The facts in the metadata of a table; `None` where there are none that can be read."""
    try:
        document = json.loads((schema.metadata or {})[METADATA_KEY])
    except (KeyError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None
