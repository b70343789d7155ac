"""Write a Hugging Face folder as a checkpoint: `python -m jax_sft.convert` of this clone."""

import in_clone

if __name__ == "__main__":
    in_clone.run("jax_sft.convert")
