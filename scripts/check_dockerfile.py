"""Run the Dockerfile's CPU target where there is no container engine, then serve from it.

The commands are those of the file: this reads it, runs the steps of a target in a directory tree
that stands in for the base image, and starts the entry point there as the image's user, in mount,
network and process namespaces of its own, with a read-only root. It ends when the health check has
passed, a prompt is answered with its key and refused without, and no secret is in the log or the
metrics. It needs root, `debootstrap` for the tree, and a package index.

    debootstrap --variant=minbase --include=python3-venv,libpython3-dev bookworm BASE
    chroot BASE python3 -m venv /usr/local
    python scripts/check_dockerfile.py BASE WORK      # BASE stays as it is; WORK is made
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
#: What an index needs from outside; images get these from the builder.
PIP_VARIABLES = ("PIP_CERT", "PIP_FIND_LINKS", "PIP_INDEX_URL", "TORCH_INDEX")
SECRETS = {"VLLM_API_KEY": "key-of-the-check", "HF_TOKEN": "hf_token_of_the_check"}
START_TIMEOUT_S = 600
POLL_S = 0.5
#: Minor numbers of the devices of /dev.
DEVICES = {"null": "3", "zero": "5", "random": "8", "urandom": "9"}
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
ASK = """
import json, sys, urllib.error, urllib.request as u
body = json.load(open("models/tiny-recall/example.json"))
data = {"model": "models/tiny-recall", "prompt": body["prompt"], "max_tokens": 4, "temperature": 0}
headers = {"Content-Type": "application/json", "Authorization": "Bearer " + sys.argv[1]}
request = u.Request("http://127.0.0.1:8000/v1/completions", json.dumps(data).encode(), headers)
try:
    print(json.load(u.urlopen(request))["choices"][0]["text"].strip(), body["answer"], sep="|")
except urllib.error.HTTPError as error:
    print(error.code)
"""
METRICS = (
    "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8000/metrics').read().decode())"
)


@dataclass
class Stage:
    """One stage of the Dockerfile, built in a directory tree."""

    root: str
    workdir: str = "/"
    environment: dict[str, str] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)

    def path(self, inside: str) -> Path:
        """Where a path of the image lies here."""
        return Path(
            f"{self.root}/{self.workdir}/{inside}" if inside[0] != "/" else self.root + inside
        )

    def chroot(self, command: list[str], user: str, **options: str) -> list[str]:
        """The command line that runs a command in the tree."""
        variables = {"PATH": PATH, **self.environment, **options}
        given = [f"{name}={value}" for name, value in variables.items()]
        enter = f'cd {shlex.quote(self.workdir)} && exec "$@"'
        inside = ["env", "-i", *given, "sh", "-c", enter, "sh", *command]
        return ["chroot", f"--userspec={user}", self.root, *inside]


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, with continued lines joined as it says."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", "")
    return [
        (name, rest.strip()) for name, _, rest in (x.partition(" ") for x in joined.split("\n"))
    ]


def build(base: Path, work: Path) -> Stage:
    """Run all stages up to ``cpu``; return that one."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage = Stage(str(base))
    for name, rest in instructions((REPOSITORY / "Dockerfile").read_text(encoding="utf-8")):
        if name == "FROM":
            _, _, label = rest.split()
            if "cpu" in stages:
                break
            stage = stages[label] = Stage(f"{work}/{label}")
            subprocess.run(["cp", "-a", f"{base}/.", stage.root], check=True)
        elif name == "ARG":
            key, _, value = rest.partition("=")
            arguments.setdefault(key, os.environ.get(key, value.strip('"')))
        elif name == "WORKDIR":
            stage.workdir = rest
            stage.path(rest).mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                copy(REPOSITORY / source, stage.path(target))
        elif name == "ENV":
            stage.environment |= dict(part.split("=", 1) for part in shlex.split(rest))
        elif name == "RUN":
            run_step(stage, rest, stages, arguments)
        elif name:
            stage.settings[name] = rest
    return stages["cpu"]


def copy(source: Path, target: Path) -> None:
    """What COPY does with a file, a directory, and `./` as the target."""
    if source.is_dir():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)
    else:
        shutil.copy(source, target)


