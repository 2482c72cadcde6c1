"""What the quality tables ask, count and say."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.tables import markdown
from bench.tables.configurations import configurations
from bench.tables.engine import flags
from bench.tables.figures import compare, within_a_point
from bench.tables.questions import SIZES, Question, judge, questions
from bench.tables.report import MARKERS, replace_section, write_report
from bench.tables.results import Results, Row
from tests.support.models import BUNDLED
from think_vllm.tools.eval.recall import recall_samples


@pytest.mark.parametrize("way", ["unasked", "asked"])
def test_questions_are_the_tokens_of_the_prompt(way: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED, local_files_only=True)
    samples = [sample for size in SIZES for sample in recall_samples(1, 2, *size)]
    for question, sample in zip(questions(way, 1, 2), samples, strict=True):
        text = f"{sample.prompt} {sample.answer} ."
        tokens = tokenizer(text)["input_ids"]
        led = [*question.prompt, *question.answer]
        assert led == tokens[: len(led)]
        counted = tokenizer.decode(question.answer[question.counted])
        # Digits that are computed one step after the prompt's end, or later.
        assert counted.strip() == (sample.answer if way == "unasked" else sample.answer[2:])
        assert question.counted.start == 1
        assert len(led) <= question.length


def test_judge_leaves_out_what_does_not_count() -> None:
    question = Question(512, (1,), (9, 4, 5, 6, 7), slice(1, 5))
    answer = judge(question, [-9.0, -1.0, -2.0, -3.0, -4.0], [8, 4, 5, 6, 7])
    assert answer.right
    assert answer.logprob == -2.5
    assert not judge(question, [0.0] * 5, [9, 4, 5, 6, 8]).right


def test_configurations_have_names_of_their_own_and_flags() -> None:
    rows = list(configurations())
    assert len({row.name for row in rows}) == len(rows)
    assert rows[0].name == markdown.DENSE
    assert not flags(rows[0])
    compared = next(row for row in rows if row.name == "float32: snapkv 256 + 0.4")
    assert flags(compared) == [
        *("--kv-channel-prune", "0.4", "--kv-evict", "snapkv", "--kv-evict-budget", "256"),
        *("--no-kv-prune-decode", "--kv-plan-context", "512"),
    ]


def row(
    right: str,
    logprob: list[float],
    group: str = "channels",
    labels: dict[str, Any] | None = None,
) -> Row:
    """Asked without the question mark, at one size."""
    answers = {"unasked": {512: {"right": right, "logprob": " ".join(map(str, logprob))}}}
    return Row.model_validate(
        {
            "group": group, "labels": labels or {}, "settings": {}, "dtype": "bfloat16",
            "code": "c", "date": "d", "seconds": 1.0, "plan": {"thin_share": {512: 0.75}},
            "answers": answers,
        }
    )  # fmt: skip


def test_compare_pairs_questions() -> None:
    found = compare(row("1101", [-1.0, -2.0, -9.0, -1.0]), row("1111", [-1.0] * 4), "unasked")
    assert found.right.estimate.value == -0.25
    assert (found.right.better, found.right.worse) == (0, 1)
    assert found.logprob.estimate.value == pytest.approx(-2.25)
    assert found.logprob.worse == 2


@pytest.mark.parametrize(
    ("lost", "count", "expected"), [(0, 600, True), (0, 200, None), (60, 600, False)]
)
def test_within_a_point_is_only_said_if_shown(lost: int, count: int, expected: bool | None) -> None:
    answers = row("0" * lost + "1" * (count - lost), [-1.0] * count)
    found = compare(answers, row("1" * count, [-1.0] * count), "unasked")
    assert within_a_point(found) is expected


def results(rows: dict[str, Row]) -> Results:
    return Results(model="m", seed=1, samples=40, rows=rows)


def test_claims_name_the_winner_of_each_ratio() -> None:
    good, bad = [-0.01 * (1 + i % 3) for i in range(40)], [-1.0 - i % 3 for i in range(40)]
    found = markdown.claims(
        results(
            {
                "dense": row("1" * 40, good, "dense"),
                "think 0.4": row("1" * 40, good),
                "random 0.4": row("01" * 20, bad),
                "think 0.8": row("01" * 20, bad),
                "random 0.8": row("1" * 40, good),
            }
        )
    )
    assert "| think beats random | yes at 0.4; the other at 0.8 |" in found
    assert "key-norm" not in found


def test_report_replaces_only_its_section(tmp_path: Path) -> None:
    document = tmp_path / "quality.md"
    document.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    rows = {
        "dense": row("1" * 40, [-0.1] * 40, "dense"),
        "kivi4": row("10" * 20, [-0.1, -math.pi] * 20, "formats"),
    }
    written = write_report(results(rows), tmp_path, document)
    text = document.read_text()
    assert document in written
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| kivi4 | 75 % | 0.500 [0.352, 0.648] | -0.500" in text
    # An interval of no width is not shown.
    assert not replace_section(tmp_path / "tables.md", "x")


def test_results_of_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results({}).save(path)
    with pytest.raises(SystemExit, match="samples is 40, now 41"):
        Results.load(path, Results(model="m", seed=1, samples=41))
