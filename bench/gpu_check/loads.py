"""Whether vLLM's CUDA build loads, and what of it."""

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.gpu_check.machine import write_result


def _kernels() -> object:
    importlib.import_module("vllm._C_stable_libtorch")
    return torch.ops._C.rms_norm


def _platform() -> str:
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        raise RuntimeError(f"vLLM runs on {current_platform!r}, not on CUDA")
    return str(current_platform.get_device_name())


def _flash_attention(version: int) -> str:
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    if not is_fa_version_supported(version):
        raise RuntimeError("not supported")
    return "supported"


def _imported(module: str) -> Callable[[], str]:
    return lambda: importlib.import_module(module).__name__


#: What must load, then what may be missing.
NEEDED: dict[str, Callable[[], Any]] = {
    "kernels": _kernels,
    "platform": _platform,
    "FlashAttention 3": lambda: _flash_attention(3),
    "engine": _imported("vllm.entrypoints.llm"),
    "think-vllm": lambda: importlib.import_module("think_vllm.plugin").register() or "registered",
}
OPTIONAL: dict[str, Callable[[], Any]] = {
    "FlashAttention 2": lambda: _flash_attention(2),
    "int4_per_token_head": _imported("vllm.v1.attention.ops.int4_per_token_head"),
}


def try_all(loaders: dict[str, Callable[[], Any]]) -> tuple[dict[str, str], dict[str, str]]:
    """What loaded, and errors of what did not."""
    loaded, errors = {}, {}
    for name, load in loaders.items():
        try:
            loaded[name] = str(load())
        except Exception as error:  # whatever an import raises
            errors[name] = f"{type(error).__name__}: {error}"
    return loaded, errors


def make_parser() -> argparse.ArgumentParser:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Try everything; 1 if something that is needed does not load."""
    options = make_parser().parse_args(arguments)
    loaded, errors = try_all(NEEDED)
    more, missing = try_all(OPTIONAL)
    for name, said in {**loaded, **more, **errors, **missing}.items():
        print(f"{name}: {said}")
    write_result(options.out, loaded=loaded | more, errors=errors | missing)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
