"""The kit: what goes in, what is stripped, and how large it may be."""

import struct
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.support.repository import describe_commit
from scripts.gpu_kit import build
from scripts.gpu_kit.build import FLASH_ATTENTION, KERNELS, KitError, check_size, pack_vllm
from scripts.gpu_kit.fatbin import MACHINE_CODE, MAGIC, PTX, strip
from tests.conftest import REPOSITORY

ENTRY_HEADER = 64


def entry(kind: int, capability: int, code: bytes) -> bytes:
    header = struct.pack("<HHIQ", kind, 257, ENTRY_HEADER, len(code)).ljust(28, b"\1")
    return (header + struct.pack("<I", capability)).ljust(ENTRY_HEADER, b"\2") + code


def fatbin(*entries: bytes) -> bytes:
    body = b"".join(entries)
    return MAGIC + struct.pack("<HHQ", 1, 16, len(body)) + body


A100 = entry(MACHINE_CODE, 80, b"a" * 40)
H100 = entry(MACHINE_CODE, 90, b"h" * 24)
TEXT = entry(PTX, 90, b"p" * 32)


def test_only_machine_code_of_the_gpu_stays() -> None:
    data = b"ELF" + fatbin(A100, H100, TEXT) + b"between" + fatbin(H100, A100) + b"end"
    made = strip(data, {90})
    assert len(made.data) == len(data)
    assert made.data.count(b"h" * 24) == 2
    for gone in (b"a", b"p" * 8):
        assert gone not in made.data
    assert (made.data[:3], made.data[-3:]) == (b"ELF", b"end")
    assert b"between" in made.data
    assert (made.kept, made.zeroed) == ({90: 48}, {80: 80, 90: 32})
    # Headers stay, so the driver finds the next entry.
    assert made.data.count(struct.pack("<HHI", MACHINE_CODE, 257, ENTRY_HEADER)) == 4


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"no fatbin at all", MAGIC, MAGIC + bytes(20)),
        MAGIC + struct.pack("<HHQ", 0, 0, 0) + MAGIC,
        # Kinds and headers that no entry has.
        fatbin(entry(7, 80, b"xyz")),
        fatbin(struct.pack("<HHIQ", MACHINE_CODE, 257, 9999, 8).ljust(80, b"x")),
    ],
)
def test_what_only_looks_like_a_fatbin_is_left_alone(data: bytes) -> None:
    assert strip(data, {90}).data == data


def test_code_that_claims_to_be_longer_than_the_file() -> None:
    data = fatbin(A100)
    assert strip(data[:-10], {90}).data == data[: -len(A100)] + A100[:ENTRY_HEADER] + bytes(30)


def make_wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


FILES = {
    "vllm/__init__.py": b"",
    "vllm/_moe_C.abi3.so": b"other kernels",
    "vllm/lib.so.1": b"another",
    KERNELS: b"ELF" + fatbin(A100, H100),
    FLASH_ATTENTION: b"flash",
    "vllm/table.json": b"small",
    "vllm/large.json": bytes(build.LARGEST_OTHER + 1),
    "vllm-0.32.0.dist-info/RECORD": bytes(build.LARGEST_OTHER + 1),
}


def test_what_of_vllm_is_packed(tmp_path: Path) -> None:
    target = tmp_path / "vllm.tar.xz"
    pack_vllm(make_wheel(tmp_path / "vllm-0.32.0-x.whl", FILES), target)
    with tarfile.open(target) as packed:
        names = {Path(name).as_posix() for name in packed.getnames()}
        small = {"vllm/__init__.py", "vllm/table.json", "vllm-0.32.0.dist-info/RECORD"}
        assert FILES.keys() & names == small | {KERNELS, FLASH_ATTENTION}
        kernels = packed.extractfile(f"./{KERNELS}")
        assert kernels is not None
        assert kernels.read() == strip(FILES[KERNELS], {90}).data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FLASH_ATTENTION: None}, "has no vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"),
        ({KERNELS: b"ELF" + fatbin(A100)}, "no machine code for sm_90"),
    ],
)
def test_a_wheel_that_does_not_fit(tmp_path: Path, change: dict, message: str) -> None:
    files = {name: data for name, data in (FILES | change).items() if data is not None}
    with pytest.raises(KitError, match=message):
        pack_vllm(make_wheel(tmp_path / "vllm-0.32.0-x.whl", files), tmp_path / "vllm.tar.xz")


def test_size(tmp_path: Path) -> None:
    (tmp_path / "small.whl").write_bytes(bytes(10))
    (tmp_path / "large.whl").write_bytes(bytes(2_000_000))
    assert check_size(tmp_path) == 2_000_010
    with pytest.raises(KitError, match=r"2\.0 MB, more than 1; largest: large\.whl 2\.0, small"):
        check_size(tmp_path, 1_000_000)


def test_requirements_are_pinned() -> None:
    lines = (build.HERE / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if line and "==" not in line and line[0] != "#"] == []


def test_commit() -> None:
    assert len(describe_commit().removesuffix("-dirty")) == 40


def test_the_kits_script_can_be_read() -> None:
    checked = subprocess.run(["bash", "-n", "scripts/gpu_kit/check.sh"], cwd=REPOSITORY)
    assert checked.returncode == 0
