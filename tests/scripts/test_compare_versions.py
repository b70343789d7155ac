"""scripts/compare_versions.py: a changed digit, weight or resumed run is a difference, and nothing
that two runs never share is one.
"""

import json
from pathlib import Path

import pytest

from scripts.compare_versions import CASES, SAVED, STEPS, Result, Version, compare, hashes

LOSS, NEXT_LOSS = 3.499943266881195, 3.4999432668811956  # neighbours in float64


class Recorded(Version):
    """A version that writes known numbers and weights in the place of running anything."""

    def __init__(self, folder: Path, change: str = ""):
        self.tree = self.folder = folder
        self.change = change

    def train(self, case: str, run: Path) -> str:
        assert case in CASES
        folder = self.folder / run
        resumes = (folder / "checkpoints" / f"{SAVED}").is_dir()
        assert not (folder / "checkpoints" / f"{STEPS}").exists()
        (folder / "checkpoints" / f"{SAVED}").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / f"{STEPS}").mkdir()
        changed = self.change == ("resumed" if resumes else "loss")
        with (folder / "metrics.jsonl").open("a") as file:
            for step in range(SAVED + 1 if resumes else 1, STEPS + 1):
                loss = NEXT_LOSS if changed and step == STEPS else LOSS
                line = {"step": step, "loss": loss, "step_time_s": 0.5 if self.change else 0.25}
                file.write(json.dumps(line) + "\n")
        return f"from step {SAVED} of {STEPS}" * (resumes and self.change != "begins again")

    def export(self, run: Path, out: Path, *options: str) -> dict[str, str]:
        folder = self.folder / out
        folder.mkdir(parents=True)
        for name in ("weights", "config"):
            file = folder / {"weights": "model.safetensors", "config": "config.json"}[name]
            file.write_text("changed" if self.change == name else "same")
        return hashes(folder)


def compared(folder: Path, change: str, case: str = "full-1") -> list[Result]:
    for name in ("old", "new"):
        (folder / name).mkdir()
    return [*compare(case, Recorded(folder / "old"), Recorded(folder / "new", change))]


@pytest.mark.parametrize(
    "change, claims",
    [
        ("", []),
        ("times", []),
        ("config", []),
        ("loss", ["metrics"]),
        ("resumed", ["metrics, resumed"]),
        ("weights", ["export of the old checkpoint", "export of either run"]),
    ],
)
def test_what_changed_is_named(tmp_path, change, claims):
    results = compared(tmp_path, change)
    assert [result.claim for result in results if not result.holds] == claims
    assert [len(result.different) for result in results if not result.holds] == [1] * len(claims)
    assert any(result.different for result in results) == bool(claims or change == "config")


def test_adapters_are_compared_alone_and_merged(tmp_path):
    claims = [result.claim for result in compared(tmp_path, "", "lora-1")]
    assert "export of either run" in claims and "export --merge of either run" in claims


def test_a_run_that_began_again_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did not resume"):
        compared(tmp_path, "begins again")


def test_a_comparison_of_nothing_does_not_hold():
    assert not Result("case", "claim", 0, []).holds and Result("case", "claim", 1, []).holds
