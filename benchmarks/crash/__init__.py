"""Processes that are killed, devices that fail and fill up: what the crash proofs share."""
