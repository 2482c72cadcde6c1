"""What ``false`` and the like mean in a YAML file of arguments.

vLLM's reader turns ``x: false`` into ``--no-x`` if the parser that reads the file knows that,
which the one of `vllm serve` does not, and drops it otherwise. So ``false`` would mean true for
what is on by default, and ``kv-quant: off``, which is false in YAML, would vanish.
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from think_vllm.config import ThinkConfig, flag_name
from think_vllm.errors import ThinkError

_BOOLEAN = frozenset(
    flag_name(name)
    for name, field in ThinkConfig.model_fields.items()
    if field.annotation is bool
)  # fmt: skip
_OURS = frozenset(map(flag_name, ThinkConfig.model_fields))
_WORDS = {True: "`on`, `yes` and `true` are true", False: "`off`, `no` and `false` are false"}


def read_settings(path: str) -> Mapping[str, Any]:
    """What a YAML file says, its keys as options; nothing if it cannot be read: vLLM says so."""
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(settings, Mapping):
        return {}
    return {"--" + str(key).replace("_", "-"): value for key, value in settings.items()}


def check_settings(path: str, settings: Mapping[str, Any]) -> None:
    """Refuse values of our options that are of another kind than what they take.

    Raises:
        ThinkError: Naming the file, the option, what it says and what to write.
    """
    for option, value in settings.items():
        if option not in _OURS:
            continue
        who = f"{path}: {option.removeprefix('--')}"
        if option in _BOOLEAN:
            if not isinstance(value, bool):
                raise ThinkError(f"{who} is {value!r}; write true or false, without quotes")
        elif isinstance(value, bool):
            raise ThinkError(f"{who}: {_WORDS[value]} in YAML; write {_form(option)}")
        elif value is None or isinstance(value, (list, dict)):
            raise ThinkError(f"{who} is {value!r}; write {_form(option)}")


def _form(option: str) -> str:
    """What a person may write for an option that takes a value."""
    field = ThinkConfig.model_fields[option.removeprefix("--").replace("-", "_")]
    if field.default == "none":
        return "`none`, or leave it out"
    return "one value" + ("" if field.default is None else f" such as `{field.default}`")


def negations(settings: Mapping[str, Any], options: Iterable[str]) -> list[str]:
    """Options that say no, for those that a file sets to false.

    Args:
        settings: Of ``read_settings``.
        options: All that the parser knows, those of its commands too.
    """
    known = set(options)
    wanted = [
        f"--no-{name.removeprefix('--')}" for name, value in settings.items() if value is False
    ]
    return [option for option in wanted if option in known]


def known_options(parser: argparse.ArgumentParser) -> set[str]:
    """Options of a parser and of its commands."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found |= known_options(command)
    return found


def our_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """What vLLM's reader leaves out of a file, of our options; for any of vLLM's parsers."""
    settings = read_settings(path)
    try:
        check_settings(path, settings)
    except ThinkError as error:
        parser.error(str(error))
    ours = {name: value for name, value in settings.items() if name in _OURS}
    return negations(ours, known_options(parser))


def other_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The same of vLLM's own options, for `think-vllm serve`."""
    settings = read_settings(path)
    others = {name: value for name, value in settings.items() if name not in _OURS}
    return negations(others, known_options(parser))
