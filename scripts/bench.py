"""Compare speed with the peers: same weights, tokens and arithmetic, on this machine, in one run.

    python -m scripts.bench --model=SMOLLM2 --table=docs/benchmarks.md  # all CPU cases, 3 repeats
    python -m scripts.bench --cases=a --only=ours,trl --repeats=1       # a quick look
    python -m scripts.bench --smoke                                     # a toy, our trainer only

The subjects are our trainer, TRL's SFTTrainer, a plain torch loop, and Tunix's PeftTrainer (packed
manually, and padded). They run in turn, in fresh processes, each peer in its own virtual
environment. The environments are created from scripts/peers/requirements-*.txt on the first run and
kept in --work. A subject that cannot be installed, or fails, gets a line of the table with the
reason. Figures are void unless the held-out loss equals that of our trainer before training and
after the same number of tokens.

Results are written to --work as JSON lines. --table rewrites the blocks of this machine in a
Markdown file and keeps those of other machines. Needs only pip and a package registry, for the
peers.
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jax_sft.files import outputs
from jax_sft.training import metrics
from scripts import bench_cases, bench_table

REPO = Path(__file__).resolve().parent.parent
PEERS = REPO / "scripts" / "peers"
SHARED = REPO.parent / "shared"


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trainer to measure.

    Attributes:
        label: name in the table.
        script: file in scripts/peers, see peers.contract.
        venv: requirements file that it needs; "" = runs with the Python of this command.
        variant: see peers.contract.Spec.
        once: whether to skip repeats, for a slow subject that no target depends on.
    """

    label: str
    script: str
    venv: str = ""
    variant: str = ""
    once: bool = False


SUBJECTS = {
    "ours": Subject("jax_sft", "ours.py"),
    "trl": Subject("TRL, packed", "trl_sft.py", "trl"),
    "torch": Subject("torch loop, packed", "torch_loop.py", "torch"),
    "tunix-packed": Subject("Tunix, packed by hand", "tunix_peft.py", "tunix", "packed"),
    "tunix-padded": Subject("Tunix, padded", "tunix_peft.py", "tunix", "padded", once=True),
}
# Matrix product speed of this machine, by library; measured once per repeat.
MATMULS = {
    "matmul/jax": Subject("jax", "matmul.py", "", "jax"),
    "matmul/torch": Subject("torch", "matmul.py", "torch", "torch"),
}


def main() -> int:
    options = parse()
    jax.config.update("jax_platforms", "cpu")  # leave the devices to the subjects
    say(f"{machine('cpu')}; work folder {options.work}")
    works = {name: prepare(name, options) for name in options.cases}
    pythons = Pythons(options.work / "venvs", options.python)
    results = options.work / time.strftime("results-%Y%m%d-%H%M%S.jsonl")
    runs = [
        (name, subject, repeat)
        for name in options.cases
        for repeat in range(options.repeats)
        for subject in chosen(name, options)
        if not (repeat and (SUBJECTS | MATMULS)[subject].once)
    ]
    # Before the runs, so that headers name the commit that is measured.
    headers = {name: describe(name, works[name]) for name in options.cases}
    records: list[dict[str, Any]] = []
    for number, (name, subject, repeat) in enumerate(runs, start=1):
        began = time.perf_counter()
        say(f"[{number}/{len(runs)}] case {name}, repeat {repeat + 1}: {subject}")
        result = run(name, works[name], subject, repeat, pythons, options)
        records.append({"case": name, "subject": subject, "repeat": repeat, **result})
        with results.open("a") as stream:
            stream.write(json.dumps(records[-1]) + "\n")
        say(f"    {in_short(result)} ({time.perf_counter() - began:.0f} s)")
    for name, header in headers.items():
        case_records = [record for record in records if record["case"] == name]
        print("\n" + bench_table.block(header, case_records), flush=True)
        if options.table:
            bench_table.write(options.table, header, case_records)
    say(f"\nresults: {results}")
    return int(any("error" in record for record in records))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=names, default=["a", "b"], help=f"of {', '.join(bench_cases.CASES)}")
    add("--only", type=names, default=[], help=f"subjects, of {', '.join(SUBJECTS)}")
    add("--repeats", type=int, default=3, help="fresh processes of each subject")
    add("--steps", type=int, default=0, help="of each run, instead of the case's own number")
    add("--work", type=Path, default=REPO / "runs" / "bench", help="folder that is kept")
    add("--table", type=Path, help="Markdown file whose blocks of this machine are rewritten")
    add("--model", type=Path, help="folder with the pretrained weights of case b")
    add("--data", type=Path, default=SHARED / "data" / "gsm8k_train.jsonl", help="question, answer")
    add("--tokenizers", type=Path, default=SHARED / "tokenizers", help="folder: smollm2/, ...")
    add(
        "--python",
        type=interpreter,
        action="append",
        default=[],
        metavar="PEER=PATH",
        help="an interpreter with what a peer (trl, torch, tunix) needs, instead of one made here",
    )
    add("--timeout", type=float, default=1800, help="seconds after which a run counts as failed")
    add("--smoke", action="store_true", help="a toy case, our own trainer, no network")
    options = parser.parse_args()
    options.python = dict(options.python)
    try:
        options.work = outputs.claim(options.work, ".jax_sft-bench", "--work")
    except ValueError as error:
        parser.error(str(error))
    if options.smoke:
        options.cases = ["smoke"]
    for given, known in ((options.cases, bench_cases.CASES), (options.only, SUBJECTS)):
        if unknown := {*given} - {*known}:
            parser.error(f"{', '.join(sorted(unknown))} unknown: use {', '.join(known)}")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    min_steps = max(bench_cases.CASES[name].warmup for name in options.cases) + 1
    if options.steps and options.steps < min_steps:
        parser.error(f"--steps must be at least {min_steps}: the first are not timed")
    if options.table and not options.table.is_file():
        parser.error(f"--table={options.table} does not exist")
    return options


