"""The servers of an evaluation: running ones, or ones that are started one after the other."""

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from think_vllm.errors import ThinkError
from think_vllm.tools.common.server import ServerError, StartedServer

PLAIN = "plain"


@dataclass(frozen=True)
class Target:
    """A server to evaluate.

    Args:
        label: What reports call it.
        url: Of one that runs; None for one to start.
        flags: Of one to start; None where nobody knows them.
    """

    label: str
    url: str | None
    flags: tuple[str, ...] | None


def running_targets(urls: Sequence[str], labels: Sequence[str]) -> list[Target]:
    """Servers that run already.

    Args:
        urls: Theirs.
        labels: One for each, or none for their addresses.

    Raises:
        ThinkError: If labels are missing or the same.
    """
    if labels and len(labels) != len(urls):
        raise ThinkError(
            f"eval: {len(urls)} times --base-url and {len(labels)} times --label; give one label "
            "for each address, in their order"
        )
    names = list(labels or urls)
    _check_different(names, "--base-url", "--label NAME")
    return [Target(name, url, None) for name, url in zip(names, urls, strict=True)]


def started_targets(configs: Sequence[str], plain: bool, labels: Sequence[str]) -> list[Target]:
    """Servers to start.

    Args:
        configs: Flags of each, as one would type them.
        plain: Whether one without flags comes first.
        labels: One for each config, or none for their flags.

    Raises:
        ThinkError: If there is nothing to start, or flags or labels make no sense.
    """
    flags = [_split(config) for config in configs]
    if labels and len(labels) != len(flags):
        raise ThinkError(
            f"eval: {len(flags)} times --config and {len(labels)} times --label; give one label "
            "for each, in their order"
        )
    names = list(labels or (_label(given) for given in flags))
    targets = [Target(name, None, given) for name, given in zip(names, flags, strict=True)]
    if plain:
        targets.insert(0, Target(PLAIN, None, ()))
    if not targets:
        raise ThinkError(
            'eval: --serve starts nothing with --no-plain and without --config "FLAGS"'
        )
    _check_different([target.label for target in targets], "--config", "--label NAME")
    return targets


@contextmanager
def opened(
    target: Target, model: str | None, arguments: Sequence[str], log: Path, start_timeout_s: float
) -> Iterator[str]:
    """Yield a server's address, and end what was started.

    Args:
        target: The server.
        model: Of one to start; None for running ones.
        arguments: Of all that are started.
        log: File that gets the output of one that is started.
        start_timeout_s: Seconds it may take to start.

    Raises:
        ThinkError: If it does not start, or ended.
    """
    if target.url is not None:
        yield target.url
        return
    if model is None or target.flags is None:
        raise ThinkError("eval: --serve MODEL is missing")
    try:
        with StartedServer(model, [*arguments, *target.flags], log, start_timeout_s) as server:
            yield server.url
            server.check_alive()
    except ServerError as error:
        raise ThinkError(f"eval: {target.label}: {error}") from None


def split_arguments(text: str, option: str) -> tuple[str, ...]:
    """Split arguments as a shell does.

    Raises:
        ThinkError: If quotes do not match.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ThinkError(f"eval: {option} {text!r}: {error}") from None


def _split(config: str) -> tuple[str, ...]:
    given = split_arguments(config, "--config")
    if not given or not given[0].startswith("-"):
        raise ThinkError(
            f"eval: --config {config!r} holds no flags; write them in quotes, as in "
            '--config "--kv-channel-prune 0.5 --kv-quant k4v2" (--plain is the server without)'
        )
    return given


def _label(flags: Sequence[str]) -> str:
    """Flags without what all of ours begin with."""
    words = " ".join(flags)
    for long, short in (("--kv-channel-prune", "prune"), ("--kv-quant ", ""), ("--", "")):
        words = words.replace(long, short)
    return words.replace("=", " ")


def _check_different(names: Sequence[str], option: str, way_out: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ThinkError(
                f"eval: {option}: two servers would be called {name!r}; tell them apart with "
                f"{way_out}"
            )
