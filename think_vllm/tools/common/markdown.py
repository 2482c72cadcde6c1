"""Tables of reports."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; nothing without rows."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ((str(cell).replace("|", "&#124;") for cell in line) for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) if len(lines) > 2 else ""
