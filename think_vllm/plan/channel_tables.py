"""Files of channel tables: for every layer and KV head, its channels from the best to the worst.

A file says which model it was made for and from what, and holds whole rankings, so one file
serves every ratio. It is JSON::

    {"format": "think-vllm channel tables", "version": 1,
     "model": "models/tiny-recall", "shape": {"model_type": "llama", "num_layers": 2, ...},
     "calibration": {"prompts": 32, "tokens": 60416, ...},
     "key_channels": [[[17, 3, ...], ...], ...],      [layers][KV heads][head size]
     "value_channels": [[[90, 12, ...], ...], ...]}
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from think_vllm.errors import ThinkError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

    from think_vllm.plan.settings import ThinkConfig
    from think_vllm.plan.static_plan import StaticPlan

FORMAT: Final = "think-vllm channel tables"
FLAG = "--kv-channel-tables-file"

#: Channels of one head.
Channels = list[int]
Rankings = list[list[Channels]]


class ModelShape(BaseModel):
    """What of a model its tables depend on; a file fits models for which all of it is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_type: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, model_config: ModelConfig) -> Self:
        """The shape of a model that vLLM has read."""
        text = model_config.hf_text_config
        return cls(
            model_type=text.model_type,
            num_layers=model_config.get_total_num_hidden_layers(),
            num_heads=text.num_attention_heads,
            num_kv_heads=model_config.get_total_num_kv_heads(),
            head_size=model_config.get_head_size(),
            hidden_size=model_config.get_hidden_size(),
            vocab_size=model_config.get_vocab_size(),
        )


class Calibration(BaseModel):
    """What tables were made from.

    ``source`` is the file or the task, ``sha256`` that of all token ids, ``observed_queries`` the
    last queries of a prompt that were scored, None for all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    prompts: int
    tokens: int
    sha256: str
    observed_queries: int | None
    think_vllm: str


class ChannelTables(BaseModel):
    """Rankings of channels, [layers][KV heads][head size], the best channel first."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["think-vllm channel tables"] = FORMAT
    version: Literal[1] = 1
    model: str
    shape: ModelShape
    calibration: Calibration
    key_channels: Rankings
    value_channels: Rankings

    def kept_keys(self, layer: int, plan: StaticPlan) -> list[Channels]:
        """Key channels that a layer keeps, per KV head, ascending."""
        return [sorted(head[: plan.key_channels]) for head in self.key_channels[layer]]

    def kept_values(self, layer: int, plan: StaticPlan) -> list[Channels]:
        """Value channels that a layer keeps, per KV head, ascending."""
        return [sorted(head[: plan.value_channels]) for head in self.value_channels[layer]]

    def save(self, path: Path) -> None:
        """Write a file, one line for each head, so that versions of it can be compared.

        Raises:
            ThinkError: If it cannot be written.
        """
        fields = self.model_dump()
        rankings = {name: fields.pop(name) for name in ("key_channels", "value_channels")}
        text = json.dumps(fields, indent=1).removesuffix("\n}")
        for name, layers in rankings.items():
            rows = ["[" + ",\n".join(map(json.dumps, heads)) + "]" for heads in layers]
            text += f',\n "{name}": [\n' + ",\n".join(rows) + "\n]"
        try:
            path.write_text(text + "\n}\n", encoding="utf-8")
        except OSError as error:
            raise ThinkError(f"calibrate: --out {path}: {error.strerror}; name another") from None


def tables_of(config: ThinkConfig, model_config: ModelConfig) -> ChannelTables:
    """Read the tables that a config names, for a model.

    Raises:
        ThinkError: If there are none for this model.
    """
    assert config.kv_channel_tables_file is not None  # parse_config
    return load_tables(config.kv_channel_tables_file, ModelShape.of(model_config))


def load_tables(path: str, shape: ModelShape) -> ChannelTables:
    """Read a file and check it against a model.

    Raises:
        ThinkError: If it cannot be read, is none of ours, or is for another model.
    """
    tables = read_tables(path)
    if tables.shape != shape:
        wrong = [
            f"{name} is {getattr(tables.shape, name)} there and {wanted} here"
            for name, wanted in shape
            if getattr(tables.shape, name) != wanted
        ]
        raise ThinkError(
            f"{FLAG} {path} was made for another model, {tables.model}: {'; '.join(wrong)}. Make "
            "one for this model with `think-vllm calibrate MODEL`"
        )
    return tables


def read_tables(path: str) -> ChannelTables:
    """Read a file.

    Raises:
        ThinkError: If it cannot be read, or is none of ours.
    """
    try:
        status = Path(path).stat()
        return _parse(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise ThinkError(
            f"{FLAG} {path}: {error.strerror}; make the file with `think-vllm calibrate MODEL`"
        ) from None


@functools.lru_cache(maxsize=4)
def _parse(path: str, modified: int, size: int) -> ChannelTables:
    """Parse a file once for all layers; another time or size stands for another content."""
    who = f"{FLAG} {path}"
    remedy = "Make it again with `think-vllm calibrate MODEL`"
    try:
        tables = ChannelTables.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ThinkError(
            f"{who} is no file of {FORMAT}, version 1: {where + ': ' if where else ''}"
            f"{first['msg']}. {remedy}"
        ) from None
    shape = tables.shape
    for name in ("key_channels", "value_channels"):
        layers: Rankings = getattr(tables, name)
        counts = {len(layers), *map(len, layers)} if layers else set()
        if len(layers) != shape.num_layers or {*map(len, layers)} != {shape.num_kv_heads}:
            raise ThinkError(
                f"{who}: {name} has {sorted(counts)} layers and heads, its shape says "
                f"{shape.num_layers} layers of {shape.num_kv_heads} KV heads. {remedy}"
            )
        every = list(range(shape.head_size))
        for layer, heads in enumerate(layers):
            for head, channels in enumerate(heads):
                if sorted(channels) != every:
                    raise ThinkError(
                        f"{who}: {name} of layer {layer}, KV head {head} is no ranking of the "
                        f"channels 0 to {shape.head_size - 1}. {remedy}"
                    )
    return tables
