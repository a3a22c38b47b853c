"""The n largest interactions, against projecting every interaction matrix onto the SAE and taking its largest entries.

The baseline is compiled once. It projects one output feature at a time (D^T Q D, [features, features]), takes the
``top_k`` of its |entries|, and merges: the method without bounds and without symmetry. The cases are all output
features of the model that ships with the package, and Gaussian factors of fw-medium's shape with 8,192 input features.
There bounds do not help, because noise has no outliers. The error is the largest difference of the n |values|, divided
by the largest of them. Memory is that of the compiled search, with its arguments.

    python benchmarks/interactions.py [output features of the Gaussian case, 8 by default]
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from measure import FW_MEDIUM, best_of, case, report

import bilinear_jax as bj
from bilinear_jax.explain import interactions
from bilinear_jax.linalg.scale import unit_columns

FEATURES = 8192


@functools.partial(jax.jit, static_argnames="n")
def largest_of_one(tensor, direction, basis, n):
    with jax.default_matmul_precision("highest"):
        q = tensor.interaction(direction[None], basis)[0]
    return jax.lax.top_k(jnp.abs(jnp.triu(q)).ravel(), n)


def brute_force(tensor, directions, basis, n):
    found = [largest_of_one(tensor, direction, basis, n)[0] for direction in directions]
    return jax.lax.top_k(jnp.concatenate(found), n)[0]


def peak_bytes(tensor, directions, basis, n) -> int:
    visited, bounds = np.zeros(8, np.int32), np.zeros(8, np.float32)
    search = interactions._search.lower(
        tensor, basis.T, directions, visited, bounds, np.float32(0), n=n, tile=min(256, basis.shape[1]), mesh=None
    )
    memory = search.compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def compare(name: str, tensor, directions, basis, n: int, repeats: int) -> dict:
    found = interactions.top_interactions(tensor, directions, basis, n)
    expected = brute_force(tensor, directions, basis, n)
    error = float(jnp.max(jnp.abs(jnp.abs(found.value) - expected)) / expected[0])
    print(
        f"{name}: pruned {found.pruned:.1%} of the pairs, {found.pruned_rows:.1%} of the rows, "
        f"{found.pruned_features:.1%} of the output features; error {error:.1e}"
    )
    seconds = best_of(
        repeats,
        {
            "ours": lambda: interactions.top_interactions(tensor, directions, basis, n),
            "brute force": lambda: brute_force(tensor, directions, basis, n),
        },
    )
    peak = peak_bytes(tensor, directions, basis, n)
    return case(name, "project and top_k", seconds["brute force"], seconds["ours"], error, peak)


def main(number: int = 8):
    tracer = bj.Tracer(bj.load("ts-nano"), layer=2)
    shipped = tracer.tensor, tracer.directions, tracer.basis
    cases = [
        compare(f"ts-nano, all {tracer.n_features} output features, n = 50", *shipped, n=50, repeats=2),
        compare(f"ts-nano, all {tracer.n_features} output features, n = 1", *shipped, n=1, repeats=2),
        compare(
            "ts-nano, one output feature, n = 50", tracer.tensor, tracer.directions[:1], tracer.basis, n=50, repeats=20
        ),
    ]

    d_model, d_hidden = FW_MEDIUM.d_model, FW_MEDIUM.d_hidden
    shapes = ((d_hidden, d_model), (d_hidden, d_model), (d_model, d_hidden), (number, d_model), (d_model, FEATURES))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    *factors, directions, basis = (0.03 * jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    tensor, basis = bj.BilinearTensor(*factors), unit_columns(basis)
    for count, repeats in ((1, 3), (number, 1)):
        name = f"Gaussian, d_model {d_model}, {FEATURES} input features, {count} of the output, n = 50"
        cases.append(compare(name, tensor, directions[:count], basis, 50, repeats))
    report("interactions", cases)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
