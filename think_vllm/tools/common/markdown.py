"""Tables of reports."""

from collections.abc import Iterable, Sequence


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = (header, ["---"] * len(header), *rows)
    return [f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines]
