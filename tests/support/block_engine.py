"""vLLM's real KVCacheManager driven by a scheduler with random choices, and a model of the worker.

A block never given back makes a count short; for what else the model notices see
``block_worker.py``.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec
from vllm.v1.request import Request, RequestStatus

from tests.support.block_worker import BLOCK, Worker
from think_vllm.hooks.kv_cache_spec import ThinKVCacheSpec
from think_vllm.plan.request import dense_rule, request_override
from think_vllm.scheduler.manager import ThinKVCacheManager
from think_vllm.scheduler.registration import register_request, resolve_request

NUM_BLOCKS = 40
MAX_LEN = 100

init_none_hash(sha256)


def make_hasher(tokens: int) -> Any:
    """What makes a hash of every so many tokens of a request."""
    return get_request_block_hasher(tokens, sha256)


def make_manager(
    specs: Sequence[KVCacheSpec],
    caching: bool = False,
    num_blocks: int = NUM_BLOCKS,
    max_len: int = MAX_LEN,
    hashed: int = BLOCK,
) -> KVCacheManager:
    """VLLM's manager for groups of layers."""
    config = KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layer{i}"], spec) for i, spec in enumerate(specs)],
    )
    return KVCacheManager(
        config,
        max_model_len=max_len,
        scheduler_block_size=BLOCK,
        hash_block_size=hashed,
        enable_caching=caching,
        log_stats=True,
    )


@dataclass
class Entry:
    """A request's part of a scheduled step."""

    request: Request
    name: str
    start: int
    count: int
    new_blocks: list[int]
    is_new: bool


