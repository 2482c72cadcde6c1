"""What ``false`` and the like mean in a YAML file of arguments.

vLLM's reader turns ``x: false`` into ``--no-x`` if the parser that reads the file knows that,
which the one of `vllm serve` does not, and drops it otherwise. So ``false`` would mean true for
what is on by default, and ``kv-quant: off``, which is false in YAML, would vanish.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from think_vllm.errors import ThinkError
from think_vllm.plan.parsing import TRUTH_WORDS, value_form
from think_vllm.plan.settings import ADDITIONAL_CONFIG_KEY, ThinkConfig, flag_name

#: Our options, each with its setting; and those that say no, each with the option's own name.
OUR_OPTIONS = {flag_name(name): name for name in ThinkConfig.model_fields}
OUR_NEGATIONS = {
    f"--no-{option.removeprefix('--')}": option.removeprefix("--")
    for option, name in OUR_OPTIONS.items()
    if ThinkConfig.model_fields[name].annotation is bool
}
_DOTTED = f"--additional-config.{ADDITIONAL_CONFIG_KEY}."


def split_config(arguments: Sequence[str]) -> list[str]:
    """Arguments with ``--config=FILE`` in two words: vLLM reads no file otherwise."""
    words: list[str] = []
    for word in arguments:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    return words


def read_settings(path: str) -> dict[str, Any]:
    """What a YAML file says, its keys as options; nothing if it cannot be read: vLLM says so.

    Raises:
        ThinkError: If it says nothing, or is no mapping.
    """
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    if not isinstance(settings, Mapping):
        raise ThinkError(f"{path} holds no settings; write lines like `kv-channel-prune: 0.5`")
    return {_option(str(key)): value for key, value in settings.items()}


def _option(key: str) -> str:
    """A key as an option; what follows a dot is a name in JSON and stays as it is."""
    name, dot, rest = key.partition(".")
    return f"--{name.replace('_', '-')}{dot}{rest}"


def check_settings(path: str, settings: Mapping[str, Any]) -> None:
    """Reject values of our options that have another type than these take.

    Raises:
        ThinkError: Naming the file, the option, what it says and what to write.
    """
    for option, value in settings.items():
        who = f"{path}: {option.removeprefix('--')}"
        if option.startswith(_DOTTED) and isinstance(value, bool):
            raise ThinkError(
                f"{who} is {str(value).lower()}, which vLLM reads wrong after a dot; write "
                f"`{option.removeprefix(_DOTTED).replace('_', '-')}: {str(value).lower()}` instead"
            )
        if option in OUR_NEGATIONS and value is not True:  # words would pass for the model's name
            plain = OUR_NEGATIONS[option]
            raise ThinkError(f"{who} is {value!r}; write `{plain}: true` or `{plain}: false`")
        if option not in OUR_OPTIONS:
            continue
        name = OUR_OPTIONS[option]
        if ThinkConfig.model_fields[name].annotation is bool:
            if not isinstance(value, bool):
                raise ThinkError(f"{who} is {value!r}; write true or false, without quotes")
        elif isinstance(value, bool):
            raise ThinkError(f"{who}: {TRUTH_WORDS[value]} in YAML; write {value_form(name)}")
        elif value is None or isinstance(value, (list, dict)):
            raise ThinkError(f"{who} is {value!r}; write {value_form(name)}")


def negations(settings: Mapping[str, Any], options: Mapping[str, argparse.Action]) -> list[str]:
    """Options that say no, for those that a file sets to false.

    Args:
        settings: Of ``read_settings``.
        options: All that the parser knows, those of its commands too.
    """
    negated = []
    for option, value in settings.items():
        negation = f"--no-{option.removeprefix('--')}"
        enabling = option.replace("--disable-", "--enable-", 1)
        if value is not False:
            continue
        if negation in options:
            negated.append(negation)
        elif (
            enabling != option and enabling in options and options[enabling] is options.get(option)
        ):
            negated.append(enabling)  # of vLLM 0.33: two sides of one option
    return negated


def check_names(
    path: str, settings: Mapping[str, Any], options: Mapping[str, argparse.Action]
) -> None:
    """Reject truth values that vLLM's reader drops: of unknown options, or empty ones.

    Raises:
        ThinkError: Naming the file, the option and what it says.
    """
    for option, value in settings.items():
        action, who = options.get(option), f"{path}: {option.removeprefix('--')}"
        if value is False and action is None and not negations({option: value}, options):
            raise ThinkError(f"{who} is false, and there is no such option; correct or remove it")
        if value is False and option.startswith("--no-") and action is not None:
            raise ThinkError(f"{who} is false; write `{option.removeprefix('--no-')}: true`")
        if value is None and action is not None and action.nargs == 0:
            raise ThinkError(f"{who} is empty; write true or false")


def known_options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options of a parser and of its commands."""
    options: dict[str, argparse.Action] = dict(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                options |= known_options(command)
    return options


def load_config_file(
    original: Callable[..., list[str]], parser: argparse.ArgumentParser, file_path: str
) -> list[str]:
    """Add our options to what vLLM's parsers read from a YAML file."""
    ours = our_arguments(parser, file_path)  # first: it says more of what is wrong with our options
    return original(parser, file_path) + ours


def our_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """What vLLM's reader leaves out of a file, of our options; for any of vLLM's parsers."""
    try:
        settings = read_settings(path)
        check_settings(path, settings)
    except ThinkError as error:
        parser.error(str(error))
    ours = {option: value for option, value in settings.items() if option in OUR_OPTIONS}
    return negations(ours, known_options(parser))


def other_arguments(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """The same of vLLM's own options, for `think-vllm serve`."""
    options = known_options(parser)
    others = {k: value for k, value in read_settings(path).items() if k not in OUR_OPTIONS}
    try:
        check_names(path, others, options)
    except ThinkError as error:
        parser.error(str(error))
    return negations(others, options)
