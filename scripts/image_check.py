"""Build the CPU image, run it as `deploy/compose.cpu.yaml` does, and ask it the README's question.

It needs root, buildah, debootstrap, curl and util-linux, a Debian mirror and a package index; no
image registry and no Docker. In place of the base image, Debian's own Python of the same version
is used. That stand-in is kept in `build/image-check`, everything else is removed.
Run: ``make image-check``, or ``python -m scripts.image_check``.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / "build" / "image-check"
TAG, PORT = "localhost/think-vllm:image-check", 8000
SECRETS = {"VLLM_API_KEY": "key-of-the-check", "HF_TOKEN": "hf_token_of_the_check"}
PROGRAMS = ("buildah", "debootstrap", "curl", "unshare", "nsenter", "setpriv")
#: What the Python image has beside Debian's smallest system: Python with its headers, certificates.
PACKAGES = "ca-certificates,libpython3-dev,python3-venv"
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
#: Options of pip that say where packages come from.
PIP_OPTIONS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert",
               "constraint", "proxy")  # fmt: skip
#: What Docker gives a container between SIGTERM and SIGKILL.
STOP_GRACE_S = 10
NANOSECONDS = 1_000_000_000
#: Mounts what the service may write to, makes the rest read-only, and drops every right.
ENTER = """
set -e
root=$1 user=$2 group=$3 workdir=$4; shift 4
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"; mount --rbind /sys "$root/sys"
while [ "$1" != -- ]; do mount $1 "$root$2"; shift 2; done; shift
mount -o remount,bind,ro "$root"
exec chroot "$root" setpriv --reuid="$user" --regid="$group" --clear-groups --bounding-set=-all \\
    --inh-caps=-all --ambient-caps=-all --no-new-privs env -i -C "$workdir" "$@"
"""


class CheckError(Exception):
    """The check cannot be made, or failed; the message says why."""


def check(what: str, passed: bool, got: str = "") -> None:
    """Print what holds.

    Raises:
        CheckError: If it does not.
    """
    if not passed:
        raise CheckError(f"failed: {what}" + (f"; got: {got}" if got else ""))
    print(f"image-check: ok: {what}", flush=True)


def output(*command: str, timeout_s: float | None = 120, check_status: bool = True) -> str:
    """Standard output and errors of a program.

    Raises:
        CheckError: If it fails, unless its status is not checked.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        timeout=timeout_s, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode and check_status:
        last = "\n".join(done.stdout.splitlines()[-30:])
        raise CheckError(f"{shlex.join(command[:4])} ... failed:\n{last}")
    return done.stdout.strip()


def step(what: str, *command: str) -> None:
    """Run a program that may take long, and say how long it took."""
    start = time.monotonic()
    output(*command, timeout_s=None)
    print(f"image-check: {what}, {time.monotonic() - start:.0f} s", flush=True)


def base_image(dockerfile: str) -> tuple[str, str, str]:
    """The base image of the CPU target, its Python and its Debian release.

    Raises:
        CheckError: If Debian has no stand-in for it.
    """
    found = re.search(r"^FROM (python:(\d+\.\d+)-slim-([a-z]+)) AS cpu$", dockerfile, re.M)
    if not found:
        raise CheckError(
            "the Dockerfile's target cpu must be FROM python:VERSION-slim-RELEASE, for which "
            "debootstrap makes a stand-in"
        )
    return f"docker.io/library/{found[1]}", found[2], found[3]


def question(readme: str) -> tuple[list[str], str]:
    """The README's `curl` as a list of words, and the answer that it promises.

    Raises:
        CheckError: If one of them is not there.
    """
    command = re.search(r"```bash\n(curl .*?/v1/completions .*?)```", readme, re.DOTALL)
    answer = re.search(r"The answer is `([^`]+)`", readme)
    if not command or not answer:
        raise CheckError(
            "README.md needs a block ```bash that begins with `curl` and asks /v1/completions, "
            "and a sentence: The answer is `...`"
        )
    return shlex.split(command[1]), answer[1]


def pip_settings(listed: str) -> tuple[str, list[Path]]:
    """What `pip config list` prints, as a `pip.conf`, and the local folders that it names."""
    settings, folders = {}, set()
    for line in reversed(listed.splitlines()):  # environment variables come first, and win
        name, _, value = line.partition("=")
        if (option := name.rpartition(".")[2]) in PIP_OPTIONS:
            settings[option] = ast.literal_eval(value)
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        # Pages of an index lead to files beside its folder `simple`.
        path = path.parent if path.name == "simple" else path
        folders |= {path} if path.is_absolute() and path.exists() else set()
    lines = [f"{option} = {value}" for option, value in settings.items()]
    return "\n".join(["[global]", *lines, ""]), sorted(folders)


