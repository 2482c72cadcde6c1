"""Build the CPU image, run it as `deploy/compose.cpu.yaml` does, and ask it the README's question.

It needs root, buildah, debootstrap, runc, curl and nsenter, a Debian mirror and a package index,
and 12 GB for temporary files; no image registry and no Docker. In place of the base image, Debian's
own Python of the same version is used. That stand-in is kept in `build/image-check`, everything
else is removed.
Run: ``make image-check``, or ``python -m scripts.image_check.check``.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from scripts.image_check.build import REPOSITORY, Builder, make_base
from scripts.image_check.container import Container
from scripts.image_check.inputs import CheckError, Image, base_image, question
from tests.support.deploy import compose_services, dockerfile_instructions

CACHE = REPOSITORY / "build" / "image-check"
SECRETS = {"VLLM_API_KEY": "key-of-the-check", "HF_TOKEN": "hf_token_of_the_check"}
#: Programs, and the Debian package that has each.
PROGRAMS = {
    "buildah": "buildah",
    "debootstrap": "debootstrap",
    "runc": "runc",
    "curl": "curl",
    "nsenter": "util-linux",
}


def check_machine(
    which: Callable[[str], str | None] = shutil.which, user: int | None = None
) -> None:
    """Reject at the start what cannot end.

    Raises:
        CheckError: If a program is missing, or this is not root.
    """
    missing = [name for name in PROGRAMS if not which(name)]
    if missing:
        packages = " ".join(PROGRAMS[name] for name in missing)
        raise CheckError(
            f"{', '.join(missing)} not found; on Debian and Ubuntu: "
            f"apt-get install --no-install-recommends {packages}"
        )
    if (os.geteuid() if user is None else user) != 0:
        raise CheckError(
            "it makes a Debian system and mounts, so it needs root: sudo make image-check"
        )


def check(what: str, passed: bool, got: str = "") -> None:
    """Print what holds.

    Raises:
        CheckError: If it does not.
    """
    if not passed:
        raise CheckError(f"failed: {what}" + (f"; got: {got}" if got else ""))
    print(f"image-check: ok: {what}", flush=True)


def check_container(container: Container, image: Image) -> None:
    """Hold a container that starts to what is promised of it."""
    took = container.wait_healthy(image.health)
    user = f"{image.user}:{image.group}"
    check(f"healthy after {took:.0f} s, as user {user}", True)
    outside = container.run(["touch", f"{image.workdir}/file"], "--user", "0:0").stderr
    check("the root is read-only", "Read-only file system" in outside, outside)
    curl, answer = question((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    key = ["-H", f"Authorization: Bearer {SECRETS['VLLM_API_KEY']}"]
    body = container.ask([*curl, *key])
    got = json.loads(body)["choices"][0]["text"].strip() if '"choices"' in body else body
    check(f"the README's question is answered with {answer!r}", got == answer, got)
    status = ["-o", "/dev/null", "-w", "%{http_code}"]
    code = container.ask([*curl, *status, "-H", "Authorization: Bearer another"])
    check("another key is rejected", code == "401", code)
    metrics = container.ask(["curl", "-s", "http://localhost:8000/metrics"])
    said = container.log.read_text("utf-8", errors="replace")
    check("KV blocks are thin", "key channels" in said and "think_vllm:" in metrics)
    shown = [name for name, secret in SECRETS.items() if secret in metrics + said]
    check("no secret is in the log or the metrics", not shown, ", ".join(shown))
    check(f"it ends {container.stop():.1f} s after SIGTERM", True)


def run(work: Path) -> None:
    """Build, start, ask."""
    base = base_image(dockerfile_instructions())
    builder = Builder(work)
    try:
        builder.import_base(make_base(base, CACHE, work), base.reference)
        image = builder.build()
        service = compose_services("compose.cpu.yaml")["thin"]
        with Container(image, service, builder.mount(), work, SECRETS) as container:
            check_container(container, image)
    finally:
        builder.clear()


def _end(number: int, _: FrameType | None) -> None:
    """Let a signal run what cleans up."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the image; 1 if it cannot be, or is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the work folder, and say where")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    work = None
    try:
        check_machine()
        signal.signal(signal.SIGTERM, _end)
        work = Path(tempfile.mkdtemp(prefix="think-vllm-image-"))
        run(work)
    except CheckError as error:
        print(f"image-check: {error}", file=sys.stderr)
        return 1
    finally:
        if work is not None and options.keep:
            print(f"image-check: logs and files are in {work}")
        elif work is not None:
            shutil.rmtree(work)
    print(f"image-check: passed, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
