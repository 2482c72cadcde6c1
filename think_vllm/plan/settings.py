"""The settings, each with its limits. ``parsing.py`` makes them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from think_vllm.plan.formats import FORMATS, BlockFormat

#: Key of our settings in vLLM's ``additional_config``, which reaches every process and is
#: part of the compile-cache hash.
ADDITIONAL_CONFIG_KEY = "think"

MAX_PRUNE_RATIO = 0.8


class ThinkConfig(BaseModel):
    """Settings of thin blocks. Field names are the flags' names.

    Sources: ThinK, arXiv 2407.21018 (section 3 and its authors' defaults: windows of 32); KIVI,
    arXiv 2402.02750 (groups of 32); SnapKV, arXiv 2404.14469; H2O, arXiv 2306.14048.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_channel_prune: float = Field(
        default=0.0,
        ge=0.0,
        le=MAX_PRUNE_RATIO,
        description="Fraction of each KV head's key channels that is pruned. 0 prunes nothing.",
    )
    kv_value_prune: float = Field(
        default=0.0,
        ge=0.0,
        le=MAX_PRUNE_RATIO,
        description="Fraction of each KV head's value channels that is pruned. 0 prunes nothing.",
    )
    kv_quant: Literal["none", "fp8", "kivi4", "k4v2", "kivi2"] = Field(
        default="none",
        description="Format of old keys and values: fp8 (e4m3), kivi4 or kivi2 (KIVI's integers of "
        "4 or 2 bits), or k4v2 (keys in 4 bits, values in 2).",
    )
    kv_quant_group: Literal[32, 64, 128] = Field(
        default=32,
        description="Elements that share a scale and a zero point in kivi4, k4v2 and kivi2.",
    )
    kv_recent_window: int = Field(
        default=32,
        ge=0,
        le=65_536,
        description="Most recent tokens, which are neither pruned nor quantized.",
    )
    kv_observation_window: int = Field(
        default=32,
        ge=1,
        le=65_536,
        description="Last prompt tokens, whose queries select the channels.",
    )
    kv_select: Literal["think", "key-norm", "random", "static"] = Field(
        default="think",
        description="What selects the channels: think (ThinK's score: norm of the queries times "
        "norm of the keys), key-norm (norm of the keys, no queries; values as with think), random "
        "(a baseline), or static (tables calibrated once for the model prune every token, from "
        "the first on).",
    )
    kv_channel_tables: Literal["prompt", "span"] = Field(
        default="prompt",
        description="Which keys score a key channel: all keys of the prompt, so that all its spans "
        "keep the same channels, or those of each span by itself.",
    )
    kv_prune_decode: bool = Field(
        default=True,
        description="Also compact spans of generated tokens, with the prompt's channels.",
    )
    kv_prune_prefill: bool = Field(
        default=False,
        description="Compact at the end of every chunk of a prompt, not only of the last one: for "
        "prompts whose dense blocks do not fit the cache. Later chunks then attend to thin blocks.",
    )
    kv_prefix_cache: Literal["thin", "dense"] = Field(
        default="thin",
        description="What prefix caching keeps of old tokens: thin blocks, which take less memory "
        "and make a hit approximate, or copies of dense blocks, which keep it exact.",
    )
    kv_evict: Literal["none", "snapkv", "h2o"] = Field(
        default="none",
        description="Evict old tokens of a long prompt. Each KV head keeps those that the prompt's "
        "last queries attend to most (snapkv), or all its queries together (h2o).",
    )
    kv_evict_budget: int = Field(
        default=1024,
        ge=1,
        le=1_048_576,
        description="Old tokens of a prompt that each KV head keeps at most, in whole spans, with "
        "--kv-evict.",
    )

    kv_prune_max_loss: float = Field(
        default=1.0,
        gt=0.0,
        le=1.0,
        description="A request stays dense if the key channels to be pruned hold more than this "
        "share of its score mass, averaged over layers and KV heads. 1 sets no limit. CPUs only, "
        "one rank.",
    )
    kv_channel_tables_file: str | None = Field(
        default=None,
        min_length=1,
        description="Channel tables for --kv-select static, from `think-vllm calibrate`.",
    )

    kv_plan_context: int = Field(
        default=8192,
        ge=256,
        le=2**24,
        description="Tokens of a typical request, prompt and answer: blocks are planned to save "
        "most there. Plan short requests with short spans: an unfinished span stays dense.",
    )

    @property
    def enabled(self) -> bool:
        """Whether anything is to be pruned, quantized or evicted."""
        pruned = max(self.kv_channel_prune, self.kv_value_prune) > 0.0
        return pruned or self.kv_quant != "none" or self.evicts

    @property
    def evicts(self) -> bool:
        """Whether old tokens of long prompts are left out."""
        return self.kv_evict != "none"

    @property
    def allows_prefix_caching(self) -> bool:
        """Whether a prompt's beginning may come from the prefix cache.

        Not with h2o, which adds up all queries of a prompt: it would select by half of them.
        """
        return self.kv_evict != "h2o"

    @property
    def limits_loss(self) -> bool:
        """Whether requests that would lose too much stay dense."""
        return self.kv_prune_max_loss < 1.0

    @property
    def is_static(self) -> bool:
        """Whether every token is pruned, with the channels of a file."""
        return self.kv_select == "static"

    @property
    def format(self) -> BlockFormat:
        """How thin blocks store keys and values."""
        return FORMATS[self.kv_quant]


def flag_name(field: str) -> str:
    """The flag of a setting."""
    return "--" + field.replace("_", "-")


def prune_flags(config: ThinkConfig) -> str:
    """The flags that ask for fewer channels, as they were given."""
    keys = f"--kv-channel-prune {config.kv_channel_prune:g}"
    if not config.kv_value_prune:
        return keys
    values = f"--kv-value-prune {config.kv_value_prune:g}"
    return f"{keys} {values}" if config.kv_channel_prune else values
