"""Measure the cost of the output head when few tokens train.

    python -m scripts.bench_head [--layers 2 --features 512 --vocab 32768 --rows 4 --seq-len 1024]

Times the loss alone and the whole model, forward and backward, without the optimizer, on the first
device of this machine. Trained tokens are contiguous at the end of each row, as answers are. Each
figure is the fastest of several runs. On a CPU it is in core seconds, so that other work on the
machine does not count. Weights are random and float32.
"""

import argparse
import functools
import platform
import time
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np

from jax_sft import models
from jax_sft.nn.model_def import ModelDef
from jax_sft.ops.cross_entropy import chunk_sizes, cross_entropy
from jax_sft.sharding.mesh import single_device_mesh
from jax_sft.training.step import value_and_grad

SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--features", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens per row")
    parser.add_argument("--dtype", default="float32", help="of activations")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the fastest counts")
    options = parser.parse_args()
    device = jax.local_devices()[0]
    print(f"{device.device_kind} ({platform.machine()}), jax {version('jax')}, {vars(options)}")
    num_tokens = options.rows * options.seq_len
    sizes = chunk_sizes(options.vocab, num_tokens, device.platform)
    print(f"{num_tokens} tokens in chunks of {', '.join(map(str, sizes))}\n")

    model_def, params = random_model(options)
    with jax.set_mesh(single_device_mesh()):
        whole = jax.jit(lambda params, batch: value_and_grad(model_def, params, batch))
        alone = jax.jit(jax.value_and_grad(loss_alone, (0, 1)))
        hidden_BTD = jax.random.normal(
            jax.random.key(0), (options.rows, options.seq_len, options.features), options.dtype
        )
        head_VD = params["head.table"].T
        seconds = {}
        for share in SHARES:
            batch = random_batch(options, share)
            labels = batch["targets"][0], batch["weights"][0]
            seconds[share] = (
                fastest(functools.partial(alone, hidden_BTD, head_VD, *labels), options),
                fastest(functools.partial(whole, params, batch), options),
            )
    print("trained   loss alone          whole model")
    for share, times in seconds.items():
        cells = (
            f"{t:7.3f} s  {t / full:5.2f}" for t, full in zip(times, seconds[1.0], strict=True)
        )
        print(f"{share:6.0%}   " + "    ".join(cells))


def random_model(options) -> tuple[ModelDef, dict[str, jax.Array]]:
    """Return a Llama of this size with an untied head, and its random parameters."""
    family, heads = models.find("llama"), options.features // 64
    raw = {
        "model_type": "llama",
        "vocab_size": options.vocab,
        "hidden_size": options.features,
        "intermediate_size": 4 * options.features,
        "num_hidden_layers": options.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": options.seq_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
    }
    cfg = family.Config.from_hf(raw)
    model_def = ModelDef.of(family, cfg, dtype=options.dtype, remat="full")
    rng = np.random.default_rng(0)
    shapes = {row.path: row.shape(cfg.axis_sizes) for row in model_def.specs}
    return model_def, {
        path: jnp.asarray(0.02 * rng.standard_normal(shape), jnp.float32)
        for path, shape in shapes.items()
    }


def random_batch(options, share: float) -> dict[str, jax.Array]:
    """Return one micro-batch of one segment per row, in which the last tokens train."""
    shape = (1, options.rows, options.seq_len)
    places = np.broadcast_to(np.arange(options.seq_len, dtype=np.int32), shape)
    tokens = np.random.default_rng(0).integers(0, options.vocab, shape).astype(np.int32)
    return {
        "tokens": jnp.asarray(tokens),
        "targets": jnp.asarray(np.roll(tokens, -1, axis=-1)),
        "weights": jnp.asarray(places >= round((1 - share) * options.seq_len), jnp.float32),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "positions": jnp.asarray(places),
    }


def loss_alone(hidden_BTD, head_VD, targets_BT, weights_BT) -> jax.Array:
    return cross_entropy(hidden_BTD, head_VD, targets_BT, weights_BT)[0]


def fastest(run: Callable[[], object], options) -> float:
    """Return the seconds of the fastest run, after one run that compiles."""
    jax.block_until_ready(run())
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = []
    for _ in range(options.repeats):
        began = clock()
        jax.block_until_ready(run())
        times.append(clock() - began)
    return min(times)


if __name__ == "__main__":
    main()
