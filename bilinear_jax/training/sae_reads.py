"""How readable transcoders become readable: the weights of their factors are set to 0 step by step while they train.

Every factor ``a . f`` of a product begins with a weight for each of the ``inputs``. Over the first ``narrow`` part of
the steps, the number that may stay falls geometrically to ``reads``:

    number(t) = floor(inputs (reads / inputs)^min(1, t / (narrow steps)))

Every ``EVERY`` steps, only those of the largest ``|a_i| rms(f_i)`` stay, so an input that is rarely or weakly active
needs a larger weight. A weight that is 0 stays 0. (Iterative hard thresholding: Blumensath and Davies 2009, "Iterative
hard thresholding for compressed sensing".)
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.training.sae_recipe import SAERecipe

EVERY = 10  # steps between two times that weights are set to 0
HALVINGS = 30  # of the interval in which the smallest weight that stays is searched


def check_inputs(configs: Sequence[SAEConfig], inputs: Mapping[int, SAE]) -> None:
    """Raise ``ValueError`` unless there is a fitting SAE for each readable transcoder, by layer."""
    for config in configs:
        if config.inputs is None:
            continue
        if config.layer not in inputs:
            raise ValueError(
                f"{config.name} reads the codes of an SAE of {config.site}, layer {config.layer}: give it as "
                f"inputs={{{config.layer}: sae}}"
            )
        its = inputs[config.layer].config
        plain = not (its.bilinear_encoder or its.encoder_bias or its.passthrough) and its.target is None
        if not plain or its.activation != "topk" or its.site != config.site:
            raise ValueError(
                f"{config.name} reads the codes of {its.name}, but it can only read those of a plain top-k SAE of "
                f"{config.site}, without an encoder bias"
            )
        if (its.n_features, its.k) != (config.inputs, config.inputs_k):
            raise ValueError(
                f"{config.name} has inputs {config.inputs} and inputs_k {config.inputs_k}, but {its.name} has "
                f"{its.n_features} features and k {its.k}"
            )


def allowed(config: SAEConfig, recipe: SAERecipe, step: Int[Array, ""]) -> Int[Array, ""]:
    """The weights that a factor may have after a step: ``number(t)`` of the docstring of this module."""
    assert config.inputs is not None and config.reads is not None
    share = jnp.minimum(1.0, step.astype(jnp.float32) / max(1.0, recipe.narrow * recipe.steps))
    number = config.inputs * (config.reads / config.inputs) ** share
    return jnp.maximum(jnp.floor(number).astype(jnp.int32), config.reads)


def narrowed(
    weights: Float[Array, "*n rows inputs"], power: Float[Array, "*n inputs"], number: Int[Array, ""]
) -> Float[Array, "*n rows inputs"]:
    """The weights with all but ``number`` of each row set to 0: those of the largest ``w^2 power`` stay.

    ``power`` is the mean square of each input, up to a factor. Of equal ones at the border, none stays.

    Example:
        >>> narrowed(jnp.array([[3.0, -2.0, 1.0]]), jnp.array([0.1, 1.0, 9.0]), jnp.asarray(2)).tolist()
        [[0.0, -2.0, 1.0]]
    """
    matters = weights**2 * power[..., None, :]

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        fits = jnp.sum(matters > middle, axis=-1, keepdims=True) <= number
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    ends = jnp.zeros((*weights.shape[:-1], 1)), jnp.max(matters, axis=-1, keepdims=True)
    _, border = jax.lax.fori_loop(0, HALVINGS, halve, ends)
    few = jnp.sum(matters > 0, axis=-1, keepdims=True) <= number
    return jnp.where((matters > border) | few, weights, 0)


def after_update(
    config: SAEConfig,
    recipe: SAERecipe,
    step: Int[Array, ""],
    before: Float[Array, "*n rows inputs"],
    weights: Float[Array, "*n rows inputs"],
    power: Float[Array, "*n inputs"],
) -> Float[Array, "*n rows inputs"]:
    """The encoder after the update of a step: what was 0 stays 0, and every ``EVERY`` steps more weights become 0."""
    weights = jnp.where(before == 0, 0, weights)
    due = (step % EVERY == 0) | (step + 1 == recipe.steps)
    return jax.lax.cond(due, lambda: narrowed(weights, power, allowed(config, recipe, step)), lambda: weights)
