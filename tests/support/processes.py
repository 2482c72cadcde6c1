"""Python programs in processes of their own."""

import subprocess
import sys
from pathlib import Path
from typing import Any


def run_python(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python; what it printed is text, and who asks looks at its exit status."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
