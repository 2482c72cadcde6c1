"""Every touch of vLLM that is not a documented extension point, and the ledger of why.

Each entry says why it is needed, and when it can go. Nothing else in this package patches
vLLM; subclasses of its classes call a few private methods that they inherit.
``tests/plugin/test_vllm_contract.py`` fails first when a vLLM upgrade changes any of these;
``docs/vllm.md`` says what ran on which release, and which hooks would end which entry.

``compat_moved.PLACES`` are names that are in one module in 0.32 and in another in 0.33.
``Platform.pre_register_and_update`` is wrapped
    because vLLM has no hook for a plugin's own flags, but gives every parser of its engine
    arguments to this method. Until vLLM lets plugins add arguments.
``parser.parse_known_args`` is wrapped, per parser
    to fold the flags into ``additional_config`` whatever their order on the command line.
    Until then too.
``FlexibleArgumentParser.load_config_file`` is wrapped
    because it drops ``false`` of what only a command's own parser knows, and ours would be taken
    for true; it adds our options and leaves vLLM's alone. Until it asks that parser.
``Platform.check_and_update_config`` is wrapped
    because it is where a platform validates and completes ``VllmConfig``, and plugins have no
    such place. Until vLLM calls plugins with the config.
``Platform.get_attn_backend_cls`` is wrapped
    because the CPU platform ignores ``attention_config.backend``, and ``backend_per_kind``, by
    which sliding-window layers could have another. Until ``CpuPlatform`` honours both. On CUDA
    the same hook names the backend's path, so that no process has to register it before vLLM asks.
``KVCacheSpecRegistry._ensure_registered`` is called
    because registering a spec before vLLM's own suppresses vLLM's own registration. Until
    it no longer returns early on a registry that is not empty.
``BlockPool._insert_block_hash`` is called, and ``Request.block_hashes`` is replaced
    (in ``scheduler/``) because thin blocks are cached under keys of their own, and a preempted
    request must not hit its own thin spans. Until managers may name the keys of their blocks, and
    are told who looks a prefix up.
``CacheConfig.user_specified_block_size`` is set
    because platforms reset a block size that the user did not name whenever a config is
    validated again. Until vLLM asks attention backends for their block size everywhere.
``model_arch_config.rswa_window`` is set, on CPUs
    because it is the only switch that makes model runners hand prompt lengths to metadata
    builders; a window no shorter than the model length changes nothing else. Until
    ``CommonAttentionMetadata`` always carries prompt lengths. Not on CUDA: model runner V2 has
    them on the device by then, and reading them there would wait for the step before.
``GPUModelRunner.gather_batch_req_state`` (V2) and, on CUDA,
``GPUModelRunner._determine_batch_execution_and_padding`` (V1) are wrapped
    (in ``model_runner.py``) because a builder must know, on the host, whose rows a step has, how
    long their prompts are and which of their spans came thin from the prefix cache: those whose
    tails were null blocks when they were admitted. And because vLLM replays full decode graphs for
    batches of single tokens of which some are the last of a prompt. Channels are chosen after such
    a token, so these batches, rare as they are, must run without a full graph. Until
    ``CommonAttentionMetadata`` carries all three, and backends can refuse a batch for full graphs.
    On CPUs V1's does something with ``--kv-evict`` only, as what a layer remembers of a prompt
    while it is computed is too much to leave behind when its request goes away; and while a request
    has a rule of its own.
``GPUModelRunner._update_states`` (V1) is wrapped there
    because it is told the sampling parameters of requests that are new. Until
    ``CommonAttentionMetadata`` says whose rows a step has.
``InputBatch.block_table`` (V1) and ``SchedulerOutput.scheduled_new_reqs`` (V2) are read there
    because they are what the host has of a request's blocks. V2 keeps none of them, so the number
    of such spans is remembered from the step that admits a request; it readmits preempted requests
    as new ones. Until ``CommonAttentionMetadata`` has a block table on the host.
``InputProcessor.process_inputs`` is wrapped (in ``hooks/requests.py``)
    because a prompt that may grow, or a request that asks for what there is not, has to be refused
    before it is a request: later it can only stop the engine, and ``Platform.validate_request`` is
    not told of the former, and not by which engine it was asked. Until it is.
``Scheduler.add_request`` is wrapped there
    because block managers know requests by their ids, and without prefix caching never see one.
    Until they are given what a request asks for.
``CompilationConfig.static_forward_context`` is read on CUDA
    because it is where a builder finds its layers' caches: spans that are due are compacted
    ahead of a full decode graph; and its layers, to give them their static channels. Until
    builders are given them.
``vllm.v1.attention.backends.fa_utils`` is used on CUDA
    (in ``worker/cuda/flash.py``) because FlashAttention is the fastest way through a prompt
    of dense blocks, and comes with vLLM. That is the point, and stays.
``CPUAttentionBackendImpl`` and ``CPUAttentionMetadataBuilder`` are subclassed
    (in ``worker/cpu/``) so that vLLM's C++ kernels store dense blocks and attend within prompts.
    That is the point, and stays.

The backend is registered as ``AttentionBackendEnum.CUSTOM``: a member made at run time would
not unpickle in vLLM's child processes, which read the config before they load plugins.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from think_vllm import VLLM_SERIES
from think_vllm.errors import ThinkError

if TYPE_CHECKING:
    import torch
    from vllm.config import CacheConfig, ModelConfig, VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

CPU_BACKEND_PATH = "think_vllm.worker.cpu.backend.ThinkCPUBackend"
CPU_WINDOW_BACKEND_PATH = "think_vllm.worker.cpu.window.WindowCPUBackend"
CPU_STATIC_BACKEND_PATH = "think_vllm.worker.static.cpu_layer.StaticCPUBackend"
CUDA_BACKEND_PATH = "think_vllm.worker.cuda.backend.ThinkCUDABackend"
CUDA_STATIC_BACKEND_PATH = "think_vllm.worker.static.cuda_layer.StaticCUDABackend"

_MARK = "_think_vllm_wrapped"
_on_command_line = False


def supported_vllm() -> bool:
    """Whether the installed vLLM is of a series that this version extends."""
    import vllm

    version: str = vllm.__version__
    return any(version == series or version.startswith(series + ".") for series in VLLM_SERIES)


def install(
    add_flags: Callable[[argparse.ArgumentParser], None],
    activate: Callable[[VllmConfig], None],
    select_backend: Callable[[VllmConfig, bool], str | None] | None,
) -> None:
    """Hook into the current platform, once per process.

    Args:
        add_flags: Adds our flags to a parser of vLLM's engine arguments.
        activate: Validates and completes a config; raises ThinkError to refuse it.
        select_backend: Path of the attention backend that a config needs for layers with or
            without a sliding window, or None for vLLM's own choice. None leaves that choice alone
            altogether.

    Raises:
        AttributeError: If the platform has not the hooks that we need.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if _MARK in vars(platform):
        return
    setattr(platform, _MARK, True)
    _wrap_parser_hook(platform, add_flags)
    _wrap_config_hook(platform, activate)
    if select_backend is not None:
        _wrap_backend_hook(platform, select_backend)