def interpreter(text: str) -> tuple[str, Path]:
    """Split PEER=PATH and make the path absolute, as runs start in other folders."""
    peer, _, path = text.partition("=")
    # Not resolved: the link identifies the virtual environment.
    interpreter_path = Path(path).absolute()
    peers = sorted({subject.venv for subject in (SUBJECTS | MATMULS).values()} - {""})
    if peer not in peers or not interpreter_path.is_file():
        usage = f"PEER of {', '.join(peers)} and PATH an interpreter"
        raise argparse.ArgumentTypeError(f"{text} is not PEER=PATH, {usage}")
    return peer, interpreter_path


def names(text: str) -> list[str]:
    """Split a comma-separated list."""
    return [name for name in text.split(",") if name]


def chosen(case: str, options: argparse.Namespace) -> list[str]:
    """Return what to run for a case, in order: the matrix products, then the subjects."""
    subjects = [
        name for name in bench_cases.CASES[case].subjects if name in (options.only or SUBJECTS)
    ]
    return [*(["matmul/jax"] if options.smoke else MATMULS), *subjects]


def prepare(name: str, options: argparse.Namespace) -> bench_cases.Work:
    """Create the files of a case and delete its compiled programs, so that cold starts are cold."""
    say(f"case {name}: model, rows, held-out examples")
    inputs = bench_cases.Inputs(options.data, options.tokenizers, options.model)
    for old in ("compiled", "runs"):
        shutil.rmtree(options.work / old / name, ignore_errors=True)
    case = bench_cases.CASES[name]
    case = dataclasses.replace(case, steps=options.steps or case.steps)
    return bench_cases.make(case, name, inputs, options.work / "cases" / name)


# ---- one run -----------------------------------------------------------------------------------


