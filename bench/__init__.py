"""Benchmarks; ``make bench`` lists them. Each prints its machine and versions."""