def _wrap_parser_hook(platform: Any, add_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    original = platform.pre_register_and_update

    def pre_register_and_update(cls: Any, parser: argparse.ArgumentParser | None = None) -> None:
        original(parser)
        if parser is not None:
            add_flags(parser)

    platform.pre_register_and_update = classmethod(pre_register_and_update)


def _wrap_config_hook(platform: Any, activate: Callable[[VllmConfig], None]) -> None:
    original = platform.check_and_update_config

    def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
        original(vllm_config)
        try:
            activate(vllm_config)
        except ThinkError as error:
            if _on_command_line:
                # A readable line instead of the traceback through pydantic and the server.
                sys.stderr.write(f"think-vllm: error: {error}\n")
                raise SystemExit(2) from None
            raise

    platform.check_and_update_config = classmethod(check_and_update_config)


def _wrap_backend_hook(
    platform: Any, select_backend: Callable[[VllmConfig, bool], str | None]
) -> None:
    original = platform.get_attn_backend_cls

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        from vllm.config import get_current_vllm_config

        has_window = attn_selector_config.has_sliding_window
        path = select_backend(get_current_vllm_config(), has_window)
        if path is None:
            chosen: str = original(selected_backend, attn_selector_config, *args, **kwargs)
            return chosen
        # The backend of sliding-window layers goes by the name of vLLM's own, which it extends.
        if path != CPU_WINDOW_BACKEND_PATH:
            from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

            register_backend(AttentionBackendEnum.CUSTOM, path)
        return path

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def fold_after_parsing(
    parser: argparse.ArgumentParser, fold: Callable[[argparse.Namespace], bool]
) -> None:
    """Run ``fold`` on whatever ``parser`` parses, before anyone else sees it.

    Args:
        parser: Of vLLM's engine arguments.
        fold: Returns whether thin blocks were asked for: refusals then end the program in one
            line, since somebody typed them.
    """
    original = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        global _on_command_line
        parsed, rest = original(args, namespace)
        if fold(parsed):
            _on_command_line = True
        return parsed, rest

    parser.parse_known_args = parse_known_args  # type: ignore[method-assign]


def follow_config_files(extend: Callable[[argparse.ArgumentParser, str], list[str]]) -> None:
    """Add arguments to what vLLM's parsers read from a YAML file, once per process.

    Args:
        extend: Gets the parser and the path.
    """
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    original = FlexibleArgumentParser.load_config_file
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def load_config_file(self: argparse.ArgumentParser, file_path: str) -> list[str]:
        ours = extend(self, file_path)  # first: it says more of what is wrong with our options
        arguments: list[str] = original(self, file_path)
        return arguments + ours

    setattr(load_config_file, _MARK, True)
    FlexibleArgumentParser.load_config_file = load_config_file


@contextlib.contextmanager
def refusals_raised() -> Iterator[None]:
    """Let refusals be exceptions for a while, although flags came from a command line."""
    global _on_command_line
    was, _on_command_line = _on_command_line, False
    try:
        yield
    finally:
        _on_command_line = was


def claim_custom_backend(vllm_config: VllmConfig) -> None:
    """Make ``vllm_config`` ask for our backend, which is part of vLLM's selection cache key.

    Raises:
        ThinkError: If the user asked for another backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.attention_config.backend_per_kind:
        raise ThinkError(
            "thin KV blocks: attention backends per kind of layer were asked for "
            f"({vllm_config.attention_config.backend_per_kind}); thin blocks need their own "
            "attention backend. Leave them out"
        )
    asked = vllm_config.attention_config.backend
    allowed = (None, AttentionBackendEnum.CPU_ATTN, AttentionBackendEnum.CUSTOM)
    if asked not in allowed:
        raise ThinkError(
            f"thin KV blocks: --attention-backend is {asked.name}; thin blocks need their own "
            "attention backend. Leave --attention-backend out"
        )
    vllm_config.attention_config.backend = AttentionBackendEnum.CUSTOM


def fix_block_size(cache_config: CacheConfig, block_size: int) -> None:
    """Set the block size for good, as if the user had named it."""
    cache_config.block_size = block_size
    cache_config.user_specified_block_size = True


def request_prompt_lens(model_config: ModelConfig) -> None:
    """Make vLLM's model runners pass prompt lengths to metadata builders."""
    model_config.model_arch_config.rswa_window = model_config.max_model_len


def really_uses_rswa(model_config: ModelConfig) -> bool:
    """Whether the model itself asks for reference sliding-window attention."""
    window = model_config.rswa_window
    return window is not None and window < model_config.max_model_len


def prompt_lens(metadata: CommonAttentionMetadata) -> torch.Tensor:
    """Prompt length of each request of a batch: int tensor [num_reqs].

    Raises:
        RuntimeError: If vLLM did not pass them.
    """
    if metadata.rswa_prefix_lens is None:
        raise RuntimeError(
            "think-vllm: vLLM passed no prompt lengths (CommonAttentionMetadata."
            "rswa_prefix_lens is None); see compat.request_prompt_lens"
        )
    lens: torch.Tensor = metadata.rswa_prefix_lens
    return lens


def wrap_method(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Let ``wrapper(original, self, ...)`` stand in for a method, in engines with thin blocks."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        # Several engines may live in one process, one after the other.
        if not _has_custom_backend(self.vllm_config):
            return original(self, *args, **kwargs)
        return wrapper(original, self, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    setattr(owner, name, wrapped)


def _has_custom_backend(vllm_config: VllmConfig) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return bool(vllm_config.attention_config.backend is AttentionBackendEnum.CUSTOM)


def register_spec(spec: type, manager: type, base: type) -> None:
    """Register a KV cache spec with its block manager, after vLLM's own."""
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager_class=manager, uniform_type_base_spec=base)


def block_key(block_hash: Any, group: int) -> Any:
    """Key of a cached block: the hash of the tokens up to its end, and a group or name space."""
    from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

    return make_block_hash_with_group_id(block_hash, group)


def cache_block(pool: Any, key: Any, block: Any, num_tokens: int) -> None:
    """Let a block of vLLM's pool be found under a key, which must be its only one."""
    pool._insert_block_hash(key, block, num_tokens=num_tokens)
