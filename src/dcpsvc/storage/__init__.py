"""Durable places for a run root: a directory, this process's memory, or any fsspec URL."""
