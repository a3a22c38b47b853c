"""One training step of every kind of dictionary, against dense autodiff of the same and other libraries.

A step is what ``training.sae`` does on a batch of activations: encode, select, decode, the gradients of all parameters,
removal of the part along the decoder's columns, Adam, columns scaled back to unit length, and the counters of dead
features, with d_model 1024, expansion 8, batch 4096, float32. The dense step differs in one point: its codes are an
array ``[batch, features]``, and its derivatives are those of JAX's dense matrix products.

    python benchmarks/sae_step.py                   # ratio: seconds of the other / ours; peak_bytes: ours
    python benchmarks/sae_step.py --torch PYTHON    # also torch, SAELens and dictionary_learning, where PYTHON has them

All kinds have k 30 active features of a token, thresholded ones on average: thresholds, and biases of ReLU, start at
quantiles of the pre-activations. The batch is noise, so tokens differ less in l0 than those of a model do. The learning
rate is so small that l0 stays; a step takes the same time with any. All steps of a kind, and our top-k step, take
turns.

Peak memory is that of the compiled step as XLA reports it, with the state donated (arguments, results and intermediate
values); that of the dense step is printed beside it. The largest relative error is that of the gradients, divided by
the largest entry of each, from the same parameters. Where the baseline is our top-k step, the ratio is below 1 for a
kind that takes longer.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import measure
import numpy as np

from bilinear_jax.nn.activations import batch_threshold, jump, step
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.training.fit import TrainState, apply_optimizer
from bilinear_jax.training.sae import sae_update
from bilinear_jax.training.sae_loss import reconstruction_loss
from bilinear_jax.training.sae_recipe import SAERecipe
from bilinear_jax.training.sae_state import as_published, initial_state, sae_optimizer

KINDS = {
    "topk": {},
    "topk_relu": dict(activation="topk_relu"),
    "batchtopk": dict(activation="batchtopk"),
    "jumprelu": dict(activation="jumprelu"),
    "relu": dict(activation="relu", encoder_bias=True),
    "transcoder": dict(target="mlp_out", encoder_bias=True, skip=True),
    "bilinear": dict(target="mlp_out", bilinear_encoder=True, product_bias=True),
}


def dense_loss(params, config: SAEConfig, recipe: SAERecipe, weight, x, y):
    """The loss with every code written out; whether each feature fired; l0, and the threshold of the batch."""
    h = (x - params["b_dec"][None] if config.centred else x) @ params["w_enc"].T
    h = h + params["b_enc"][None] if config.encoder_bias else h
    if config.bilinear_encoder:
        left, right = jnp.split(h, 2, axis=-1)
        h = left * right + params["b_z"][None]
    active, threshold = (h > 0).astype(h.dtype), jnp.zeros(())
    if config.activation == "batchtopk":
        threshold = batch_threshold(h, config.k * len(x))
        codes = jnp.where((h >= threshold) & (h > 0), h, 0)
    elif config.activation == "jumprelu":
        its = jnp.broadcast_to(jnp.exp(params["log_threshold"]), h.shape)
        codes = jump(jnp.maximum(h, 0), its, recipe.bandwidth)
        active = step(jnp.maximum(h, 0), its, recipe.bandwidth)
    elif config.activation == "relu":
        codes = jnp.maximum(h, 0)
    else:
        values, indices = jax.lax.top_k(h, config.k)
        values = jnp.maximum(values, 0) if config.activation == "topk_relu" else values
        codes = jnp.zeros_like(h).at[jnp.arange(len(x))[:, None], indices].set(values)
    reconstruction = codes @ params["w_dec_rows"] + params["b_dec"][None]
    if config.skip:
        reconstruction = reconstruction + x @ params["w_skip"].T
    loss, l0 = jnp.sum((y - reconstruction) ** 2) / jnp.sum(y**2), jnp.sum(active) / len(x)
    if config.activation == "jumprelu":
        loss = loss + weight * (l0 / config.k - 1) ** 2
    if config.activation == "relu":
        loss = loss + weight * jnp.sum(codes) / len(x) / jnp.sqrt(jnp.mean(jnp.sum(y**2, axis=-1)))
    return loss, (jnp.any(codes != 0, axis=0), l0, threshold)


def dense_update(config: SAEConfig, recipe: SAERecipe):
    """The training step by dense autodiff, on the same state."""
    optimizer = sae_optimizer(recipe)

    def update(state: TrainState, activations):
        x, y = activations[config.site, config.layer], activations[config.reconstructs, config.layer]
        params = jax.tree.map(lambda leaf: leaf[0], state.params["stack_0"])
        extra = dict(state.extra["stack_0"])
        weight = jnp.exp(extra["log_weight"][0]) if "log_weight" in extra else recipe.sparsity
        find = jax.value_and_grad(dense_loss, has_aux=True)
        (loss, (fired, l0, threshold)), gradient = find(params, config, recipe, weight, x, y)
        gradient = {"stack_0": jax.tree.map(lambda leaf: leaf[None], gradient)}
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        quiet = jnp.minimum(extra["quiet"] + len(x), recipe.dead_after)
        extra["quiet"] = jnp.where(fired[None], jnp.zeros_like(quiet), quiet)
        if "running_threshold" in extra:
            extra["running_threshold"] = 0.99 * extra["running_threshold"] + 0.01 * threshold
        if "log_weight" in extra:
            extra["log_weight"] = extra["log_weight"] + 0.02 * jnp.clip(l0 / config.k - 1, -1.0, 1.0)
        return TrainState(state.step + 1, params, opt_state, {"stack_0": extra}), {"nmse": loss}

    return update


def start_at(x):
    """Random params, moved to an l0 of k if that is not the number of active features by construction."""

    def start(config: SAEConfig, params):
        if config.activation not in ("jumprelu", "relu"):
            return params
        z = np.asarray(SAE(params, config).preactivations(x))
        # Between two tokens: a token at the threshold itself would be active or not by rounding.
        least = np.quantile(z, 1 - config.k / z.shape[1], axis=0, method="midpoint")
        least = np.maximum(least, 1e-3).astype(np.float32)
        return params | ({"threshold": least} if config.activation == "jumprelu" else {"b_enc": -least})

    return start


class Running:
    """A compiled step with the state that it moves."""

    def __init__(self, update, state: TrainState, activations):
        state = jax.tree.map(jnp.copy, state)  # its own: it is donated
        compiled = jax.jit(update, donate_argnums=0).lower(state, activations).compile()
        memory = compiled.memory_analysis()
        self.peak_bytes = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
        self._step, self._state, self._activations = compiled, state, activations
        self.metrics = {}

    def __call__(self):
        self._state, self.metrics = self._step(self._state, self._activations)
        return self._state, self.metrics


class Other:
    """The steps of ``sae_step_torch.py`` in another interpreter."""

    def __init__(self, python: str, options, lr: float):
        sizes = {"d-model": options.d_model, "features": options.d_model * options.expansion}
        sizes |= {"k": options.k, "batch": options.batch, "lr": lr}
        arguments = [part for name, size in sizes.items() for part in (f"--{name}", str(size))]
        command = [python, str(Path(__file__).with_name("sae_step_torch.py")), *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        there = json.loads(self._read())
        self.names, self.missing = there["steps"], there["missing"]

    def steps(self, kind: str):
        """The steps of a kind of dictionary."""
        return {name: lambda name=name: self._run(name) for name in self.names if f"({kind}" in name.replace(",", ")")}

    def _run(self, name: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(name + "\n")
        self._process.stdin.flush()
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            sys.exit("the interpreter of --torch has stopped: its message is above")
        return line

    def close(self) -> None:
        self._process.communicate()


def gradient_error(state: TrainState, config: SAEConfig, recipe: SAERecipe, x, y) -> float:
    """Largest difference between sparse and dense gradients, by the largest entry of each array."""
    params = jax.tree.map(lambda leaf: leaf[0], state.params["stack_0"])

    def sparse_loss(params):
        published = as_published(params)
        if config.activation == "batchtopk":
            published["threshold"] = jnp.zeros(())
        return reconstruction_loss(config, published, x, y, loss=recipe.loss, weight=recipe.sparsity)[0]

    sparse = jax.jit(jax.grad(sparse_loss))(params)
    dense = jax.jit(jax.grad(lambda params: dense_loss(params, config, recipe, recipe.sparsity, x, y)[0]))(params)
    return max(float(jnp.max(jnp.abs(sparse[name] - dense[name])) / jnp.max(jnp.abs(dense[name]))) for name in dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter with torch, SAELens or dictionary_learning")
    options = parser.parse_args()

    recipe = SAERecipe(steps=1000, batch_size=options.batch, lr=1e-7, final_lr=1e-7)
    sites = [("mlp_in", 0), ("mlp_out", 0)]
    keys = jax.random.split(jax.random.key(0))
    activations = {
        site: jax.random.normal(key, (options.batch, options.d_model)) for site, key in zip(sites, keys, strict=True)
    }
    means = {site: jnp.mean(values, axis=0) for site, values in activations.items()}
    x = activations["mlp_in", 0]

    def made(kind: str):
        config = SAEConfig("mlp_in", 0, options.d_model, options.expansion, options.k, **KINDS[kind])
        return config, initial_state([config], recipe, means, start_at(x))

    other = Other(options.torch, options, recipe.lr) if options.torch else None
    for missing in other.missing if other else ():
        print(f"not timed, {missing}")
    config, state = made("topk")
    reference = Running(sae_update([config], recipe), state, activations)
    cases = []
    for kind in options.kinds:
        config, state = made(kind)
        error = gradient_error(state, config, recipe, x, activations[config.reconstructs, 0])
        ours = reference if kind == "topk" else Running(sae_update([config], recipe), state, activations)
        dense = Running(dense_update(config, recipe), state, activations)
        steps = {"our topk": reference} | ({} if ours is reference else {"ours": ours}) | {"dense autodiff": dense}
        seconds = measure.best_of(options.repeats, steps | (other.steps(kind) if other else {}))
        our_seconds = seconds.pop("ours", seconds["our topk"])
        if ours is reference:
            del seconds["our topk"]
        l0 = ours.metrics.get(f"l0.{config.name}", options.k)
        name = f"{kind}: a step at {options.batch} tokens, {options.d_model} x {options.expansion}, l0 {float(l0):.1f}"
        print(f"{kind}: gradients differ by {error:.1e} of the largest entry")
        print(f"{kind}: peak memory {ours.peak_bytes / 1e6:.0f} MB, dense {dense.peak_bytes / 1e6:.0f} MB")
        for baseline, its in seconds.items():
            cases.append(measure.case(name, baseline, its, our_seconds, error, ours.peak_bytes))
    if other:
        other.close()
    measure.report("sae_step", cases)


if __name__ == "__main__":
    main()