def run(
    case: str,
    work: bench_cases.Work,
    name: str,
    repeat: int,
    pythons: "Pythons",
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Run a subject and return the result it printed, or {"error": reason}."""
    subject = (SUBJECTS | MATMULS)[name]
    python = pythons.of(subject.venv, work.spec.device)
    if isinstance(python, Failure):
        return {"error": python.reason}
    folder = options.work / "runs" / case / f"{name.replace('/', '-')}-{repeat + 1}"
    (folder / "workdir").mkdir(parents=True)
    spec = dataclasses.replace(
        work.spec,
        variant=subject.variant,
        held_out="" if repeat else work.spec.held_out,  # compare losses only once
        workdir=str(folder / "workdir"),
        started=time.time(),
    )
    (folder / "spec.json").write_text(json.dumps(dataclasses.asdict(spec)))
    command = [str(python), str(PEERS / subject.script), str(folder / "spec.json")]
    if options.smoke and name in MATMULS:
        command.append("256")  # smaller than the sizes that measure speed
    compiled = options.work / "compiled" / case / name.replace("/", "-")
    env = environment(work.spec.device, compiled)
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        try:
            done = subprocess.run(
                command, stdout=out, stderr=err, env=env, cwd=folder, timeout=options.timeout
            )
        except subprocess.TimeoutExpired:
            return {"error": f"stopped after {options.timeout:.0f} s"}
        finally:
            shutil.rmtree(folder / "workdir", ignore_errors=True)  # checkpoints
    if done.returncode:
        return {"error": f"exit code {done.returncode}: {last_line(folder / 'stderr')[:300]}"}
    try:
        return json.loads(last_line(folder / "stdout"))
    except json.JSONDecodeError:
        return {"error": f"printed no result: {last_line(folder / 'stdout')[:300]}"}


def environment(device: str, compiled: Path) -> dict[str, str]:
    """Return the environment variables of a subject's process."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if device == "cpu":
        env |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return env


def last_line(file: Path) -> str:
    """Return the last nonempty line, or "no message"."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no message"


def in_short(result: Mapping[str, Any]) -> str:
    """Format a result as one line for the terminal."""
    if "error" in result:
        return f"FAILED: {result['error']}"
    if "flops_per_s" in result:
        return f"{result['flops_per_s'] / 1e9:,.0f} GFLOP/s"
    seconds = sum(result["step_s"])
    return (
        f"{seconds / len(result['step_s']):.3f} s/step, {sum(result['trained']) / seconds:.0f} "
        f"trained tokens/s, {result['peak_bytes'] / 2**30:.2f} GiB, "
        f"first step {result['first_step_s']:.1f} s"
    )


# ---- environments ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Failure:
    """The reason why a peer has no interpreter."""

    reason: str


class Pythons:
    """The interpreters of the peers, each created on first use.

    Args:
        folder: where environments are kept; an environment is reused while its requirements file
            and this Python's version are unchanged.
        given: {peer: path of an interpreter} that the user passed instead.
    """

    def __init__(self, folder: Path, given: Mapping[str, Path]):
        self._folder, self._given = folder, given
        self._interpreters: dict[tuple[str, str], Path | Failure] = {}

    def of(self, peer: str, device: str) -> Path | Failure:
        """Return the interpreter of a peer; "" is the current interpreter."""
        if not peer:
            return Path(sys.executable)
        if peer in self._given:
            return self._given[peer]
        if (peer, device) not in self._interpreters:
            self._interpreters[peer, device] = self._make(peer, device)
        return self._interpreters[peer, device]

    def _make(self, peer: str, device: str) -> Path | Failure:
        file = PEERS / f"requirements-{peer}.txt"
        if device == "gpu" and (for_gpu := PEERS / f"requirements-{peer}-gpu.txt").exists():
            file = for_gpu
        requirements = file.name + "\n" + file.read_text() + sys.version
        venv = self._folder / file.stem.removeprefix("requirements-")
        stamp, python = venv / "installed", venv / "bin" / "python"
        if stamp.exists() and stamp.read_text() == requirements:
            return python
        say(f"    installing {file.name} into {venv} (minutes)")
        shutil.rmtree(venv, ignore_errors=True)
        log = self._folder / f"{venv.name}.log"
        self._folder.mkdir(parents=True, exist_ok=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        with log.open("w") as out:
            for command in ([sys.executable, "-m", "venv", str(venv)], [*pip, "-r", str(file)]):
                done = subprocess.run(command, stdout=out, stderr=out)
                if done.returncode:
                    return Failure(f"could not be installed: {last_line(log)[:300]} ({log})")
        stamp.write_text(requirements)
        return python


# ---- words -------------------------------------------------------------------------------------


def describe(name: str, work: bench_cases.Work) -> bench_table.Header:
    """Return the table header of a case."""
    case = bench_cases.CASES[name]
    hardware = machine(case.device)
    return bench_table.Header(
        case=name,
        title=f"Case {name}: {work.title}",
        machine=hardware,
        when=f"{time.strftime('%Y-%m-%d')}, commit {commit()}",
        dtype=case.dtype,
        subjects=case.subjects,
        labels={subject: SUBJECTS[subject].label for subject in case.subjects},
        flops=work.flops,
        causal_flops=work.causal_flops,
        peak_flops=next((p for kind, p in metrics.PEAK_FLOPS.items() if kind in hardware), 0.0)
        if case.device == "gpu"
        else 0.0,
        targets=case.targets,
        floor_target=case.floor_target,
        mfu_target=case.mfu_target,
    )


def machine(device: str) -> str:
    """Describe the hardware, identically on every run, as this names the block of a table."""
    if device == "gpu":
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        output = subprocess.run(query, capture_output=True, text=True, check=True)
        gpus = output.stdout.split("\n")[:-1]
        return f"{len(gpus)} x {gpus[0]}"
    cpu_fields = dict[str, str]()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        cpu_fields.setdefault(key.strip(), value.strip())
    kind = cpu_fields.get("model name", platform.machine())
    # Virtual machines hide the model. The vector width limits the speed of a matrix product.
    flags = set(cpu_fields.get("flags", "").split())
    widths = {"avx512f": "AVX-512", "avx2": "AVX2", "avx": "AVX"}
    vectors = next((f" ({name})" for flag, name in widths.items() if flag in flags), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{kind}{vectors}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def commit() -> str:
    """Return the commit of this clone, with "+" appended if files have changed."""
    git = ["git", "-C", str(REPO)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + "+" * (dirty == 1) if not head.returncode else "unknown"


def say(line: str) -> None:
    """Print a line and flush, so that it shows at once in a pipe too."""
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
