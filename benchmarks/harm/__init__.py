"""What is done to stored bytes and frames: one surface in each file, for `benchmarks.mutations`."""
