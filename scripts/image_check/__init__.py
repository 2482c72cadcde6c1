"""Build the CPU image without an image registry, run it as its compose file does, and ask it."""
