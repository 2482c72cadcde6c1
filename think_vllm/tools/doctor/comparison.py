"""How far an engine with thin blocks is from one without, token by token."""

import math
from dataclasses import dataclass

from think_vllm.tools.doctor.probe import ProbeResult


@dataclass(frozen=True)
class Comparison:
    """Over all tokens but the first of each prompt, which sees the prompt dense in both."""

    tokens: int  # how many were compared
    #: Mean of ``log p_dense(token) - log p_thin(token)``, in nats: the tokens are the dense
    #: engine's greedy choice, so this is the logarithm of the perplexities' ratio.
    mean_difference: float
    largest_difference: float  # largest absolute difference of a token, in nats
    agreement: float  # share of steps whose likeliest token is the same

    @property
    def perplexity_change(self) -> float:
        """Relative change of the perplexity on the dense engine's tokens; 0.01 is 1 % more."""
        return math.expm1(self.mean_difference)

    def reasons_against(self, max_perplexity_change: float, min_agreement: float) -> list[str]:
        """What is worse than allowed, a sentence each."""
        reasons = []
        if not self.perplexity_change <= max_perplexity_change:  # NaN is worse than anything
            reasons.append(
                f"perplexity on the dense answers changes by {self.perplexity_change:+.1%}, more "
                f"than {max_perplexity_change:+.1%}"
            )
        if not self.agreement >= min_agreement:
            reasons.append(
                f"the likeliest token is the same in {self.agreement:.1%} of the steps, less than "
                f"{min_agreement:.1%}"
            )
        return reasons


def compare(dense: ProbeResult, thin: ProbeResult) -> Comparison:
    """Compare two runs over the same prompts and tokens.

    Raises:
        ValueError: If they are not over the same.
    """
    if dense.prompts != thin.prompts or dense.tokens != thin.tokens:
        raise ValueError("compare: the runs are not over the same prompts and tokens")
    pairs = [
        (p_dense - p_thin, a == b)
        for row in zip(dense.logprobs, thin.logprobs, dense.tokens, thin.likeliest, strict=True)
        for p_dense, p_thin, a, b in list(zip(*row, strict=True))[1:]
    ]
    differences = [difference for difference, _ in pairs]
    return Comparison(
        tokens=len(pairs),
        mean_difference=math.fsum(differences) / len(pairs),
        largest_difference=max(map(abs, differences)),
        agreement=sum(same for _, same in pairs) / len(pairs),
    )
