"""The recipe for SAEs: one forward pass of the language model feeds every SAE that is trained.

The loss of an SAE on a batch is the share of its input that it misses, ``sum |x - x_hat|^2 / sum |x|^2``. After each
Adam update the decoder's columns are brought back to unit length; the part of their gradient along the column, which
would only change that length, is removed before. (Paper, appendix on SAE training.)
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE, SAEConfig, unit_columns
from bilinear_jax.nn.sites import capture, default_token_mask
from bilinear_jax.training.data import Windows
from bilinear_jax.training.fit import ByStep, TrainState, apply_optimizer, cosine_with_warmup, fit


@dataclasses.dataclass(frozen=True)
class SAERecipe:
    """How to train SAEs. The learning rate goes up over ``warmup`` steps, then by a cosine to a fifth."""

    steps: int  # updates in all
    batch_size: int = 32  # windows of n_ctx tokens an update
    lr: float = 1e-3  # Adam's learning rate
    warmup: int = 100  # steps
    dead_after: int = 1_000_000  # tokens without firing after which a feature counts as dead
    seed: int = 0  # of the parameters and of the order of the data


def without_parallel_part(gradient: dict[str, Array], params: dict[str, Array]) -> dict[str, Array]:
    """The gradient with the component of each decoder column along that (unit) column removed."""
    along = jnp.einsum("df,df->f", gradient["w_dec"], params["w_dec"])
    return gradient | {"w_dec": gradient["w_dec"] - jnp.einsum("df,f->df", params["w_dec"], along)}


def with_unit_columns(params: dict[str, Array]) -> dict[str, Array]:
    """The params with every decoder column scaled to unit length."""
    return params | {"w_dec": unit_columns(params["w_dec"])}


def reconstruction_loss(
    config: SAEConfig, params: dict[str, Array], x: Float[Array, "tokens d_model"], mask: Bool[Array, " tokens"]
) -> tuple[Float[Array, ""], Bool[Array, " features"]]:
    """``sum |x - x_hat|^2 / sum |x|^2`` over the tokens in ``mask``, and which features fired on them."""
    sae = SAE(params, config)
    codes = sae.encode(x)
    reconstruction = sae.decode(codes, x)
    weight = mask.astype(x.dtype)
    missed = jnp.einsum("td,t->", (x - reconstruction) ** 2, weight)
    fired = jnp.einsum("tf,t->f", (codes != 0).astype(x.dtype), weight) > 0
    return missed / jnp.einsum("td,t->", x**2, weight), fired


def train_saes(
    lm: LanguageModel,
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    tokens: np.ndarray,
    directory: str | Path,
    *,
    save_every: int = 200,
) -> list[SAE]:
    """Train all SAEs in ``configs`` at once on a flat token stream; resumes from ``directory``.

    Position 0 and padding are left out. Logged for every SAE: ``nmse.<name>`` of the batch and ``dead.<name>``, the
    share of features that have not fired for ``recipe.dead_after`` tokens.
    """
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise ValueError(f"two SAEs share a name, give them tags: {sorted(names)}")
    windows = Windows(tokens, lm.config.n_ctx, recipe.batch_size, recipe.seed)
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.lr / 5)
    optimizer = optax.adam(rate)
    sites = [(config.site, config.layer) for config in configs]

    def update(state: TrainState, batch):
        lm_params, rows = batch
        got = capture(lm.config, lm_params, rows, sites, compute_dtype=lm.compute_dtype)
        mask = default_token_mask(rows, lm.config.pad_id).reshape(-1)
        params, quiet, gradients, metrics = {}, {}, {}, {}
        for config, site in zip(configs, sites, strict=True):
            before = state.params[config.name]
            x = got[site].reshape(-1, config.d_model)

            def loss_of(sae_params, config=config, x=x):
                return reconstruction_loss(config, sae_params, x, mask)

            (loss, fired), gradient = jax.value_and_grad(loss_of, has_aux=True)(before)
            gradients[config.name] = without_parallel_part(gradient, before)
            silent = state.extra[config.name] + jnp.sum(mask)
            quiet[config.name] = jnp.where(fired, jnp.zeros_like(silent), silent)
            metrics[f"nmse.{config.name}"] = loss
            metrics[f"dead.{config.name}"] = jnp.mean(quiet[config.name] >= recipe.dead_after)
        params, opt_state = apply_optimizer(optimizer, gradients, state)
        params = {name: with_unit_columns(sae_params) for name, sae_params in params.items()}
        return TrainState(state.step + 1, params, opt_state, quiet), metrics

    params = _initial_params(lm, configs, recipe, windows.batch_at(0))
    quiet = {config.name: jnp.zeros(config.n_features, jnp.int32) for config in configs}
    state = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), quiet)
    identity = {
        "model": dataclasses.asdict(lm.config),
        "saes": [dataclasses.asdict(config) for config in configs],
        "recipe": dataclasses.asdict(recipe),
        "tokens": len(tokens),
    }
    state = fit(
        update,
        state,
        ByStep(lambda step: (lm.params, windows.batch_at(step))),
        steps=recipe.steps,
        directory=directory,
        config=identity,
        save_every=save_every,
        name="SAEs",
    )
    return [SAE(state.params[config.name], config) for config in configs]


def _initial_params(lm: LanguageModel, configs: Sequence[SAEConfig], recipe: SAERecipe, rows: np.ndarray):
    """Fresh SAEs, tied, with the mean input of the first batch as decoder bias (so that codes start centred)."""
    got = lm.capture(rows, [(config.site, config.layer) for config in configs])
    keys = jax.random.split(jax.random.key(recipe.seed), len(configs))
    params = {}
    for config, key in zip(configs, keys, strict=True):
        x = got[config.site, config.layer][:, 1:].reshape(-1, config.d_model)
        params[config.name] = SAE.init(config, key).params | {"b_dec": jnp.mean(x, axis=0)}
    return params
