"""Checkpoints of a run: saving, resuming, and the ways from and to Hugging Face folders."""
