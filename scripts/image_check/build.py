"""Make a stand-in for the base image with debootstrap, and build on it with buildah."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.image_check.inputs import Base, CheckError, Image, debian_mirror, image, pip_settings

REPOSITORY = Path(__file__).resolve().parent.parent.parent
APT = Path("/etc/apt")
TAG = "localhost/think-vllm:image-check"
#: What the Python image has beside Debian's smallest system: Python with its headers, certificates.
PACKAGES = ("ca-certificates", "libpython3-dev", "python3-venv")
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
PIP_CONF = "/etc/pip.conf"
LOG_LINES = 30


def step(what: str, command: Sequence[str], log: Path, **variables: str) -> None:
    """Run a command with its output in a log, and say how long it took.

    Raises:
        CheckError: If it fails, with the end of the log.
    """
    start = time.monotonic()
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | variables,
            check=False,
        )
    if done.returncode:
        last = log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise CheckError("\n".join([f"{what}: {command[0]} failed", *last]))
    print(f"image-check: {what}, {time.monotonic() - start:.0f} s", flush=True)


def sources(folder: Path = APT) -> list[str]:
    """The texts of apt's lists of sources."""
    parts = folder / "sources.list.d"
    found = [
        folder / "sources.list",
        *sorted(parts.glob("*.sources")),
        *sorted(parts.glob("*.list")),
    ]
    return [path.read_text(encoding="utf-8") for path in found if path.exists()]


def make_base(base: Base, cache: Path, work: Path) -> Path:
    """A tar of the stand-in, made once and kept in `cache`.

    Raises:
        CheckError: If it cannot be made, or its Python is another one.
    """
    tar = cache / f"base-{base.suite}-python{base.python}.tar"
    if tar.exists():
        print(f"image-check: base from {tar}")
        return tar
    tree, log = work / "base", work / "base.log"
    include = f"--include={','.join(PACKAGES)}"
    # Without a mirror of this release in apt's sources, debootstrap takes Debian's own.
    mirror = debian_mirror(sources(), base.suite)
    command = ["debootstrap", "--variant=minbase", include, base.suite, str(tree)]
    step("base made by debootstrap", [*command, *([mirror] if mirror else [])], log)
    # The Python image has its Python there, and pip may install into it.
    step(
        "/usr/local made a Python",
        ["chroot", str(tree), "python3", "-m", "venv", "/usr/local"],
        log,
    )
    name = f"python{base.python}"
    if not (tree / "usr/local/bin" / name).exists():
        raise CheckError(
            f"Debian's {base.suite} has no {name}, so it cannot stand in for the base image"
        )
    for folder in ("var/cache/apt", "var/lib/apt/lists"):
        shutil.rmtree(tree / folder)
        (tree / folder).mkdir()
    cache.mkdir(parents=True, exist_ok=True)
    partial = tar.with_suffix(".partial")
    step(
        "base packed", ["tar", "-C", str(tree), "--one-file-system", "-cf", str(partial), "."], log
    )
    partial.rename(tar)
    shutil.rmtree(tree)
    return tar


class Builder:
    """buildah with a storage of its own, which goes with the work folder."""

    def __init__(self, work: Path) -> None:
        self._log = work / "build.log"
        self._work = work
        # vfs copies, and so needs nothing of the kernel: it works inside of a container, too.
        driver = os.environ.get("STORAGE_DRIVER", "vfs")
        places = ["--root", str(work / "storage"), "--runroot", str(work / "run")]
        self._buildah = ["buildah", *places, "--storage-driver", driver]
        (work / "tmp").mkdir()

    def _step(self, what: str, *arguments: str) -> None:
        step(what, [*self._buildah, *arguments], self._log, TMPDIR=str(self._work / "tmp"))

    def _ask(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._buildah, *arguments], check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise CheckError(f"buildah {arguments[0]} failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def import_base(self, tar: Path, reference: str) -> None:
        """Give the stand-in the name that the Dockerfile asks for."""
        container = self._ask("from", "scratch")
        self._step("base unpacked", "add", "--quiet", container, str(tar), "/")
        self._ask("config", "--env", f"PATH={PATH}", "--cmd", "python3", container)
        self._step("base stored", "commit", "--quiet", "--rm", container, reference)

    def build(self, target: str = "cpu") -> Image:
        """Build a target with the package index of this machine, and return what the image says.

        pip's configuration is mounted while the steps run, so no layer has it.

        Raises:
            CheckError: If the build fails, or left the configuration in the image.
        """
        listed = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"],
            check=True,
            capture_output=True,
            text=True,
        )
        settings, paths = pip_settings(listed.stdout)
        pip_conf = self._work / "pip.conf"
        pip_conf.write_text(settings, encoding="utf-8")
        mounts = [f"{pip_conf}:{PIP_CONF}:ro", *(f"{path}:{path}:ro" for path in paths)]
        # Without --pull-never an image that is not there is asked for at a registry.
        options = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--no-cache"]
        options += [f"--volume={mount}" for mount in mounts]
        if index := os.environ.get("TORCH_INDEX"):
            options += ["--build-arg", f"TORCH_INDEX={index}"]
        self._step(
            f"target {target} built",
            "build",
            *options,
            "--target",
            target,
            "-t",
            TAG,
            str(REPOSITORY),
        )
        return image(json.loads(self._ask("inspect", "--type", "image", TAG))["Docker"]["config"])

    def mount(self) -> Path:
        """The files of the image, in a container of it.

        Raises:
            CheckError: If pip's configuration is among them.
        """
        start = time.monotonic()
        container = self._ask("from", "--pull-never", TAG)
        root = Path(self._ask("mount", container))
        print(f"image-check: image unpacked, {time.monotonic() - start:.0f} s")
        left = root / PIP_CONF.lstrip("/")
        # buildah leaves the empty file that it mounted ours on.
        if left.exists() and left.stat().st_size:
            raise CheckError(f"the image has {PIP_CONF}, which may name an index and its password")
        return root

    def clear(self) -> None:
        """Unmount everything, so that the work folder can be removed."""
        subprocess.run([*self._buildah, "rm", "--all"], check=False, capture_output=True)
