"""Results for tests, written by hand."""

from typing import Any

from think_vllm.tools.bench.configuration import Kind
from think_vllm.tools.bench.results import Figures, Measurement, Results, ServerRecord
from think_vllm.tools.bench.scenario import Scenario
from think_vllm.tools.common.machine import Machine

MACHINE = Machine(
    date="2026-11-23T10:00:00+00:00", processor="A processor", cores=2, memory_bytes=2**34,
    device="cpu", num_devices=1, python="3.11.7", versions={"vllm": "0.32.0"}, thread_binding=None,
)  # fmt: skip
SCENARIO = Scenario(
    name="short", description="Short ones.", prompt_tokens=100, output_tokens=10,
    concurrency=(2, 8), num_prompts=8,
)  # fmt: skip


def figures(tokens: float, running: float | None, **others: Any) -> Figures:
    fields: dict[str, Any] = dict.fromkeys(Figures.model_fields, 1)
    fields |= {"completed": 8, "failed": 0, "errors": {}, "prefix_hit_rate": None}
    fields |= {"output_tokens": 8, "processor_s": 2.0, "running_mean": 2.0}
    fields |= {"output_tokens_per_s": tokens, "running_waiting": running}
    return Figures.model_validate(fields | others)


def measurement(server: str, places: int, measured: Figures, turn: int = 0) -> Measurement:
    return Measurement(
        server=server, scenario="short", concurrency=places, request_rate=None, num_prompts=8,
        round=turn, date="2026-11-23T10:01:00+00:00", load_average=0.5, figures=measured,
    )  # fmt: skip


def results(*measurements: Measurement, **changes: Any) -> Results:
    kinds: dict[str, Kind] = {"plain": "plain", "fp8 cache": "fp8 cache", "thin": "thin"}
    servers = [
        ServerRecord(
            label=label, kind=kind, flags=[], commands=[f"think-vllm serve m --{kind}"],
            capacity={"short": 3},
        )
        for label, kind in kinds.items()
    ]  # fmt: skip
    fields = {
        "machine": MACHINE, "command": "think-vllm bench m", "model": "m", "seed": 0, "rounds": 1,
        "kv_cache_memory_bytes": 10**7, "complete": True, "scenarios": [SCENARIO],
        "servers": servers, "measurements": list(measurements),
    }  # fmt: skip
    return Results.model_validate(fields | changes)
