"""What another implementation answered (``bench/kvpress/``), beside ours on the same prompts."""

from pathlib import Path
from typing import Any

from bench.tables.configurations import compared_name
from bench.tables.figures import compare, share_right
from bench.tables.markdown import difference, share, table
from bench.tables.questions import WAYS
from bench.tables.results import Results, Row

FILE = "kvpress.json"
#: Key of `Results.notes`: channels and tokens chosen from equal keys and queries.
CHOICES = "choices"


def load(directory: Path) -> Results | None:
    """Read its file; None if there is none."""
    path = directory / FILE
    if not path.is_file():
        return None
    return Results.model_validate_json(path.read_text(encoding="utf-8"))


def comparison(ours: Results, theirs: Results) -> str:
    """Each of its rows beside ours of the same ratio and budget."""
    if (ours.seed, ours.samples) != (theirs.seed, theirs.samples):
        raise SystemExit(f"{FILE}: its questions are others; run bench.kvpress.compare again")
    named: dict[str, list[Row]] = {}
    for row in theirs.rows.values():
        name = compared_name(row.labels["ratio"], row.labels["budget"])
        named.setdefault(name, []).append(row)
    # In our order, whichever was run first.
    lines = [
        _line(row, name, way, mine)
        for name, mine in ours.rows.items()
        for row in named.get(name, [])
        for way in WAYS
        if way in row.answers
    ]
    header = ["kvpress", "asked", "right: ours", "right: kvpress", "ours - kvpress"]
    return table([*header, "log-probability: ours - kvpress", "largest"], lines)


def choices(theirs: Results) -> str:
    """Whether equal keys and queries lead to equal choices, all ratios together."""
    sums: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for found in theirs.notes.get(CHOICES, []):
        sums.setdefault((found["what"], found["model"], found["heads"]), []).append(found)
    lines = []
    for key, parts in sums.items():
        # "0.3 pruned", "0.4 pruned", ...
        shares, verb = zip(*(part["count"].split() for part in parts), strict=True)
        counts = [
            sum(part[name] for part in parts) for name in ("cases", "same", "same_of_control")
        ]
        lines.append([*key, f"{', '.join(shares)} {verb[0]}", *map(str, counts)])
    header = ["choice of", "model", "query / KV heads", "how many", "heads", "same", "control"]
    return table(header, lines)


def _line(row: Row, name: str, way: str, mine: Row) -> list[str]:
    found = compare(mine, row, way)
    pairs = zip(mine.logprob(way, None), row.logprob(way, None), strict=True)
    largest = max(abs(a - b) for a, b in pairs)
    return [
        row.labels["kind"] + (": " + name.removeprefix("float32: ") if row.settings else ""),
        way,
        share(share_right(mine, way)),
        share(share_right(row, way)),
        difference(found.right),
        difference(found.logprob),
        f"{largest:.2g}" if largest else "below 1e-05",  # as results are rounded
    ]
