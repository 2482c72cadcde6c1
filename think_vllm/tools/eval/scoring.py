"""Scores of answers, 0 to 1, from text alone.

``all`` and ``any`` are RULER's string matches (arXiv 2404.06654), but for whole words: RULER also
finds ``cat`` in ``category``. The others are LongBench's metrics (arXiv 2308.14508), in code of
our own; ``rouge`` and ``code`` differ from its packages as their docstrings say.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.recall import CODE_DIGITS

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[a-z0-9]+")
#: Lines with one of these are no code, for LongBench.
_NOT_CODE = ("`", "#", "//")
QUESTION_MARK = "?"


def score(question: Question, text: str) -> float:
    """Score an answer.

    Args:
        question: What was asked.
        text: What came back.

    Returns:
        0 to 1, the best over the right answers.
    """
    return METRICS[question.metric](question, text)


def recall_match(question: Question, text: str) -> float:
    """Whether the question mark and then exactly the right digits come first.

    The prompt ends before its question mark: vLLM computes the first token of an answer before
    the prompt becomes thin, so all digits are to be read from thin blocks.
    """
    words = text.split()
    right = [QUESTION_MARK, *question.answers[0].split()]
    return float(words[: 1 + CODE_DIGITS] == right)


def share_of_answers(question: Question, text: str) -> float:
    """Share of the right answers that the text holds, as whole words, in any case."""
    return sum(_holds(text, answer) for answer in question.answers) / len(question.answers)


def any_answer(question: Question, text: str) -> float:
    """Whether the text holds one of the right answers."""
    return float(any(_holds(text, answer) for answer in question.answers))


def word_f1(prediction: str, truth: str) -> float:
    """F1 of the words, without case, punctuation and articles (SQuAD's, as LongBench uses it)."""
    said, right = _plain_words(prediction), _plain_words(truth)
    return _f1(sum((Counter(said) & Counter(right)).values()), len(said), len(right))


def rouge_l(prediction: str, truth: str) -> float:
    """F1 of the longest common subsequence of words (ROUGE-L, Lin 2004), without case.

    The package that LongBench uses takes the union over pairs of sentences; this is one sequence,
    as rouge-score's ``rougeL`` without stemming.
    """
    said, right = _WORD.findall(prediction.lower()), _WORD.findall(truth.lower())
    return _f1(common_subsequence(said, right), len(said), len(right))


def code_similarity(prediction: str, truth: str) -> float:
    """Similarity of the first line of code: 2 LCS / (lengths), what rapidfuzz calls ``ratio``.

    LongBench rounds it to whole percent.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in _NOT_CODE)), "")
    if not line and not truth:
        return 1.0
    return 2 * common_subsequence(line, truth) / (len(line) + len(truth))


def count_match(prediction: str, truth: str) -> float:
    """Share of the numbers said that are the right one."""
    numbers = _NUMBER.findall(prediction)
    return numbers.count(truth) / len(numbers) if numbers else 0.0


def retrieval_match(prediction: str, truth: str) -> float:
    """As `count_match`, for a right answer such as ``Paragraph 7``."""
    number = _NUMBER.search(truth)
    return count_match(prediction, number[0]) if number else 0.0


def classification_match(prediction: str, truth: str, classes: Sequence[str]) -> float:
    """1 over the number of classes that the text names, if the right one is among them.

    A class whose name is part of the right one's does not count. (LongBench's code means the
    same, but skips the neighbour of every name that it drops.)
    """
    named = [name for name in classes if name in prediction]
    named = [name for name in named if name == truth or name not in truth]
    return 1 / len(named) if truth in named else 0.0


def common_subsequence(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence.

    Source: the bit-parallel row of Hyyrö, "Bit-parallel LCS-length computation revisited" (2004):
    a zero bit is a place of `first` where the length goes up.
    """
    places: dict[Hashable, int] = {}
    for index, item in enumerate(first):
        places[item] = places.get(item, 0) | 1 << index
    full = (1 << len(first)) - 1
    row = full
    for item in second:
        matches = row & places.get(item, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(first) - row.bit_count()


def _holds(text: str, answer: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) is not None


def _plain_words(text: str) -> list[str]:
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(common: int, said: int, right: int) -> float:
    return 2 * common / (said + right) if common else 0.0


def _best(metric: Callable[[str, str], float]) -> Callable[[Question, str], float]:
    def best(question: Question, text: str) -> float:
        return max(metric(text, answer) for answer in question.answers)

    return best


def _classification(question: Question, text: str) -> float:
    return max(classification_match(text, right, question.classes) for right in question.answers)


METRICS: dict[str, Callable[[Question, str], float]] = {
    "recall": recall_match,
    "all": share_of_answers,
    "any": any_answer,
    "f1": _best(word_f1),
    "rouge": _best(rouge_l),
    "code": _best(code_similarity),
    "count": _best(count_match),
    "retrieval": _best(retrieval_match),
    "classification": _classification,
}
