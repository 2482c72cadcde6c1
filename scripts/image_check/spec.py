"""Write a container's configuration for an OCI runtime, from an image and a compose service.

Docker and Kubernetes make one like it and give it to the same runtime.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.image_check.inputs import CheckError, Image

#: What Docker mounts a tmpfs with, as long as the service does not say the opposite.
TMPFS_OPTIONS = ("noexec", "nosuid", "nodev")
UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
HOSTS = "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {hostname}\n"
HOSTNAME = "think-vllm"


def size_bytes(text: str) -> int:
    """A size of a compose file: `64m`, `1gb`.

    Raises:
        CheckError: If it is none.
    """
    found = re.fullmatch(r"(\d+)([kmg]?)b?", text.lower())
    if not found:
        raise CheckError(f"compose: a size is {text!r}; write it as a number and b, k, m or g")
    return int(found[1]) * UNITS[found[2]]


def tmpfs(entry: str) -> dict[str, Any]:
    """The mount of a service's `tmpfs` entry, `/tmp:exec,mode=1777`."""
    target, _, options = entry.partition(":")
    given = [option for option in options.split(",") if option]
    kept = [option for option in TMPFS_OPTIONS if option.removeprefix("no") not in given]
    return {
        "destination": target,
        "type": "tmpfs",
        "source": "tmpfs",
        "options": [*kept, *(option for option in given if option not in kept)],
    }


def volume_targets(service: Mapping[str, Any]) -> list[str]:
    """Where a service has named volumes, which it may write to."""
    fields = [volume.split(":") for volume in service.get("volumes", [])]
    return [target for name, target, *mode in fields if name[0] not in "./" and "ro" not in mode]


def writable_targets(service: Mapping[str, Any]) -> set[str]:
    """All paths that a service may write to, beside those that its runtime always gives it."""
    return {tmpfs(entry)["destination"] for entry in service.get("tmpfs", [])} | {
        *volume_targets(service)
    }


def environment(
    image: Image, service: Mapping[str, Any], given: Mapping[str, str]
) -> dict[str, str]:
    """Variables of the container; those of the service without a value are the caller's to give."""
    entries = service.get("environment", {}).items()
    values = {name: str(value) for name, value in entries if value is not None}
    return {**image.environment, "HOSTNAME": HOSTNAME, **values, **given}


def container_spec(
    default: Mapping[str, Any],
    image: Image,
    service: Mapping[str, Any],
    root: Path,
    work: Path,
    variables: Mapping[str, str],
) -> dict[str, Any]:
    """The `config.json` of the container.

    Args:
        default: What the runtime suggests (`runc spec`): namespaces, devices, masked paths.
        image: Gives the command, the user, the environment.
        service: Gives the limits: read-only root, capabilities, what can be written to.
        root: The image's files.
        work: Has a folder `volumes/0`, `volumes/1`, ... for each volume, and `hosts`.
        variables: Secrets that the caller passes on.

    Raises:
        CheckError: If the service leaves the container a right that this check does not know.
    """
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add"):
        raise CheckError("compose: the service must have cap_drop: [ALL] and no cap_add")
    rights = ("bounding", "effective", "inheritable", "permitted", "ambient")
    process = {
        "terminal": False,
        "user": {"uid": image.user, "gid": image.group},
        "args": image.command,
        "env": [f"{k}={v}" for k, v in environment(image, service, variables).items()],
        "cwd": image.workdir,
        "capabilities": {right: [] for right in rights},
        "noNewPrivileges": "no-new-privileges:true" in service.get("security_opt", []),
    }
    mounts = [_shared_memory(mount, service) for mount in default["mounts"]]
    mounts += [tmpfs(entry) for entry in service.get("tmpfs", [])]
    for index, target in enumerate(volume_targets(service)):
        mounts.append(_bind(work / "volumes" / str(index), target, "rw"))
    mounts.append(_bind(work / "hosts", "/etc/hosts", "ro"))
    return {
        **default,
        "process": process,
        "root": {"path": str(root), "readonly": bool(service.get("read_only"))},
        "hostname": HOSTNAME,
        "mounts": mounts,
    }


def _bind(source: Path, target: str, mode: str) -> dict[str, Any]:
    """A bind mount."""
    options = ["rbind", "rprivate", mode]
    return {"destination": target, "type": "bind", "source": str(source), "options": options}


def _shared_memory(mount: dict[str, Any], service: Mapping[str, Any]) -> dict[str, Any]:
    """A mount as it is, or `/dev/shm` in the size of the service."""
    if mount["destination"] != "/dev/shm" or "shm_size" not in service:
        return mount
    others = [option for option in mount["options"] if not option.startswith("size=")]
    return {**mount, "options": [*others, f"size={size_bytes(service['shm_size'])}"]}
