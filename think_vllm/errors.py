"""The one exception of this package that a user is meant to read."""

#: How to serve what thin blocks cannot.
WAY_OUT = "Serve this model without --kv-channel-prune, --kv-value-prune and --kv-quant"


class ThinkError(ValueError):
    """A configuration that cannot be served.

    The message says who refuses, what was given, what is needed and the way out. On a
    command line it ends the program in one readable line; offline it is raised as it is.
    """
