"""What the quality tables ask, count and say."""

import math

import pytest
from transformers import AutoTokenizer

from bench.tables import markdown
from bench.tables.configurations import configurations
from bench.tables.engine import SEQUENCES, engine_arguments, flags, in_order
from bench.tables.figures import count, logprob_against, right_against, share_right, within_a_point
from bench.tables.questions import SIZES, Question, judge, other_prompt, questions
from bench.tables.report import MARKERS, replace_section, write_report
from bench.tables.results import Results, Row
from tests.support.models import BUNDLED
from think_vllm.tools.eval.recall import QUESTION_TOKENS, VOCABULARY, recall_samples


@pytest.mark.parametrize("way", ["unasked", "asked"])
def test_questions_are_the_tokens_of_the_prompt(way):
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


def test_judge_leaves_out_what_does_not_count():
    question = Question(512, (1,), (9, 4, 5, 6, 7), slice(1, 5))
    answer = judge(question, [-9.0, -1.0, -2.0, -3.0, -4.0], [8, 4, 5, 6, 7])
    assert answer.right
    assert answer.logprob == -2.5
    assert not judge(question, [0.0] * 5, [9, 4, 5, 6, 8]).right


def test_other_prompt_asks_for_another_record_of_the_same_text():
    question = next(questions("unasked", 1, 1))
    other = other_prompt(question)
    assert other[:-1] == question.prompt[:-1]
    assert other[-1] != question.prompt[-1]
    assert other[-1] in question.prompt[: -QUESTION_TOKENS + 1]
    asked = VOCABULARY[other[-1]]
    assert asked.startswith("k")


def test_prefixes_are_left_before_they_are_found():
    order = in_order(SEQUENCES + 4, hits=True)
    assert [place for place, counts in order if counts] == list(range(SEQUENCES + 4))
    # As many as run at once lie between.
    for place in range(SEQUENCES + 4):
        assert order.index((place, True)) - order.index((place, False)) >= SEQUENCES
    assert in_order(2, hits=False) == [(0, True), (1, True)]


def test_configurations_have_names_of_their_own_and_flags():
    rows = {row.name: row for row in configurations()}
    assert len(rows) == len(list(configurations()))
    assert next(iter(rows)) == "dense"
    assert not flags(rows["dense"])
    wanted = "--kv-channel-prune 0.4 --kv-evict snapkv --kv-evict-budget 256 --kv-plan-context 512"
    assert flags(rows["snapkv 256 + 0.4"]) == wanted.split()
    chunks = engine_arguments(rows["k4v2 + 0.5, chunks of 256"])
    wanted = "--kv-prune-prefill --max-num-batched-tokens 256 --max-num-seqs 1"
    assert chunks[-5:] == wanted.split()
    assert "--enable-prefix-caching" in engine_arguments(rows["0.5, thin prefix"])


def row(right: str, logprobs: list[float], group: str = "formats", **labels: object) -> Row:
    """Asked without the question mark, at one size."""
    answers = {"unasked": {512: {"right": right, "logprobs": logprobs}}}
    run = {"settings": {}, "code": "c", "date": "d", "seconds": 1.0, "thin_share": {512: 0.75}}
    return Row.model_validate(run | {"group": group, "labels": labels, "answers": answers})


def results(rows: dict[str, Row]) -> Results:
    """Counted, as they are kept."""
    made = Results(model="m", seed=1, samples=40, rows=rows)
    count(made)
    for one in made.rows.values():
        one.answers = {}
    return made


def test_count_pairs_questions():
    dense = row("1111" * 10, [-1.0] * 40, "dense")
    found = results({"dense": dense, "x": row("1101" * 10, [-1.0, -2.0, -9.0, -1.0] * 10)})
    right = right_against(found.rows["x"], "unasked", 40, "dense")
    assert right.estimate.value == -0.25
    assert (right.better, right.worse) == (0, 10)
    logprob = logprob_against(found.rows["x"], "unasked", "dense")
    assert logprob.value == pytest.approx(-2.25)
    assert logprob.low is not None
    assert logprob.low < -2.25
    assert share_right(found.rows["x"], "unasked", 40, 512).value == 0.75


@pytest.mark.parametrize(
    ("lost", "count_", "expected"), [(0, 600, True), (0, 200, None), (60, 600, False)]
)
def test_within_a_point_is_only_said_if_shown(lost, count_, expected):
    answers = row("0" * lost + "1" * (count_ - lost), [-1.0] * count_)
    dense = row("1" * count_, [-1.0] * count_, "dense")
    found = results({"dense": dense, "x": answers}).rows["x"]
    difference = right_against(found, "unasked", count_, "dense").estimate
    assert within_a_point(difference) is expected


def test_claims_name_the_winner_of_each_ratio():
    good, bad = [-0.01 * (1 + i % 3) for i in range(40)], [-1.0 - i % 3 for i in range(40)]
    all_right, half_right = ("1" * 40, good, "channels"), ("01" * 20, bad, "channels")
    rows = {
        "dense": row("1" * 40, good, "dense"),
        "think 0.4": row(*all_right, ratio=0.4, policy="think"),
        "random 0.4": row(*half_right, ratio=0.4, policy="random"),
        "think 0.8": row(*half_right, ratio=0.8, policy="think"),
        "random 0.8": row(*all_right, ratio=0.8, policy="random"),
    }
    found = markdown.claims(results(rows))
    assert "| think beats random | yes at 0.4; the other at 0.8 |" in found
    assert "key-norm" not in found


def test_report_replaces_only_its_section(tmp_path):
    document = tmp_path / "quality.md"
    document.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    rows = {
        "dense": row("1" * 40, [-0.1] * 40, "dense"),
        "kivi4": row("10" * 20, [-0.1, -math.pi] * 20),
    }
    # Files hold all that a report needs.
    path = tmp_path / "results.json"
    results(rows).save(path)
    kept = Results.load(path, Results(model="m", seed=1, samples=40))
    assert len(path.read_text().splitlines()) == 9
    written = write_report(kept, tmp_path, document)
    text = document.read_text()
    assert document in written
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    # An interval of no width is not shown.
    assert "| kivi4 | 75 % | 0.500 [0.352, 0.648] | -0.500" in text
    document.write_text("no markers")
    assert not replace_section(document, "x")


def test_results_of_other_questions_are_rejected(tmp_path):
    path = tmp_path / "results.json"
    results({}).save(path)
    with pytest.raises(SystemExit, match="samples is 40, now 41"):
        Results.load(path, Results(model="m", seed=1, samples=41))