class Engine:
    """A scheduler with random choices, whose steps run ``lag`` steps late.

    With a lag it schedules ahead of sampled tokens, as vLLM's async scheduling does. The worker of
    ``spec`` is modelled; ``others`` are of further groups of layers. A request has ``chunk`` tokens
    in a step at most; prefixes are hashed in ``hashed`` tokens, as with ``--prefix-match-unit``.
    """

    def __init__(
        self,
        spec: ThinKVCacheSpec,
        lag: int,
        caching: bool = False,
        chunk: int = MAX_LEN,
        others: Sequence[KVCacheSpec] = (),
        num_blocks: int = NUM_BLOCKS,
        max_len: int = MAX_LEN,
        hashed: int = BLOCK,
    ) -> None:
        self.manager = make_manager([spec, *others], caching, num_blocks, max_len, hashed)
        self.others = others
        self.limits_loss = spec.limits_loss
        self.num_blocks = num_blocks
        self.max_len = max_len
        self.worker = Worker(spec.rule)
        self.lag = lag
        self.chunk = chunk
        self.in_flight: deque[tuple[list[tuple[int, int]], list[Entry]]] = deque()
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.incarnation: dict[str, int] = {}
        self.hits: dict[str, int] = {}
        #: Whether requests stay dense, of those that were asked what they would lose.
        self.decisions: dict[str, bool] = {}
        self.hasher = make_hasher(hashed)

    @property
    def free_blocks(self) -> int:
        return int(self.manager.block_pool.get_num_free_blocks())

    def name(self, request: Request) -> str:
        return f"{request.request_id}.{self.incarnation[request.request_id]}"

    def arrive(
        self, prompt_len: int, max_tokens: int, tenant: int | None = None, asks: int | None = None
    ) -> Request:
        """Queue a request; those of a tenant begin alike.

        It asks to stay dense (-1), or for its own budget in spans, 0 for all; None, and what this
        engine rejects, is nothing.
        """
        name = f"r{len(self.incarnation)}"
        unique = 1000 * (len(self.incarnation) + 10)
        shared = prompt_len * 3 // 4 if tenant is not None else 0
        tokens = [tenant * 100 + i for i in range(shared)] if tenant is not None else []
        tokens += [unique + i for i in range(prompt_len - shared)]
        params = SamplingParams(max_tokens=max_tokens, extra_args=self._asked(asks))
        request = Request(name, tokens, params, None, block_hasher=self.hasher)
        if params.extra_args is not None:
            register_request(self.manager.coordinator.single_type_managers, request)
        self.incarnation[name] = 0
        self.waiting.append(request)
        return request

    def _asked(self, asks: int | None) -> dict[str, int | bool] | None:
        rule = self.worker.rule
        if asks is None or rule.prune_prefill:
            return None
        if asks < 0:
            return {"kv_channel_prune": False}
        if rule.budget_spans is None:
            return None
        return {"kv_evict_budget": asks * rule.span_tokens}

    def step(self, budget: int) -> None:
        """Schedule up to ``budget`` tokens, and run the step that is now due."""
        self.manager.new_step_starts()
        scheduled: list[Entry] = []
        preempted = False
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted below
            before = len(self.running)
            budget -= self._schedule(request, min(budget, self._wanted(request)), scheduled)
            preempted |= len(self.running) < before
        for request in [] if preempted else list(self.waiting):
            done = self._admit(request, budget, scheduled)
            if not done:
                break
            budget -= done
        copies, retained = self.manager.take_kv_cache_block_copies()
        self.manager.block_pool.free_blocks(retained)
        pairs = [(int(c.src_block_id), int(c.dst_block_id)) for c in copies]
        self.in_flight.append((pairs, scheduled))
        for entry in scheduled:
            entry.request.num_computed_tokens += entry.count
            entry.request.num_in_flight_tokens += entry.count
            ahead = entry.request.num_tokens + entry.request.num_output_placeholders
            if entry.request.num_computed_tokens == ahead:
                # Scheduled ahead of the token that this step will sample.
                entry.request.num_output_placeholders += 1
        while len(self.in_flight) > self.lag:
            self._process()

    def drain(self) -> None:
        while self.in_flight:
            self._process()

    def abort(self, index: int) -> None:
        everyone = self.running + self.waiting
        if everyone:
            request = everyone[index % len(everyone)]
            request.status = RequestStatus.FINISHED_ABORTED
            self._drop(request)

    def preempt(self, index: int) -> None:
        if self.running:
            self._preempt(self.running[index % len(self.running)])

    def reset(self) -> None:
        """Forget all prefixes, which vLLM does only while nothing runs."""
        if not self.running:
            assert self.manager.reset_prefix_cache()

    def _wanted(self, request: Request) -> int:
        known = int(request.num_tokens) + int(request.num_output_placeholders)
        return min(self.chunk, min(known, self.max_len - 1) - int(request.num_computed_tokens))

    def _schedule(self, request: Request, count: int, scheduled: list[Entry]) -> int:
        if count <= 0:
            return 0
        while (blocks := self.manager.allocate_slots(request, count)) is None:
            victim = self.running[-1]
            scheduled[:] = [entry for entry in scheduled if entry.request is not victim]
            self._preempt(victim)
            if victim is request:
                return 0
        new = [int(i) for i in blocks.get_block_ids()[0]]
        start = int(request.num_computed_tokens)
        scheduled.append(Entry(request, self.name(request), start, count, new, False))
        return count

    def _admit(self, request: Request, budget: int, scheduled: list[Entry]) -> int:
        if request.num_in_flight_tokens:
            return 0  # vLLM drains what a preempted request has in flight; so do we
        cached, hit, _ = self.manager.get_computed_blocks(request)
        known = min(int(request.num_tokens), self.max_len - 1)
        count = min(budget, self.chunk, known - hit)
        if count <= 0:
            return 0
        blocks = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=hit,
            new_computed_blocks=cached,
            full_sequence_must_fit=True,  # as vLLM's scheduler asks by default
        )
        if blocks is None:
            return 0
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        self.hits[self.name(request)] = hit
        rows = [int(i) for i in self.manager.get_block_ids(request.request_id)[0]]
        scheduled.append(Entry(request, self.name(request), hit, count, rows, True))
        return count

    def _process(self) -> None:
        copies, scheduled = self.in_flight.popleft()
        if self.others:  # whose blocks this worker never wrote
            copies = [pair for pair in copies if pair[0] in self.worker.memory]
        self.worker.copy(copies)
        for entry in scheduled:
            request = entry.request
            # A step that was in flight when its request ended goes on with what was sampled.
            tokens = [*request.all_token_ids, *[7] * (self.lag + 1)]
            if entry.is_new:
                own = request_override(self.worker.rule, request.sampling_params.extra_args)
                if self.decisions.get(request.request_id):
                    own = dense_rule(self.worker.rule)
                self.worker.start(entry.name, tokens, entry.new_blocks, entry.start, own)
            else:
                self.worker.rows[entry.name].blocks.extend(entry.new_blocks)
                self.worker.rows[entry.name].tokens = tokens
        for entry in scheduled:
            self._run(entry)

    def _run(self, entry: Entry) -> None:
        request = entry.request
        self.worker.run(entry.name, request.num_prompt_tokens, entry.start, entry.count)
        request.num_in_flight_tokens -= entry.count
        if self.limits_loss and entry.start + entry.count >= request.num_prompt_tokens:
            self._resolve(entry)
        if request not in self.running or entry.name != self.name(request):
            return
        if entry.start + entry.count == request.num_tokens:
            request.num_output_placeholders -= 1
            last = request.num_output_tokens + 1 >= request.max_tokens
            if last or request.num_tokens + 1 >= self.max_len:
                request.status = RequestStatus.FINISHED_LENGTH_CAPPED
                self._drop(request)
            else:
                request.append_output_token_ids(7)

    def _resolve(self, entry: Entry) -> None:
        """Decide like a worker: every other request stays dense. The managers hear of it."""
        name, row = entry.request.request_id, self.worker.rows[entry.name]
        if name in self.decisions or row.rule.stays_dense:
            return
        self.decisions[name] = dense = int(name[1:]) % 2 == 1
        if dense:
            row.rule = dense_rule(row.rule)
        resolve_request(self.manager.coordinator.single_type_managers, entry.request, dense)

    def _preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.incarnation[request.request_id] += 1
        self.running.remove(request)
        self.waiting.insert(0, request)

    def _drop(self, request: Request) -> None:
        self.manager.free(request)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)

    def finish(self) -> None:
        """Run until nothing is left to do."""
        for _ in range(3000):
            if not self.running and not self.waiting:
                break
            self.step(40)
        self.drain()
        assert not self.running
        assert not self.waiting

    def check_ownership(self) -> None:
        """Every block is either free or held, as often as its count says."""
        held: dict[int, int] = {}
        for request in self.running:
            for group in self.manager.get_blocks(request.request_id).blocks:
                for block in group:
                    if not block.is_null:
                        held[block.block_id] = held.get(block.block_id, 0) + 1
        for manager in self.manager.coordinator.single_type_managers:
            if isinstance(manager, ThinKVCacheManager):
                for _, _, copy in manager._publisher.copies._fresh:
                    held[copy.block_id] = held.get(copy.block_id, 0) + 1
        counts = {b.block_id: b.ref_cnt for b in self.manager.block_pool.blocks if not b.is_null}
        assert {i: count for i, count in counts.items() if count} == held
        assert len(held) + self.free_blocks == self.num_blocks - 1
