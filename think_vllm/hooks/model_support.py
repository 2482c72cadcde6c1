"""Which models thin blocks can serve, and which of their layers become thin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from think_vllm.errors import FLAGS, REMEDY, ThinkError

if TYPE_CHECKING:
    from vllm.config import ModelConfig

#: Entries of ``layer_types`` in configurations of transformers.
FULL, WINDOW = ("full_attention", "attention"), "sliding_attention"


@dataclass(frozen=True)
class AttentionLayers:
    """How many layers of which kind a model has, as its configuration says."""

    full: int  # layers that attend to the whole context; their old blocks become thin
    window: int  # layers that attend to a sliding window; they stay vLLM's
    window_tokens: int  # of the sliding window, 0 without one
    others: tuple[str, ...] = ()  # names of kinds that are neither

    @property
    def groups(self) -> tuple[int, int, int]:
        """How vLLM shares blocks out: layers of a block, groups of full and of window layers.

        A block serves the layers of one group, and all groups have as many layers, padded if need
        be (``vllm.v1.core.kv_cache_utils._get_kv_cache_groups_uniform_page_size``).
        """
        if not self.window:
            return self.full, 1, 0
        size, most = sorted((self.full, self.window))
        if most < 1.5 * size:
            size = most
        return size, -(-self.full // size), -(-self.window // size)

    def block_layers(self, stage: AttentionLayers) -> int:
        """Layers of a block on a rank that has a stage of these layers.

        vLLM groups those of all ranks together, and deals each kind's out in turn.
        """
        _, full_groups, window_groups = self.groups
        most = -(-stage.full // full_groups)
        return max(most, -(-stage.window // window_groups)) if window_groups else most


def attention_layers(
    model_config: ModelConfig, stage: tuple[int, int] | None = None
) -> AttentionLayers:
    """Count a model's layers by kind, or the layers ``stage[0] .. stage[1] - 1``.

    vLLM takes ``sliding_window`` for that of every layer unless ``layer_types`` says otherwise, and
    for none if it is None, as with ``--disable-sliding-window``.
    """
    text = model_config.hf_text_config
    window_tokens = model_config.get_sliding_window() or 0
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = [WINDOW if window_tokens else FULL[0]] * model_config.get_total_num_hidden_layers()
    elif not window_tokens:
        kinds = [FULL[0] if kind == WINDOW else kind for kind in kinds]
    if stage is not None:
        kinds = kinds[slice(*stage)]
    return AttentionLayers(
        full=sum(kind in FULL for kind in kinds),
        window=sum(kind == WINDOW for kind in kinds),
        window_tokens=window_tokens,
        others=tuple(sorted(set(kinds) - {*FULL, WINDOW})),
    )


def check_model(model_config: ModelConfig) -> None:
    """Reject models whose attention has no KV cache per head, or one of another form.

    Raises:
        ThinkError: Naming the property, and the remedy.
    """
    text = model_config.hf_text_config
    layers = attention_layers(model_config)
    reasons: list[tuple[Any, str]] = [
        (model_config.runner_type != "generate", "it does not generate text, so it never decodes"),
        (model_config.use_mla, "multi-head latent attention (MLA) has no per-head key channels"),
        (model_config.is_encoder_decoder, "it is an encoder-decoder model"),
        (model_config.is_attention_free, "it has no attention layers"),
        (model_config.is_hybrid, "it mixes attention with state-space or linear layers"),
        (model_config.is_mm_prefix_lm, "its attention over images is bidirectional"),
        (model_config.attention_chunk_size is not None, "it has chunked attention layers"),
        (layers.others, f"it has layers of the kind {', '.join(layers.others)}"),
        (getattr(text, "num_kv_shared_layers", 0), "its layers share one another's KV cache"),
        (
            not layers.full,
            "all its layers have a sliding window "
            f"({layers.window_tokens} tokens), so there is nothing old to compact",
        ),
        (model_config.rswa_window is not None, "it uses reference sliding-window attention"),
        (
            model_config.uses_alibi
            or getattr(text, "position_embedding_type", "") == "alibi"
            or text.model_type in ("bloom", "mpt"),
            "it uses ALiBi position biases",
        ),
    ]
    for present, reason in reasons:
        if present:
            raise ThinkError(
                f"thin KV blocks do not support {model_config.model}: {reason}. {REMEDY}"
            )


def check_static_model(model_config: ModelConfig) -> None:
    """Reject models that static pruning cannot serve.

    Raises:
        ThinkError: Naming the property, and the remedy.
    """
    check_model(model_config)
    if attention_layers(model_config).window:
        raise ThinkError(
            f"--kv-select static does not support {model_config.model} yet: some of its layers "
            "have a sliding window, and their blocks would have another size; use --kv-select "
            f"think, or serve without {FLAGS}"
        )


def window_summary(layers: AttentionLayers) -> list[str]:
    """Lines about the plan of a model with sliding-window layers."""
    if not layers.window:
        return []
    return [
        f"{layers.full} of {layers.full + layers.window} layers become thin; the others have a "
        f"sliding window of {layers.window_tokens} tokens and stay as they are"
    ]
