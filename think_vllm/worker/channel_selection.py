"""Select the channels that a layer keeps, by what a policy scores them.

Plain torch, for both backends and for prompts whose tokens are evicted.
"""

from dataclasses import dataclass

import torch

from think_vllm.metrics.rank import rank_report
from think_vllm.metrics.shares import kept_shares
from think_vllm.plan.planner import BlockPlan
from think_vllm.worker.policies import POLICIES, LayerHeads


@dataclass(frozen=True)
class ChannelSelection:
    """Channels that are kept, of ``n`` prompts or spans."""

    channels: torch.Tensor  # ``[n, Hk, K]`` uint8, as compaction takes them
    #: ``[n, Hk, D]`` float32. Of key channels; None if they have no mass to count.
    scores: torch.Tensor | None
    keys: int  # ``C``, how many of the channels are of keys

    def report(self, which: torch.Tensor | None = None) -> None:
        """Count what share of the scores is kept; only of ``which``, unless that is None."""
        if self.scores is None:
            return
        scores, channels = self.scores, self.channels[:, :, : self.keys]
        if which is not None:
            scores, channels = scores[which], channels[which]
        rank_report().add_selection(scores, channels)

    def kept_shares(self) -> torch.Tensor:
        """Share of the score mass that is kept: ``[n, Hk]`` float64.

        Raises:
            ValueError: If the policy's scores have no mass.
        """
        if self.scores is None:
            raise ValueError("kept_shares: scores is None; the policy's scores have no mass")
        return kept_shares(self.scores, self.channels[:, :, : self.keys])


class ChannelSelector:
    """Chooses channels of one layer.

    Args:
        plan: How many are kept, and the policy.
        heads: Of the layer.
    """

    def __init__(self, plan: BlockPlan, heads: LayerHeads) -> None:
        self._plan = plan
        self._policy = POLICIES[plan.config.kv_select](plan.config, heads)
        self._sees_queries, self._sees_outputs = _window_sources(plan)

    @property
    def uses_keys(self) -> bool:
        """Whether ``select`` needs the energy of keys."""
        return self._plan.prunes_keys and self._policy.uses_keys

    def sources(self, query: torch.Tensor, output: torch.Tensor) -> list[torch.Tensor]:
        """What is summed up over observation windows, of queries and what they were answered."""
        wanted = ((query, self._sees_queries), (output, self._sees_outputs))
        return [source for source, is_wanted in wanted if is_wanted]

    def select(self, windows: torch.Tensor, keys: torch.Tensor | None) -> ChannelSelection:
        """Select channels.

        Args:
            windows: ``[n, S, Hk, D]`` float32. Energy of the observation window, for each of its
                ``sources``: a mean over tokens, or any multiple of it.
            keys: ``[n, Hk, D]`` float32. Mean squared keys; None unless ``uses_keys``.

        Raises:
            ValueError: If something is missing.
        """
        plan, nothing = self._plan, windows.new_empty(0)
        if windows.shape[1] != self._sees_queries + self._sees_outputs:
            raise ValueError(
                f"select: windows is {tuple(windows.shape)}; expected [n, "
                f"{self._sees_queries + self._sees_outputs}, Hk, D], one of each source"
            )
        if keys is None and self.uses_keys:
            raise ValueError(
                f"select: keys is None; --kv-select {plan.config.kv_select} needs their energy"
            )
        size = (windows.shape[0], *windows.shape[2:])
        scores = None
        if plan.prunes_keys:
            queries = windows[:, 0] if self._sees_queries else nothing
            scored = self._policy.score_keys(queries, nothing if keys is None else keys)
            scored = scored.expand(size)
            channels = top_channels(scored, plan.key_channels)
            scores = scored if self._policy.has_mass else None
        else:
            channels = torch.arange(size[2], dtype=torch.uint8, device=windows.device)
            channels = channels.repeat(*size[:2], 1)
        if plan.prunes_values:
            outputs = windows[:, -1] if self._sees_outputs else nothing
            scored = self._policy.score_values(outputs).expand(size)
            values = top_channels(scored, plan.value_channels)
            channels = torch.cat([channels, values], dim=2)
        return ChannelSelection(channels, scores, plan.key_channels)


def count_sources(plan: BlockPlan) -> int:
    """How much is summed up over observation windows: queries, their outputs, both or nothing."""
    return sum(_window_sources(plan))


def _window_sources(plan: BlockPlan) -> tuple[bool, bool]:
    policy = POLICIES[plan.config.kv_select]
    return (plan.prunes_keys and policy.uses_queries, plan.prunes_values and policy.uses_outputs)


def top_channels(score: torch.Tensor, count: int) -> torch.Tensor:
    """Keep the channels with the highest scores.

    Args:
        score: ``[n, Hk, D]``.
        count: How many are kept.

    Returns:
        ``[n, Hk, count]`` uint8, ascending; of equal scores the lower channel is kept.

    Raises:
        ValueError: If there are not as many.
    """
    if score.dim() != 3 or not 0 < count <= score.shape[2]:
        raise ValueError(
            f"top_channels: score is {tuple(score.shape)}, count is {count}; expected [n, Hk, D] "
            "and 1 to D"
        )
    ranked = torch.argsort(score, dim=2, descending=True, stable=True)
    return ranked[:, :, :count].sort(dim=2).values.to(torch.uint8)
