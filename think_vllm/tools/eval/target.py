"""The servers of an evaluation: running ones, or ones that are started one after the other."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from think_vllm.errors import ThinkError
from think_vllm.tools.common.flags import split_flags

PLAIN = "plain"


@dataclass(frozen=True)
class Target:
    """A server to evaluate."""

    label: str  # what reports call it
    url: str | None  # of a running server; None for one to start
    flags: tuple[str, ...] | None  # of a server to start; None where they are unknown


def targets_of(options: Namespace) -> list[Target]:
    """The servers, the reference first.

    Raises:
        ThinkError: If there is nothing to start, or flags or labels make no sense.
    """
    if options.base_url:
        option, names = "--base-url", options.base_url
        servers: list[tuple[str | None, tuple[str, ...] | None]] = [
            (url, None) for url in options.base_url
        ]
    else:
        option = "--config"
        flags = [split_flags(config, "eval: --config") for config in options.config]
        names = [_label(one) for one in flags]
        servers = [(None, one) for one in flags]
    labels = options.label or names
    if len(labels) != len(servers):
        raise ThinkError(
            f"eval: {len(servers)} times {option} and {len(labels)} times --label; give one label "
            "for each, in their order"
        )
    targets = [Target(label, *server) for label, server in zip(labels, servers, strict=True)]
    if options.serve and options.plain:
        targets.insert(0, Target(PLAIN, None, ()))
    if not targets:
        raise ThinkError(
            'eval: --serve starts nothing with --no-plain and without --config "FLAGS"'
        )
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise ThinkError(
                f"eval: {option}: two servers would be called {label!r}; tell them apart with "
                "--label NAME"
            )
    return targets


def _label(flags: Sequence[str]) -> str:
    """Flags without what all of ours begin with."""
    words = " ".join(flags)
    for long, short in (("--kv-channel-prune", "prune"), ("--kv-quant ", ""), ("--", "")):
        words = words.replace(long, short)
    return words.replace("=", " ")
