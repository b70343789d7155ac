"""Store the model files next to the checkpoints, so that export needs nothing else.

The folder `model_files` holds config, tokenizer, chat template, the dtype of each tensor, and a
manifest.
"""

import dataclasses
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jax_sft.data.chat import chat_templates
from jax_sft.files import manifest, step_folders
from jax_sft.files.disk import sync
from jax_sft.runtime.text import at_most
from jax_sft.weights import hf_folder

NAME = hf_folder.KEPT
DTYPES_FILE = "tensor_dtypes.json"


@dataclasses.dataclass(frozen=True)
class Model:
    """Source of the model files.

    Attributes:
        folder: the model folder.
        dtypes: {HF name: safetensors dtype} of its tensors.
        chat_template: text that replaces the model's chat template; "" = keep the model's.
    """

    folder: Path
    dtypes: Mapping[str, str]
    chat_template: str = ""

    def copy_side_files(self, out: Path) -> None:
        """Copy config, tokenizer and chat template to a folder."""
        hf_folder.copy_side_files(self.folder, out)
        if self.chat_template:
            chat_templates.put(self.chat_template, out)


def is_kept(folder: Path) -> bool:
    """Whether a folder is the `model_files` of a checkpoint folder."""
    return folder.name == NAME and (folder / DTYPES_FILE).is_file()


def dtypes(folder: Path) -> dict[str, str]:
    """Return {HF name: safetensors dtype} of the model of a checkpoint folder.

    Raises:
        ValueError: the file is missing, or is not a JSON object.
    """
    return hf_folder.read_json(folder / NAME / DTYPES_FILE)


def keep(folder: Path, model: Model, replace: bool = False) -> None:
    """Copy the model files into a checkpoint folder, unless it has them.

    Args:
        replace: replace existing ones.

    Raises:
        OSError: a file operation failed.
    """
    out = folder / NAME
    if out.exists() and not replace:
        return
    unfinished = folder / f".{NAME}-{secrets.token_hex(4)}"
    unfinished.mkdir()
    model.copy_side_files(unfinished)
    (unfinished / DTYPES_FILE).write_text(json.dumps(dict(model.dtypes), indent=1))
    manifest.write(unfinished)
    if out.exists():
        os.rename(out, replaced := unfinished.with_name(f"{unfinished.name}.old"))
        shutil.rmtree(replaced)
    os.rename(unfinished, out)
    sync(folder)


def verify(folder: Path) -> manifest.Check:
    """Check the model files of a checkpoint folder.

    Raises:
        ValueError: the files are missing, or some were changed; the message names each.
    """
    kept = folder / NAME
    if kept.is_symlink() or not kept.is_dir():
        raise ValueError(
            f"{folder} is neither a run with a checkpoint, nor a checkpoint folder, nor a step: it "
            f"has no {NAME}"
        )
    check = manifest.check(kept, hashes=True)
    if check.problems:
        step_folders.refuse_older_format(folder)
        raise ValueError(
            f"{kept} is not as it was written: {'; '.join(at_most(check.problems))}. "
            "Restore it from a backup, or move it elsewhere: training writes it again from "
            "model.path"
        )
    return check


def changed(folder: Path, model: Model) -> list[str]:
    """Return the names of the stored model files that differ from the current model's."""
    stored = verify(folder).manifest
    assert stored
    current = _sha256(model)
    before = {name: sha256 for name, (_, sha256) in stored.files.items() if name != DTYPES_FILE}
    return sorted(
        name
        for name in current.keys() | before.keys()
        if name != "generation_config.json" and before.get(name) != current.get(name)
    )


def _sha256(model: Model) -> dict[str, str]:
    """Return {name: sha256} of the files that `keep` would copy."""
    if not model.chat_template:
        return manifest.sha256_of(model.folder, hf_folder.side_files(model.folder))
    with tempfile.TemporaryDirectory() as folder:
        model.copy_side_files(Path(folder))
        return manifest.sha256_of(Path(folder), hf_folder.side_files(Path(folder)))
