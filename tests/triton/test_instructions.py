"""What decode attention over thin blocks costs in machine instructions, without a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.triton.test_aot import run

#: Most warp instructions per token and KV head, on compute capability 9.0 at head size 128 with
#: half of the key channels pruned. An H100 reads about 13.4 bytes a cycle in each multiprocessor,
#: which issues about 2 instructions: what costs much more than bytes / 6.7 waits for them.
CEILINGS = {"none": 24, "fp8": 24, "kivi4": 32, "k4v2": 28, "kivi2": 28}
#: A narrower load of codes needs more instructions and more transactions for the same bytes.
FEWEST_LOAD_BITS = 64


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each format. Compiled in a process of its own: this one may interpret kernels."""
    out: Path = tmp_path_factory.mktemp("instructions") / "figures.json"
    counted = run("-m", "bench.instructions", "--capability", "90", "--out", str(out))
    assert counted.returncode == 0, counted.stderr
    return {made["format"]: made for made in json.loads(out.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("quant", CEILINGS)
def test_instructions_per_token(figures: dict[str, dict[str, Any]], quant: str) -> None:
    assert figures[quant]["total"] <= CEILINGS[quant], figures[quant]["instructions"]


@pytest.mark.parametrize("quant", CEILINGS)
def test_nothing_is_spilled(figures: dict[str, dict[str, Any]], quant: str) -> None:
    assert figures[quant]["spill_bytes"] == 0


@pytest.mark.parametrize("quant", CEILINGS)
def test_codes_are_loaded_in_wide_words(figures: dict[str, dict[str, Any]], quant: str) -> None:
    widths = [int(bits) for bits in figures[quant]["code_load_bits"]]
    assert min(widths) >= FEWEST_LOAD_BITS, figures[quant]["loads"]
