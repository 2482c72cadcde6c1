"""Faults that are seeded to see what the tests catch."""

from pathlib import Path

import pytest

from scripts import seeded_faults
from scripts.seeded_faults import Fault, examine, main, read_faults, run_tests
from tests.conftest import REPOSITORY

FAULT = Fault("less", "sizes.py", "SIZE = 3", "SIZE = 2", "It is too small.")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with a test."""
    (tmp_path / "sizes.py").write_text("SIZE = 3\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    for folder in seeded_faults.FOLDERS:
        (tmp_path / "tests" / folder).mkdir(parents=True)
        (tmp_path / "tests" / folder / "__init__.py").touch()
    option = 'def pytest_addoption(parser):\n    parser.addoption("--tier")\n'
    (tmp_path / "conftest.py").write_text(option)
    test = "from sizes import SIZE\n\n\ndef test_size(pytestconfig):\n"
    test += '    assert SIZE == 3\n    assert pytestconfig.getoption("tier") == "usual"\n'
    (tmp_path / "tests" / "engine" / "test_it.py").write_text(test)
    return tmp_path


def test_each_fault_has_its_line() -> None:
    faults = read_faults()
    assert len({fault.name for fault in faults}) == len(faults) >= 25
    for fault in faults:
        lines = (REPOSITORY / fault.file).read_text(encoding="utf-8").splitlines()
        assert sum(fault.line in line for line in lines) == 1, fault.name
        assert fault.becomes != fault.line


def test_seed_rejects_a_line_that_is_not_there_once(tree: Path) -> None:
    (tree / "sizes.py").write_text("SIZE = 3\nSIZE = 3\n")
    with pytest.raises(ValueError, match="'SIZE = 3' 2 times; fault less needs it once"):
        FAULT.seed(tree)


@pytest.mark.slow
def test_run_tests_names_what_fails(tree: Path, tmp_path: Path) -> None:
    assert run_tests(tree, "usual", tmp_path / "log") is None
    FAULT.seed(tree)
    assert run_tests(tree, "usual", tmp_path / "log") == "tests/engine/test_it.py::test_size"
    # What cannot be imported is caught, too.
    (tree / "sizes.py").write_text("SIZE 3")
    assert run_tests(tree, "usual", tmp_path / "log") == "tests/engine/test_it.py"


@pytest.mark.slow
def test_tests_that_hang_are_ended(tree: Path, tmp_path: Path, monkeypatch) -> None:
    (tree / "sizes.py").write_text("import time\ntime.sleep(1000)\n")
    monkeypatch.setattr(seeded_faults, "LIMIT_S", 1)
    assert run_tests(tree, "usual", tmp_path / "log") == "hung: no end after 0 minutes"


@pytest.mark.slow
def test_main_says_what_is_missed(tree: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    missed = Fault("missed", "sizes.py", "SIZE = 3", "SIZE = 3.0", "Nothing.")
    monkeypatch.setattr(seeded_faults, "read_faults", lambda: [FAULT, missed])
    monkeypatch.setattr(seeded_faults, "REPOSITORY", tree)
    files = [path.relative_to(tree) for path in tree.rglob("*") if path.is_file()]
    monkeypatch.setattr(seeded_faults, "copied_files", lambda: files)
    assert main(["--logs", str(tmp_path / "logs")]) == 1
    said = capsys.readouterr().out
    assert "1 of 2 faults caught" in said
    assert "missed: missed" in said
    assert main(["less", "--logs", str(tmp_path / "logs")]) == 0
    (tree / "sizes.py").write_text("SIZE = 3 - 1\n")
    assert examine(None, "usual", tmp_path / "logs").failed == "tests/engine/test_it.py::test_size"
    assert main(["no-fault", "less", "--logs", str(tmp_path / "logs")]) == 1
    assert "mend that first" in capsys.readouterr().out


def test_unknown_faults_are_rejected(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "no such fault: nothing; there are span-early" in capsys.readouterr().err
