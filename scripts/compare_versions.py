"""Show that two versions of this project compute the same: losses, resumed runs and exports.

    git worktree add ../old 11a128b
    python -m scripts.compare_versions ../old . --out=../compared [--cases=full-1,lora-8]

Both trees run with this Python, on CPUs. Per case a tiny model trains for 20 steps in each version.
The new version then resumes the old one's checkpoint of step 10 and exports the one of step 20.
Numbers are compared in all digits, weights by the sha256 of their files. Two minutes per case on 2
cores. Exit code 0: everything is the same. 1: what differs is printed.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

STEPS, SAVED = 20, 10
# Run in each tree: makes the inputs of all cases, and prints where the package comes from.
INPUTS = """
import pathlib
import jax_sft
from jax_sft import tiny

parts = tiny.build("runs/tiny-parts")
tiny.write_words(parts, num_train=2000)
experts = pathlib.Path("runs/experts")
experts.mkdir()
tiny.write_tokenizer(experts)
changes = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
sizes = {"moe_intermediate_size": 64, "head_dim": 32, "router_aux_loss_coef": 0.01}
tiny.write_model(experts, tiny.CONFIG | changes | sizes)
print(pathlib.Path(jax_sft.__file__).parent.parent)
"""
ALWAYS: dict[str, object] = {
    "train.steps": STEPS,
    "log.every_steps": 1,
    "checkpoint.every_steps": SAVED,
    "eval.samples": 0,
}
ONE: dict[str, object] = {
    "mesh.cpu_devices": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "mesh.sequence": 1,
}
EIGHT: dict[str, object] = {
    "mesh.cpu_devices": 8,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "mesh.sequence": 1,
}
BFLOAT16: dict[str, object] = {"model.dtype": "bfloat16", "model.remat": "full"}
LORA: dict[str, object] = {"lora.rank": 8}
DROPOUT: dict[str, object] = {"lora.dropout": 0.1, "batch.micro_rows": 4}
CASES: dict[str, dict[str, object]] = {
    "full-1": ONE | BFLOAT16,
    "full-8": EIGHT | BFLOAT16,
    "lora-1": ONE | BFLOAT16 | LORA,
    "lora-8": EIGHT | BFLOAT16 | LORA,
    "float32-micro-1": ONE | {"batch.micro_rows": 2},
    "float32-lora-dropout-micro-1": ONE | LORA | DROPOUT,
    "float32-lora-dropout-micro-8": EIGHT | LORA | DROPOUT,
    "experts-8": EIGHT | BFLOAT16 | {"model.path": "runs/experts"},
}
TIMES = ("_per_s", "_time_s", "_ms")  # ends of the names of metrics that no two runs share


class Version:
    """A version of the project: runs its commands in a folder of its own."""

    def __init__(self, tree: Path, folder: Path):
        """Make the inputs.

        Raises:
            ValueError: the package of another tree was imported.
        """
        self.tree, self.folder = tree.resolve(), folder
        folder.mkdir()
        (folder / "runs").mkdir()
        imported = self.python("-c", INPUTS).splitlines()[-1]
        if Path(imported) != self.tree:
            raise ValueError(f"{self.tree} is no tree of this project: {imported} was imported")

    def python(self, *arguments: str | Path) -> str:
        """Run Python in this version's folder and return what it printed.

        Raises:
            CalledProcessError: it failed; its output has been printed.
        """
        env = os.environ | {
            "PYTHONPATH": str(self.tree),
            "XDG_CACHE_HOME": str(self.folder / "cache"),  # of tokens and of compiled programs
            "JAX_PLATFORMS": "cpu",
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        if done.returncode:
            print(done.stdout)
            done.check_returncode()
        return done.stdout

    def train(self, case: str, run: Path) -> str:
        """Train a case, or resume it if `run` has a checkpoint; return what was printed."""
        options = [f"--config.{key}={value}" for key, value in (ALWAYS | CASES[case]).items()]
        config = f"--config={self.tree / 'configs' / 'tiny.py'}"
        return self.python("-m", "jax_sft.train", config, f"--workdir={run}", *options)

    def export(self, run: Path, out: Path, *options: str) -> dict[str, str]:
        """Export the last step of a run and return `hashes` of the result."""
        script = self.tree / "scripts" / "export_hf.py"
        self.python(script, f"--checkpoint={run / 'checkpoints'}", f"--out={out}", *options)
        return hashes(self.folder / out)


def hashes(folder: Path) -> dict[str, str]:
    """Return {path relative to `folder`: sha256} of all files."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def weights(files: dict[str, str]) -> dict[str, str]:
    """Return the entries of weight files and their index."""
    return {name: sha for name, sha in files.items() if ".safetensors" in name}


