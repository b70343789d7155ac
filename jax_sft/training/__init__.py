"""Execute a run: its compiled program, steps, state, evaluation and metrics."""