def run_step(stage: Stage, rest: str, stages: dict[str, Stage], arguments: dict[str, str]) -> None:
    """Run one RUN instruction, with its bind mounts as copies that are taken away again."""
    mounts = []
    while match := re.match(r"--mount=(\S+)\s+", rest):
        fields = dict(part.split("=", 1) for part in match[1].split(","))
        source, target = fields["source"], stage.path(fields["target"])
        copy(
            stages[fields["from"]].path(source) if "from" in fields else REPOSITORY / source, target
        )
        mounts.append(target)
        rest = rest[match.end() :]
    print(f"RUN {rest}", flush=True)
    variables = {name: os.environ[name] for name in PIP_VARIABLES if name in os.environ}
    command = stage.chroot(["sh", "-c", rest], "0:0", **arguments, **variables)
    subprocess.run(command, check=True)
    for target in mounts:
        shutil.rmtree(target)


def serve(stage: Stage, log: Path) -> None:
    """Start the entry point with the default command, and check what it does."""
    root = stage.root
    mounts = [
        ["mount", "--bind", root, root],
        *(["mount", "-t", "tmpfs", "tmpfs", f"{root}/{name}"] for name in ("tmp", "dev")),
        ["mkdir", f"{root}/dev/shm"],
        ["chmod", "1777", f"{root}/dev/shm"],
        *(["mknod", "-m", "666", f"{root}/dev/{n}", "c", "1", k] for n, k in DEVICES.items()),
        ["mount", "-t", "proc", "proc", f"{root}/proc"],
        ["mount", "-t", "sysfs", "-o", "ro", "sysfs", f"{root}/sys"],
        ["mount", "--bind", f"{root}/cache", f"{root}/cache"],
        ["mount", "-o", "remount,bind,ro", root],
        ["ip", "link", "set", "lo", "up"],
    ]
    for command in mounts:
        subprocess.run(command, check=True)
    user = stage.settings["USER"]
    entry = json.loads(stage.settings["ENTRYPOINT"]) + json.loads(stage.settings["CMD"])
    health = json.loads(stage.settings["HEALTHCHECK"].partition("CMD ")[2])
    hub = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    start = time.monotonic()
    with log.open("wb") as output:
        server = subprocess.Popen(
            stage.chroot(entry, user, **SECRETS, **hub), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while subprocess.run(stage.chroot(health, user), capture_output=True).returncode:
            late = time.monotonic() - start > START_TIMEOUT_S
            if late or server.poll() is not None:
                raise SystemExit(f"the server is not healthy, see {log}")
            time.sleep(POLL_S)
        print(f"healthy after {time.monotonic() - start:.0f} s, as user {user}, root read-only")
        outside = subprocess.run(stage.chroot(["touch", "/opt/file"], "0:0"), capture_output=True)
        check("the root is read-only", outside.returncode != 0)
        got, answer = python(stage, user, ASK, SECRETS["VLLM_API_KEY"]).split("|")
        check(f"the answer is {answer!r}, got {got!r}", got == answer)
        check("another key is refused", python(stage, user, ASK, "another") == "401")
        metrics, said = python(stage, user, METRICS), log.read_text("utf-8", errors="replace")
        log.with_name("metrics.txt").write_text(metrics, encoding="utf-8")
        shown = [secret for secret in SECRETS.values() if secret in metrics + said]
        check("no secret is in the log or the metrics", not shown)
        check("KV blocks are thin", "key channels" in said)
    finally:
        # Its children end with this namespace; while it starts it does not listen to SIGTERM.
        server.kill()


def python(stage: Stage, user: str, code: str, *arguments: str) -> str:
    """Run some Python in the tree, return what it prints."""
    command = stage.chroot(["python3", "-c", code, *arguments], user)
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def check(what: str, passed: bool) -> None:
    """Print what holds, or end the program."""
    if not passed:
        raise SystemExit(f"failed: {what}")
    print(f"ok: {what}")


if __name__ == "__main__":
    work = Path(sys.argv[-1]).resolve()
    state = work / "stage.json"
    if sys.argv[1] != "serve":
        built = build(Path(sys.argv[1]).resolve(), work)
        state.write_text(json.dumps(asdict(built)), encoding="utf-8")
        # Namespaces of its own: mounts, port 8000 and processes end with this program.
        options = ["--mount", "--net", "--pid", "--fork", "--kill-child"]
        again = [sys.executable, __file__, "serve", str(work)]
        os.execvp("unshare", ["unshare", *options, *again])
    serve(Stage(**json.loads(state.read_text(encoding="utf-8"))), work / "server.log")
