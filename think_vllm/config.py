"""The validated settings, however they were given: flags, YAML, JSON or ``additional_config``."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from think_vllm.errors import ThinkError

#: Key of our settings in vLLM's ``additional_config``, which reaches every process and is
#: part of the compile-cache hash.
ADDITIONAL_CONFIG_KEY = "think"

MAX_PRUNE_RATIO = 0.8


class ThinkConfig(BaseModel):
    """Settings of channel pruning. Field names are the flags' names.

    Source: ThinK, arXiv 2407.21018 (section 3 and its authors' defaults: windows of 32).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kv_channel_prune: float = Field(
        default=0.0,
        ge=0.0,
        le=MAX_PRUNE_RATIO,
        description="Fraction of each KV head's key channels that is pruned. 0 prunes nothing.",
    )
    kv_recent_window: int = Field(
        default=32,
        ge=0,
        le=65_536,
        description="Most recent tokens that are never pruned.",
    )
    kv_observation_window: int = Field(
        default=32,
        ge=1,
        le=65_536,
        description="Last prompt tokens whose queries choose the channels.",
    )
    kv_prune_decode: bool = Field(
        default=True,
        description="Also compact spans that fill up with generated tokens.",
    )

    @property
    def enabled(self) -> bool:
        """Whether anything is to be pruned."""
        return self.kv_channel_prune > 0.0


def parse_config(settings: Mapping[str, Any]) -> ThinkConfig:
    """Validate settings.

    Raises:
        ThinkError: Naming every wrong setting, what was given and what is allowed.
    """
    try:
        return ThinkConfig.model_validate(dict(settings))
    except ValidationError as error:
        raise ThinkError("; ".join(_explain(e) for e in error.errors())) from None


def config_from_additional(additional_config: object) -> ThinkConfig | None:
    """Read our settings out of vLLM's ``additional_config``.

    Returns:
        None if there are none, or if they prune nothing: vLLM then runs untouched.

    Raises:
        ThinkError: If they are there but wrong.
    """
    if not isinstance(additional_config, Mapping):
        return None
    settings = additional_config.get(ADDITIONAL_CONFIG_KEY)
    if settings is None:
        return None
    if not isinstance(settings, Mapping):
        raise ThinkError(
            f'additional_config["{ADDITIONAL_CONFIG_KEY}"] is {settings!r}; it must be an object '
            'like {"kv_channel_prune": 0.5}'
        )
    config = parse_config(settings)
    return config if config.enabled else None


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    flag = "--" + name.replace("_", "-")
    if error["type"] == "extra_forbidden":
        known = ", ".join(ThinkConfig.model_fields)
        return f"unknown setting {name}={error['input']!r}; known are {known}"
    field = ThinkConfig.model_fields.get(name)
    meaning = f" ({field.description})" if field is not None and field.description else ""
    return f"{flag} is {error['input']!r}: {error['msg']}{meaning}"
