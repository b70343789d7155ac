"""Determine the tokens that end a text: the model's, the trained ones, and the export's.

A model folder names its stop tokens in generation_config.json, which inference engines read, and in
config.json. Training adds the tokens that end trained turns, as {id: trained turns that it ends}.
`train` shows both kinds at the start and stores the trained ones with each step; `hf_export` writes
both.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_sft.data.tokens import worker
from jax_sft.files import step_folders
from jax_sft.weights import hf_folder

GENERATION, CONFIG = "generation_config.json", "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
KEY = "eos_token_id"
# Keys that transformers copies from config.json if there is no generation_config.json.
_COPIED = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def named(folder: Path) -> list[int]:
    """Return the token ids at which generation with a model folder stops.

    Raises:
        ValueError: a file is not a JSON object.
    """
    files = _both(folder)
    return _ids(files.get(GENERATION)) or _ids(files.get(CONFIG))


def trained(report: Mapping[str, Mapping[str, Any]]) -> dict[int, int]:
    """Sum the ends of trained turns over the sources of `Examples.report`, most frequent first."""
    ends: dict[int, int] = {}
    for counts in report.values():
        for end, count in counts["turn_ends"].items():
            ends[int(end)] = ends.get(int(end), 0) + count
    return dict(sorted(ends.items(), key=lambda pair: -pair[1]))


def stored(metadata: Mapping[str, Any]) -> dict[int, int] | None:
    """Return the ends of trained turns in a step's metadata; None = not recorded."""
    ends = metadata.get("turn_ends")
    return None if ends is None else {int(end): count for end, count in ends.items()}


def inherited(folder: Path) -> dict[int, int]:
    """Return the ends that the run of a checkpoint folder trained; {} for a model folder.

    Args:
        folder: `model.path` as `hf_folder.resolve` returned it.
    """
    if folder.name != hf_folder.KEPT or not (present := step_folders.present(folder.parent)):
        return {}
    return stored(step_folders.metadata(folder.parent / str(present[0]))) or {}


def union(first: Iterable[int], second: Iterable[int]) -> list[int]:
    """Return the ids of both in order, without duplicates."""
    return list(dict.fromkeys([*first, *second]))


def shown(ids: Iterable[int], names: Mapping[int, str], counts: Mapping[int, int]) -> str:
    """Return token ids as "'<|im_end|>' (258, 40 turns)"; "no token" for none."""
    texts = []
    for token in ids:
        number = str(token)
        if count := counts.get(token):
            number += f", {count:,} turn{'s' * (count > 1)}"
        texts.append(f"{names[token]!r} ({number})" if names.get(token) else f"token {number}")
    return " and ".join(texts) or "no token"


def line(
    folder: Path,
    before: Sequence[int],
    ends: Mapping[int, int],
    report: Mapping[str, Mapping[str, Any]],
) -> str:
    """Return a line about the ends of texts and of trained turns, and where the export will stop.

    Args:
        folder: the model folder.
        before, ends: results of `named` and `trained`.
        report: report of the train sources.
    """
    both, token_names = union(before, ends), names(folder)
    has_turns = any(counts["format"] not in worker.NO_TEMPLATE for counts in report.values())
    if not ends:
        return (
            "no example trains a special token at its end: the model learns no end of text; the "
            f"export stops at {shown(before, token_names, {})}"
        )
    if all(end in before for end in ends):
        return f"at {shown(before, token_names, ends)}, as the model does"
    stops = "both" if len(both) == 2 else "all of them"
    return (
        f"the model ends texts with {shown(before, token_names, {})}, "
        f"{'the template ends turns' if has_turns else 'the data end'} with "
        f"{shown(ends, token_names, ends)}; the export will stop at "
        f"{stops if before else 'the latter'}"
    )


def export_line(
    folder: Path, ends: Mapping[int, int] | None, changed: Mapping[str, Mapping[str, Any]]
) -> str:
    """Return a line about the stop tokens of an export, and the files changed for them.

    Args:
        folder: folder of the model files, before the change.
        ends, changed: results of `stored` and `changes`.
    """
    if ends is None:
        return (
            "the checkpoint does not say which tokens end trained turns (it is of no training, or "
            f"older than that): unknown, {GENERATION} is not written"
        )
    before, token_names = named(folder), names(folder)
    if not changed:
        return f"stops at {shown(before, token_names, ends)}, as the model did"
    return (
        f"stops at {shown(union(before, ends), token_names, ends)}: {KEY} of "
        f"{' and '.join(changed)} was {before or None}"
    )


