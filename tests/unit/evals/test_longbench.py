import json

import pytest

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.scoring import score
from think_vllm.tools.eval.tasks.longbench import (
    longbench_questions,
    read_prompts,
    read_rows,
    scored_text,
)

ROW = {
    "input": "Who?",
    "context": "It was {Ann}.",
    "answers": ["Ann", "Miss Ann"],
    "length": 3,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "x1",
}


class Words:
    """One token a word, one more for every prompt."""

    def __init__(self):
        self.words = []

    def count(self, text):
        return 1 + len(text.split())

    def encode(self, text):
        start = len(self.words)
        self.words += text.split()
        return list(range(start, len(self.words)))

    def decode(self, tokens):
        return " ".join(self.words[token] for token in tokens) + " "


def write(tmp_path, *lines):
    path = tmp_path / "rows.jsonl"
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text), encoding="utf-8")
    return path


def questions(rows, prompts=None, room=4000, max_tokens=None):
    return list(longbench_questions(rows, prompts or {}, "f1", Words(), room, max_tokens))


def test_read_rows_keeps_what_longbench_writes(tmp_path):
    # A line separator of Unicode inside a text does not end the line.
    row = {**ROW, "context": "one\u2028two"}
    path = write(tmp_path, json.dumps(row, ensure_ascii=False), "", {**ROW, "_id": "x2"})
    assert [found["_id"] for found in read_rows(path, "f1")] == ["x1", "x2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", r"rows.jsonl:2: no JSON .*one object a line"),
        ("[1]", r"rows.jsonl:2: list in place of an object"),
        ({**ROW, "context": None}, r"rows.jsonl:2: 'context' is None, a text is needed"),
        ({"input": "x"}, r"rows.jsonl:2: 'context' is None"),
        ({**ROW, "answers": "Ann"}, r"rows.jsonl:2: 'answers' is 'Ann', a list"),
        ({**ROW, "answers": []}, r"rows.jsonl:2: 'answers' is \[\], a list"),
        ({**ROW, "dataset": "trec"}, r"rows.jsonl:2: 'all_classes' is missing"),
        ({**ROW, "dataset": "dureader"}, r"rows.jsonl:2: dureader is scored in Chinese words"),
    ],
)
def test_read_rows_names_the_line_that_is_wrong(tmp_path, line, message):
    with pytest.raises(ThinkError, match=message):
        read_rows(write(tmp_path, ROW, line, ROW), "f1")


def test_read_rows_refuses_files_without_rows(tmp_path):
    with pytest.raises(ThinkError, match="holds no line"):
        read_rows(write(tmp_path, ""), "f1")
    with pytest.raises(ThinkError, match="No such file"):
        read_rows(tmp_path / "none.jsonl", "f1")


def test_questions_have_the_metric_of_their_dataset():
    rows = [
        ROW,
        {**ROW, "dataset": "lcc"},
        {**ROW, "dataset": "samsum"},
        {**ROW, "dataset": "mine"},
        {**ROW, "dataset": "trec", "answers": ["City"], "all_classes": ["City", "Food"]},
        ROW,
    ]
    made = questions(rows)
    assert [q.metric for q in made] == ["f1", "code", "rouge", "f1", "classification", "f1"]
    assert [q.number for q in made] == [0, 0, 0, 0, 0, 1]
    assert made[0].identity == "x1"
    assert made[0].max_tokens == 32
    assert "It was {Ann}." in made[0].prompt
    assert made[3].prompt == "It was {Ann}.\n\nWho?"
    assert score(made[4], "City") == 1.0
    assert questions([ROW], max_tokens=7)[0].max_tokens == 7


def test_first_line_counts_where_longbench_says_so():
    trivia, hotpot = questions([{**ROW, "dataset": "triviaqa"}, ROW])
    assert scored_text(trivia, "\nAnn\nQuestion: more") == "Ann"
    assert scored_text(hotpot, "Ann\nmore") == "Ann\nmore"


def test_prompts_of_longbench_replace_ours(tmp_path):
    path = tmp_path / "dataset2prompt.json"
    path.write_text(json.dumps({"hotpotqa": "C: {context} {x}\nQ: {input}"}), encoding="utf-8")
    prompts = read_prompts(tmp_path)
    assert questions([ROW], prompts)[0].prompt == "C: It was {Ann}. {x}\nQ: Who?"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(ThinkError, match="not a prompt for each dataset"):
        read_prompts(tmp_path)
    with pytest.raises(ThinkError, match=r"dataset2prompt\.json is needed"):
        read_prompts(tmp_path / "none")


def test_long_prompts_lose_their_middle():
    row = {**ROW, "context": " ".join(f"w{i}" for i in range(1000))}
    (question,) = questions([row], room=200)
    assert question.prompt_tokens == 200 - 32
    words = question.prompt.split()
    assert words[-1] == "Answer:"
    assert "w0" in words
    assert "w999" in words
    assert "w500" not in words
    with pytest.raises(ThinkError, match="leaves nothing of the text"):
        questions([row], room=33)
