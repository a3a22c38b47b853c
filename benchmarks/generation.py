"""Generation with a cache against recomputing from scratch, and its one-token step against reading the weights once.

Random weights of fw-medium's shape (334M parameters, float32), one prompt, greedy. A step at batch 1 multiplies every
weight once, so it can't take less than reading them: all but the input embedding, of which it reads one row. Reading
is measured as the fastest of a few jitted reductions over the same arrays, on all cores. The error is the share
of the new tokens that are not the most likely ones according to one forward pass over the finished text.

    python benchmarks/generation.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from measure import FW_MEDIUM, best_of, case, peak_bytes, random_params, report

from bilinear_jax.generation import generate
from bilinear_jax.nn.sites import forward

NEW = 30
STEPS = NEW - 1  # the first of the new tokens comes from the prompt's own pass


def recompute(logits, prompt):
    """The greedy tokens, each from a forward pass over everything before it, padded to the final length."""
    tokens = np.pad(prompt, ((0, 0), (0, NEW)))
    for at in range(prompt.shape[1], tokens.shape[1]):
        tokens[:, at] = np.argmax(logits(tokens)[:, at - 1], axis=-1)
    return tokens[:, -NEW:]


def measure(length, config, params, reductions):
    """Seconds of our calls after a prompt of that length and of the reductions; the share of wrong tokens; memory."""
    prompt = np.random.default_rng(0).integers(0, config.n_vocab, (1, length))
    ours = functools.partial(generate, config, params, prompt, temperature=0.0)
    seconds = best_of(5, {"all": lambda: ours(max_length=NEW), "first": lambda: ours(max_length=1)} | reductions)
    logits = functools.partial(jax.jit(functools.partial(forward, config)), params)
    new = np.asarray(ours(max_length=NEW))
    likeliest = np.argmax(logits(np.concatenate([prompt, new], axis=1))[:, length - 1 : -1], axis=-1)
    seconds |= best_of(1, {"scratch": lambda: recompute(logits, prompt)})
    peak = peak_bytes(functools.partial(generate, config, max_length=NEW, temperature=0.0), params, prompt)
    return seconds, float(np.mean(likeliest != new)), peak


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
    measured = {length: measure(length, config, params, reductions) for length in (10, 400)}
    reading, name = min((seconds[name], name) for seconds, _, _ in measured.values() for name in reductions)
    gigabytes = sum(a.nbytes for a in weights) / 1e9
    print(f"reading {gigabytes:.2f} GB ({name}): {1e3 * reading:.1f} ms, {gigabytes / reading:.1f} GB/s")
    cases = []
    for length, (seconds, wrong, peak) in measured.items():
        step, every = (seconds["all"] - seconds["first"]) / STEPS, seconds["all"]
        cases.append(case(f"step after {length}", "reading the weights once", reading, step, wrong, peak))
        scratch = seconds["scratch"]
        cases.append(case(f"{NEW} tokens after {length}", "recomputing from scratch", scratch, every, wrong, peak))
    report("generation", cases)


if __name__ == "__main__":
    main()
