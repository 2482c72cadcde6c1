"""What a run of the tests leaves out, and says so."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.support.tiers import TIERS, closing_lines

FILE = """
import pytest

def test_usual():
    pass

@pytest.mark.slow
def test_slow():
    pass

@pytest.mark.extended
@pytest.mark.parametrize("number", range(3))
def test_extended(number):
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tier", "workers", "passed", "left"),
    [("quick", "2", 1, 4), ("usual", "0", 2, 3), ("usual", "2", 2, 3), ("all", "2", 5, 0)],
)
def test_closing_lines_say_what_is_left_out(
    tmp_path: Path, tier: str, workers: str, passed: int, left: int
) -> None:
    (tmp_path / "test_it.py").write_text(FILE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow: x\n    extended: x\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.tiers",
        "-p",
        "no:cacheprovider",
    ]
    command += [f"--tier={tier}", "-n", workers, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert f" {passed} passed" in done.stdout, done.stdout + done.stderr
    assert (f"test_it.py: {left} tests\n" in done.stdout) == (left > 0)
    assert ("left out" in done.stdout) == (tier != "all")


def test_closing_lines_of_nothing() -> None:
    assert list(closing_lines(TIERS["usual"], Counter())) == []
    assert list(closing_lines(TIERS["usual"], Counter({"a": 1}))) == [
        "a: 1 test", "`make test-all` runs them",
    ]  # fmt: skip
