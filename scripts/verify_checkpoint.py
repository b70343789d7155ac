"""Check the files of a run's checkpoints: `python -m jax_sft.verify` of this clone."""

import in_clone

if __name__ == "__main__":
    in_clone.run("jax_sft.verify")
