"""Load a server with what ``soak_jobs`` draws, and check everything that comes back.

* Every request gets the status that it must get, and whoever stays gets the whole answer.
* An answer given in company equals the one given alone: the reference scores every token of every
  answer, and a sample is asked for again, one at a time, of the same server.
* Afterwards no block is lost, nobody waits, and the server's log shows no error.

Whether prompts that begin alike are compared too is up to the caller: with prefix caching over
thin blocks, a prompt can meet a beginning that another one's channels have thinned.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from tests.support.models import BUNDLED, make_exact_llama
from tests.support.reference import Reference, Thinning
from tests.support.server import REQUEST_TIMEOUT_S, Server
from tests.support.soak_checks import (
    Findings,
    Outcome,
    check_outcomes,
    check_server,
    check_tossed,
    comparable,
    compare_alone,
    compare_with_reference,
)
from tests.support.soak_jobs import Job, draw_jobs
from think_vllm.plan.planner import BlockPlan, plan_blocks
from think_vllm.plan.settings import ThinkConfig

MAX_MODEL_LEN = 2048
#: Of the bundled model, and of the exact one.
HEAD_SIZE, HEADS, KV_HEADS = 128, 4, 2
#: Requests of the greatest length that the pool has room for; the load would like several more.
POOL_REQUESTS = 1.25


@dataclass(frozen=True)
class Case:
    """What a server is started with.

    An ``exact`` one serves ``make_exact_llama`` and not the bundled model. Codes are rounded, so
    they are the same in company as alone only where keys are the same bits. It has random weights.
    """

    settings: ThinkConfig
    exact: bool = False

    @property
    def exact_prefixes(self) -> bool:
        """Whether prompts that begin alike are served as if they did not."""
        return self.settings.kv_prefix_cache == "dense"

    @property
    def plan(self) -> BlockPlan:
        """How its blocks are laid out, in float32."""
        plan = plan_blocks(self.settings, HEAD_SIZE, 4, None)
        assert plan is not None
        return plan

    def model(self, folder: Path) -> Path:
        """Directory of the model; the exact one is made there."""
        if not self.exact:
            return BUNDLED
        shape = {"head_size": HEAD_SIZE, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
        return make_exact_llama(folder / "exact-llama", **shape)

    def precise(self) -> Reference | None:
        """The reference in float64; None where codes depend on the last bit of float32."""
        return None if self.exact else Reference(BUNDLED, torch.float64)

    def server_arguments(self) -> list[str]:
        """Float32; chunks shorter than most prompts; what the settings are as flags."""
        given = self.settings.model_dump(exclude_unset=True)
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
        limits = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-batched-tokens", "512"]
        limits += ["--max-num-seqs", "16", "--dtype", "float32", "--enforce-eager"]
        return [*limits, *flags, "--enable-prefix-caching"]

    def jobs(self, seed: int, count: int) -> list[Job]:
        """What to send."""
        return draw_jobs(seed, count, MAX_MODEL_LEN, frequency_penalty=2.0 if self.exact else 0.0)

    def pool_bytes(self) -> int:
        """Fewer blocks than the load needs, and the null block."""
        layers = 1 if self.exact else 2
        blocks = int(POOL_REQUESTS * MAX_MODEL_LEN / self.plan.block_size) + 1
        return blocks * self.plan.layout.run_bytes * KV_HEADS * layers


CASES = {
    "prune 0.5": Case(ThinkConfig(kv_channel_prune=0.5, kv_prefix_cache="dense")),
    "prune 0.4 + kivi4": Case(ThinkConfig(kv_channel_prune=0.4, kv_quant="kivi4"), exact=True),
}


def run_jobs(server: Server, jobs: Sequence[Job], concurrency: int) -> list[Outcome]:
    """Send all requests, ``concurrency`` at a time, in their order."""
    return asyncio.run(_run(server, jobs, concurrency))


async def _run(server: Server, jobs: Sequence[Job], concurrency: int) -> list[Outcome]:
    outcomes = [Outcome() for _ in jobs]
    pending = iter(zip(jobs, outcomes, strict=True))
    # A connection per request: hanging up is how a client leaves.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)

    async def work(client: httpx.AsyncClient) -> None:
        for job, outcome in pending:
            try:
                async with asyncio.timeout(job.patience_s):
                    await _send(client, server, job, outcome)
            except TimeoutError:
                pass
            except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
                outcome.error = repr(error)

    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
        await asyncio.gather(*(work(client) for _ in range(concurrency)))
    return outcomes


async def _send(client: httpx.AsyncClient, server: Server, job: Job, outcome: Outcome) -> None:
    body = job.body
    text = body if isinstance(body, str) else json.dumps({"model": server.model, **body})
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/completions"
    async with client.stream("POST", url, content=text, headers=headers) as response:
        outcome.status = response.status_code
        if response.status_code != 200:
            outcome.error = (await response.aread()).decode()
            return
        if not job.stream:
            outcome.take(json.loads(await response.aread())["choices"][0])
            return
        if job.leaves_after == 0:
            return
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                outcome.take(json.loads(line.removeprefix("data: "))["choices"][0])
                if job.leaves_after is not None and len(outcome.tokens) >= job.leaves_after:
                    return


@dataclass(frozen=True)
class Soaked:
    """A soak that is over: seconds are of the load alone, preemptions of requests meanwhile."""

    jobs: Sequence[Job]
    outcomes: Sequence[Outcome]
    found: Findings
    seconds: float
    preemptions: int


def soak(
    server: Server,
    reference: Reference,
    thinning: Thinning | None,
    jobs: Sequence[Job],
    precise: Reference | None = None,
    concurrency: int = 24,
    alone: int = 20,
    exact_prefixes: bool = True,
) -> Soaked:
    """Load a server with float32 and fewer blocks than the load needs, and check what it has done.

    The ``precise`` reference, in float64, is for where rounding alone may make the difference.
    ``concurrency`` requests are sent at a time, and ``alone`` of them asked for again.
    ``exact_prefixes`` says whether requests that begin alike are served as if they did not.
    """
    found = Findings()
    before = server.metric("vllm:num_preemptions_total")
    start = time.monotonic()
    outcomes = run_jobs(server, jobs, concurrency)
    seconds = time.monotonic() - start
    preemptions = int(server.metric("vllm:num_preemptions_total") - before)
    if not preemptions:
        found.failures.append("no request was preempted: the pool is too large for the load")
    check_outcomes(jobs, outcomes, found)
    which = comparable(jobs, outcomes, exact_prefixes)
    with server.frozen():
        compare_with_reference(reference, thinning, jobs, outcomes, which, found, precise)
    compare_alone(server, jobs, outcomes, which[:: max(1, len(which) // alone)], found)
    check_tossed(found)
    check_server(server, found)
    return Soaked(jobs, outcomes, found, seconds, preemptions)
