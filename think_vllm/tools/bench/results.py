"""The results of a run, as in its JSON file. The other files come from it."""

from collections import Counter
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from think_vllm.errors import ThinkError
from think_vllm.tools.bench.configuration import Kind
from think_vllm.tools.bench.gauges import read_metrics
from think_vllm.tools.bench.scenario import LoadPoint, Scenario
from think_vllm.tools.common.compact import write_json
from think_vllm.tools.common.machine import Machine
from think_vllm.tools.common.server import Server

FORMAT = 1
RESULTS_FILE = "results.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ServerRecord(_Record):
    """A server that was measured."""

    label: str
    kind: Kind
    flags: list[str] = Field(description="Those that make it differ from the others.")
    commands: list[str] = Field(
        default=[], description="As one would type them; host and port are left out."
    )
    plan: dict[str, Any] | None = Field(default=None, description="Of its thin blocks.")
    kv_cache_dtype: str | None = None
    block_size: int | None = Field(default=None, description="Tokens of a dense block.")
    num_blocks: int | None = Field(default=None, description="vLLM's null block included.")
    capacity: dict[str, int] = Field(
        default={}, description="Whole requests of a scenario that fit, by the plan."
    )
    start_s: float | None = Field(default=None, description="Until it was healthy.")

    def read_cache(self, server: Server) -> None:
        """Record the KV cache of a running server, as far as it says.

        Raises:
            OSError: If it is out of reach.
            ServerError: If it has ended.
        """
        if (cache := read_metrics(server).cache()) is not None:
            self.kv_cache_dtype, self.block_size = cache.dtype, cache.block_size
            self.num_blocks = cache.num_blocks


class Figures(_Record):
    """Figures of one load. Times and tokens are those of vLLM's load generator."""

    completed: int
    failed: int
    errors: Counter[str] = Field(
        default=Counter(), description="Why requests failed, and how many of them."
    )
    duration_s: float
    requests_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    input_tokens: int
    output_tokens: int
    median_ttft_ms: float
    p99_ttft_ms: float
    median_itl_ms: float
    p99_itl_ms: float
    median_tpot_ms: float = Field(description="A request's mean time between tokens.")
    p99_tpot_ms: float
    median_e2el_ms: float
    running_mean: float = Field(description="Of requests, while any ran.")
    running_waiting: float | None = Field(
        description="Of requests, while others waited and the cache was full; None if none did."
    )
    running_peak: float
    cache_use_mean: float = Field(description="Share of blocks, of the same samples.")
    cache_use_peak: float
    preemptions: int
    prefix_hit_rate: float | None = Field(description="Of prompt tokens; None without caching.")
    processor_s: float | None = Field(
        description="Of all of the server's processes; None if it was not started here."
    )
    samples: int = Field(description="Of the gauges above.")

    @property
    def reasons(self) -> str:
        """Why requests failed, as a person reads it; empty if none did."""
        return "; ".join(f"{count} x {error}" for error, count in self.errors.items())

    @property
    def output_tokens_per_processor_s(self) -> float | None:
        """What does not depend on the share of a machine that a server gets."""
        return self.output_tokens / self.processor_s if self.processor_s else None


class Measurement(_Record):
    """One load of one server."""

    server: str
    scenario: str
    concurrency: int | None
    request_rate: float | None
    num_prompts: int
    round: int
    date: str = Field(description="UTC, when the load began.")
    load_average: float = Field(description="Of the machine, one minute, before the load.")
    figures: Figures

    @property
    def point(self) -> LoadPoint:
        """The load."""
        return LoadPoint(self.num_prompts, self.concurrency, self.request_rate)


class Failure(_Record):
    """A server or a load that could not be measured."""

    server: str
    load: str | None = Field(description="None if it is the server that failed.")
    message: str


class Results(_Record):
    """One run."""

    format: int = FORMAT
    machine: Machine
    command: str
    model: str
    kv_cache_memory_bytes: int | None = Field(description="None if it is unknown.")
    seed: int
    rounds: int
    note: str = ""
    complete: bool = Field(default=False, description="Whether the run came to its end.")
    scenarios: list[Scenario]
    servers: list[ServerRecord] = []
    measurements: list[Measurement] = []
    failures: list[Failure] = []

    def server(self, label: str) -> ServerRecord:
        """A server by its label."""
        return next(one for one in self.servers if one.label == label)

    def labels_of(self, kind: Kind) -> list[str]:
        """Labels of servers of a kind."""
        return [one.label for one in self.servers if one.kind == kind]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file of an earlier run.

        Raises:
            ThinkError: If it is none.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ThinkError(f"bench: --compare {path}: cannot be read: {error}") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise ThinkError(
                f"bench: --compare {path} is no results.json of this version: {where}: "
                f"{first['msg']}; measure again, or give the results.json of a run"
            ) from None
