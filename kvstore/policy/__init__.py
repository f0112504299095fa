"""Eviction policies: plain bookkeeping that says which block goes next."""
