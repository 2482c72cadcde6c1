"""Which functions an instruction comes from, through all that the compiler put in place.

``ptxas -lineinfo`` keeps one line number per instruction, that of the innermost function. Triton
writes the calls around it as a comment into its PTX, so the lines are numbered again, one number
for each chain of calls, before the assembler sees them.
"""

import ast
import re
from functools import cache
from pathlib import Path

_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]+)"')
_LOC = re.compile(r"^(?P<indent>\s*)\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^/\n]*(?P<rest>.*)$")
_PLACE = re.compile(r"([^\s@\[\]/:]+):(\d+)(?::\d+)?")


#: Functions that an instruction comes from, the innermost first; empty for what is in none.
Chain = tuple[str, ...]


def number_lines(ptx: str) -> tuple[str, list[Chain]]:
    """Number the lines of PTX by chains of calls.

    Returns:
        PTX whose line ``i`` stands for chain ``i``, and the chains. Chain 0 is empty.
    """
    matches = filter(None, map(_FILE.match, ptx.splitlines()))
    files = {match[1]: match[2] for match in matches}
    by_name = {Path(path).name: path for path in files.values()}
    chains: dict[Chain, int] = {(): 0}
    rows = []
    for row in ptx.splitlines():
        if found := _LOC.match(row):
            comment = found["rest"].partition("//")[2]
            named = [(by_name.get(name, name), int(line)) for name, line in _PLACE.findall(comment)]
            places = named or [(files.get(found["file"], ""), int(found["line"]))]
            chain = tuple(function_at(path, line) for path, line in places)
            number = chains.setdefault(chain, len(chains))
            row = f"{found['indent']}.loc {found['file']} {number} 0"
        rows.append(row)
    return "\n".join(rows) + "\n", list(chains)


def function_at(path: str, line: int) -> str:
    """Name of the innermost function around a line; empty outside of all, or without the file."""
    spans = [span for span in _functions(path) if span[0] <= line <= span[1]]
    return max(spans)[2] if spans else ""


@cache
def _functions(path: str) -> list[tuple[int, int, str]]:
    """First line, last line and name of every function of a file."""
    source = Path(path)
    if not source.is_file():
        return []
    return [
        (node.lineno, node.end_lineno or node.lineno, node.name)
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
