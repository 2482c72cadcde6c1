"""Where the repository and its model are."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUNDLED = REPOSITORY / "models" / "tiny-recall"
