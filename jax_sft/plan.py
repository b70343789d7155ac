"""Predict, without a GPU, whether a run fits, what it sends, what overlaps, and its rough speed.

    python -m jax_sft.plan --config=configs/qwen7b.py --target=h200 --hosts=2 [--search]

Compiles exactly the step that `train` would run, for GPUs that need not exist, and analyzes the
compiled program. Needs the model's config.json, but no weights and no data. If --workdir (default
runs/NAME_OF_CONFIG) holds a run's data_report.json, its lengths and trained share are used. Writes
plan.json and plan.html to --workdir. Exits with 1 if the run does not fit.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from jax_sft.runtime import lifecycle

if __name__ == "__main__":
    lifecycle.begin()

import jax
from absl import app, flags, logging

from jax_sft import config, hardware
from jax_sft.files import outputs, paths
from jax_sft.planning import search, targets
from jax_sft.planning.analysis import Target, analyse
from jax_sft.planning.step_cost import RowWork, segment_pairs
from jax_sft.report import plan_page
from jax_sft.report.plan_tables import Plan
from jax_sft.runtime import command_line
from jax_sft.sharding.mesh import simulate_cpu_devices
from jax_sft.validate import validate

EXIT_DOES_NOT_FIT = 1
FALLBACK = (
    "the step is partitioned for simulated CPU devices, which tells what it sends, but neither "
    "temporaries, peak and verdict, nor what overlaps and how long it takes"
)
MOST_ADVICE = 4  # most settings to compile when looking for one that fits, 10 to 20 s each


def plan(
    cfg: config.Config,
    target: str,
    hosts: int,
    gpus_per_host: int = 8,
    *,
    report: Path | None = None,
    with_search: bool = False,
    hlo_file: Path | None = None,
    say=lambda line: None,
) -> Plan:
    """Return the plan of a run, the dict that plan.json holds; see `report.plan_tables.Plan`.

    Args:
        cfg: from `jax_sft.config.default()`.
        target: a key of `hardware.CHIPS`.
        hosts: number of hosts.
        gpus_per_host: GPUs in each host.
        report: a run's data_report.json; None = rows of one full segment, all trained.
        with_search: also try other meshes, micro-batches and remat policies.
        hlo_file: file to which the compiled program is written; None = not written.
        say: prints a line of progress.

    Raises:
        ValueError: the config or an argument is wrong.
    """
    chip = hardware.find(target)
    num_devices = hosts * gpus_per_host
    if hosts < 1 or gpus_per_host < 1:
        raise ValueError(f"--hosts={hosts} --gpus-per-host={gpus_per_host}: use positive numbers")
    if hlo_file and not hlo_file.absolute().parent.is_dir():
        raise ValueError(f"--hlo={hlo_file}: there is no folder {hlo_file.absolute().parent}")
    settings = validate(cfg, num_devices, planned_for=chip.capability)
    row = _row_work(report, settings.data.seq_len)
    if problem := targets.plugin_problem():
        if with_search:
            raise ValueError(f"--search needs the compiler for GPUs: {problem}")
        say(f"WARNING {problem}. Until then: {FALLBACK}")
        devices = cpu_devices(num_devices)
        settings = dataclasses.replace(settings, attention="blockwise")  # runs on CPUs
    else:
        devices = targets.topology(chip, hosts, gpus_per_host)
    machines = Target(chip, hosts, gpus_per_host, devices, row)
    say(f"compiling for {num_devices} x {chip.kind} ...")
    planned = analyse(settings, machines, hlo_file=hlo_file)
    if settings.data.packing == "none":
        planned["warnings"].append(
            'data.packing = "none" pads rows to the longest of a batch: planned are full rows, the '
            "most work and memory that a batch can take"
        )
    if with_search:
        planned["search"] = search.search(settings, machines, say)
    elif not fits(planned):
        say("it does not fit: looking for what would")
        planned["advice"] = search.advice(settings, machines, MOST_ADVICE, say)
    return planned


def _row_work(report: Path | None, seq_len: int) -> RowWork:
    """Return the work of a row of the data, from the report of a run if there is one.

    Raises:
        ValueError: `report` is not the data report of a run.
    """
    if report is None:
        return segment_pairs(None, seq_len)
    try:
        return segment_pairs(json.loads(report.read_text())["train"], seq_len)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{report} is not a run's data_report.json ({type(error).__name__}: {error}): name "
            "another with --data-report, or move it away to plan for full rows"
        ) from error


def fits(planned: Plan) -> bool:
    """Return whether the run fits, and True without the plugin, when it is not known."""
    return "memory" not in planned or planned["memory"]["fits"]


def cpu_devices(num_devices: int) -> list[Any]:
    """Return simulated CPU devices for which the step is partitioned.

    Raises:
        ValueError: JAX already runs with fewer devices.
    """
    simulate_cpu_devices(num_devices)
    if jax.device_count() < num_devices:
        raise ValueError(f"JAX already runs with {jax.device_count()} of {num_devices} devices")
    return jax.devices()[:num_devices]


def _path(option: str) -> Path | None:
    """Return the path in an option, or None if the option is not given."""
    text = flags.FLAGS[option].value
    return paths.local(text, f"--{option}") if text else None


def is_plan(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a plan.json."""
    return start.startswith(b'{\n  "target": {')


def is_hlo(start: bytes) -> bool:
    """Return whether a file that begins with `start` is a compiled program."""
    return start.startswith(b"HloModule")


def main(_: list[str]) -> None:
    """Run the command line."""
    logging.set_verbosity(logging.ERROR)
    options = flags.FLAGS
    workdir = paths.local(options.workdir or command_line.default_workdir(), "--workdir")
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"--workdir={workdir} is a file: name a folder")
    plan_json = outputs.check_file(workdir / "plan.json", is_plan, "--workdir")
    plan_html = outputs.check_file(workdir / "plan.html", outputs.is_page, "--workdir")
    hlo_file = _path("hlo")
    if hlo_file:
        hlo_file = outputs.check_file(hlo_file, is_hlo, "--hlo")
    default_report = workdir / "data_report.json"
    report = _path("data-report") or (default_report if default_report.exists() else None)
    planned = plan(
        options.config,
        options.target,
        options.hosts,
        int(options["gpus-per-host"].value or 0),
        report=report,
        with_search=options.search,
        hlo_file=hlo_file,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(plan_page.as_text(planned))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        outputs.write_file(plan_json, [json.dumps(planned, indent=2) + "\n"])
        outputs.write_file(plan_html, [plan_page.render(planned)])
    except OSError as error:
        raise ValueError(f"--workdir={workdir} cannot be written: {error}") from error
    print(f"\nwritten: {workdir / 'plan.json'}, {workdir / 'plan.html'}")
    sys.exit(0 if fits(planned) else EXIT_DOES_NOT_FIT)


if __name__ == "__main__":
    targets.keep_off_gpus()
    command_line.define_config()
    flags.DEFINE_enum("target", "h200", list(hardware.CHIPS), "The kind of GPU.")
    flags.DEFINE_integer("hosts", 1, "How many hosts.")
    flags.DEFINE_integer("gpus-per-host", 8, "GPUs in each host.")
    flags.DEFINE_bool("search", False, "Also try other meshes, micro-batches and remat policies.")
    flags.DEFINE_string("workdir", "", "Where plan.json goes; default runs/NAME_OF_CONFIG.")
    flags.DEFINE_string("data-report", "", "Default: data_report.json in the workdir.")
    flags.DEFINE_string("hlo", "", "Also write the compiled program to this file.")
    lifecycle.run(lambda: app.run(main, flags_parser=command_line.parse_flags))
