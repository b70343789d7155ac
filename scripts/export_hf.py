"""Write a checkpoint as a Hugging Face folder: `python -m jax_sft.export` of this clone."""

import in_clone

if __name__ == "__main__":
    in_clone.run("jax_sft.export")
