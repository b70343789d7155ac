"""Causal attention on packed rows: one file per backend, and the choice of backend."""
