"""The one exception of this package that a user is meant to read."""

#: What turns thin blocks on.
FLAGS = "--kv-channel-prune, --kv-value-prune, --kv-quant and --kv-evict"
#: How to serve what thin blocks cannot.
WAY_OUT = f"Serve this model without {FLAGS}"


class ThinkError(ValueError):
    """A configuration that cannot be served.

    The message says who refuses, what was given, what is needed and the way out. On a
    command line it ends the program in one readable line; offline it is raised as it is.
    """
