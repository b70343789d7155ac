"""Find or download a Hugging Face model folder, refuse unsafe entries, and copy its side files.

Called by every command that names a model. `hf_reader` reads the weights of a folder, `hf_writer`
writes a folder.
"""

import re
import shutil
import stat
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from jax_sft.files import paths, regular, step_folders, strict_json

# Files of a model folder in addition to its weights. They are copied unchanged, except for
# eos_token_id (`stop_tokens`) and the template that `data.chat_template` names.
SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json"),
)

TEMPLATES = "additional_chat_templates/*.jinja"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
KEPT = step_folders.KEPT

_READ = {".json", ".jinja", ".txt", ".model", ".safetensors"}  # suffixes of SIDE_FILES and weights
_READ_BY_OTHERS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "preprocessor_config.json"),
)
_PICKLES = ("bin", "pt", "pth", "pkl", "ckpt")


def resolve(path: str, revision: str = "", weights: bool = True) -> Path:
    """Return the local folder of a model: `path` itself, or a download of the hub id `path`.

    For a run, its checkpoint folder, a step, or a folder from `convert`, return the folder of the
    model files stored there; see `pretrained` and `step_of` for the weights.

    Args:
        weights: download the weights too, not only config and tokenizer.

    Raises:
        ValueError: the path is neither a folder nor a hub id that can be downloaded, or the folder
            has an unsafe entry, see `check_entries`.
    """
    folder = paths.local(path, "model.path")
    if folder.is_dir():
        checkpoints, _ = step_folders.locate(folder)
        if (checkpoints / KEPT).is_dir() and not _has_model_type(folder):
            folder = checkpoints / KEPT
        check_entries(folder)
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", path) or path.startswith("."):
        raise ValueError(f"model.path = {path!r} is not a folder")
    patterns = [*SIDE_FILES, TEMPLATES]
    if weights:
        patterns += ["*.safetensors", INDEX]
    try:
        downloaded = huggingface_hub.snapshot_download(
            path, revision=revision or None, allow_patterns=patterns
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path = {path!r} is neither a folder here nor a model the hub gave: {error}"
        ) from error
    return Path(downloaded)


def step_of(path: str, step: int | None = None) -> int | None:
    """Return the step that a path for `resolve` or `step` names; None = the newest.

    Args:
        step: the step, if the path does not name it.

    Raises:
        ValueError: path and `step` name different steps.
    """
    folder = paths.local(path, "model.path")
    return step_folders.locate(folder, step)[1] if folder.is_dir() else step


def _has_model_type(folder: Path) -> bool:
    """Whether a folder has the config.json of a model, not that of a run."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return "model_type" in read_json(folder / "config.json")
    except ValueError:
        return True  # the caller reads it too, and reports what is wrong


def check_entries(folder: Path) -> None:
    """Refuse entries that would hang or crash a library that reads the folder, and links out of it.

    Linked files would be read, and copied into every export. This function also limits size and
    depth of the JSON files that transformers reads; the tokenizers library limits tokenizer.json.

    Raises:
        ValueError: the folder has such entries; the message names them.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":  # the hub's cache: its files are links into ../../blobs
        root = root.parent.parent
    links, irregular = [], []
    for pattern in ("*", "additional_chat_templates/*"):
        for file in sorted(folder.glob(pattern)):
            if file.is_symlink() and not file.resolve().is_relative_to(root):
                links.append(f"{file.relative_to(folder)} -> {file.resolve()}")
            elif file.suffix in _READ and file.exists() and not file.is_file():
                kind = regular.KINDS.get(stat.S_IFMT(file.stat().st_mode), "of another kind")
                irregular.append(f"{file.relative_to(folder)} is {kind}")
    if irregular:
        raise ValueError(f"{folder} has no model: {', '.join(irregular)}, not a regular file")
    if links:
        raise ValueError(
            f"{folder} has links out of the folder: {', '.join(links)}. Put the files "
            "themselves there, or set model.path to the folder that has them"
        )
    for name in _READ_BY_OTHERS:
        if (folder / name).exists():
            strict_json.read(folder / name, strict=False)


def pickles(folder: Path) -> list[str]:
    """Return the names of a model folder's pickle files; they could run code and are never read."""
    return sorted(file.name for kind in _PICKLES for file in folder.glob(f"*.{kind}"))


def side_files(folder: Path) -> list[str]:
    """Return the SIDE_FILES that a folder has, and its additional chat templates."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    return names + sorted(str(file.relative_to(folder)) for file in folder.glob(TEMPLATES))


def copy_side_files(folder: Path, out: Path) -> list[str]:
    """Copy config, generation config, tokenizer and chat templates. Returns the names copied."""
    names = side_files(folder)
    for name in names:
        (out / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, out / name)
    return names


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a model folder.

    Raises:
        ValueError: the file is missing, or `strict_json.read` refuses it.
    """
    try:
        return strict_json.read(file, max_bytes=64 * 2**20 if file.name == INDEX else 16 * 2**20)
    except FileNotFoundError:
        raise ValueError(f"{file.parent} has no {file.name}: it is not a model folder") from None
