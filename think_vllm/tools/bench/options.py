"""The command line of ``think-vllm bench``."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.bench.configuration import DEFAULT_FLAGS
from think_vllm.tools.bench.results import RESULTS_FILE
from think_vllm.tools.bench.scenario import Scenario, known_scenarios, load_scenario
from think_vllm.tools.common.figures import check_matplotlib
from think_vllm.tools.plan import parse_bytes, positive_int

#: Options whose value is flags.
_QUOTED = ("--config", "--server-args")
_ONLY_STARTED = ("config", "fp8_cache", "no_plain", "kv_cache_memory_bytes", "server_args")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ThinkError: If options mean nothing together.
    """
    options = _parser().parse_args(_joined(arguments))
    if options.base_url:
        for name in _ONLY_STARTED:
            if getattr(options, name):
                raise ThinkError(
                    f"bench: --{name.replace('_', '-')} is for servers that are started here; "
                    "leave it or --base-url out"
                )
    elif options.kv_cache_memory_bytes is None:
        raise ThinkError(
            "bench: --kv-cache-memory-bytes SIZE is needed, the KV cache that every server gets, "
            "as in 8GiB: without it their memory would not be equal"
        )
    if (options.out / RESULTS_FILE).exists():
        raise ThinkError(
            f"bench: --out {options.out} holds the results of another run; name another directory"
        )
    if not options.no_plots:
        check_matplotlib("bench")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="think-vllm bench",
        allow_abbrev=False,
        description="Load tests with vLLM's own benchmark code: plain vLLM and pruned "
        "configurations in equal KV memory, one server after the other.",
    )
    number: dict[str, Any] = {"type": positive_int, "metavar": "N"}
    parser.add_argument("model", help="Model name or directory.")
    text = "Compare with plain vLLM of an earlier run on this machine."
    parser.add_argument("--compare", type=Path, metavar="results.json", help=text)

    add = parser.add_argument_group("servers").add_argument
    text = 'Flags of one more server, in quotes: "--kv-channel-prune 0.5 --kv-quant k4v2". May '
    text += f"be repeated. Default: {'; '.join(DEFAULT_FLAGS)}."
    add("--config", action="append", metavar='"FLAGS"', help=text)
    add("--no-plain", action="store_true", help="Leave plain vLLM out.")
    add("--fp8-cache", action="store_true", help="Also vLLM's own --kv-cache-dtype fp8.")
    text = "KV cache of every server (of each rank), as in 8GiB or 50MB."
    add("--kv-cache-memory-bytes", type=parse_bytes, metavar="SIZE", help=text)
    text = "As for `vllm serve`, for all. Default: the most requests in flight."
    add("--max-num-seqs", **number, help=text)
    text = "Flags of `vllm serve` for all servers, in quotes."
    add("--server-args", metavar='"FLAGS"', help=text)
    text = "How long a server may take to start. Default: 1800."
    add("--start-timeout", type=positive_int, default=1800, metavar="SECONDS", help=text)

    add = parser.add_argument_group("a server that runs already").add_argument
    add("--base-url", metavar="URL", help="Load this one; start none.")
    add("--label", default="server", help="What reports call it. Default: server.")

    group = parser.add_argument_group("loads")
    add = group.add_argument
    text = f"One or several of {', '.join(known_scenarios())}, or a YAML file. Default: paper."
    add("--scenario", nargs="+", default=["paper"], metavar="NAME", help=text)
    either = group.add_mutually_exclusive_group().add_argument
    text = "Requests in flight, one load after the other. Default: the scenario's."
    either("--concurrency", nargs="+", **number, help=text)
    text = "Requests per second, one load after the other. Default: the scenario's."
    either("--request-rate", nargs="+", type=float, metavar="R", help=text)
    add("--num-prompts", **number, help="Requests of a load at most.")
    add("--seed", type=int, default=0, help="Of the prompts. Default: 0.")
    text = "Times that every server is measured; every second time in reverse order. Default: 1."
    add("--rounds", default=1, **number, help=text)

    add = parser.add_argument_group("results").add_argument
    out = Path("results") / f"bench-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    text = "Where files go. Default: results/bench-DATE-TIME."
    add("--out", type=Path, default=out, metavar="DIR", help=text)
    add("--note", default="", help="A remark that is kept with the figures.")
    add("--no-plots", action="store_true", help="Draw nothing.")
    return parser


def _joined(arguments: Sequence[str]) -> list[str]:
    """Tie flags in quotes to their option; argparse takes a single one for its own."""
    joined: list[str] = []
    for word in arguments:
        if joined and joined[-1] in _QUOTED:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def chosen_scenarios(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios, with the loads given on the command line in place of their own."""
    changes: dict[str, Any] = {}
    if options.concurrency is not None:
        changes = {"concurrency": tuple(options.concurrency), "request_rate": ()}
    if options.request_rate is not None:
        changes = {"concurrency": (), "request_rate": tuple(options.request_rate)}
    if options.num_prompts is not None:
        changes["num_prompts"] = options.num_prompts
    loaded = [load_scenario(name) for name in options.scenario]
    names = [scenario.name for scenario in loaded]
    if len(set(names)) < len(names):
        raise ThinkError(f"bench: --scenario has one name twice: {', '.join(names)}")
    return [scenario.changed(**changes) if changes else scenario for scenario in loaded]
