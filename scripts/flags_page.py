"""Write the table of docs/flags.md from the descriptions of the settings, as ``--help`` has them.

``python -m scripts.flags_page`` after a setting has changed; a test fails until then.
"""

import argparse
from pathlib import Path
from typing import Any

from think_vllm.hooks.flags import declare_flags
from think_vllm.plan.settings import ThinkConfig, flag_name

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"
_BEGIN, _END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
_HEAD = "| flag | values | default | meaning |\n| --- | --- | --- | --- |\n"


def with_table(page: str) -> str:
    """The page with a fresh table."""
    parser = argparse.ArgumentParser(add_help=False)
    declare_flags(parser)
    metavars = {action.dest: action.metavar for action in parser._actions}
    fields = ThinkConfig.model_json_schema()["properties"]
    rows = [_row(name, metavars[name], field) for name, field in fields.items()]
    before, rest = page.split(_BEGIN)
    return "".join([before, _BEGIN, _HEAD, *rows, _END, rest.split(_END)[1]])


def _row(name: str, metavar: Any, field: dict[str, Any]) -> str:
    flag, default, values = flag_name(name), field["default"], ""
    if field.get("type") == "boolean":
        flag, default = flag.replace("--", "--[no-]", 1), "on" if default else "off"
    elif "enum" in field:
        values = ", ".join(f"`{value}`" for value in field["enum"])
    elif "exclusiveMinimum" in field:
        values = f"above {field['exclusiveMinimum']:g}, to {field['maximum']:g}"
    elif "maximum" in field:
        values = f"{field['minimum']:g} to {field['maximum']:,}"
    if isinstance(default, int | float):
        default = f"{default:g}"
    flag += f" {metavar}" if metavar else ""
    return f"| `{flag}` | {values} | {default or ''} | {field['description']} |\n"


def main() -> None:
    """Write the page."""
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
