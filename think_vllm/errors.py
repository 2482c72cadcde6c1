"""``ThinkError``, the error that users are shown, and texts for its messages."""

import re

#: What turns thin blocks on.
FLAGS = "--kv-channel-prune, --kv-value-prune, --kv-quant and --kv-evict"
#: How to serve what thin blocks cannot.
REMEDY = f"Serve this model without {FLAGS}"
#: The last line of a traceback, behind the prefix of vLLM's log.
_ERROR = re.compile(r"(?:^|\] )((?:\w+\.)*\w*(?:Error|Exception): .*\S)")


class ThinkError(ValueError):
    """A configuration that cannot be served.

    The message says who rejects, what was given, what is needed and the remedy. On a
    command line it ends the program in one readable line; offline it is raised as it is.
    """


def end_of_output(text: str, lines: int) -> str:
    """Take the end of a program's output, and the first error in it if that stands before.

    An engine ends with the traceback of the caller that waited for it, and the reason is far above.

    Args:
        text: The output.
        lines: Of the end.
    """
    output = text.splitlines()
    for line in output[:-lines]:
        if found := _ERROR.search(line):
            return "\n".join([found[1], "...", *output[-lines:]])
    return "\n".join(output[-lines:])
