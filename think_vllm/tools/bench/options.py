"""The command line of ``think-vllm bench``, and what of it makes no sense."""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.tools.bench import plots
from think_vllm.tools.bench.configuration import DEFAULT_FLAGS
from think_vllm.tools.bench.results import RESULTS_FILE
from think_vllm.tools.bench.scenario import Scenario, known_scenarios, load_scenario
from think_vllm.tools.plan import parse_bytes, positive_int

#: Options whose value is flags.
_QUOTED = ("--config", "--server-args")
_ONLY_STARTED = ("config", "fp8_cache", "no_plain", "kv_cache_memory_bytes", "server_args")


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="think-vllm bench",
        allow_abbrev=False,
        description="Load tests with vLLM's own benchmark code: plain vLLM and pruned "
        "configurations in equal KV memory, one server after the other.",
    )
    parser.add_argument("model", help="Model name or directory.")
    servers = parser.add_argument_group("servers")
    servers.add_argument(
        "--config",
        action="append",
        metavar='"FLAGS"',
        help='Flags of one more server, in quotes: "--kv-channel-prune 0.5 --kv-quant k4v2". May '
        f"be repeated. Default: {'; '.join(DEFAULT_FLAGS)}.",
    )
    servers.add_argument("--no-plain", action="store_true", help="Leave plain vLLM out.")
    servers.add_argument(
        "--fp8-cache", action="store_true", help="Also vLLM's own --kv-cache-dtype fp8."
    )
    servers.add_argument(
        "--kv-cache-memory-bytes",
        type=parse_bytes,
        metavar="SIZE",
        help="KV cache of every server (of each rank), as in 8GiB or 50MB.",
    )
    servers.add_argument(
        "--max-num-seqs",
        type=positive_int,
        metavar="N",
        help="As for `vllm serve`, for all. Default: the most requests in flight.",
    )
    servers.add_argument(
        "--server-args", metavar='"FLAGS"', help="Flags of `vllm serve` for all servers, in quotes."
    )
    servers.add_argument(
        "--start-timeout",
        type=positive_int,
        default=1800,
        metavar="SECONDS",
        help="How long a server may take to start. Default: 1800.",
    )
    running = parser.add_argument_group("a server that runs already")
    running.add_argument("--base-url", metavar="URL", help="Load this one; start none.")
    running.add_argument("--label", default="server", help="What reports call it. Default: server.")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="results.json",
        help="Compare with plain vLLM of an earlier run on this machine.",
    )
    loads = parser.add_argument_group("loads")
    loads.add_argument(
        "--scenario",
        nargs="+",
        default=["paper"],
        metavar="NAME",
        help=f"One or several of {', '.join(known_scenarios())}, or a YAML file. Default: paper.",
    )
    kind = loads.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        nargs="+",
        type=positive_int,
        metavar="N",
        help="Requests in flight, one load after the other. Default: the scenario's.",
    )
    kind.add_argument(
        "--request-rate",
        nargs="+",
        type=float,
        metavar="R",
        help="Requests per second, one load after the other. Default: the scenario's.",
    )
    loads.add_argument(
        "--num-prompts", type=positive_int, metavar="N", help="Requests of a load at most."
    )
    loads.add_argument("--seed", type=int, default=0, help="Of the prompts. Default: 0.")
    loads.add_argument(
        "--rounds",
        type=positive_int,
        default=1,
        metavar="N",
        help="Times that every server is measured; every second time in reverse order. Default: 1.",
    )
    output = parser.add_argument_group("results")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    output.add_argument(
        "--out",
        type=Path,
        default=Path("results") / f"bench-{stamp}",
        metavar="DIR",
        help="Where files go. Default: results/bench-DATE-TIME.",
    )
    output.add_argument("--note", default="", help="A remark that is kept with the figures.")
    output.add_argument("--no-plots", action="store_true", help="Draw nothing.")
    return parser.parse_args(_joined(arguments))


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


def check_options(options: argparse.Namespace) -> None:
    """Refuse options that mean nothing together."""
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
        plots.check_matplotlib()
