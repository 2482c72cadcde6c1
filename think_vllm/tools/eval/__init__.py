"""Evaluation data that needs neither a network nor a framework."""
