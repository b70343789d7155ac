"""Real processes: what one number of them saved others read bitwise; one that fails, fails all."""

import shutil
import socket
import time
from pathlib import Path

import pytest

from tests import programs

# A process: ACTION is a list of words, done in order with all others.
PROCESS = """
import resource, signal, sys, time
from pathlib import Path
import jax, numpy as np
from jax_sft.hosts import cluster
from jax_sft import config
from jax_sft.sharding.mesh import make_mesh, simulate_cpu_devices
from jax_sft.training.state import TrainState

num_devices, folder, *actions = sys.argv[1:]
simulate_cpu_devices(int(num_devices))
cluster.initialize()
from scripts.faults import damage  # after devices are known
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
CONFIG = config.to_dict(config.default())
cluster.hosts()
checkpoints = damage.open_folder(Path(folder), say=lambda line: print(line, flush=True))
mesh = make_mesh({"data": 1, "fsdp": int(num_devices), "tensor": 1, "sequence": 1})
abstract = damage.abstract_of(damage.make_state(0, mesh=mesh))
found = checkpoints.start(CONFIG)
for action in actions:
    what, _, value = action.partition("=")
    if what == "save":
        began = time.monotonic()
        state = damage.make_state(int(value), mesh=mesh)
        damage.save(checkpoints, state, CONFIG, wait=value == "3")
        checkpoints.close()
        print(f"save {value}: {checkpoints.saved_step} {time.monotonic() - began:.1f}", flush=True)
    elif what == "limit" and cluster.process_id() == int(value):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))  # writes fail here only
    elif what == "unlimit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    elif what == "restore":
        state, found = damage.restore(checkpoints, found, abstract)
        expected = damage.make_state(found.step, mesh=mesh)
        assert found.step == int(value), found.step
        for have, want in zip(*map(jax.tree.leaves, (state, expected)), strict=True):
            assert (have.dtype, have.sharding) == (want.dtype, want.sharding)
            for a, b in zip(have.addressable_shards, want.addressable_shards, strict=True):
                assert np.asarray(a.data).tobytes() == np.asarray(b.data).tobytes()
    elif what == "again":
        found = damage.open_folder(Path(folder)).start(CONFIG)
print("end", flush=True)
cluster.exchange("the end", "")
if cluster.num_processes() > 1:
    jax.distributed.shutdown()
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run processes that share some devices; return what each printed."""
    program = tmp_path_factory.mktemp("program") / "process.py"
    program.write_text(PROCESS)

    def run(count: int, num_devices: int, folder: Path, *actions: str) -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {}
        if count > 1:
            env = {"JAX_SFT_COORDINATOR": f"127.0.0.1:{port}", "JAX_SFT_NUM_PROCESSES": str(count)}
        logs = tmp_path_factory.mktemp("logs")
        processes = [
            server.start(
                program,
                *(str(num_devices), str(folder), *actions),
                output=logs / f"{number}.out",
                errors=logs / f"{number}.err",
                env=env | ({"JAX_SFT_PROCESS_ID": str(number)} if count > 1 else {}),
            )
            for number in range(count)
        ]
        printed = []
        for number, process in enumerate(processes):
            code = process.wait(timeout=240)
            out, error = (logs / f"{number}.{name}" for name in ("out", "err"))
            printed.append(out.read_text())
            assert code == 0 and printed[-1].endswith("end\n"), printed[-1] + error.read_text()
        return printed

    with programs.Server("jax_sft.train", "scripts.faults.damage") as server:
        yield run


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """Return a folder with steps 1 and 2, which two processes saved."""
    folder = tmp_path_factory.mktemp("saved") / "a[1]" / "checkpoints"  # no glob pattern
    run(2, 8, folder, "save=1", "save=2")
    return folder


@pytest.mark.parametrize("others", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_what_2_processes_save_others_read_bitwise_and_back(run, saved, tmp_path, others):
    # Its name would be a glob pattern of another folder.
    folder = Path(shutil.copytree(saved, tmp_path / "a[1]" / "checkpoints"))
    assert {path.name for path in (folder / "2").glob("manifest.*")} == {
        *("manifest.0.json", "manifest.1.json")
    }
    run(1, 8, folder, "restore=2", "save=3")
    if others == 4:
        run(4, 4, folder, "restore=3", "save=4")
    run(2, 8, folder, f"restore={4 if others == 4 else 3}")


@pytest.mark.parametrize("where", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_write_error_of_one_process_fails_the_save_of_both_at_once(run, tmp_path, where):
    folder = tmp_path / "checkpoints"
    began = time.monotonic()
    out = run(
        *(2, 8, folder, "save=1", f"limit={where}", "save=2", "unlimit"),
        *("save=3", "again", "restore=3"),
    )
    assert time.monotonic() - began < 60  # and not the 300 s of Orbax's barriers
    for lines in out:
        assert "save 1: 1 " in lines and "save 2: 1 " in lines and "save 3: 3 " in lines
    assert "step 2 could NOT be saved" in out[0] and "File too large" in out[0]
    assert f"[process {where} (host " in out[0] and "step 1 remains the newest" in out[0]
    assert {path.name for path in folder.iterdir()} == {"1", "3"}


def test_damage_that_only_one_process_reads_sends_both_to_the_older_step(run, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "checkpoints"))
    (file,) = [
        file
        for file in (folder / "2" / "params" / "ocdbt.process_1").rglob("*")
        if file.is_file() and file.stat().st_size > 1 << 20
    ]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    out = run(2, 8, folder, "restore=1")
    assert "tensor params/a.kernel is damaged" in out[0] and file.name in out[0]
