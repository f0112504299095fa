"""What the benchmarks of a worker share: models, a node in its own process, sources of blocks."""
