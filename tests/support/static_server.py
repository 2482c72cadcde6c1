"""A statically pruned server or engine, and its truth: a model all keys of which are masked.

The channels are at random, so another head's, another layer's or a dense key shows at once.
"""

from pathlib import Path

import torch

from tests.support.checks import TOLERANCE, random_prompts
from tests.support.served import Completion, Served
from tests.support.static_tables import MaskedModel, mask, random_tables
from think_vllm.plan.settings import ThinkConfig
from think_vllm.plan.static_plan import StaticPlan, plan_static


class Static:
    """A server and its truth."""

    def __init__(self, model: Path, folder: Path, block_size: int, **given: float | str) -> None:
        tables, file = random_tables(model), folder / "tables.json"
        tables.save(file)
        settings = {"kv_select": "static", "kv_channel_tables_file": str(file), **given}
        config = ThinkConfig.model_validate(settings)
        plan = plan_static(config, tables.shape.head_size, 4, block_size)
        assert plan is not None
        self.plan: StaticPlan = plan
        self.arguments = ["--block-size", str(block_size)]
        for name, value in settings.items():
            self.arguments += [f"--{name.replace('_', '-')}", str(value)]
        kept = mask(tables.key_channels, plan.key_channels)
        kept_values = mask(tables.value_channels, plan.value_channels)
        self.reference = MaskedModel(model, kept, kept_values, quantized=plan.is_quantized)
        self.whole = MaskedModel(model, torch.ones_like(kept), torch.ones_like(kept))

    def worst(
        self, prompts: list[list[int]], completions: list[Completion], whole: bool = False
    ) -> float:
        """Largest difference of a log-probability from the reference, or from the whole model."""
        reference = self.whole if whole else self.reference
        return max(
            float(
                (reference.logprobs(prompt, done.tokens) - torch.tensor(done.logprobs)).abs().max()
            )
            for prompt, done in zip(prompts, completions, strict=True)
        )

    def check(self, server: Served, lengths: list[int], counts: list[int]) -> None:
        """Compare a load with the reference, and see that the whole model says something else."""
        prompts = random_prompts(lengths)
        done = server.complete_all(prompts, counts)
        assert self.worst(prompts, done) < TOLERANCE
        assert self.worst(prompts, done, whole=True) > 10 * TOLERANCE
