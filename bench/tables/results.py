"""The files of results: all answers while engines run, and figures of them to keep.

Answers go to a working file that is not kept in the repository, with every question's. What pages
and pictures need is counted from them, one line of JSON for each configuration.
"""

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from bench.tables.questions import Answer, Question
from think_vllm.tools.common.compact import write_json


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Answers(_Record):
    """Answers to the questions of one size, in their order."""

    right: str = Field(default="", description="1 for a right answer, 0 for a wrong one.")
    logprobs: list[float] = Field(default=[], description="Means over counted digits; nats.")


class Against(NamedTuple):
    """A configuration against another on the same questions."""

    better: int  # questions that it alone answered right
    worse: int  # questions that the other alone answered right
    logprob: float  # mean difference of the log-probability of right digits; nats a digit
    low: float | None  # lower end of its 95 % interval; None where all differences are the same
    high: float | None  # upper end


class Figures(_Record):
    """What the answers to one way of asking come to."""

    right: dict[int, int] = Field(description="Right answers by size.")
    against: dict[str, Against] = Field(default={}, description="By the other's name.")


class Row(_Record):
    """What one configuration answered."""

    group: str
    labels: dict[str, Any]
    settings: dict[str, Any]
    code: str = Field(description="Version of the code that answered.")
    date: str = Field(description="UTC, ISO 8601.")
    seconds: float = Field(description="Start of the engine and all answers.")
    thin_share: dict[int, float] = Field(description="Of prompts, by size; empty if none is thin.")
    hit_share: float | None = Field(default=None, description="Of prompts, in the prefix cache.")
    answers: dict[str, dict[int, Answers]] = Field(
        default={}, description="By way of asking and by size; in the working file only."
    )
    figures: dict[str, Figures] = Field(default={}, description="By way of asking.")

    def add(self, way: str, question: Question, answer: Answer) -> None:
        """Append the next answer."""
        cell = self.answers.setdefault(way, {}).setdefault(question.length, Answers())
        cell.right += str(int(answer.right))
        cell.logprobs.append(round(answer.logprob, 5))


class Results(_Record):
    """A file of rows that answered the same questions."""

    model: str
    seed: int
    samples: int = Field(description="Questions of each size.")
    provenance: dict[str, Any] = Field(default={}, description="Of the last run that added rows.")
    skipped: dict[str, str] = Field(default={}, description="Configurations that were not run.")
    rows: dict[str, Row] = {}

    @classmethod
    def load(cls, path: Path, wanted: "Results") -> "Results":
        """Read a file to go on with; ``wanted`` if there is none.

        Raises:
            SystemExit: If its questions are others.
        """
        if not path.is_file():
            return wanted
        found = cls.model_validate_json(path.read_text(encoding="utf-8"))
        for name in ("model", "seed", "samples"):
            if getattr(found, name) != getattr(wanted, name):
                raise SystemExit(
                    f"{path}: its {name} is {getattr(found, name)}, now "
                    f"{getattr(wanted, name)}; give the same, or another file"
                )
        return found

    def save(self, path: Path) -> None:
        """Write the file, a row on each line; what was there stays whole until then."""
        rows = {name: row.model_dump(exclude_defaults=True) for name, row in self.rows.items()}
        write_json(path, self.model_dump(exclude={"rows"}) | {"rows": rows})
