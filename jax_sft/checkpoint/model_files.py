"""What a checkpoint folder keeps of the model that is trained, so that export needs no more.

`model_files` beside the steps: config, tokenizer, chat template and the dtype of each tensor, with
a manifest.
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
    """Where the files come from.

    Attributes:
        folder: the model folder.
        dtypes: {HF name: safetensors dtype} of its tensors.
        chat_template: the text that takes the place of its own; "" = none does.
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
    """Whether a folder is what a checkpoint folder keeps of its model."""
    return folder.name == NAME and (folder / DTYPES_FILE).is_file()


def dtypes(folder: Path) -> dict[str, str]:
    """Return {HF name: safetensors dtype} of the model of a checkpoint folder.

    Raises:
        ValueError: the file is missing, or no JSON object.
    """
    return hf_folder.read_json(folder / NAME / DTYPES_FILE)


def keep(folder: Path, model: Model, anew: bool = False) -> None:
    """Copy the files of the model into a checkpoint folder, unless they are there.

    Args:
        anew: replace those that are there.

    Raises:
        OSError: the file system refused something.
    """
    out = folder / NAME
    if out.exists() and not anew:
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
    """Check the kept files of a checkpoint folder.

    Raises:
        ValueError: they are missing, or one was changed; each is named.
    """
    kept = folder / NAME
    if kept.is_symlink() or not kept.is_dir():
        raise ValueError(
            f"{folder} is neither a run with a checkpoint, nor a checkpoint folder, nor a step: it "
            f"has no {NAME}"
        )
    found = manifest.check(kept, hashes=True)
    if found.problems:
        step_folders.refuse_older_format(folder)
        raise ValueError(
            f"{kept} is not as it was written: {'; '.join(at_most(found.problems))}. "
            "Restore it from a backup, or move it elsewhere: training writes it again from "
            "model.path"
        )
    return found


def changed(folder: Path, model: Model) -> list[str]:
    """Return the files of the model of today that are not those that were kept."""
    found = verify(folder).manifest
    assert found
    today = _sha256(model)
    before = {name: sha256 for name, (_, sha256) in found.files.items() if name != DTYPES_FILE}
    return sorted(
        name
        for name in today.keys() | before.keys()
        if name != "generation_config.json" and before.get(name) != today.get(name)
    )


def _sha256(model: Model) -> dict[str, str]:
    """Return {name: sha256} of the files that `keep` would copy."""
    if not model.chat_template:
        return manifest.sha256_of(model.folder, hf_folder.side_files(model.folder))
    with tempfile.TemporaryDirectory() as folder:
        model.copy_side_files(Path(folder))
        return manifest.sha256_of(Path(folder), hf_folder.side_files(Path(folder)))
