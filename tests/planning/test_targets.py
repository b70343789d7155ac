"""Chips are described as their data sheets say, and XLA compiles for each of them without a GPU."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_sft import hardware
from jax_sft.planning import targets
from jax_sft.planning.hlo import collectives, loops, parser
from jax_sft.training import metrics

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
needs_plugin = pytest.mark.skipif(
    targets.plugin_problem() is not None, reason=str(targets.plugin_problem())
)


@pytest.mark.parametrize(
    ("name", "memory_gib", "peak", "hbm", "nvlink", "network"),
    [
        ("h100", 79.11, 989e12, 3.35e12, 450e9, 50e9),
        ("h200", 139.80, 989e12, 4.8e12, 450e9, 50e9),
        ("b200", 178.36, 2250e12, 8e12, 900e9, 50e9),
        ("a100", 79.26, 312e12, 2.039e12, 300e9, 25e9),
    ],
)
def test_chips_are_as_their_data_sheets_and_drivers_say(
    name, memory_gib, peak, hbm, nvlink, network
):
    chip = hardware.find(name)
    assert round(chip.memory_bytes / GIB, 2) == memory_gib
    assert (chip.peak_flops, chip.hbm_bytes_per_s) == (peak, hbm)
    assert (chip.nvlink_bytes_per_s, chip.network_bytes_per_s) == (nvlink, network)


def test_an_unknown_chip_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"--target=h300: use one of \['h100', 'h200', 'b200', "):
        hardware.find("h300")


def test_the_meter_measures_against_the_peak_that_the_plan_predicts_with():
    for chip in hardware.CHIPS.values():
        first = next(peak for name, peak in metrics.PEAK_FLOPS.items() if name in chip.kind)
        assert first == chip.peak_flops


def test_every_target_tells_its_own_numbers():
    for chip in hardware.CHIPS.values():
        text = targets.target_config(chip)
        assert text.count("{") == text.count("}")
        assert int(re.findall(r"device_memory_size: (\d+)", text)[0]) == chip.memory_bytes
        assert re.findall(r"core_count: (\d+)", text) == [str(chip.cores)]
        assert re.findall(r"major: (\d+) minor: (\d) ", text) == [tuple(map(str, chip.capability))]
        # Kernels of sm_90a and sm_100a exist for these only.
        assert ("ACCELERATED" in text) == (chip.name != "a100")


@needs_plugin
@pytest.mark.parametrize("name", hardware.CHIPS)
def test_a_sharded_function_compiles_for_every_chip(name):
    chip = hardware.find(name)
    devices = targets.topology(chip, hosts=2, gpus_per_host=8)
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert {device.device_kind for device in devices} == {chip.kind}
    assert metrics.peak_flops(devices) == 16 * chip.peak_flops
    mesh = jax.make_mesh((16,), ("fsdp",), axis_types=(AxisType.Auto,), devices=devices)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("fsdp"))

    def loss(w, x):
        return jnp.tanh(x @ w.astype(jnp.bfloat16)).astype(jnp.float32).sum()

    w = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((4096, 1024), jnp.bfloat16, sharding=split)
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(whole, split))
    compiled = step.lower(w, x).compile(compiler_options=targets.compiler_options())
    text = compiled.as_text()
    module = parser.parse(text)
    transfers = collectives.collectives(module, loops.executions(module))
    # Whether a gather blocks or has a start and a done depends on the chip and on jaxlib.
    assert {"all-gather", "reduce-scatter"} <= {transfer.kind for transfer in transfers}
    assert "__cublas" in text and "__triton_gemm" not in text
    # Its shards of w, of x and of the gradient: 64 KiB, 512 KiB and 64 KiB, and a gathered w.
    assert 2 * 2**20 < compiled.memory_analysis().peak_memory_in_bytes < 16 * 2**20


@needs_plugin
def test_no_environment_is_needed_to_compile():
    options = targets.compiler_options()
    assert options["xla_gpu_enable_triton_gemm"] is False
    folder = Path(options["xla_gpu_cuda_data_dir"])
    assert (folder / "bin" / "ptxas").exists()


@pytest.mark.parametrize(("hosts", "gpus"), [(0, 8), (1, 0), (-1, 8)])
def test_a_topology_of_no_devices_is_refused(hosts, gpus):
    with pytest.raises(ValueError, match=f"--hosts={hosts} --gpus-per-host={gpus}: use positive"):
        targets.topology(hardware.find("h200"), hosts, gpus)


# ---- what must be installed ------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit, named by CUDA_HOME, with ptxas but without libdevice."""
    monkeypatch.delenv("CUDA_ROOT", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ptxas").touch()
    (tmp_path / "nvvm" / "libdevice").mkdir(parents=True)
    return tmp_path


def test_a_toolkit_counts_only_with_ptxas_and_libdevice(toolkit, monkeypatch):
    monkeypatch.setattr(targets, "_wheels", lambda: [])
    assert targets.cuda_folder() != toolkit
    (toolkit / "nvvm" / "libdevice" / "libdevice.10.bc").touch()
    assert targets.cuda_folder() == toolkit


def test_the_wheels_come_before_a_toolkit(toolkit, monkeypatch, tmp_path_factory):
    (toolkit / "nvvm" / "libdevice" / "libdevice.10.bc").touch()
    wheels = tmp_path_factory.mktemp("cu13")
    for name in ("bin/ptxas", "nvvm/libdevice/libdevice.10.bc"):
        (wheels / name).parent.mkdir(parents=True)
        (wheels / name).touch()
    monkeypatch.setattr(targets, "_wheels", lambda: [wheels])
    assert targets.cuda_folder() == wheels


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"jaxlib": "0.10.2"}, "JAX's CUDA plugin is not installed: "),
        (
            {"jaxlib": "0.10.2", "jax-cuda13-pjrt": "0.10.1"},
            "jax-cuda13-pjrt 0.10.1 does not fit jaxlib 0.10.2: ",
        ),
        (
            {"jaxlib": "0.10.2", "jax-cuda13-pjrt": "0.10.2"},
            "no ptxas and libdevice, of NVIDIA's wheels or of a CUDA toolkit: ",
        ),
    ],
)
def test_what_is_missing_is_named_with_the_remedy(monkeypatch, versions, message):
    monkeypatch.setattr(targets, "_version", versions.get)
    monkeypatch.setattr(targets, "cuda_folder", lambda: None)
    assert targets.plugin_problem() == message + "pip install -r requirements-plan.txt"
    with pytest.raises(ValueError, match=message):
        targets.topology(hardware.find("h200"), 1, 8)


def test_the_remedy_exists_and_allows_the_same_jax_as_training():
    name = targets.REMEDY.split()[-1]
    lines = (ROOT / name).read_text().splitlines()
    training = (ROOT / "requirements.txt").read_text().splitlines()
    (jax_range,) = [line.removeprefix("jax") for line in training if re.match("jax[>=]", line)]
    assert f"jax[cuda13-local]{jax_range}" in lines and "-r requirements.txt" in lines
