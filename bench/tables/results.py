"""The file of results: one row for each configuration, written as they come."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from bench.tables.questions import Answer, Question


class Answers(BaseModel):
    """Answers to the questions of one size, in their order, each kind on one line of the file."""

    model_config = ConfigDict(extra="forbid")

    right: str = Field(default="", description="1 for a right answer, 0 for a wrong one.")
    logprob: str = Field(default="", description="Means over the digits that count; nats.")


class Row(BaseModel):
    """What one configuration answered."""

    model_config = ConfigDict(extra="forbid")

    group: str
    labels: dict[str, Any]
    settings: dict[str, Any]
    dtype: str
    code: str = Field(description="Version of the code that answered.")
    date: str = Field(description="UTC, ISO 8601.")
    seconds: float = Field(description="Start of the engine and all answers.")
    plan: dict[str, Any] = Field(description="How blocks were made; empty without thin ones.")
    answers: dict[str, dict[int, Answers]] = Field(description="By way of asking and by size.")

    def add(self, way: str, question: Question, answer: Answer) -> None:
        """Append the next answer."""
        cell = self.answers.setdefault(way, {}).setdefault(question.length, Answers())
        cell.right += str(int(answer.right))
        cell.logprob = f"{cell.logprob} {answer.logprob:.5f}".lstrip()

    def sizes(self, way: str) -> list[int]:
        """Sizes that were asked."""
        return sorted(self.answers.get(way, {}))

    def right(self, way: str, size: int | None) -> list[float]:
        """1 or 0 for each question of a size; None for all sizes."""
        return [float(mark) for cell in self._cells(way, size) for mark in cell.right]

    def logprob(self, way: str, size: int | None) -> list[float]:
        """Mean log-probability for each question, as for `right`."""
        return [float(x) for cell in self._cells(way, size) for x in cell.logprob.split()]

    def _cells(self, way: str, size: int | None) -> list[Answers]:
        cells = self.answers.get(way, {})
        return [cells[length] for length in sorted(cells) if size in (None, length)]


class Results(BaseModel):
    """A file of rows that answered the same questions."""

    model_config = ConfigDict(extra="forbid")

    model: str
    seed: int
    samples: int = Field(description="Questions of each size.")
    provenance: dict[str, Any] = Field(default={}, description="Of the last run that added rows.")
    notes: dict[str, Any] = {}
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
                    f"{getattr(wanted, name)}; give the same, or another --out"
                )
        return found

    def save(self, path: Path) -> None:
        """Write the file; what was there stays whole until then."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
