import random

import pytest

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.scoring import (
    classification_match,
    code_similarity,
    common_subsequence,
    count_match,
    retrieval_match,
    rouge_l,
    score,
    word_f1,
)


def question(metric: str, *answers: str, classes: tuple[str, ...] = ()) -> Question:
    return Question("task", 0, "prompt", answers, metric, 8, classes=classes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ? 4 9 2 1 .", 1.0),
        ("? 4 9 2 1", 1.0),
        (" 4 9 2 1 .", 0.0),
        (" . 4 9 2 1 .", 0.0),
        ("? 4 9 2 2 .", 0.0),
        ("? 4 9 2", 0.0),
        ("? . 4 9 2 1", 0.0),
        ("", 0.0),
    ],
)
def test_recall_wants_the_mark_and_all_digits(text, expected):
    assert score(question("recall", "4 9 2 1"), text) == expected


@pytest.mark.parametrize(
    ("metric", "answers", "text", "expected"),
    [
        ("all", ("123", "456"), "They are 123, and 456.", 1.0),
        ("all", ("123", "456"), "It is 123.", 0.5),
        ("all", ("cat",), "a category of CATS", 0.0),
        ("all", ("cat",), "The Cat.", 1.0),
        ("all", ("1234567",), "91234567", 0.0),
        ("any", ("Oslo", "Rome"), "in rome, I think", 1.0),
        ("any", ("Oslo", "Rome"), "in Paris", 0.0),
        ("any", ("C++",), "It is C++.", 1.0),
    ],
)
def test_score_matches_whole_words(metric, answers, text, expected):
    assert score(question(metric, *answers), text) == expected


def test_score_is_the_best_over_the_answers():
    assert score(question("f1", "a dog", "the red cat"), "red cat") == 1.0


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("The red cat.", "red cat", 1.0),
        # 2 of 3 words said are among 4: precision 2/3, recall 1/2.
        ("red cat sleeps", "big red cat runs", 4 / 7),
        # A word said twice counts as often as it is right.
        ("cat cat cat", "cat", 0.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_word_f1(prediction, truth, expected):
    assert word_f1(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        # Values of rouge-score 0.1.2, rougeL without stemming.
        ("police killed the gunman", "police kill the gunman", 0.75),
        ("the gunman kill police", "police kill the gunman", 0.5),
        ("The quick brown fox jumps", "the brown dog jumps quickly, it says.", 0.5),
        ("", "something", 0.0),
    ],
)
def test_rouge_l(prediction, truth, expected):
    assert rouge_l(prediction, truth) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("    return x", "    return x", 1.0),
        ("```python\n# comment\n    return y\nmore", "    return x", 22 / 24),
        ("lewenstein", "levenshtein", 18 / 21),
        ("\n\n", "abc", 0.0),
    ],
)
def test_code_similarity(prediction, truth, expected):
    assert code_similarity(prediction, truth) == pytest.approx(expected)


def test_count_and_retrieval_divide_by_what_was_said():
    assert count_match("There are 7.", "7") == 1.0
    assert count_match("7 or 8", "7") == 0.5
    assert count_match("seven", "7") == 0.0
    assert count_match("17", "7") == 0.0
    assert retrieval_match("Paragraph 12", "Paragraph 12") == 1.0
    assert retrieval_match("12, no, 13", "Paragraph 12") == 0.5


def test_classification_divides_by_the_classes_named():
    classes = ("Food", "Food type", "Sport", "City")
    assert classification_match("It is Sport", "Sport", classes) == 1.0
    assert classification_match("Sport or City", "Sport", classes) == 0.5
    # The name of one class is part of the other's.
    assert classification_match("Food type", "Food type", classes) == 1.0
    assert classification_match("Food type", "Food", classes) == 0.5
    assert classification_match("none", "Sport", classes) == 0.0


def test_common_subsequence_equals_the_table():
    rng = random.Random(0)
    for _ in range(200):
        first = rng.choices("abcd", k=rng.randrange(12))
        second = rng.choices("abcd", k=rng.randrange(12))
        table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
        for i, x in enumerate(first):
            for j, y in enumerate(second):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        assert common_subsequence(first, second) == table[-1][-1]
