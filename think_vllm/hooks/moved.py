"""Names of vLLM that moved between the series that we extend: where each of them is.

Newest place first. Delete a row once no supported vLLM has the name elsewhere.
"""

import importlib
from typing import Any

PLACES = {
    # 0.33: both programs of the server share one folder.
    "make_arg_parser": ("vllm.entrypoints.common.cli_args", "vllm.entrypoints.launchers.cli_args"),
    "cli_env_setup": ("vllm.entrypoints.common.startup", "vllm.entrypoints.serve.utils.api_utils"),
}


def moved(name: str) -> Any:
    """Find a name of ``PLACES``.

    Raises:
        ImportError: If the installed vLLM has it in none of them.
    """
    for place in PLACES[name]:
        try:
            return getattr(importlib.import_module(place), name)
        except (ModuleNotFoundError, AttributeError):
            continue
    raise ImportError(f"think-vllm: vLLM has {name} in none of {', '.join(PLACES[name])}")
