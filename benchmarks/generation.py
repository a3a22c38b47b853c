"""Generation with a cache against recomputing from scratch, and its one-token step against reading the weights once.

Random weights of fw-medium's shape (334M parameters, float32), one prompt, greedy. A step at batch 1 multiplies every
weight once. So it cannot be faster than reading the weights (of the input embedding, only one row). The time of
reading is the fastest of a few jitted reductions over the same arrays, on all cores. They run as often in a row as
there are steps, because the speed of memory varies. The time of a step is the difference between a long and a short
continuation, divided by the number of steps. The error is the fraction of new tokens that are not the most likely ones
in one forward pass over the finished text.

    python benchmarks/generation.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from measure import FW_MEDIUM, best_of, case, peak_bytes, random_params, report

from bilinear_jax.nn.generation import generate
from bilinear_jax.nn.sites import forward

NEW = 30
LONG = 110  # new tokens of the long continuation


def recompute(logits, prompt):
    """The greedy tokens, each from a forward pass over everything before it, padded to the final length."""
    tokens = np.pad(prompt, ((0, 0), (0, NEW)))
    for at in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, at] = np.argmax(logits(tokens)[:, at - 1], axis=-1)
    return tokens[:, -NEW:]


def measure(length, config, params, read):
    """Seconds of our calls after a prompt of that length and of a reading; the share of wrong tokens; memory."""
    prompt = np.random.default_rng(0).integers(0, config.n_vocab, (1, length))
    ours = functools.partial(generate, config, params, prompt, temperature=0.0)
    seconds = best_of(
        4,
        {
            "short": lambda: ours(max_length=NEW),
            "long": lambda: ours(max_length=LONG),
            "readings": lambda: [jax.block_until_ready(read()) for _ in range(LONG - NEW)],
        },
    )
    step = (seconds["long"] - seconds["short"]) / (LONG - NEW)
    reading = seconds["readings"] / (LONG - NEW)
    logits = functools.partial(jax.jit(functools.partial(forward, config)), params)
    new = np.asarray(ours(max_length=NEW))
    likeliest = np.argmax(logits(np.concatenate([prompt, new], axis=1))[:, length - 1 : -1], axis=-1)
    wrong = float(np.mean(likeliest != new))
    scratch = best_of(1, {"": lambda: recompute(logits, prompt)})[""]
    peak = peak_bytes(functools.partial(generate, config, max_length=NEW, temperature=0.0), params, prompt)
    return [
        case(f"step after {length}", "reading the weights once", reading, step, wrong, peak),
        case(f"{NEW} tokens after {length}", "recomputing from scratch", scratch, seconds["short"], wrong, peak),
    ]


def main():
    config, params = FW_MEDIUM, random_params(FW_MEDIUM)
    weights = jax.tree.leaves([params["layers"], params["w_u"]])
    reductions = {
        f"{kind} over {over}": functools.partial(
            jax.jit(lambda arrays, f=f, axis=axis: [f(a, axis=axis) for a in arrays]), weights
        )
        for kind, f in (("sum", jnp.sum), ("max", jnp.max))
        for over, axis in (("everything", None), ("rows", -1))
    }
    seconds = best_of(10, reductions)
    fastest = min(seconds, key=seconds.get)
    gigabytes = sum(a.nbytes for a in weights) / 1e9
    print(f"{gigabytes:.2f} GB of weights: {gigabytes / seconds[fastest]:.1f} GB/s at best ({fastest})", flush=True)
    report("generation", [c for length in (10, 400) for c in measure(length, config, params, reductions[fastest])])


if __name__ == "__main__":
    main()
