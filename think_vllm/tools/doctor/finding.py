"""One line of a diagnosis."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How a finding bears on the result."""

    GOOD = "ok"
    NOTE = "note"
    """Does not stand in the way; good to know."""
    BAD = "no-go"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    level: Level  # whether it stands in the way
    subject: str  # a word or two
    text: str  # a sentence; with the remedy if it is bad

    def __str__(self) -> str:
        """A line of a report."""
        return f"{self.level.value:<6} {self.subject}: {self.text}"
