"""Measure whole training steps on one GPU, ours and those of others, in calls of ten minutes.

    python -m scripts.gpu_cases [--only PATTERN ...] [--out FILE] [--budget SECONDS] [--smoke]
    python -m scripts.gpu_cases --list | --predict | --table FILE ...

A case is SYSTEM/SIZE/LENGTH: a Qwen2.5 shape with random weights, on packed rows of LENGTH tokens,
multiplied in bfloat16. Each case runs in its own process (scripts/gpu_case.py; scripts/gpu_torch.py
for PyTorch) with a time limit. Its results are printed and appended to the file as JSON lines at
once. The most important cases run first. Run this in the clone's root; the package need not be
installed, and nothing is downloaded. --only accepts patterns such as "*/7b/*". --smoke runs toy
sizes on the CPU. --predict plans our cases without a GPU. --table prints results as Markdown.
"""

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scripts.gpu_checks import Row, Task, run_all

CASE = Path(__file__).resolve().parent / "gpu_case.py"
TORCH = Path(__file__).resolve().parent / "gpu_torch.py"
PEAK_FLOPS = 989e12  # FLOP/s of an H200, dense bfloat16
_QWEN = dict(
    model_type="qwen2",
    hidden_act="silu",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=131072,
)


def shape(D: int, F: int, L: int, N: int, K: int, V: int, tied: bool) -> dict[str, Any]:
    """Return a config.json of Qwen2: features, mlp, layers, heads, kv heads, vocabulary."""
    return _QWEN | dict(
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=K,
        vocab_size=V,
        tie_word_embeddings=tied,
    )


# Sizes of Qwen2.5, from the config.json files on the hub.
SHAPES = {
    "0.5b": shape(896, 4864, 24, 14, 2, 151_936, True),
    "1.5b": shape(1536, 8960, 28, 12, 2, 151_936, True),
    "7b": shape(3584, 18_944, 28, 28, 4, 152_064, False),
    "toy": shape(64, 96, 2, 4, 2, 320, False),
}
# {tokens of a row: median segment length} (log-normal, sigma 1). Short rows hold chats, long rows
# hold documents and long conversations.
MEDIANS = {128: 20, 4096: 400, 32768: 4000}

