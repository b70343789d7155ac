"""The text of compiled XLA modules: parsed, and read for kernels, transfers and loops."""
