"""Requests on the CUDA backend, checked token by token."""

from collections.abc import Sequence
from typing import Any

import torch

from tests.triton.engine import Engine
from tests.triton.expected import Expected, Request, expect, make_request
from think_vllm.plan.block_plan import BlockPlan, span_rule
from think_vllm.plan.settings import ThinkConfig

#: Format, blocks of a span before and after, tokens of a thin block, kept channels of keys and of
#: values, heads.
PLANS = {
    "none-0.5": ("none", 5, 4, 20, 32, 64, (4, 2)),
    "fp8": ("fp8", 2, 1, 32, 64, 64, (2, 1)),
    "k4v2-0.5": ("k4v2", 3, 1, 48, 32, 64, (2, 1)),
    "none-0.5-values-0.3": ("none", 3, 2, 24, 32, 44, (4, 2)),
    "k4v2-values-0.5": ("k4v2", 3, 1, 48, 64, 28, (2, 1)),
}
#: Of a plan that only evicts.
EVICTED_ONLY = ("none", 1, 1, 16, 64, 64, (4, 2))
#: float32 sums in another order, of values of about 1.
TOLERANCE = 2e-5


def make_plan(name: str, **settings: Any) -> BlockPlan:
    shape = PLANS.get(name, EVICTED_ONLY)
    quant, span_blocks, thin_blocks, tokens, channels, value_channels, _ = shape
    config = ThinkConfig.model_validate(
        {
            "kv_channel_prune": 1 - channels / 64,
            "kv_value_prune": 1 - value_channels / 64,
            "kv_quant": quant,
            "kv_recent_window": 12,
            "kv_observation_window": 10,
            **settings,
        }
    )
    rule = span_rule(config, 16, span_blocks, thin_blocks)
    return BlockPlan(config, 64, channels, value_channels, rule, tokens, 4)


class Life:
    """Follows requests step by step and checks every token's output.

    Settings are of ``ThinkConfig`` where their names begin with ``kv_``, else of the engine.
    """

    def __init__(self, name: str, version: int, device: torch.device, **settings: Any) -> None:
        config = {key: value for key, value in settings.items() if key.startswith("kv_")}
        options = {key: value for key, value in settings.items() if key not in config}
        self.plan = make_plan(name, **config)
        self.rule = self.plan.rule
        self.engine = Engine(
            self.plan, PLANS.get(name, EVICTED_ONLY)[-1], version, device, **options
        )
        self.expected: dict[str, Expected] = {}

    def add(
        self,
        name: str,
        prompt_len: int,
        total: int,
        hit: tuple[Request, int] | None = None,
        borders: Sequence[int] = (),
        **extra_args: Any,
    ) -> Request:
        """Admit a request, whose tokens are made from its name.

        ``hit`` says whose prefix of how many tokens it finds in the cache; ``borders``, which
        matter with ``prune_prefill`` only, where its prompt is cut into chunks; ``extra_args`` what
        it asks for itself.
        """
        engine = self.engine
        request = make_request(name, prompt_len, total, engine.heads, self.plan, len(engine.layers))
        request.extra_args = extra_args or None
        if hit is not None:
            other, tokens = hit
            for mine, others in ((request.key, other.key), (request.value, other.value)):
                mine[:, :tokens] = others[:, :tokens]
        engine.add(request)
        self.resume(request, hit, borders)
        return request

    def resume(
        self, request: Request, hit: tuple[Request, int] | None = None, borders: Sequence[int] = ()
    ) -> None:
        """Admit a new or preempted request; see ``add``."""
        start, cached = 0, None
        if hit is not None:
            other, start = hit
            self.engine.hit(request, other, start)
            spans = request.cached_spans
            cached = [layer[:spans] for layer in self.expected[other.name].channels]
        self.expected[request.name] = expect(request, self.plan, start, cached, borders)

    def decode(self, steps: int, *names: str) -> None:
        """Run steps of a token of each of these requests."""
        for _ in range(steps):
            self.step(**dict.fromkeys(names, 1))

    def step(self, **work: int) -> None:
        """Run so many tokens of each request."""
        starts = {name: self.engine.requests[name].computed for name in work}
        for name, out in self.engine.step(work).items():
            wanted = self.expected[name].output[:, starts[name] : starts[name] + work[name]]
            torch.testing.assert_close(out.double(), wanted, atol=TOLERANCE, rtol=0)
