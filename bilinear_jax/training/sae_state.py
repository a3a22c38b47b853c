"""The training state of dictionaries: alike ones stacked, their start, and the way back to the published orientation.

params[stack]   w_enc, w_dec_rows [n, features, d_model]   b_dec [n, d_model]   and what else the dictionaries have,
                with log_threshold for the thresholds of JumpReLU, so that they stay positive
extra[stack]    quiet [n, features]: tokens since each feature last fired, counted up to dead_after
                running_threshold [n]: of BatchTopK, the mean of the thresholds of the batches
                power [n, inputs]: of readable transcoders, the sum over steps of the mean square of each input
                log_weight [n]: of ReLU with k, the logarithm of the weight of the sparsity loss
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.training.fit import TrainState, cosine_with_warmup
from bilinear_jax.training.sae_recipe import SAERecipe
from bilinear_jax.training.sae_start import Start
from bilinear_jax.training.unit_decoder import unit_decoder


def sae_optimizer(recipe: SAERecipe) -> optax.GradientTransformation:
    """Adam with the recipe's learning rate, on the params of the training state. Decoder rows stay at unit length."""
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.final_lr)
    return unit_decoder(optax.adam(rate), "w_dec_rows", axis=-1)


def stacks(configs: Sequence[SAEConfig]) -> dict[str, tuple[SAEConfig, ...]]:
    """The stacks of dictionaries that are trained together: those that differ only in sites, layer and tag.

    Raises:
        ValueError: if there are no SAEs, or if two have the same name.
    """
    names = [config.name for config in configs]
    if not names:
        raise ValueError("configs is empty: give at least one SAE to train")
    if len(set(names)) < len(names):
        raise ValueError(f"two SAEs have the same name: give them different tags, {sorted(names)}")
    alike: dict[SAEConfig, list[SAEConfig]] = {}
    for config in configs:
        target = None if config.target is None else "mlp_out"
        shape = dataclasses.replace(config, site="mlp_in", target=target, layer=0, tag=None)
        alike.setdefault(shape, []).append(config)
    return {f"stack_{i}": tuple(stack) for i, stack in enumerate(alike.values())}


def initial_state(
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    means: Mapping[tuple[str, int], Float[Array | np.ndarray, " d_model"]],
    start: Start | None = None,
) -> TrainState:
    """New dictionaries. Their decoder bias is ``means[site, layer]``, the mean of what they reconstruct.

    SAEs start tied, so that codes start centred. ``start`` makes better params from random ones: see
    ``training.sae_start``.

    The parameters of a dictionary depend only on ``recipe.seed``, its name, its mean and its start, not on the others.
    """

    def fresh(config: SAEConfig) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), zlib.crc32(config.name.encode()))
        params = dict(SAE.init(config, key).params)
        mean = jnp.asarray(means[config.reconstructs, config.layer], jnp.float32)
        params |= {"b_dec": mean / config.scale}
        made = params if start is None else start(config, params)
        return made | {"w_dec": params["w_dec"]} if recipe.frozen_decoder else made

    groups = stacks(configs)
    params = {
        label: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(as_rows(fresh(config)) for config in group))
        for label, group in groups.items()
    }
    extra = {label: _counters(group, recipe) for label, group in groups.items()}
    return TrainState(jnp.zeros((), jnp.int32), params, sae_optimizer(recipe).init(params), extra)


def _counters(group: Sequence[SAEConfig], recipe: SAERecipe) -> dict[str, Array]:
    n, config = len(group), group[0]
    found = {"quiet": jnp.zeros((n, config.n_features), jnp.int32)}
    if config.inputs is not None:
        found["power"] = jnp.zeros((n, config.inputs))
    if config.activation == "batchtopk":
        found["running_threshold"] = jnp.zeros(n)
    if config.activation == "relu" and config.k is not None:
        found["log_weight"] = jnp.full(n, math.log(max(recipe.sparsity, 1e-9)))
    return found


def saes_of(state: TrainState, configs: Sequence[SAEConfig]) -> list[SAE]:
    """The dictionaries of a training state, in the order of ``configs`` and in the published orientation."""
    found = {}
    for label, group in stacks(configs).items():
        for i, config in enumerate(group):
            params = as_published(jax.tree.map(lambda leaf, i=i: leaf[i], state.params[label]))
            if config.activation == "batchtopk":
                params["threshold"] = state.extra[label]["running_threshold"][i]
            found[config.name] = SAE(params, config)
    return [found[config.name] for config in configs]


def as_rows(params: Mapping[str, Array]) -> dict[str, Array]:
    """Published params as they are trained: decoder columns as rows, for the sparse products, and log thresholds."""
    found = {name: leaf for name, leaf in params.items() if name not in ("w_dec", "threshold")}
    if params.get("threshold") is not None and jnp.ndim(params["threshold"]):
        found["log_threshold"] = jnp.log(jnp.maximum(params["threshold"], 1e-6))
    return found | {"w_dec_rows": params["w_dec"].T}


def as_published(params: Mapping[str, Array]) -> dict[str, Array]:
    """The inverse of ``as_rows``, without the threshold of BatchTopK, which is not trained."""
    found = {name: leaf for name, leaf in params.items() if name not in ("w_dec_rows", "log_threshold")}
    if "log_threshold" in params:
        found["threshold"] = jnp.exp(params["log_threshold"])
    return found | {"w_dec": params["w_dec_rows"].T}
