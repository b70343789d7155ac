"""Parse the text of compiled XLA modules and extract kernels, collectives and loops."""
