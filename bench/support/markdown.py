"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; nothing without rows."""
    lines = [header, ["---"] * len(header), *rows]
    if len(lines) == 2:
        return ""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