def mounts(service: Mapping[str, Any], folder: Path) -> list[str]:
    """What a compose service may write to, as pairs of `mount`'s options and a path.

    Raises:
        CheckError: If the service has a right that this check does not take away.
    """
    confined = {"cap_drop": ["ALL"], "security_opt": ["no-new-privileges:true"], "read_only": True}
    if any(service.get(name) != value for name, value in confined.items()):
        raise CheckError(f"compose: the service must have {confined}")
    pairs = [f"-t tmpfs -o size={service['shm_size'].removesuffix('b')} tmpfs", "/dev/shm"]
    for volume in service["volumes"]:
        pairs += [f"--bind {folder}", volume.split(":")[1]]
    for entry in service["tmpfs"]:
        target, _, options = entry.partition(":")
        pairs += [f"-t tmpfs -o nosuid,nodev,{options} tmpfs", target]
    return pairs


def make_base(python: str, suite: str, work: Path) -> Path:
    """A tar of the stand-in for the base image, made once."""
    tar, tree = CACHE / f"base-{suite}-python{python}.tar", work / "base"
    if not tar.exists():
        mirror = filter(None, [os.environ.get("DEBIAN_MIRROR")])
        include = f"--include={PACKAGES}"
        step("base", "debootstrap", "--variant=minbase", include, suite, str(tree), *mirror)
        # The Python image has its Python there, and pip may install into it.
        output("chroot", str(tree), "python3", "-m", "venv", "/usr/local")
        if not (tree / f"usr/local/bin/python{python}").exists():
            raise CheckError(f"Debian's {suite} has no python{python}")
        CACHE.mkdir(parents=True, exist_ok=True)
        output("tar", "-C", str(tree), "--one-file-system", "-cf", f"{tar}.partial", ".")
        Path(f"{tar}.partial").rename(tar)
        shutil.rmtree(tree)
    return tar


def build(buildah: Sequence[str], work: Path) -> tuple[Path, dict[str, Any]]:
    """Build the image; return its files and its configuration."""
    reference, python, suite = base_image((REPOSITORY / "Dockerfile").read_text("utf-8"))
    base = output(*buildah, "from", "scratch")
    output(*buildah, "add", "--quiet", base, str(make_base(python, suite, work)), "/")
    output(*buildah, "config", "--env", f"PATH={PATH}", base)
    step("base stored", *buildah, "commit", "--quiet", "--rm", base, reference)
    settings, folders = pip_settings(output(sys.executable, "-m", "pip", "config", "list"))
    (work / "pip.conf").write_text(settings, encoding="utf-8")
    volumes = {str(work / "pip.conf"): "/etc/pip.conf"} | {str(path): path for path in folders}
    options = [f"--volume={source}:{target}:ro" for source, target in volumes.items()]
    if index := os.environ.get("TORCH_INDEX"):
        options += ["--build-arg", f"TORCH_INDEX={index}"]
    step(
        "target cpu built", *buildah, "build", "--isolation", "chroot", "--pull-never", "--format",
        "docker", *options, "--target", "cpu", "-t", TAG, str(REPOSITORY),
    )  # fmt: skip
    root = Path(output(*buildah, "mount", output(*buildah, "from", "--pull-never", TAG)))
    left = root / "etc/pip.conf"  # buildah leaves the empty file that it mounted ours on
    check("pip's configuration is not in the image", not left.exists() or not left.stat().st_size)
    inspected = json.loads(output(*buildah, "inspect", "--type", "image", TAG))
    return root, inspected["Docker"]["config"]


