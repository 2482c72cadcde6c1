"""Pack stock vLLM's CUDA build for one Hopper GPU into ``.kit/``, for a machine without an index.

That machine has Linux on x86-64, a Hopper GPU, Python 3.12, torch 2.11 for CUDA 13, Triton 3.6,
transformers, numpy, numba and pytest. The kit holds what is missing: vLLM's Python code, its
library of kernels and FlashAttention 3, each for compute capability 9.0, and wheels.

Needs pip, a package index, and about 2 GB for temporary files; no GPU. A few minutes.
Run: ``make gpu-kit``, or ``python -m scripts.gpu_kit.build``.

vLLM's libraries use libtorch's stable ABI and CUDA 13's runtime, which is why those of its wheel,
built for another torch, are expected to load.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.support.repository import REPOSITORY, describe_commit
from scripts.gpu_kit.fatbin import strip

HERE = Path(__file__).resolve().parent
VLLM = "vllm==0.32.0"
CAPABILITY = 90
#: Libraries that are packed; all others of the wheel are for other GPUs or other models.
KERNELS = "vllm/_C_stable_libtorch.abi3.so"
FLASH_ATTENTION = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
#: Files of other kinds are data of models and kernels that the checks do not use, if larger.
LARGEST_OTHER = 200_000
MAX_BYTES = 60_000_000
PYTHON = "3.12"
GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)


class KitError(Exception):
    """The kit cannot be made; the message says why."""


def download(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """Wheels for the machine, whatever Python runs this.

    Args:
        folder: Where to.
        wanted: Requirements or ``-r FILE``, as pip takes them. What they depend on is left out.

    Raises:
        KitError: If pip fails.
    """
    platforms = [f"manylinux_2_{version}_x86_64" for version in GLIBC]
    platforms += ["manylinux1_x86_64", "manylinux2014_x86_64", "any"]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
    for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in platforms:
        command += ["--platform", platform]
    if subprocess.run([*command, *wanted], check=False).returncode:
        raise KitError(f"gpu-kit: pip could not download {' '.join(wanted)}; see above")
    return sorted(folder.glob("*.whl"))


def packed_files(wheel: Iterable[zipfile.ZipInfo]) -> Iterator[zipfile.ZipInfo]:
    """What of vLLM's wheel goes into the kit."""
    for entry in wheel:
        path = Path(entry.filename)
        is_code = path.suffix == ".py" or any(part.endswith(".dist-info") for part in path.parts)
        is_library = path.suffix == ".so" or ".so." in path.name
        if is_library:
            if entry.filename in (KERNELS, FLASH_ATTENTION):
                yield entry
        elif not entry.is_dir() and (is_code or entry.file_size <= LARGEST_OTHER):
            yield entry


def pack_vllm(wheel: Path, target: Path) -> None:
    """Write what is needed of vLLM's wheel as a ``.tar.xz``.

    Raises:
        KitError: If the wheel has no library of kernels for the GPU.
    """
    with zipfile.ZipFile(wheel) as source, tempfile.TemporaryDirectory() as folder:
        names = set()
        for entry in packed_files(source.infolist()):
            source.extract(entry, folder)
            names.add(entry.filename)
        missing = {KERNELS, FLASH_ATTENTION} - names
        if missing:
            raise KitError(f"gpu-kit: {wheel.name} has no {', '.join(sorted(missing))}")
        library = Path(folder) / KERNELS
        stripped = strip(library.read_bytes(), {CAPABILITY})
        if not stripped.kept:
            raise KitError(f"gpu-kit: {KERNELS} has no machine code for sm_{CAPABILITY}")
        library.write_bytes(stripped.data)
        with tarfile.open(target, "w:xz", preset=6) as packed:
            packed.add(folder, arcname=".")


def build(kit: Path, wheels: Path) -> int:
    """Make the kit.

    Args:
        kit: Folder of the kit; what it held before is removed.
        wheels: Folder for downloads. A wheel of vLLM that is there already is taken.

    Returns:
        Its bytes.

    Raises:
        KitError: If something is missing, or the kit is too large.
    """
    vllm, others = wheels / "vllm", wheels / "others"
    found = sorted(vllm.glob("vllm-*.whl")) or download(vllm, [VLLM])
    others = download(others, ["-r", str(HERE / "requirements.txt")])
    shutil.rmtree(kit, ignore_errors=True)
    kit.mkdir(parents=True)
    pack_vllm(found[-1], kit / "vllm.tar.xz")
    for wheel in others:
        shutil.copy2(wheel, kit)
    shutil.copy2(HERE / "check.sh", kit)
    # That machine's copy may have no history.
    (kit / "commit").write_text(describe_commit() + "\n", encoding="utf-8")
    return check_size(kit)


def check_size(kit: Path, most: int = MAX_BYTES) -> int:
    """Bytes of a kit.

    Raises:
        KitError: If there are too many, with the largest files.
    """
    sizes = {path.name: path.stat().st_size for path in kit.iterdir()}
    total = sum(sizes.values())
    if total > most:
        largest = sorted(sizes, key=sizes.__getitem__, reverse=True)[:5]
        raise KitError(
            f"gpu-kit: {kit} has {total / 1e6:.1f} MB, more than {most / 1e6:.0f}; largest: "
            + ", ".join(f"{name} {sizes[name] / 1e6:.1f}" for name in largest)
        )
    return total


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the kit and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kit", type=Path, default=REPOSITORY / ".kit")
    parser.add_argument("--wheels", type=Path, help="keep downloads there, and use what is there")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            size = build(options.kit, options.wheels or Path(folder))
    except KitError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.kit}: {size / 1e6:.1f} MB. There: bash .kit/check.sh 1, then 2")
    return 0


if __name__ == "__main__":
    sys.exit(main())
