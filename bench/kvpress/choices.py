"""Whether kvpress and our references choose the same from the same keys and queries."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import SnapKVPress, ThinKPress
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.kvpress.presses import WINDOW_TOKENS
from think_vllm.kernels.reference.eviction import (
    POOLING_TOKENS,
    attention_sums_ref,
    choose_tokens_ref,
    pool_ref,
)
from think_vllm.kernels.reference.scoring import (
    key_energy_ref,
    key_scores_ref,
    query_energy_ref,
    top_channels_ref,
)
from think_vllm.plan.layout import BlockForm
from think_vllm.plan.parsing import parse_config
from think_vllm.plan.planner import plan_blocks
from think_vllm.worker.token_selection import split_runs

RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
#: Query and KV heads of models with random weights: one to one, and groups of 4.
RANDOM_HEADS = ((4, 4), (8, 2))


@dataclass
class RecordingThinKPress(ThinKPress):
    """Remembers each layer's queries, keys, and the channels that it set to zero."""

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def compress(self, module: Any, hidden_states: Any, keys: torch.Tensor, *rest: Any) -> Any:
        """Remember and prune."""
        kwargs = rest[-1]
        queries = self.compute_window_queries(
            module, kwargs["hidden_states"], kwargs["position_embeddings"]
        )
        before = keys[0].clone()
        keys, values = super().compress(module, hidden_states, keys, *rest)
        self.seen.append((queries[0], before, (keys[0] == 0).all(dim=1)))
        return keys, values


@dataclass
class RecordingSnapKVPress(SnapKVPress):
    """Remembers each layer's queries, keys, and the tokens that it keeps."""

    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def compress(self, module: Any, hidden_states: Any, keys: torch.Tensor, *rest: Any) -> Any:
        """Remember and evict."""
        kwargs = rest[-1]
        queries = ThinKPress(0.5, self.window_size).compute_window_queries(
            module, kwargs["hidden_states"], kwargs["position_embeddings"]
        )
        before = keys[0].clone()
        keys, values = super().compress(module, hidden_states, keys, *rest)
        # A kept token is the one whose keys are found again.
        places = (keys[0][:, :, None] == before[:, None]).all(dim=3).int().argmax(dim=2)
        self.seen.append((queries[0], before, places.sort(dim=1).values))
        return keys, values


def compare_choices(bundled: Any, prompts: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Count the heads whose choices are the same, and how many a near miss would have had.

    That control chooses channels by the norm of keys alone, and tokens with kvpress's default of 5
    averaged neighbours: where it scores like ours, equal choices would show nothing.

    Args:
        bundled: The recall model.
        prompts: Its prompts; models with random weights get the same tokens.
    """
    models = {"tiny-recall": bundled}
    for heads, kv_heads in RANDOM_HEADS:
        models[f"random weights, {heads} / {kv_heads}"] = random_model(heads, kv_heads)
    found = []
    for name, model in models.items():
        for what, count, same, control in _choices(model, prompts):
            config = model.config
            found.append(
                {
                    "what": what,
                    "model": name.split(",")[0],
                    "heads": f"{config.num_attention_heads} / {config.num_key_value_heads}",
                    "count": count,
                    "cases": len(same),
                    "same": sum(same),
                    "same_of_control": sum(control),
                }
            )
    return found


def random_model(heads: int, kv_heads: int) -> LlamaForCausalLM:
    """Two layers with random weights, for tokens of the bundled model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=128, intermediate_size=256, num_hidden_layers=2, head_dim=64,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _choices(
    model: Any, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[str, str, list[bool], list[bool]]]:
    for ratio in RATIOS:
        same: list[bool] = []
        control: list[bool] = []
        for prompt in prompts:
            press = RecordingThinKPress(ratio, WINDOW_TOKENS)
            _prefill(model, press, prompt)
            for queries, keys, pruned in press.seen:
                kept = (~pruned).sum(dim=1)
                assert len(kept.unique()) == 1
                theirs = torch.stack([(~head).nonzero()[:, 0] for head in pruned])
                same += _equal(kept_channels(queries, keys, int(kept[0])), theirs)
                by_norm = kept_channels(torch.ones_like(queries), keys, int(kept[0]))
                control += _equal(by_norm, theirs)
        yield "key channels", f"{ratio:g} pruned", same, control
    for share in (0.5, 0.8):
        same, control = [], []
        for prompt in prompts:
            seen = []
            for neighbours in (POOLING_TOKENS, SnapKVPress.kernel_size):
                snapkv = RecordingSnapKVPress(share, WINDOW_TOKENS, neighbours)
                _prefill(model, snapkv, prompt)
                seen.append(snapkv.seen)
            for (queries, keys, tokens), (_, _, others) in zip(*seen, strict=True):
                ours = kept_tokens(queries, keys, tokens.shape[1])
                same += _equal(ours, tokens)
                control += _equal(ours, others)
        yield "tokens", f"{share:g} evicted", same, control


def _equal(ours: torch.Tensor, theirs: torch.Tensor) -> list[bool]:
    """For each head."""
    return [a == b for a, b in zip(ours.tolist(), theirs.tolist(), strict=True)]


def kept_channels(queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """The channels that the references keep, from keys stored in blocks: ``[Hk, count]``.

    Args:
        queries: ``[Hq, W, D]``.
        keys: ``[Hk, P, D]``.
        count: How many.
    """
    num_heads, length, head_size = keys.shape
    plan = plan_blocks(parse_config({"kv_channel_prune": 0.5}), head_size, keys.itemsize)
    assert plan is not None
    blocks = -(-length // plan.block_size)
    cache = torch.zeros(blocks, num_heads, plan.block_size, 2 * head_size)
    padded = torch.zeros(num_heads, blocks * plan.block_size, head_size)
    padded[:, :length] = keys
    dense, _ = split_runs(cache, plan, BlockForm.CPU)
    dense.copy_(padded.view(num_heads, blocks, plan.block_size, head_size).permute(1, 0, 3, 2))
    rows = torch.arange(blocks, dtype=torch.int32)[None]
    energy = key_energy_ref(cache, rows, [0], [length], plan)
    asked = query_energy_ref(queries.transpose(0, 1), num_heads)[None]
    return top_channels_ref(key_scores_ref("think", asked, energy), count)[0]


def kept_tokens(queries: torch.Tensor, keys: torch.Tensor, count: int) -> torch.Tensor:
    """The tokens that the references keep, the window's among them: ``[Hk, count]``."""
    num_heads, length, head_size = keys.shape
    window = queries.shape[1]
    old = length - window
    sums = attention_sums_ref(queries.transpose(0, 1), keys, old, head_size**-0.5)
    chosen = choose_tokens_ref(pool_ref(sums, old), count - window)
    return torch.cat([chosen, torch.arange(old, length).expand(num_heads, window)], dim=1)


@torch.inference_mode()
def _prefill(model: Any, press: Any, prompt: Sequence[int]) -> None:
    with press(model):
        model(torch.tensor([list(prompt)]), past_key_values=DynamicCache(), use_cache=True)
