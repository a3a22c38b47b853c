"""What the benchmarks share: a model of fw-medium's shape with random weights, fair timing, and the last line."""

import json
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from bilinear_jax.nn.transformer import Transformer, TransformerConfig

FW_MEDIUM = TransformerConfig(n_layer=16, n_head=16, d_model=1024, d_hidden=4096, n_ctx=512, n_vocab=32_000)


def random_params(config: TransformerConfig, scale: float = 0.03):
    """Normal weights, one array at a time, so that nothing else takes memory."""
    shapes = jax.eval_shape(lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten([scale * jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)])


def best_of(repeats: int, functions: Mapping[str, Callable]) -> dict[str, float]:
    """The least seconds that each function took, after one call that compiles.

    They take turns, so that whatever else the machine does meanwhile disturbs all alike.
    """
    best = dict.fromkeys(functions, float("inf"))
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                best[name] = min(best[name], time.perf_counter() - start)
    return best


def peak_bytes(function: Callable, *args) -> int:
    """Memory of a compiled function: its arguments, its results and what it needs in between."""
    memory = jax.jit(function).lower(*args).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def case(name: str, baseline: str, baseline_s: float, our_s: float, max_relative_error: float, peak_bytes: int) -> dict:
    """One measurement, printed and returned as the last line's JSON has it."""
    ratio = baseline_s / our_s
    print(f"{name}: {1e3 * our_s:.1f} ms; {baseline}: {1e3 * baseline_s:.1f} ms; ratio {ratio:.2f}", flush=True)
    return {
        "case": name,
        "baseline": baseline,
        "ratio": round(ratio, 3),
        "max_relative_error": max_relative_error,
        "peak_bytes": peak_bytes,
    }


def report(benchmark: str, cases: list[dict]) -> None:
    print(json.dumps({"benchmark": benchmark, "cases": cases}))