def metrics(run: Path, after: int = 0) -> dict[str, str]:
    """Return {"step key": number as it was written} of all metrics but times, after a step."""
    numbers = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        written = json.loads(line, parse_float=str, parse_int=str)
        step = int(written["step"])
        for key, number in written.items():
            if step > after and not key.endswith(TIMES):
                numbers[f"{step} {key}"] = number
    return numbers


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return a line for each entry that is not the same in both."""
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in [*old, *(key for key in new if key not in old)]
        if old.get(key) != new.get(key)
    ]


def interrupted(run: Path, out: Path) -> None:
    """Copy a finished run as it was after the save of step `SAVED`."""
    shutil.copytree(run, out, ignore=shutil.ignore_patterns(str(STEPS)))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    earlier = [line for line in lines if json.loads(line)["step"] <= SAVED]
    (out / "metrics.jsonl").write_text("".join(earlier))


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of one comparison.

    Attributes:
        count: number of entries compared.
        different: a line for each entry that is not the same.
        expected: whether versions may differ in this.
    """

    case: str
    claim: str
    count: int
    different: list[str]
    expected: bool = False

    @property
    def holds(self) -> bool:
        """Whether something was compared, and all of it is the same or may differ."""
        return self.count > 0 and (self.expected or not self.different)

    def text(self) -> str:
        """Return a line, followed by up to five of the entries that differ."""
        verdict = f"{len(self.different)} differ" if self.different else "bitwise the same"
        if self.different and self.expected:
            verdict += " (they may)"
        entries = [f"    {entry}" for entry in self.different[:5]]
        return "\n".join(
            [f"{self.case:28} {self.claim:38} {self.count:3} compared: {verdict}", *entries]
        )


def compare(case: str, old: Version, new: Version) -> Iterator[Result]:
    """Run a case in both versions and yield the comparisons.

    Raises:
        ValueError: the new version began again instead of resuming the old checkpoint.
    """
    run, resumed, exports = Path("runs", case), Path("runs", f"{case}-resumed"), Path("exports")
    for version in (old, new):
        version.train(case, run)
    before = metrics(old.folder / run)
    yield Result(case, "metrics", len(before), differences(before, metrics(new.folder / run)))

    interrupted(old.folder / run, new.folder / resumed)
    if f"from step {SAVED} of {STEPS}" not in new.train(case, resumed):
        raise ValueError(f"{new.tree} did not resume {new.folder / resumed}")
    before = metrics(old.folder / run, after=SAVED)
    after = metrics(new.folder / resumed, after=SAVED)
    yield Result(case, "metrics, resumed", len(before), differences(before, after))

    for options in [(), ("--merge",)] if "lora.rank" in CASES[case] else [()]:
        claim, name = " ".join(("export", *options)), "-".join((case, *options))
        exported = old.export(run, exports / name, *options)
        again = new.export(old.folder / run, exports / f"{name}-of-old", *options)
        own = new.export(run, exports / name, *options)
        files = weights(exported)
        changed = differences(files, weights(again))
        yield Result(case, f"{claim} of the old checkpoint", len(files), changed)
        changed = differences(files, weights(own))
        yield Result(case, f"{claim} of either run", len(files), changed)
        others = {name: sha256 for name, sha256 in exported.items() if name not in files}
        changed = differences(others, {name: again.get(name, "absent") for name in others})
        yield Result(case, f"{claim}: other files", len(others), changed, expected=True)


def main(argv: list[str] | None = None) -> int:
    """Compare, print the results and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a checkout of one version")
    parser.add_argument("new", type=Path, help="a checkout of the other")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; must be new")
    parser.add_argument(
        "--cases", default=",".join(CASES), help="separated by commas [%(default)s]"
    )
    options = parser.parse_args(argv)
    cases = options.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}: use {', '.join(CASES)}")
    out = options.out.resolve()
    out.mkdir(parents=True)
    old = Version(options.old, out / "old")
    new = Version(options.new, out / "new")
    inputs = [hashes(version.folder / "runs") for version in (old, new)]
    results = [Result("inputs", "files", len(inputs[0]), differences(*inputs))]
    print(results[0].text(), flush=True)
    for case in cases:
        for result in compare(case, old, new):
            results.append(result)
            print(result.text(), flush=True)
    return 0 if all(result.holds for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
