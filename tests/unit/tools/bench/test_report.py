"""Tables, files and pictures, from results written by hand."""

import csv
import io
from pathlib import Path

import pytest

from tests.unit.tools.bench.example_results import figures, measurement, results
from think_vllm.errors import ThinkError
from think_vllm.tools.bench.comparison import rows_of
from think_vllm.tools.bench.plots import draw
from think_vllm.tools.bench.report import csv_text, markdown
from think_vllm.tools.bench.results import Failure, Results

RUN = results(
    measurement("plain", 8, figures(200, 4.0, cache_use_mean=0.97)),
    measurement("fp8 cache", 8, figures(250, 8.0)),
    measurement("thin", 8, figures(300, 12.0, failed=2, errors={"hung up": 2})),
    measurement("thin", 8, figures(340, 12.0), turn=1),
    measurement("thin", 2, figures(90, None, prefix_hit_rate=0.25)),
    note="Alone on the machine.",
)


def test_markdown_has_a_line_for_each_load() -> None:
    text = markdown(RUN, rows_of(RUN), ["compared with x"])
    lines = text.splitlines()
    [plain] = [line for line in lines if line.startswith("| 8 at a time | plain |")]
    assert plain == (
        "| 8 at a time | plain | 4.0 | x1.00 | 200 | x1.00 | x0.80 | 4 | x1.00 | 1 | 1 | 1.0 "
        "| 1.0 | 1.0 | 1.0 | 1 | 0.97 | 3 |"
    )
    [thin] = [line for line in lines if line.startswith("| 8 at a time | thin")]
    assert "thin; **2 failed** | 12.0 | x3.00 | 320 (300 to 340) | x1.60 | x1.28 |" in thin
    [alone] = [line for line in lines if line.startswith("| 2 at a time | thin")]
    assert "| (2.0) | - | 90 | - | - |" in alone
    for part in (str(RUN.machine), f"`{RUN.command}`", RUN.note, "- compared with x", "10.0 MB"):
        assert part in text
    assert "found in the prefix cache: thin, 2 at a time: 0.250." in text
    assert "- thin: `think-vllm serve m --thin`" in text


def test_markdown_says_what_failed_and_that_a_run_was_cut_off() -> None:
    failure = Failure(server="thin", load=None, message="no memory left")
    run = results(failures=[failure], complete=False)
    text = markdown(run, rows_of(run))
    assert "did not come to its end" in text
    assert "Nothing was measured." in text
    assert "thin:\n\n```\nno memory left\n```" in text


def test_csv_text_carries_machine_and_commands_on_every_line() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(RUN))))
    assert len(rows) == len(RUN.measurements)
    assert [float(row["output_tokens_per_s"]) for row in rows] == [200, 250, 300, 340, 90]
    assert rows[4]["running_waiting"] == ""
    assert [row["errors"] for row in rows] == ["", "", "2 x hung up", "", ""]
    for row in rows:
        assert row["machine"] == str(RUN.machine)
        assert row["command"] == RUN.command
        assert row["server_command"].startswith("think-vllm serve m")
        assert row["date"].startswith("2026-")


def test_results_come_back_from_their_file(tmp_path: Path) -> None:
    RUN.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == RUN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: .*No such file"),
        ("nothing", "is no results.json of this version"),
        ('{"format": 1}', "machine: Field required; measure again"),
    ],
)
def test_read_rejects_other_files(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ThinkError, match=message):
        Results.read(path)


def test_draw_makes_a_plot_of_each_scenario_and_a_summary(tmp_path: Path) -> None:
    paths = draw(RUN, rows_of(RUN), tmp_path)
    assert [path.name for path in paths] == ["short.png", "summary.png"]
    for path in paths:
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert RUN.command.encode() in data


def test_draw_without_plain_has_no_summary(tmp_path: Path) -> None:
    run = results(measurement("thin", 8, figures(300, 12.0)))
    assert [path.name for path in draw(run, rows_of(run), tmp_path)] == ["short.png"]
