"""Simulated caches, one for each way to choose a victim: what a tournament is held among."""
