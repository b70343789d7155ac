"""The content of plan.json, and its verdict, tables and bars as text.

Called by `plan_page`. Every figure that was not measured is labeled as predicted.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

GIB = 2**30
TERA = 1e12


class Memory(TypedDict):
    """Bytes of one device. `fits` means that `headroom_bytes` of the card stay free."""

    parameters: int
    moments: int
    gradients: int
    activations_and_temporaries: int
    arguments: int
    temporaries: int
    peak_bytes: int
    card_bytes: int
    headroom_bytes: int
    fits: bool
    largest: list[dict[str, Any]]  # bytes, shape, what, count


class Communication(TypedDict):
    """A collective, as seen by one device.

    `bytes` is the size of the array in one execution. `fast_bytes` and `slow_bytes` are sent within
    and between hosts by all `count` executions of a step. `overlaps` is None if unknown.
    """

    kind: str
    axis: list[str]
    dtype: str
    bytes: float
    count: float
    fast_bytes: float
    slow_bytes: float
    overlaps: bool | None
    hidden_behind_flops: float
    what: str


class Predicted(TypedDict):
    """See roofline.Prediction."""

    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float
    mfu_causal: float
    time: dict[str, float]  # seconds, adding up to step_time_s
    assumptions: list[str]


class Plan(TypedDict):
    """The content of plan.json. Without the CUDA plugin, memory and prediction are missing."""

    target: dict[str, Any]  # chip, hosts, gpus_per_host, num_devices
    versions: dict[str, str]
    compiled_for: str  # "cuda", or "cpu (partitioned table only)"
    config: dict[str, Any]
    compile: dict[str, float]  # lower_s, compile_s, hlo_bytes
    memory: NotRequired[Memory]
    communication: list[Communication]
    communication_total: dict[str, float]  # fast_bytes, slow_bytes
    row: NotRequired[dict[str, Any]]  # mean row of the data, see step_cost.RowWork
    opaque_kernels: NotRequired[dict[str, float]]  # kernels with unknown FLOPs
    arithmetic: dict[str, Any]  # all devices: model_flops by part, hardware_flops, ...
    predicted: NotRequired[Predicted]
    warnings: list[str]
    advice: list[str]
    search: NotRequired[list[dict[str, Any]]]  # mesh, micro_rows, remat, peak_bytes, fits, ...


# ---- verdict, tables and bars --------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Rows of cells.

    Attributes:
        text: indices of the columns that hold text; the others hold numbers.
        flexible: index of the column that is shortened if a line is too long.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: tuple[int, ...] = (0,)
    flexible: int = 0
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """Parts of a whole in order. `rest` describes the remainder in words."""

    title: str
    parts: Sequence[tuple[str, float, str]]  # name, size, size in words
    whole: float
    rest: str


def verdict(plan: Plan) -> tuple[str, bool | None]:
    """Return the first line and whether the run fits, None if that is unknown."""
    target = plan["target"]
    devices = f"{target['num_devices']} x {target['chip']}"
    memory = plan.get("memory")
    if memory is None:
        return f"NOT KNOWN whether it fits {devices}: compiled for {plan['compiled_for']}", None
    peak, card = memory["peak_bytes"], memory["card_bytes"]
    share = memory["headroom_bytes"] / card
    numbers = f"predicted peak {gib(peak)} of {gib(card)} on each of {devices}"
    if memory["fits"]:
        return f"FITS: {numbers}, {gib(card - peak)} free ({share:.0%} must be)", True
    missing = peak + memory["headroom_bytes"] - card
    return f"DOES NOT FIT: {numbers}, {gib(missing)} too much ({share:.0%} must stay free)", False


def tables(plan: Plan) -> Iterator[Table]:
    """Yield the tables of a plan in display order."""
    if memory := plan.get("memory"):
        yield _memory_table(memory)
    if predicted := plan.get("predicted"):
        yield _time_table(predicted)
    yield from _communication_tables(plan)
    yield _arithmetic_table(plan["arithmetic"])
    if memory and memory["largest"]:
        rows = [
            [
                str(buffer["what"]),
                str(buffer["shape"]),
                f"{buffer['count']:,}",
                gib(buffer["bytes"]),
            ]
            for buffer in memory["largest"]
        ]
        head = ["buffer", "shape", "count", "each"]
        yield Table("Largest buffers of one device", head, rows, text=(0, 1))
    if "search" in plan:
        yield _search_table(plan["search"])


_PARTS = ("parameters", "moments", "gradients", "activations_and_temporaries")


def _memory_parts(memory: Memory) -> list[tuple[str, int]]:
    parts: list[tuple[str, int]] = [(_words(name), memory[name]) for name in _PARTS]
    other = memory["peak_bytes"] - sum(size for _, size in parts)
    return [*parts, ("other", other)] if other > 0 else parts


def _memory_table(memory: Memory) -> Table:
    card = memory["card_bytes"]
    lines = [
        *_memory_parts(memory),
        ("peak", memory["peak_bytes"]),
        ("free", card - memory["peak_bytes"]),
        ("must stay free", memory["headroom_bytes"]),
        ("card", card),
    ]
    rows = [[name, gib(size), f"{size / card:.1%}"] for name, size in lines]
    return Table("Memory of one device, predicted", ["", "size", "of the card"], rows)


def _time_table(predicted: Predicted) -> Table:
    step = predicted["step_time_s"]
    rows = [
        [_words(name.removesuffix("_s")), f"{seconds * 1e3:,.1f} ms", f"{seconds / step:.1%}"]
        for name, seconds in predicted["time"].items()
    ]
    rows.append(["step", f"{step * 1e3:,.1f} ms", ""])
    rows.append(["tokens/s", f"{predicted['tokens_per_s']:,.0f}", ""])
    rows.append(["tokens/s per device", f"{predicted['tokens_per_s_per_device']:,.0f}", ""])
    rows.append(["MFU", f"{predicted['mfu']:.1%}", ""])
    rows.append(["MFU, head for all tokens", f"{predicted['mfu_causal']:.1%}", ""])
    return Table("Time of a step, predicted", ["", "predicted", "of the step"], rows)


def _communication_tables(plan: Plan) -> Iterator[Table]:
    rows = []
    for group in _alike(plan["communication"]):
        first = group[0]
        fast, slow = (
            sum(collective[key] for collective in group) for key in ("fast_bytes", "slow_bytes")
        )
        hidden = sum(
            collective["fast_bytes"] + collective["slow_bytes"]
            for collective in group
            if collective["overlaps"]
        )
        known = all(collective["overlaps"] is not None for collective in group)
        rows.append(
            [
                *(first["kind"], "+".join(first["axis"]), first["dtype"], _model_part(first)),
                f"{sum(collective['count'] for collective in group):,.0f}",
                *(gib(fast), gib(slow)),
                f"{hidden / ((fast + slow) or 1.0):.0%}" if known else "?",
            ]
        )
    total = plan["communication_total"]
    sums = [gib(total["fast_bytes"]), gib(total["slow_bytes"])]
    rows.append(["total", "", "", "", "", *sums, ""])
    head = ["collective", "axis", "dtype", "what", "count", "fast", "slow", "overlaps"]
    yield Table(
        "Communication of a step, sent by one device",
        head,
        rows,
        text=(0, 1, 2, 3),
        flexible=3,
        note=(
            "fast and slow: within and between hosts; overlaps: share of the bytes that move while "
            "the device computes; every collective by itself is in plan.json"
        ),
    )


def _model_part(collective: Communication) -> str:
    """Return the model part of a collective: "layers.mlp" for "layers.mlp.up.kernel, again"."""
    return ".".join(collective["what"].split(",")[0].split(".")[:2])


def _alike(communication: Sequence[Communication]) -> list[list[Communication]]:
    """Group collectives by kind, axis, dtype and model part, those with the most bytes first."""
    groups: dict[Any, list[Communication]] = {}
    for collective in communication:
        key = (
            collective["kind"],
            tuple(collective["axis"]),
            collective["dtype"],
            _model_part(collective),
        )
        groups.setdefault(key, []).append(collective)

    def sent(alike: list[Communication]) -> float:
        return sum(collective["fast_bytes"] + collective["slow_bytes"] for collective in alike)

    return sorted(groups.values(), key=sent, reverse=True)


def _arithmetic_table(arithmetic: Mapping[str, Any]) -> Table:
    parts = arithmetic["model_flops"]
    whole = sum(parts.values()) or 1.0
    rows = [
        [_words(name), f"{flops / TERA:,.1f}", f"{flops / whole:.1%}"]
        for name, flops in parts.items()
    ]
    rows.append(["model, forward and backward", f"{whole / TERA:,.1f}", "100.0%"])
    for name, flops in arithmetic.items():
        if name != "model_flops":
            shown = f"{flops / TERA:,.1f}", f"{flops / whole:.1%}"
            rows.append([_words(name.removesuffix("_flops")), *shown])
    return Table("Arithmetic of a step, all devices", ["", "TFLOP", "of the model's"], rows)


def _search_table(settings: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [
            " ".join(f"{axis}={size}" for axis, size in setting["mesh"].items() if size > 1) or "-",
            str(setting["remat"]),
            f"{setting['micro_rows']:,}",
            gib(setting["peak_bytes"]),
            "yes" if setting["fits"] else "NO",
            f"{setting['step_time_s']:,.3f} s",
            f"{setting['mfu']:.1%}",
        ]
        for setting in settings
    ]
    head = ["mesh", "remat", "micro_rows", "peak", "fits", "step", "MFU"]
    note = "peak, step and MFU are predicted; the fastest that fit come first"
    return Table("Search", head, rows, text=(0, 1, 4), note=note)


def bars(plan: Plan) -> Iterator[Bar]:
    """Yield the bars of a plan: memory of the card, and time of a step by activity."""
    if memory := plan.get("memory"):
        parts = [(name, size, gib(size)) for name, size in _memory_parts(memory)]
        free = memory["card_bytes"] - memory["peak_bytes"]
        rest = f"free {gib(free)}" if free >= 0 else f"over the card by {gib(-free)}"
        yield Bar("Memory of one device, predicted", parts, memory["card_bytes"], rest)
    if predicted := plan.get("predicted"):
        parts = [
            (_words(name.removesuffix("_s")), seconds, f"{seconds * 1e3:,.1f} ms")
            for name, seconds in predicted["time"].items()
        ]
        step = predicted["step_time_s"]
        yield Bar("Time of a step, predicted", parts, step, f"step {step * 1e3:,.1f} ms")


def facts(plan: Plan) -> list[tuple[str, str]]:
    """Return (name, text) of the config, the target and the compilation."""
    target, compiled = plan["target"], plan["compile"]
    settings = " ".join(f"{key}={_value(value)}" for key, value in plan["config"].items())
    versions = " ".join(f"{name} {version}" for name, version in plan["versions"].items())
    hosts = "1 host" if target["hosts"] == 1 else f"{target['hosts']:,} hosts"
    where = f"{hosts} x {target['gpus_per_host']} x {target['chip']}"
    took = f"in {compiled['lower_s'] + compiled['compile_s']:.1f} s"
    size = f"{compiled['hlo_bytes'] / 1e6:.1f} MB of HLO"
    return [
        ("config", settings),
        ("target", where),
        ("compiled", f"for {plan['compiled_for']} with {versions} {took}, {size}; nothing has run"),
    ]


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_value(inner)}" for key, inner in value.items())
    return str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def gib(size: float) -> str:
    """Format bytes: 70.53 GiB, 3.20 MiB, 0."""
    if not size:
        return "0"
    return f"{size / GIB:,.2f} GiB" if abs(size) >= GIB / 100 else f"{size / 2**20:,.2f} MiB"
