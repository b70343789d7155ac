"""Resume from the newest step whose files and arrays pass verification.

A damaged step is reported, moved aside and never loaded, and the step before it is used.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_sft import config
from jax_sft.checkpoint import array_checksums, model_files, orbax_io
from jax_sft.data.chat import chat_templates
from jax_sft.files import step_folders
from jax_sft.files.disk import probe_folder
from jax_sft.hosts import cluster, consensus
from jax_sft.runtime import command_line
from jax_sft.runtime.text import at_most
from jax_sft.weights import vocabulary

FORMAT_VERSION = 2
_PLACE = re.compile(r"(params/|optimizer/|)((?:\d+\.)*)(.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class StoredStep:
    """A stored step.

    Attributes:
        metadata: data stored next to the arrays: `config`, `metrics`, `extra`, ...
        arrays: {"params/PATH" or "optimizer/PATH": {"shape", "dtype", "sum"}}.
    """

    step: int
    metadata: dict[str, Any]
    arrays: dict[str, dict[str, Any]]

    @property
    def extra(self) -> dict[str, Any]:
        """The `extra` argument of `Checkpoints.save`."""
        return self.metadata.get("extra") or {}


class Resume:
    """Find and load the step to resume from. Every process has one and calls the same methods.

    Args: see saving.Checkpoints.
    """

    def __init__(
        self,
        folder: Path,
        options,
        model: model_files.Model | None,
        data: str,
        vocab: vocabulary.Vocabulary,
        say: Callable[[str], None],
        eval_data: Mapping[str, str],
        bound: Collection[str],
    ):
        self._folder, self._options, self._model = folder, options, model
        self._data, self._vocabulary, self._say = data, vocab, say
        self._eval_data, self._bound = eval_data, bound
        self._untried: list[int] = []
        self._bad: list[str] = []
        self._replaces_files = False

    def start(self, today: dict[str, Any]) -> StoredStep | None:
        """Clean up, and find the newest step whose files pass verification. Reads no arrays.

        Args:
            today: the resolved config of this start.

        Raises:
            ValueError: the folder cannot be used, every step in it is damaged, or the config or the
                data have changed in a way that is not allowed.
        """
        listing = consensus.from_first("checkpoint folder", self._prepare_folder)
        for line in listing["said"]:
            self._say(line)
        self._untried, self._bad = listing["steps"], listing["aside"]
        newest = self._next_good()
        if newest:
            self._check_drift(newest, today)
        return newest

    def restore(
        self, stored_step: StoredStep, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, jax.Array], StoredStep]:
        """Return the arrays of the step in `stored_step`, or of an older one if these are damaged.

        Args:
            abstract: {name: shape, dtype and sharding to restore to}, see `TrainState.named`.
                Stored arrays of other dtypes, or with a vocabulary padded for another mesh, are
                converted after their checksums were compared.

        Raises:
            ValueError: the step is of another model or optimizer, or every step is damaged.
        """
        while True:
            arrays, problems = self._load(stored_step, abstract)
            if arrays:
                return arrays, stored_step
            self._set_aside(stored_step.step, problems)
            older = self._next_good()
            assert older  # _next_good raises if there is none
            # `start` has already checked the config against a step of the same run.
            stored_step = older

    def keep_model_files(self) -> None:
        """Replace stored model files by changed ones, if allowed; later exports use these.

        Called once it is certain that the run continues to train.
        """
        if self._model and self._replaces_files:
            keep = functools.partial(model_files.keep, self._folder, self._model, replace=True)
            consensus.from_first("model files", keep)

    def _prepare_folder(self) -> dict[str, Any]:
        """Clean up the folder and list its steps, on the first process."""
        probe_folder(self._folder)
        step_folders.refuse_older_format(self._folder)
        lines = [
            f"clean   {name}: left by a run that was killed, removed"
            for name in step_folders.remove_leftovers(self._folder)
        ]
        present, aside = step_folders.present(self._folder), step_folders.set_aside(self._folder)
        if (self._folder / model_files.NAME).exists():
            model_files.verify(self._folder)
            # The files are from a start that ended before its first save, so no step needs them.
            if self._model and not present and model_files.changed(self._folder, self._model):
                model_files.keep(self._folder, self._model, replace=True)
        elif self._model:
            if present:
                lines.append(f"WARNING {self._folder} lacks {model_files.NAME}: written again")
            model_files.keep(self._folder, self._model)
        return {"said": lines, "steps": present, "aside": aside}

    def _next_good(self) -> StoredStep | None:
        """Return the newest step whose files pass verification; move damaged ones aside."""
        while self._untried:
            step = self._untried[0]
            hashes = self._options.verify == "hashes"
            part = (cluster.process_id(), cluster.num_processes())
            bar = f"checking step {step}" if hashes and part[0] == 0 else ""
            check = step_folders.check(self._folder, step, hashes, part, bar)
            problems = consensus.gather("checkpoint files", check.problems)
            if not problems:
                assert check.manifest
                stored = step_folders.metadata(self._folder / str(step))
                self._check_version(stored)
                for line in check.warnings:
                    self._say(f"WARNING checkpoint step {step}: {line}; it is ignored")
                return StoredStep(step, stored, check.manifest.arrays)
            self._set_aside(step, problems)
        if self._bad:
            raise ValueError(
                f"{self._folder} has no good step left, only damaged ones ({', '.join(self._bad)}):"
                " restore one from a backup under its plain number, or move the damaged ones "
                "elsewhere to start from the beginning, or choose another workdir"
            )
        return None

    def _check_version(self, stored: dict[str, Any]) -> None:
        version = stored.get("format_version", 0)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"{self._folder} has checkpoints of format {version}, this program knows "
                f"{FORMAT_VERSION}: update jax_sft"
            )

    def _set_aside(self, step: int, problems: Sequence[str]) -> None:
        """Rename a damaged step and print what is wrong with it."""
        self._untried.remove(step)
        aside = consensus.from_first(
            "checkpoint aside", lambda: step_folders.move_aside(self._folder, step).name
        )
        self._bad.append(aside)
        self._say(f"WARNING checkpoint step {step} is damaged and NOT used; kept as {aside}:")
        for line in at_most(problems):
            self._say(f"WARNING   {line}")
        if self._untried:
            self._say(f"WARNING trying the previous step, {self._untried[0]}")

    def _check_drift(self, stored_step: StoredStep, today: dict[str, Any]) -> None:
        """Refuse to resume if config, data or model files differ in a way that is not allowed."""
        changes = config.drift(stored_step.metadata.get("config") or {}, today, self._bound)
        for key in [key for key in changes if self._is_moved(key, stored_step)]:
            self._say(f"moved   {changes.pop(key)}: the tokens are the same")
        files = model_files.changed(self._folder, self._model) if self._model else []
        # Wait until all processes have compared the files, as the first one may then replace them.
        files = consensus.gather("model files", files)
        if files:
            key, line = self._changed_files(files, stored_step.metadata)
            changes.setdefault(key, line)
        data_changes = [key for key in changes if config.covered(key, ("data", "model"))]
        if self._data != stored_step.metadata.get("data", self._data) and not data_changes:
            changes["data"] = "data: the files are not those of the checkpoint, though their names"
            changes["data"] += " and the config are the same"
        allowed = [key for key in changes if config.covered(key, self._options.allow_changes)]
        for key in allowed:
            self._say(f"WARNING changed since the checkpoint, as allowed: {changes.pop(key)}")
        if changes:
            lines = "\n".join(f"  {line}" for line in changes.values())
            keys = (*self._options.allow_changes, *changes)
            advice = command_line.again({"checkpoint.allow_changes": tuple(dict.fromkeys(keys))})
            raise ValueError(
                f"{self._folder} holds step {stored_step.step} of a run that differs in\n{lines}\n"
                "Resume with the config of that run (config.json next to the checkpoints), choose "
                f"another workdir, or allow the changes: {advice}"
            )
        self._replaces_files = bool(files)

    def _changed_files(self, files: Sequence[str], stored: Mapping[str, Any]) -> tuple[str, str]:
        """Return the config key that the changed model files belong to, and a line about them."""
        assert self._model
        before = ((stored.get("config") or {}).get("data") or {}).get("chat_template")
        are_templates = all(name.partition("/")[0] in chat_templates.FILES for name in files)
        if are_templates and (before or self._model.chat_template):
            key = chat_templates.KEY
            return key, f"{key}: the text of the template is not that of the checkpoint"
        return "model.path", f"model.path: its files {list(files)} were changed"

    def _is_moved(self, key: str, stored_step: StoredStep) -> bool:
        """Whether a changed key only moves the source of data whose tokens are the same."""
        data, kind, name, *field = [*key.split("."), "", "", ""][:4]
        if (data, kind) == ("data", "train") and field[0] not in ("", "epochs", "weight"):
            return bool(self._data) and self._data == stored_step.metadata.get("data")
        stored = (stored_step.metadata.get("eval_data") or {}).get(name)
        is_eval = (data, kind) == ("data", "eval") and field[0]
        return bool(is_eval and stored) and stored == self._eval_data.get(name)

    def _named_files(self, step: int) -> list[str]:
        """Hash every file of a damaged step to find the damaged ones."""
        part = (cluster.process_id(), cluster.num_processes())
        bar = f"looking for what is damaged in step {step}" if part[0] == 0 else ""
        check = step_folders.check(self._folder, step, True, part, bar)
        return consensus.gather("checkpoint files, all", check.problems)

    def _load(
        self, stored_step: StoredStep, abstract: Mapping[str, jax.ShapeDtypeStruct]
    ) -> tuple[dict[str, jax.Array] | None, list[str]]:
        """Return (arrays under the names of `abstract`, []) or (None, problems of the step)."""
        renamed = under_stored_names(abstract, stored_step.arrays)
        self._check_shapes(stored_step, renamed)
        stored = {}
        for name, array in renamed.items():
            shape, dtype = (
                stored_step.arrays[name]["shape"],
                np.dtype(stored_step.arrays[name]["dtype"]),
            )
            stored[name] = vocabulary.as_stored(shape, dtype, array.sharding)
        arrays, problems = {}, []
        try:
            arrays = _flat(orbax_io.load(self._folder / str(stored_step.step), nested(stored)))
        except orbax_io.Failed as error:
            problems = [f"it cannot be read: {error}"]
        if problems := consensus.gather("checkpoint arrays", problems):
            return None, problems + self._named_files(stored_step.step)
        sums = array_checksums.read(arrays, array_checksums.start(arrays))
        problems = [
            array_checksums.problem(n, sums[n], stored_step.arrays[n]["sum"]) for n in arrays
        ]
        if problems := [problem for problem in problems if problem]:
            return None, problems + self._named_files(stored_step.step)
        for name, array in renamed.items():
            if arrays[name].shape != array.shape:
                arrays[name] = vocabulary.resized(arrays[name], array.shape, array.sharding)
            if arrays[name].dtype != array.dtype:
                arrays[name] = arrays[name].astype(array.dtype)
        # `renamed` has the names of the step, in the order of `abstract`.
        return {name: arrays[stored] for name, stored in zip(abstract, renamed, strict=True)}, []

    def _check_shapes(self, stored_step: StoredStep, wanted: Mapping[str, Any]) -> None:
        """Refuse a step of another model or optimizer.

        Raises:
            ValueError: names or shapes of the arrays differ.
        """
        vocab = self._vocabulary
        shapes = {name: vocab.cut(name, array.shape) for name, array in wanted.items()}
        same = (
            stored_step.metadata.get("vocab") == vocab.size
        )  # otherwise the stored arrays are unpadded
        cut = (vocab.cut,) if same else ()
        if problems := step_folders.misfits(stored_step.arrays, shapes, *cut):
            raise ValueError(
                f"checkpoint step {stored_step.step} is of another model or optimizer than the "
                f"config's: {problems}"
            )


def under_stored_names(
    wanted: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the leaves of a state under the names that a step stores them as, in the same order.

    optax names leaves by their position in a chain, "1.0.mu.PATH". Adding or removing a part
    without arrays, such as clipping, renames all others. Names that are equal apart from these
    numbers are matched in the order of the chain.
    """

    def grouped(names: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            place, _, rest = _parts(name)
            groups.setdefault(f"{place} {rest}", []).append(name)
        return {rest: sorted(group, key=_places) for rest, group in groups.items()}

    state_groups, stored_groups = grouped(wanted), grouped(arrays)
    renamed = {
        name: stored_name
        for rest, names in state_groups.items()
        if len(names) == len(stored_groups.get(rest, ()))
        for name, stored_name in zip(names, stored_groups[rest], strict=True)
    }
    return {renamed.get(name, name): leaf for name, leaf in wanted.items()}


def _places(name: str) -> list[int]:
    """Return the chain positions at the start of an optimizer leaf's name."""
    return [int(number) for number in _parts(name)[1].split(".") if number]


def _parts(name: str) -> tuple[str, str, str]:
    """Split a name into its kind, its chain positions, and the rest."""
    match = _PLACE.fullmatch(name)
    assert match, name  # every text matches
    return match[1], match[2], match[3]


def nested(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return {"params": {path: leaf}, "optimizer": {path: leaf}} for `TrainState.named` leaves."""
    tree: dict[str, dict[str, Any]] = {"params": {}, "optimizer": {}}
    for name, leaf in leaves.items():
        kind, _, path = name.partition("/")
        tree[kind][path] = leaf
    return tree


def _flat(tree: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{kind}/{path}": leaf for kind, part in tree.items() for path, leaf in part.items()}
