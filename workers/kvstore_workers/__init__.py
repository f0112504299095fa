"""The Python workers of kvstore."""
