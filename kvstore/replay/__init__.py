"""Traces through policies without moving bytes: what a cache of some size would have been worth."""
