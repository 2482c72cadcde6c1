"""Whether a prompt that has ended would lose too much score mass, so that its request stays dense.

The layers of one rank say what their selections of channels keep; once the step is over, the mean
over layers and heads decides, once and for all. Nothing of the prompt has been compacted by then.
"""

from collections.abc import Sequence

import torch

from think_vllm.hooks import model_runner

_loss_limit: "LossLimit | None" = None


class LossLimit:
    """Decides for the requests of one rank.

    Args:
        max_loss: Share of the score mass that may go.
    """

    def __init__(self, max_loss: float) -> None:
        self._max_loss = max_loss
        self._shares: dict[str, list[torch.Tensor]] = {}

    def add(self, names: Sequence[str], shares: torch.Tensor) -> None:
        """Note what a layer would keep of prompts that end in this step.

        Args:
            names: Ids of their requests.
            shares: float64 [n, Hk]. Of the score mass; see ``kept_shares``.
        """
        for name, kept in zip(names, shares, strict=True):
            if not model_runner.is_resolved(name):  # it resumes: what was decided stays so
                self._shares.setdefault(name, []).append(kept)

    def take(self) -> dict[str, bool]:
        """Decide for the prompts that have ended since the last call.

        Returns:
            Whether each stays dense; one whose scores are no numbers does.
        """
        decisions = {
            name: not 1.0 - float(torch.stack(kept).mean()) <= self._max_loss
            for name, kept in self._shares.items()
        }
        self._shares.clear()
        return decisions


def begin_loss_limit(max_loss: float | None) -> None:
    """Decide for an engine from now on; None for one without a limit."""
    global _loss_limit
    _loss_limit = None if max_loss is None else LossLimit(max_loss)


def loss_limit() -> LossLimit:
    """The limit of this process's rank.

    Raises:
        RuntimeError: If its engine has no limit.
    """
    if _loss_limit is None:
        raise RuntimeError("think-vllm: loss_limit() for an engine without --kv-prune-max-loss")
    return _loss_limit


def take_decisions() -> dict[str, bool]:
    """Decide for prompts that ended in this step, and tell this rank's builder."""
    if _loss_limit is None:
        return {}
    decisions = _loss_limit.take()
    if decisions:
        model_runner.resolve(decisions)
    return decisions
