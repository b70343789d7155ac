"""Check the files of an export: `python -m jax_sft.verify` of this clone."""

import in_clone

if __name__ == "__main__":
    in_clone.run("jax_sft.verify")
