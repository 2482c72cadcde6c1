"""What is made of results: pictures, and a section of a document."""

from pathlib import Path

from bench.tables import markdown
from bench.tables.figures import DENSE
from bench.tables.pictures import draw_all
from bench.tables.questions import WAYS
from bench.tables.results import Results

#: Kept by a document around what is replaced.
MARKERS = ("<!-- quality tables: begin -->", "<!-- quality tables: end -->")


def write_report(results: Results, directory: Path, document: Path) -> list[Path]:
    """Write everything that can be said of the rows there are.

    Args:
        results: Rows; without a dense one there is nothing to compare with.
        directory: Where pictures go.
        document: A Markdown file with `MARKERS`; it is left alone if it has none.

    Returns:
        The files.
    """
    if DENSE not in results.rows:
        raise SystemExit(f"no row {DENSE!r} yet; run it with --only {DENSE}")
    written = draw_all(results, directory)
    if document.is_file() and replace_section(document, summary(results)):
        written.append(document)
    return written


def summary(results: Results) -> str:
    """Claims, tables and remarks; what has no rows is left out."""
    sections = {
        "What was expected, and what was found": markdown.claims(results),
        "Channels: share right, unasked, by ratio": markdown.policies(results),
        "Channels: log-probability to dense": markdown.policies_logprob(results),
    }
    for group, title in markdown.TITLES.items():
        for way in WAYS:
            sections[f"{title}, {way}"] = markdown.group_table(results, group, way)
    found = results.provenance
    versions = ", ".join(f"{name} {text}" for name, text in found.get("versions", {}).items())
    codes = ", ".join(sorted({row.code for row in results.rows.values()}))
    parts = [
        f"{len(results.rows)} configurations, {results.samples} prompts of each size, seed "
        f"{results.seed}, `{results.model}`; last run {found.get('date', '-')}; "
        f"{found.get('processor', '-')}, {found.get('cores', '-')} cores; Python "
        f"{found.get('python', '-')}, {versions}; code {codes}.",
        *(f"### {title}\n\n{text}" for title, text in sections.items() if text),
        markdown.remarks(results),
    ]
    return "\n\n".join(filter(None, parts))


def replace_section(document: Path, text: str) -> bool:
    """Put text between the markers of a document; whether it has them."""
    before, begin, rest = document.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not end:
        return False
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    return True
