"""Questions from local JSON lines, in the fields of LongBench (arXiv 2308.14508).

Nothing is downloaded. Datasets that LongBench knows get its metric and its number of tokens.
Prompts are our own unless its ``dataset2prompt.json`` is given: with ours, figures compare servers
with each other and not with published ones.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.eval.question import Question
from think_vllm.tools.eval.scoring import METRICS
from think_vllm.tools.eval.tokens import Tokens, cut_middle


@dataclass(frozen=True)
class Dataset:
    """How LongBench asks and scores a set.

    Args:
        metric: A name of `scoring.METRICS`.
        max_tokens: Tokens of an answer.
        prompt: With ``{context}`` and ``{input}``.
        first_line: Whether only the first line of an answer counts.
    """

    metric: str
    max_tokens: int
    prompt: str
    first_line: bool = False


_ASK = (
    "Read the following text, then answer the question about it in one short phrase.\n\n{context}"
    "\n\nQuestion: {input}\nAnswer:"
)
_SUMMARIZE = "Read the following text.\n\n{context}\n\n{input}\nSummary of the text in one page:"
_CONTINUE = "Complete the last of the following examples.\n\n{context}\n{input}"
_COUNT = (
    "Some of the following paragraphs may be repeated. How many different ones are there? Answer "
    "with the number alone.\n\n{context}\n\nNumber of different paragraphs:"
)
_RETRIEVE = (
    "Which of the following paragraphs is the abstract at the end from? Answer as in "
    "'Paragraph 1'.\n\n{context}\n\nAbstract: {input}\n\nAnswer:"
)
_CODE = "Complete the code with its next line.\n{context}{input}Next line of code:\n"
_PLAIN = "{context}\n\n{input}"

DATASETS = {
    "narrativeqa": Dataset("f1", 128, _ASK),
    "qasper": Dataset("f1", 128, _ASK),
    "multifieldqa_en": Dataset("f1", 64, _ASK),
    "hotpotqa": Dataset("f1", 32, _ASK),
    "2wikimqa": Dataset("f1", 32, _ASK),
    "musique": Dataset("f1", 32, _ASK),
    "gov_report": Dataset("rouge", 512, _SUMMARIZE),
    "qmsum": Dataset("rouge", 512, _SUMMARIZE),
    "multi_news": Dataset("rouge", 512, _SUMMARIZE),
    "trec": Dataset("classification", 64, _CONTINUE, first_line=True),
    "triviaqa": Dataset("f1", 32, _CONTINUE, first_line=True),
    "samsum": Dataset("rouge", 128, _CONTINUE, first_line=True),
    "passage_count": Dataset("count", 32, _COUNT),
    "passage_retrieval_en": Dataset("retrieval", 32, _RETRIEVE),
    "lcc": Dataset("code", 64, _CODE),
    "repobench-p": Dataset("code", 64, _CODE),
}
#: Their scores need a splitter of Chinese text into words, which is not among our packages.
CHINESE = (
    "multifieldqa_zh",
    "dureader",
    "vcsum",
    "lsht",
    "passage_retrieval_zh",
)
#: What a file may be scored by; ``recall`` is for prompts of the bundled model's task.
FILE_METRICS = [name for name in METRICS if name != "recall"]
PROMPTS_FILE = "dataset2prompt.json"


def read_rows(path: Path, metric: str) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, checked.

    Args:
        path: The file; empty lines are skipped.
        metric: Of datasets that LongBench does not know.

    Raises:
        ThinkError: With the line that cannot be used.
    """
    try:
        # Not splitlines: JSON may hold other marks that end a line for Unicode.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ThinkError(f"eval: --jsonl {path}: {error}; JSON lines in UTF-8 are needed") from None
    rows = [
        _row(text, f"eval: --jsonl {path}:{number}", metric)
        for number, text in enumerate(lines, 1)
        if text.strip()
    ]
    if not rows:
        raise ThinkError(f"eval: --jsonl {path} holds no line")
    return rows


def read_prompts(directory: Path) -> dict[str, str]:
    """LongBench's own prompts, from the ``config`` directory of its repository.

    Raises:
        ThinkError: If there are none.
    """
    path = directory / PROMPTS_FILE
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ThinkError(
            f"eval: --longbench-config {directory}: {error}; LongBench's {PROMPTS_FILE} is needed "
            "there"
        ) from None
    if not isinstance(prompts, dict) or not all(isinstance(x, str) for x in prompts.values()):
        raise ThinkError(f"eval: {path} is not a prompt for each dataset")
    return prompts


def longbench_questions(
    rows: list[dict[str, Any]],
    prompts: dict[str, str],
    metric: str,
    tokens: Tokens,
    max_model_len: int,
    max_tokens: int | None,
) -> Iterator[Question]:
    """Yield a question for each row, its middle cut out where it is too long.

    Args:
        rows: As `read_rows` returns them.
        prompts: By dataset; those that lack one get ours.
        metric: Of datasets that LongBench does not know.
        tokens: Counts prompts.
        max_model_len: Tokens of prompt and answer.
        max_tokens: Tokens of an answer, in place of the dataset's.
    """
    numbers: dict[str, int] = {}
    for row in rows:
        name = row["dataset"]
        kind = DATASETS.get(name, Dataset(metric, 64, _PLAIN))
        if max_tokens is not None:
            kind = replace(kind, max_tokens=max_tokens)
        template = prompts.get(name, kind.prompt)
        # Not str.format: code is full of braces, in templates of others as well.
        before, found, after = template.partition("{context}")
        prompt = (
            f"{before.replace('{input}', row['input'])}{row['context'] if found else ''}"
            f"{after.replace('{input}', row['input'])}"
        )
        prompt = cut_middle(prompt, max_model_len - kind.max_tokens, tokens)
        numbers[name] = numbers.get(name, -1) + 1
        yield Question(
            task=name,
            number=numbers[name],
            prompt=prompt,
            answers=tuple(row["answers"]),
            metric=kind.metric,
            max_tokens=kind.max_tokens,
            classes=tuple(row.get("all_classes") or ()),
            prompt_tokens=tokens.count(prompt),
            identity=str(row["_id"]) if row.get("_id") is not None else None,
        )


def scored_text(question: Question, text: str) -> str:
    """The part of an answer that counts."""
    kind = DATASETS.get(question.task)
    return text.lstrip("\n").split("\n")[0] if kind is not None and kind.first_line else text


def _row(text: str, where: str, metric: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ThinkError(f"{where}: no JSON ({error}); one object a line is needed") from None
    if not isinstance(row, dict):
        raise ThinkError(f"{where}: {type(row).__name__} in place of an object")
    for field in ("input", "context", "dataset"):
        if not isinstance(row.get(field), str):
            raise ThinkError(
                f"{where}: {field!r} is {row.get(field)!r}, a text is needed; the fields are "
                "those of LongBench: input, context, answers, dataset, and _id if you like"
            )
    answers = row.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(x, str) for x in answers):
        raise ThinkError(f"{where}: 'answers' is {answers!r}, a list of texts is needed")
    name = row["dataset"]
    if name in CHINESE:
        raise ThinkError(
            f"{where}: {name} is scored in Chinese words, which cannot be split here; leave it out"
        )
    kind = DATASETS.get(name)
    used = metric if kind is None else kind.metric
    if used == "classification" and not row.get("all_classes"):
        raise ThinkError(f"{where}: 'all_classes' is missing, which a classification needs")
    return row
