"""Write docs/config.md, the reference of all configuration keys, from jax_sft/settings.py.

python -m scripts.config_docs
"""

from pathlib import Path

from jax_sft.runtime import config_help

FILE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

if __name__ == "__main__":
    FILE.write_text(config_help.as_markdown(), encoding="utf-8")
    print(f"written: {FILE}")