_MOMENTS = {"optimizer.moments_dtype": "bfloat16"}
_PURE = _MOMENTS | {"model.param_dtype": "bfloat16"}
_KEPT = {"model.remat": "qkv,attention,attention_lse"}
_ALL_KEPT = {"model.remat": "qkv,attention,attention_lse,mlp"}
_FULL = {"model.remat": "full"}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to run a case. `expected` is (peak GiB, seconds per step) as `plan` predicts them."""

    rows: int
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    layers: int = 0  # 0 = all of the model's
    expected: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """A system on a shape and a length. Settings are tried in order until one fits in memory."""

    system: str
    size: str
    length: int
    settings: tuple[Setting, ...]
    limit_s: float = 75
    variant: str = ""

    @property
    def name(self) -> str:
        return f"{self.system}{self.variant and '-' + self.variant}/{self.size}/{self.length}"

    def raw(self, setting: Setting) -> dict[str, Any]:
        """Return the config.json of a setting."""
        raw = SHAPES[self.size]
        return raw | {"num_hidden_layers": setting.layers or raw["num_hidden_layers"]}


def of(system: str, size: str, length: int, *settings: Setting, **others) -> Case:
    return Case(system, size, length, settings, **others)


# Our trainer has float32 masters, and bfloat16 moments where a setting has _MOMENTS or _PURE. The
# variant `pure` has bfloat16 masters too, like PyTorch's AdamW on a model loaded in bfloat16.
CASES = (
    of(
        *("ours", "7b", 4096),
        Setting(3, _MOMENTS | _ALL_KEPT, expected=(120.5, 0.949)),
        Setting(6, _MOMENTS | _KEPT, expected=(107.9, 2.093)),
        Setting(4, _MOMENTS | _FULL, expected=(94.1, 1.446)),
        Setting(4, _MOMENTS | _KEPT, layers=20, expected=(77.6, 1.047)),
        limit_s=150,
    ),
    of("torch", "7b", 4096, Setting(4), Setting(2), Setting(1), Setting(2, layers=20)),
    of("jax_plain", "7b", 4096, Setting(4), Setting(2), Setting(2, layers=20), limit_s=90),
    of(
        *("ours", "7b", 4096),
        Setting(6, _MOMENTS | _KEPT, expected=(107.9, 2.093)),
        variant="more-rows",
    ),
    of(
        *("ours", "7b", 32768),
        Setting(1, _MOMENTS | _KEPT, expected=(118.5, 2.986)),
        Setting(1, _MOMENTS | _FULL, expected=(105.5, 3.090)),
        Setting(1, _MOMENTS | _KEPT, layers=20, expected=(90.3, 2.197)),
        limit_s=110,
    ),
    of(
        *("ours", "1.5b", 4096),
        Setting(8, _ALL_KEPT, expected=(66.7, 0.603)),
        Setting(8, _KEPT, expected=(37.0, 0.676)),
    ),
    of(
        *("ours", "0.5b", 4096),
        Setting(16, _ALL_KEPT, expected=(49.4, 0.446)),
        Setting(16, _FULL, expected=(16.1, 0.495)),
    ),
    of(
        *("ours", "7b", 4096),
        Setting(4, _PURE | _ALL_KEPT, expected=(105.0, 1.227)),
        Setting(2, _PURE, expected=(64.3, 0.750)),
        variant="pure",
    ),
    # Cases that do not fit into the first call: --only "*/32768" "*/1.5b/*" "*/0.5b/*" "*compiled*"
    of("torch", "7b", 32768, Setting(1), Setting(1, layers=20), Setting(1, layers=12)),
    of("jax_plain", "7b", 32768, Setting(1), Setting(1, layers=20), Setting(1, layers=12)),
    of("torch", "1.5b", 4096, Setting(8), Setting(4)),
    of("jax_plain", "1.5b", 4096, Setting(8), Setting(4)),
    of("torch", "0.5b", 4096, Setting(16), Setting(8)),
    of("jax_plain", "0.5b", 4096, Setting(16), Setting(8)),
    of(
        *("ours", "1.5b", 32768),
        Setting(1, _ALL_KEPT, expected=(66.7, 0.696)),
        Setting(1, _KEPT, expected=(37.0, 0.769)),
    ),
    of(
        *("ours", "0.5b", 32768),
        Setting(2, _ALL_KEPT, expected=(49.4, 0.598)),
        Setting(1, _KEPT, expected=(14.6, 0.293)),
    ),
    of("torch", "1.5b", 32768, Setting(1)),
    of("jax_plain", "1.5b", 32768, Setting(1), Setting(1, layers=14)),
    of("torch", "0.5b", 32768, Setting(1)),
    of("jax_plain", "0.5b", 32768, Setting(1), Setting(1, layers=12)),
    of("torch", "7b", 4096, Setting(4), Setting(2), variant="compiled", limit_s=200),
)
SMOKE = (
    of("ours", "toy", 128, Setting(4, {"model.dtype": "float32", "model.attention": "reference"})),
    of("jax_plain", "toy", 128, Setting(4)),
    of("torch", "toy", 128, Setting(4)),
)


def find(name: str) -> Case:
    """Return the case with a name."""
    return {case.name: case for case in (*CASES, *SMOKE)}[name]


def tasks(cases: Iterable[Case]) -> list[Task]:
    """Return the tasks: the description of this machine first, then the cases."""
    tasks_to_run = [Task("machine", "", 60, {}, CASE)]
    for case in cases:
        check, _, argument = case.name.partition("/")
        script = TORCH if case.system == "torch" else CASE
        tasks_to_run.append(Task(check, argument, case.limit_s, {}, script))
    return tasks_to_run


def model_flops(raw: dict[str, Any], tokens: float, pairs: float) -> float:
    """Return the FLOPs of a training step as MFU_c counts them.

    Only matrix products of real tokens count: once for the forward pass and twice for the backward
    pass. The embedding lookup and recomputation do not count.

    Args:
        raw: config.json.
        tokens: number of tokens that are not padding; the head counts for each of them.
        pairs: number of query-key pairs that attend: causal, within segments.
    """
    D, F, L = (raw[f"{name}"] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    N, K, V = (raw[name] for name in ("num_attention_heads", "num_key_value_heads", "vocab_size"))
    H = raw.get("head_dim") or D // N
    layer = D * H * (2 * N + 2 * K) + 3 * D * F
    return 6 * (L * layer + D * V) * tokens + 12 * L * N * H * pairs


# ---- command line --------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=["*"], help="run these cases alone")
    parser.add_argument("--out", type=Path, default=Path("gpu_cases.jsonl"), help="of the results")
    parser.add_argument("--budget", type=float, default=560, help="seconds for all of it")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, on CPU")
    parser.add_argument("--list", action="store_true", help="print the cases in their order")
    parser.add_argument("--predict", action="store_true", help="plan our cases; no GPU is used")
    parser.add_argument("--table", nargs="+", type=Path, help="print these results as a table")
    options = parser.parse_args(argv)
    known = SMOKE if options.smoke else CASES
    chosen = [c for c in known if any(fnmatch.fnmatch(c.name, p) for p in options.only)]
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if options.table:
        lines = [line for file in options.table for line in file.read_text().splitlines()]
        print(table(map(json.loads, lines)))
        return 0
    if options.predict:
        own_cases = [case for case in chosen if case.system == "ours"]
        planned = [Task("predict", case.name, 600, {}, CASE) for case in own_cases]
        return run_all(planned, options.out, 3600, smoke=True)  # on CPU
    return run_all(tasks(chosen), options.out, options.budget, smoke=options.smoke)


HEAD = (
    "case, layers, rows, tokens, attention, s/step, tokens/s, MFU_c, peak GiB, predicted s, "
    "predicted GiB, settings"
)


def table(rows: Iterable[Row]) -> str:
    """Return the measured steps as a Markdown table."""
    lines = [f"| {' | '.join(HEAD.split(', '))} |", "|---" * len(HEAD.split(", ")) + "|"]
    for row in rows:
        if "step_time_s" not in row:
            continue
        expected = row.get("expected") or {}
        cells = [
            *(row["task"], row["layers"], row["rows"], row["tokens"], row["attention"]),
            *(f"{row['step_time_s']:.3f}", f"{row['tokens_per_s']:,.0f}"),
            *(f"{row['mfu_c']:.1%}", _gib(row.get("peak_bytes"))),
            f"{expected['step_time_s']:.3f}" if expected else "",
            _gib(expected.get("peak_bytes")),
            " ".join(f"{key.split('.')[-1]}={value}" for key, value in row["settings"].items()),
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _gib(size: float | None) -> str:
    return f"{size / 2**30:.1f}" if size else ""


if __name__ == "__main__":
    sys.exit(main())
