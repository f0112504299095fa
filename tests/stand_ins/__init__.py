"""Thin, faithful stand-ins for the interfaces of engines, so that no engine is needed."""
