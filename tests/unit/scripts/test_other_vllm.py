"""Another vLLM's Python over the operators of the CPU build; downloads are not tested here."""

import zipfile
from pathlib import Path

import pytest

from scripts import other_vllm
from scripts.other_vllm import OtherVllmError, installed_operators, main, make, unpack

METADATA = "Metadata-Version: 2.4\nName: vllm\nVersion: 9.1.0\nRequires-Python: >=3.10\n"
FILES = {
    "vllm/__init__.py": "",
    "vllm/_C.abi3.so": "for CUDA",
    "vllm/lib/libgomp.so.1": "for CUDA",
    "vllm/templates/chat.jinja": "{{ x }}",
    "vllm-9.1.0.dist-info/entry_points.txt": "",
}


def make_wheel(folder: Path, metadata: str = METADATA) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / "vllm-9.1.0-cp38-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as target:
        for name, content in {**FILES, "vllm-9.1.0.dist-info/METADATA": metadata}.items():
            target.writestr(name, content)
    return wheel


def test_unpack_takes_what_is_no_library_and_calls_it_a_cpu_build(tmp_path: Path) -> None:
    unpack(make_wheel(tmp_path / "wheels"), tmp_path / "made")
    made = {str(x.relative_to(tmp_path / "made")) for x in (tmp_path / "made").rglob("*.*")}
    assert {"vllm/__init__.py", "vllm/templates/chat.jinja"} <= made
    assert not any(".so" in name for name in made)
    metadata = tmp_path / "made" / "vllm-9.1.0.dist-info" / "METADATA"
    assert metadata.read_text() == METADATA.replace("9.1.0", "9.1.0+cpu")


@pytest.mark.parametrize("metadata", ["Name: vllm\n", METADATA.replace("9.1.0", "9.1.0+cu130")])
def test_unpack_rejects_what_it_cannot_call_a_cpu_build(tmp_path: Path, metadata: str) -> None:
    with pytest.raises(OtherVllmError, match="does not say its version"):
        unpack(make_wheel(tmp_path / "wheels", metadata), tmp_path / "made")


def test_operators_are_those_of_the_installed_build() -> None:
    found = installed_operators()
    assert "_C.abi3.so" in {name for _, name in found}
    assert all(path.is_file() for path, _ in found)


def test_make_is_whole_or_leaves_nothing(tmp_path, monkeypatch, capsys):
    wanted: list[str] = []

    def pip(command: str, *arguments: str) -> None:
        wanted.append(arguments[-1])
        if command == "install":
            raise OtherVllmError("other-vllm: pip install failed; see above")
        make_wheel(Path(arguments[arguments.index("-d") + 1]))

    monkeypatch.setattr(other_vllm, "pip", pip)
    assert main(["9.1.0", "--folder", str(tmp_path)]) == 1
    assert "pip install failed" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(other_vllm, "PACKAGES", [])
    monkeypatch.setattr(
        other_vllm, "pip", lambda command, *args: command == "install" or pip(command, *args)
    )
    made = make("9.1.0", tmp_path)
    assert (made / "vllm" / "_C.abi3.so").resolve().is_file()
    wanted.clear()
    assert make("9.1.0", tmp_path) == made
    assert wanted == []
