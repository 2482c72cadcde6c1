"""Where the repository and its model are, and which commit it is."""

import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BUNDLED = REPOSITORY / "models" / "tiny-recall"


def ask(*command: str, limit_s: float = 20) -> str:
    """What a program says, without blanks around; empty if it fails or is not there."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return said.stdout.strip() if said.returncode == 0 else ""


def git(*arguments: str) -> str:
    """What git says of the repository; empty without a history."""
    return ask("git", "-C", str(REPOSITORY), *arguments)


def describe_commit() -> str:
    """Commit, ``-dirty`` behind it if files were changed; empty if unknown."""
    return git("describe", "--always", "--dirty", "--abbrev=40")
