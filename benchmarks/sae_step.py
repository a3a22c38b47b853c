"""One sparse training step of an SAE, against the same step with dense autodiff, and with torch if it is installed.

A step is what ``training.sae`` does on a batch of activations: encode, top-k, decode, the gradients of all parameters,
removal of the part along the decoder's columns, Adam, columns scaled back to unit length, and the counters of dead
features, with d_model 1024, expansion 8, k 30, batch 4096, float32. The dense step differs in one point: its codes are
an array ``[batch, features]``, and reconstruction and derivatives are those of JAX's dense matrix product.

    python benchmarks/sae_step.py            # ratio: seconds of the other / ours; peak_bytes: ours

Peak memory is that of the compiled step as XLA reports it, with the state donated (arguments, results and intermediate
values); that of the dense step is printed beside it. The largest relative error is that of the gradients, divided by
the largest entry of each, from the same parameters.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import measure
import numpy as np

from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.training.fit import TrainState, apply_optimizer
from bilinear_jax.training.sae import sae_update
from bilinear_jax.training.sae_loss import reconstruction_loss
from bilinear_jax.training.sae_recipe import SAERecipe
from bilinear_jax.training.sae_state import initial_state, sae_optimizer, saes_of


def dense_loss(params, config: SAEConfig, x):
    """The loss with every code written out, and whether each feature fired."""
    y = (x - params["b_dec"][None]) @ params["w_enc"].T
    values, indices = jax.lax.top_k(y, config.k)
    codes = jnp.zeros_like(y).at[jnp.arange(len(x))[:, None], indices].set(values)
    reconstruction = codes @ params["w_dec_rows"] + params["b_dec"][None]
    return jnp.sum((x - reconstruction) ** 2) / jnp.sum(x**2), jnp.any(codes != 0, axis=0)


def dense_update(config: SAEConfig, recipe: SAERecipe):
    """The training step by dense autodiff, on the same state."""
    optimizer = sae_optimizer(recipe)

    def update(state: TrainState, activations):
        x = activations[config.site, config.layer]
        params = jax.tree.map(lambda leaf: leaf[0], state.params["stack_0"])
        (loss, fired), gradient = jax.value_and_grad(dense_loss, has_aux=True)(params, config, x)
        gradient = {"stack_0": jax.tree.map(lambda leaf: leaf[None], gradient)}
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        quiet = jnp.minimum(state.extra["stack_0"]["quiet"] + len(x), recipe.dead_after)
        quiet = jnp.where(fired[None], jnp.zeros_like(quiet), quiet)
        return TrainState(state.step + 1, params, opt_state, {"stack_0": {"quiet": quiet}}), {"nmse": loss}

    return update


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

    def __call__(self):
        self._state, metrics = self._step(self._state, self._activations)
        return self._state, metrics


def torch_step(sae: SAE, recipe: SAERecipe, x: np.ndarray):
    """The dense step in torch, or None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    config = sae.config
    w_enc, w_dec, b_dec = (torch.nn.Parameter(torch.tensor(np.asarray(sae.params[name]))) for name in sae.params)
    order = list(sae.params)
    named = dict(zip(order, (w_enc, w_dec, b_dec), strict=True))
    optimizer = torch.optim.Adam(named.values(), lr=recipe.lr)
    batch = torch.tensor(x)
    quiet = torch.zeros(config.n_features, dtype=torch.int32)

    def step():
        pre = (batch - named["b_dec"]) @ named["w_enc"].T
        values, indices = torch.topk(pre, config.k)
        codes = torch.zeros_like(pre).scatter(1, indices, values)
        reconstruction = codes @ named["w_dec"].T + named["b_dec"]
        loss = ((batch - reconstruction) ** 2).sum() / (batch**2).sum()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            w = named["w_dec"]
            w.grad -= w * (w.grad * w).sum(0, keepdim=True)
            optimizer.step()
            w /= w.norm(dim=0, keepdim=True)
            fired = torch.zeros(config.n_features, dtype=torch.bool)
            fired[indices[values != 0]] = True
            quiet.add_(len(batch))
            quiet[fired] = 0
        return float(loss.detach())

    return step


def gradient_error(state: TrainState, config: SAEConfig, x) -> float:
    """Largest difference between sparse and dense gradients, by the largest entry of each array."""
    params = jax.tree.map(lambda leaf: leaf[0], state.params["stack_0"])

    def sparse_loss(params):
        published = {name: leaf for name, leaf in params.items() if name != "w_dec_rows"}
        return reconstruction_loss(config, published | {"w_dec": params["w_dec_rows"].T}, x)[0]

    sparse = jax.jit(jax.grad(sparse_loss))(params)
    dense = jax.jit(jax.grad(lambda params: dense_loss(params, config, x)[0]))(params)
    return max(float(jnp.max(jnp.abs(sparse[name] - dense[name])) / jnp.max(jnp.abs(dense[name]))) for name in dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=1024)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--k", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    config = SAEConfig("mlp_out", 0, options.d_model, options.expansion, options.k)
    recipe = SAERecipe(steps=1000, batch_size=options.batch)
    x = jax.random.normal(jax.random.key(0), (options.batch, options.d_model))
    activations = {(config.site, config.layer): x}
    state = initial_state([config], recipe, {(config.site, config.layer): jnp.mean(x, axis=0)})
    error = gradient_error(state, config, x)
    sparse = Running(sae_update([config], recipe), state, activations)
    dense = Running(dense_update(config, recipe), state, activations)
    steps: dict[str, Callable] = {"sparse": sparse, "dense": dense}
    in_torch = torch_step(saes_of(state, [config])[0], recipe, np.asarray(x))
    if in_torch is not None:
        steps["torch"] = in_torch
    seconds = measure.best_of(options.repeats, steps)

    shape = f"a step at {options.batch} tokens, {options.d_model} x {options.expansion}, k {options.k}"
    print(f"gradients differ by {error:.1e} of the largest entry")
    print(f"peak memory: sparse {sparse.peak_bytes / 1e6:.0f} MB, dense {dense.peak_bytes / 1e6:.0f} MB")
    cases = [measure.case(shape, "dense autodiff", seconds["dense"], seconds["sparse"], error, sparse.peak_bytes)]
    if in_torch is not None:
        cases.append(
            measure.case(shape, "dense in torch", seconds["torch"], seconds["sparse"], error, sparse.peak_bytes)
        )
    measure.report("sae_step", cases)


if __name__ == "__main__":
    main()
