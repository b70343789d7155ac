"""Tokenized sources: the processes that make them, and their cache on disk."""
