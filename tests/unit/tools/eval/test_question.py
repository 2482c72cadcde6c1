import pytest

from think_vllm.tools.eval.question import Question


def score(metric, answers, text):
    question = Question("task", 0, "prompt", answers, metric, 8, 100, None, 92)
    return question.score(text)


RIGHT = (" ? 4 9 2 1 .", "? 4 9 2 1")
WRONG = (" 4 9 2 1 .", " . 4 9 2 1 .", "? 4 9 2 2 .", "? 4 9 2", "? . 4 9 2 1", "")


@pytest.mark.parametrize("text", [*RIGHT, *WRONG])
def test_recall_wants_the_mark_and_all_digits(text):
    assert score("recall", ("4 9 2 1",), text) == (1.0 if text in RIGHT else 0.0)


@pytest.mark.parametrize(
    ("answers", "text", "expected"),
    [
        (("123", "456"), "They are 123, and 456.", 1.0),
        (("123", "456"), "It is 123.", 0.5),
        (("cat",), "a category of CATS", 0.0),
        (("cat",), "The Cat.", 1.0),
        (("1234567",), "91234567", 0.0),
        (("C++",), "It is C++.", 1.0),
    ],
)
def test_score_matches_whole_words(answers, text, expected):
    assert score("all", answers, text) == expected
