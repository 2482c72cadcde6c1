"""What benchmarks share, some of it with tests."""
