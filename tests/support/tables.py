"""Tests over all combinations of tables, of which ``make test`` runs some."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import pytest


def crossed(tables: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """Parametrize a test by all combinations of the rows of some tables.

    Those in which all tables go forward together are run always: each row comes up in one or more
    of them. The others are marked ``extended``.

    Args:
        tables: Rows by the names that ``pytest.mark.parametrize`` takes.
    """
    sizes = [len(rows) for rows in tables.values()]
    together = {tuple(i % size for size in sizes) for i in range(max(sizes))}
    names = [name.strip() for group in tables for name in group.split(",")]
    chosen = []
    for places in product(*map(range, sizes)):
        values: list[Any] = []
        for (group, rows), place in zip(tables.items(), places, strict=True):
            values += rows[place] if "," in group else [rows[place]]
        marks = [] if places in together else [pytest.mark.extended]
        chosen.append(pytest.param(*values, marks=marks, id="-".join(map(_name, values))))
    return pytest.mark.parametrize(names, chosen)


def _name(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)