def changes(folder: Path, ends: Mapping[int, int], vocab: int) -> dict[str, dict[str, Any]]:
    """Return {file: new content} that makes a model folder also stop at trained ends.

    Each file keeps the ids that it names, or uses those of the other file if it names none. The
    trained ids follow. A file that already names all of them is not changed.

    Args:
        vocab: number of token ids; larger ids are left out.

    Raises:
        ValueError: a file is not a JSON object.
    """
    files = _both(folder)
    ids = {name: _ids(content) for name, content in files.items()}
    added = [end for end in ends if end < vocab]
    if not added:
        return {}
    changed = {}
    for name, other in ((GENERATION, CONFIG), (CONFIG, GENERATION)):
        current = ids.get(name) or ids.get(other) or []
        new_ids = union((token for token in current if token < vocab), added)
        if name in files and not set(added) <= set(ids[name]):
            changed[name] = files[name] | {KEY: _compact(new_ids)}
        elif name == GENERATION and name not in files and not set(added) <= set(current):
            kept = {key: files[CONFIG][key] for key in _COPIED if key in files.get(CONFIG, {})}
            changed[name] = kept | {KEY: _compact(new_ids)}
    return changed


def write(folder: Path, changed: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the files that `changes` returned."""
    for name, content in changed.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def names(folder: Path) -> dict[int, str]:
    """Return {id: text} of the special and added tokens of a model folder.

    Raises:
        ValueError: a file is not a JSON object.
    """
    # tokenizer_config.json is small and has the tokens for most models; tokenizer.json may have
    # 11 MB.
    config = _read(folder, TOKENIZER_CONFIG).get("added_tokens_decoder")
    if isinstance(config, dict) and config:
        added = list(config.items())
    else:
        entries = _added_tokens(folder / "tokenizer.json")
        entries = entries if isinstance(entries, list) else []
        added = [(entry.get("id"), entry) for entry in entries if isinstance(entry, dict)]
    return {
        int(str(token)): entry["content"]
        for token, entry in added
        if re.fullmatch(r"[0-9]{1,9}", str(token))
        and isinstance(entry, dict)
        and isinstance(entry.get("content"), str)
    }


def _added_tokens(file: Path) -> Any:
    """Return the added tokens of a tokenizer.json.

    Skips its vocabulary where it can, as parsing that takes 1 s for 11 MB.
    """
    if not file.is_file():
        return []
    before, _, rest = file.read_text(encoding="utf-8").partition('"added_tokens":')
    if '"vocab"' not in before and rest.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            return json.JSONDecoder().raw_decode(rest.lstrip())[0]
    return hf_folder.read_json(file).get("added_tokens") or []


def eos_text(folder: Path, ends: Mapping[int, int] | None) -> str:
    """Return the text of the token that ends most trained turns.

    Raises:
        ValueError: the token is not known.
    """
    token_names = names(folder)
    if not ends or (end := max(ends, key=ends.__getitem__)) not in token_names:
        raise ValueError(
            "the token that ends trained turns is not known, so that it cannot become the "
            "tokenizer's eos_token: leave out --tokenizer-eos (train.export_tokenizer_eos)"
        )
    return token_names[end]


def set_tokenizer_eos(folder: Path, text: str) -> None:
    """Make a token the eos_token of a folder's tokenizer."""
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        if not (content := _read(folder, name)):
            continue
        before = content.get("eos_token")
        content["eos_token"] = before | {"content": text} if isinstance(before, dict) else text
        write(folder, {name: content})


def _both(folder: Path) -> dict[str, dict[str, Any]]:
    names = [name for name in (GENERATION, CONFIG) if (folder / name).is_file()]
    return {name: hf_folder.read_json(folder / name) for name in names}


def _read(folder: Path, name: str) -> dict[str, Any]:
    return hf_folder.read_json(folder / name) if (folder / name).is_file() else {}


def _ids(content: Mapping[str, Any] | None) -> list[int]:
    """Return the token ids of a file's eos_token_id, which may be an id, a list or missing."""
    value = (content or {}).get(KEY)
    ids = value if isinstance(value, list) else [value]
    return [token for token in ids if type(token) is int and 0 <= token < 2**31]


def _compact(ids: list[int]) -> int | list[int]:
    return ids if len(ids) > 1 else ids[0]
