"""Whether a model can be served with thin blocks here, and what that does to its answers."""