class Server:
    """The image's own command, confined as a compose service; a context manager."""

    def __init__(self, root: Path, config: dict[str, Any], service: dict[str, Any], work: Path):
        user, group = config["User"].split(":")
        check(f"the user is {user}:{group}", "0" not in (user, group))
        (root / "etc/hosts").write_text(f"127.0.0.1 localhost {socket.gethostname()}\n")
        shutil.copytree(root / "cache", work / "cache")
        output("chown", "-R", f"{user}:{group}", str(work / "cache"))
        variables = {k: v for k, v in service["environment"].items() if v is not None} | SECRETS
        self.health, self.log = config["Healthcheck"], work / "server.log"
        where = [str(root), user, group, config["WorkingDir"], *mounts(service, work / "cache")]
        command = [*config["Env"], *(f"{name}={value}" for name, value in variables.items()),
                   *config["Entrypoint"], *config["Cmd"]]  # fmt: skip
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*unshare, *where, "--", *command], stdout=log, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def inside(self, *command: str, check_status: bool = True) -> str:
        """Output of a command in the server's file system, as root but without its rights."""
        (child,) = psutil.Process(self._process.pid).children()
        enter = ("nsenter", f"--target={child.pid}", "--mount", "--root", "--wd")
        return output(*enter, "env", f"PATH={PATH}", *command, check_status=check_status)

    def wait_healthy(self) -> float:
        """Seconds until the image's health check passes.

        Raises:
            CheckError: If it does not before Docker gives up, or the server ends.
        """
        start, health = time.monotonic(), self.health
        deadline_s = (health["StartPeriod"] + health["Retries"] * health["Interval"]) / NANOSECONDS
        while True:
            took = time.monotonic() - start
            if self._process.poll() is not None or took > deadline_s:
                raise CheckError(f"not healthy after {took:.0f} s:\n{self.log.read_text()[-4000:]}")
            try:
                self.inside(*health["Test"][1:])
                return took
            except (CheckError, ValueError):  # not yet
                time.sleep(0.5)

    def stop(self) -> float:
        """Seconds from SIGTERM to the end."""
        start = time.monotonic()
        (child,) = psutil.Process(self._process.pid).children()
        child.terminate()
        try:
            self._process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired as error:
            raise CheckError(f"it runs {STOP_GRACE_S} s after SIGTERM") from error
        return time.monotonic() - start


def ask(server: Server) -> None:
    """Hold a server that starts to what is promised of it."""
    check(f"healthy after {server.wait_healthy():.0f} s", True)
    said = server.inside("touch", "/opt/think-vllm/file", check_status=False)
    check("the root is read-only", "Read-only file system" in said, said)
    curl, answer = question((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    body = output(*curl, "-H", f"Authorization: Bearer {SECRETS['VLLM_API_KEY']}")
    got = json.loads(body)["choices"][0]["text"].strip() if '"choices"' in body else body
    check(f"the README's question is answered with {answer!r}", got == answer, got)
    status = ("-o", "/dev/null", "-w", "%{http_code}")
    code = output(*curl, *status, "-H", "Authorization: Bearer another")
    check("another key is rejected", code == "401", code)
    metrics, log = output("curl", "-s", f"http://localhost:{PORT}/metrics"), server.log.read_text()
    check("KV blocks are thin", "key channels" in log and "think_vllm:" in metrics)
    shown = [name for name, secret in SECRETS.items() if secret in metrics + log]
    check("no secret is in the log or the metrics", not shown, ", ".join(shown))
    check(f"it ends {server.stop():.1f} s after SIGTERM", True)


def check_machine(programs: Iterable[str] = PROGRAMS) -> None:
    """Reject at the start what cannot end.

    Raises:
        CheckError: If a program is missing, this is not root, or the server's port is taken.
    """
    if missing := [name for name in programs if not shutil.which(name)]:
        raise CheckError(f"{', '.join(missing)} not found; on Debian and Ubuntu: apt-get install "
                         "--no-install-recommends buildah debootstrap curl util-linux")  # fmt: skip
    if os.geteuid() != 0:
        raise CheckError("it makes a Debian system and mounts: sudo make image-check")
    with socket.socket() as port:
        if port.connect_ex(("127.0.0.1", PORT)) == 0:
            raise CheckError(f"a program listens on port {PORT}, where the image's server will")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the image; 1 if it cannot be, or is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the work folder, and say where")
    keep, start = parser.parse_args(arguments).keep, time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="think-vllm-image-"))
    # vfs copies, and so needs nothing of the kernel: it works inside of a container, too.
    driver = os.environ.get("STORAGE_DRIVER", "vfs")
    places = ("--root", str(work / "storage"), "--runroot", str(work / "run"))
    buildah = ("buildah", *places, "--storage-driver", driver)
    services = (REPOSITORY / "deploy/compose.cpu.yaml").read_text(encoding="utf-8")
    try:
        check_machine()
        root, config = build(buildah, work)
        with Server(root, config, yaml.safe_load(services)["services"]["thin"], work) as server:
            ask(server)
    except CheckError as error:
        print(f"image-check: {error}", file=sys.stderr)
        return 1
    finally:
        if keep:
            print(f"image-check: logs and files are in {work}")
        else:
            subprocess.run([*buildah, "rm", "--all"], check=False, capture_output=True)
            shutil.rmtree(work, ignore_errors=True)
    print(f"image-check: passed, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
