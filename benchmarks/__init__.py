"""Programs that measure what the project promises; `python -m benchmarks.prove` runs them all."""
