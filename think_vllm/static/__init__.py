"""Channels that are the same for every token of a model, calibrated once."""
