"""What scores channels: ``--kv-select``.

A policy sees energies, sums of squares that kernels have made, and says which channels matter most.
Plain torch, the same on CPUs and GPUs, and for prompts whose tokens are evicted. Knows neither
vLLM nor blocks. A new one is a class here; its name is a value of ``ThinkConfig.kv_select`` too.
"""

import random
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from think_vllm.plan.settings import ThinkConfig


@dataclass(frozen=True)
class LayerHeads:
    """The KV heads that a rank has of one layer."""

    layer: int  # number of the layer in the model
    first: int  # number of the first head among the layer's, over all ranks
    count: int  # ``Hk``, heads of this rank
    head_size: int  # ``D``
    seed: int = 0  # vLLM's ``--seed``


#: By their names in ``--kv-select``.
POLICIES: "dict[str, type[Policy]]" = {}


class Policy(ABC):
    """Scores the channels of one layer; those with the highest scores are kept.

    What a policy does not use is not computed: it gets a tensor without elements instead, which
    says no more than the device.

    A subclass has its name in ``--kv-select`` as the keyword ``name``.

    Args:
        config: The settings.
        heads: Whose channels.
    """

    #: Whether it looks at the queries of the observation window.
    uses_queries: ClassVar[bool] = False
    #: Whether it looks at keys. Else all spans of a prompt have the same channels.
    uses_keys: ClassVar[bool] = False
    #: Whether it looks at what attention has answered the queries of the observation window.
    uses_outputs: ClassVar[bool] = False
    #: Whether scores of keys are squares of something whose kept share is worth a metric.
    has_mass: ClassVar[bool] = False

    def __init_subclass__(cls, *, name: str) -> None:
        super().__init_subclass__()
        POLICIES[name] = cls

    def __init__(self, config: ThinkConfig, heads: LayerHeads) -> None:
        self.config, self.heads = config, heads

    @abstractmethod
    def score_keys(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Score key channels.

        Args:
            queries: ``[n, Hk, D]`` float32. Per KV head the mean over its query heads of their
                squared queries, over the window; or any multiple of that.
            keys: ``[n, Hk, D]`` float32. Mean squared keys.

        Returns:
            ``[n, Hk, D]`` float32, or what broadcasts to that.
        """

    @abstractmethod
    def score_values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Score value channels.

        Args:
            outputs: ``[n, Hk, D]`` float32. As ``queries``, of attention's outputs.

        Returns:
            As ``score_keys``.
        """


class ThinK(Policy, name="think"):
    """Norm of the observed queries times norm of the keys; for values, norm of the outputs.

    Source: ThinK, arXiv 2407.21018, section 3.2. Means of squares rank channels alike; with
    grouped queries the mean runs over the heads of the group as well, as in kvpress.
    """

    uses_queries = uses_keys = uses_outputs = has_mass = True

    def score_keys(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Multiply energies."""
        return queries * keys

    def score_values(self, outputs: torch.Tensor) -> torch.Tensor:
        """Take energies as they are."""
        return outputs


class KeyNorm(ThinK, name="key-norm"):
    """Norm of the keys alone, whatever is asked. Value channels as ThinK's."""

    uses_queries = False

    def score_keys(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Take energies as they are."""
        return keys


class Random(Policy, name="random"):
    """Chance, to compare with: per head, the same channels for all prompts.

    Seeded by vLLM's ``--seed`` and the numbers of layer and head in the model, so all ranks and
    devices agree. Python's generator keeps its numbers over versions.
    """

    def __init__(self, config: ThinkConfig, heads: LayerHeads) -> None:
        super().__init__(config, heads)
        self._scores = torch.stack([self._draw("keys"), self._draw("values")])

    def score_keys(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Hand out numbers that were drawn once: ``[Hk, D]``."""
        return self._on(keys.device)[0]

    def score_values(self, outputs: torch.Tensor) -> torch.Tensor:
        """As ``score_keys``; other numbers."""
        return self._on(outputs.device)[1]

    def _on(self, device: torch.device) -> torch.Tensor:
        if self._scores.device != device:
            self._scores = self._scores.to(device)
        return self._scores

    def _draw(self, kind: str) -> torch.Tensor:
        heads, rows = self.heads, []
        for head in range(heads.first, heads.first + heads.count):
            drawn = random.Random(f"{heads.seed} {heads.layer} {head} {kind}")
            rows.append([drawn.random() for _ in range(heads.head_size)])
        return torch.tensor(rows, dtype=torch.float32)
