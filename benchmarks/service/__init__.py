"""Clients, tiers and a proxy that behave as the proofs of the service need them."""
