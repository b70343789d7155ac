"""Real hosts: processes that each build only their own rows make the same global batch."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_sft.hosts import cluster
from tests import programs, tiers

REPO = Path(__file__).resolve().parents[2]
ROWS, START, STOP = 8, 5, 12
# One host: joins the others, then writes the rows that it built of each step.
HOST = """
import json, os, sys
from pathlib import Path
import jax, numpy as np
from jax_sft.hosts import cluster
from jax_sft import config
from jax_sft.sharding.mesh import make_mesh, simulate_cpu_devices
from jax_sft.data.batches.loader import Loader
from jax_sft.data.tokens.prepare import prepare
from jax_sft.settings import Data, Source

simulate_cpu_devices(8)
cluster.initialize()
model, data, out, start, stop, packing = sys.argv[1:]
sources = {"a": Source(data, limit=50), "b": Source(data, epochs=0.4)}
settings = Data(train=sources, seq_len=256, packing=packing)
mesh = make_mesh({"data": 2, "fsdp": 4})
examples = prepare(sources, Path(model), settings, progress=False)
cluster.check_same("data", {"a": json.dumps(examples.report["a"]["fingerprint"])})
loader = Loader(
    examples, settings, sources, rows=8, micro_rows=8, mesh=mesh, shuffle=True, seed=3
)
found = {}
for step, batch in enumerate(loader.batches(int(start), int(stop)), start=int(start)):
    for name, array in batch.items():
        for shard in array.addressable_shards:
            first = shard.index[1].start or 0
            found[f"{step}/{name}/{first}"] = np.asarray(shard.data)[0]
np.savez(Path(out) / f"{jax.process_index()}.npz", **found)
sockets = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
for file in ("tcp", "tcp6"):
    for line in Path("/proc/self/net", file).read_text().splitlines()[1:]:
        _, at, _, state, *_, inode = line.split()[:10]
        if state == "0A" and f"socket:[{inode}]" in sockets:  # LISTEN
            assert at.partition(":")[0].endswith("0100007F"), f"{file}: process listens at {at}"
"""


def run_hosts(num_hosts: int, folder: Path, *arguments: object) -> dict[str, np.ndarray]:
    """Start hosts that share 8 devices; return {"step/array": the global batch's array}."""
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = programs.environment(PYTHONPATH=str(REPO))
    if num_hosts > 1:
        env |= {"JAX_SFT_COORDINATOR": f"127.0.0.1:{port}", "JAX_SFT_NUM_PROCESSES": str(num_hosts)}
    model, data, start, stop, packing = map(str, arguments)
    command = [sys.executable, "-c", HOST, model, data, str(folder), start, stop, packing]
    hosts = [
        subprocess.Popen(
            command, env=env | {"JAX_SFT_PROCESS_ID": str(number)} if num_hosts > 1 else env
        )
        for number in range(num_hosts)
    ]
    assert [host.wait(timeout=240) for host in hosts] == [0] * num_hosts
    rows: dict[str, dict[int, np.ndarray]] = {}
    for file in folder.glob("*.npz"):
        with np.load(file) as parts:
            for key in parts:
                array, _, first = key.rpartition("/")
                rows.setdefault(array, {})[int(first)] = parts[key]
    return {name: np.concatenate([of[n] for n in sorted(of)]) for name, of in rows.items()}


@pytest.mark.parametrize(
    ("coordinator", "resolved", "expected"),
    [
        ("127.0.0.1:29400", ["127.0.0.1"], "127.0.0.1:29400"),
        ("localhost:29400", ["127.0.0.1", "::1"], "127.0.0.1:29400"),
        ("[::1]:29400", ["::1"], "[::1]:29400"),
        ("here:29400", ["10.1.2.3"], "10.1.2.3:29400"),
        ("here:29400", ["127.0.1.1"], "[::]:29400"),  # Debian's own name: others see another
        ("here:29400", ["10.1.2.3", "10.9.9.9"], "[::]:29400"),
        ("alias:29400", ["192.0.2.7"], "[::]:29400"),  # an address of no interface here
        ("unknown:29400", [], "[::]:29400"),
    ],
)
def test_the_coordinator_listens_at_the_one_address_that_is_named(
    monkeypatch, coordinator, resolved, expected
):
    def getaddrinfo(*_, **__):
        if not resolved:
            raise OSError("unknown")
        return [(None, None, None, "", (address, 0)) for address in resolved]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    ours = ("127.0.0.1", "127.0.1.1", "::1", "10.1.2.3")
    monkeypatch.setattr(cluster, "_is_local", lambda address: address in ours)
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS", raising=False)
    assert cluster.bind_address(coordinator) == expected


# Rows that are not packed are resumed in one process by test_loader.
@pytest.mark.parametrize("packing", ["best_fit", tiers.full("none")])
def test_resumed_on_1_2_and_4_hosts_the_global_batches_are_bitwise_those_of_one(
    make_model, tmp_path, packing
):
    rng = np.random.default_rng(0)
    data = tmp_path / "rows.jsonl"
    rows = (
        {"prompt": f"row {n}", "response": "x" * int(length)}
        for n, length in enumerate(rng.integers(1, 180, 120))
    )
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model()
    whole = run_hosts(1, tmp_path / "whole", model, data, 0, STOP, packing)
    assert all(array.shape[0] == ROWS for array in whole.values())
    for num_hosts in (1, 2, 4) if packing == "best_fit" else (2,):
        resumed = run_hosts(num_hosts, tmp_path / str(num_hosts), model, data, START, STOP, packing)
        assert len(resumed) == 5 * (STOP - START)
        for name, array in resumed.items():
            np.testing.assert_array_equal(array, whole[name], err_msg=f"{num_hosts} hosts, {name}")
