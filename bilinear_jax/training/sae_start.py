"""Where the training of a dictionary starts, from the model and some of its activations, if random is worse.

    SAE                     random unit columns, encoder rows equal to them
    linear transcoder       encoder rows ``d_f^T M``, with the columns d_f and the least-squares map M from x to y
    skip                    0, so the start is that of a transcoder without
    bilinear transcoder     of a gated or bilinear MLP: the hidden units that write most. The feature of unit m is
    (mlp_in to mlp_out)     (l_m . x)(r_m . x) |p_m| along p_m / |p_m|, so the start computes a part of the MLP exactly
                            (half of it where the MLP has a gate, whose derivative at 0 is about one half)
    readable transcoder     the same units in the features of the input SAE, l_m . (D f + b): what the MLP makes of the
                            SAE's reconstruction
    jumprelu                each threshold is the value that a share k / features of the tokens exceeds

Each hidden unit is turned so that its mean contribution is positive, since the largest pre-activations are active.
If there are more features than units, each further feature is a unit turned round.
"""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig

Samples = Mapping[tuple[str, int], Float[Array | np.ndarray, "tokens d_model"]]
"""Activations of some tokens, by site and layer: row i of every site belongs to the same token."""

Start = Callable[[SAEConfig, dict[str, Array]], dict[str, Array]]
"""``start(config, random params) -> params``."""

NONE: Mapping[int, SAE] = MappingProxyType({})

RIDGE = 1e-3
"""Added to the covariance of x, in units of its mean eigenvalue, when M is fitted."""


def start_from(lm: LanguageModel, samples: Samples, inputs: Mapping[int, SAE] = NONE) -> Start:
    """The start of each dictionary, as in the docstring of this module. A pure function of the model and the samples.

    ``inputs`` are the input SAEs of readable transcoders, by layer.

    Example:
        >>> import jax
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> model = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> lm = LanguageModel.init(model, jax.random.key(0))
        >>> x = jax.random.normal(jax.random.key(1), (50, 8))
        >>> config = SAEConfig("mlp_in", 0, 8, 2, 3, bilinear_encoder=True, target="mlp_out")
        >>> start = start_from(lm, {("mlp_in", 0): x, ("mlp_out", 0): x})
        >>> start(config, SAE.init(config, jax.random.key(2)).params)["w_enc"].shape
        (32, 8)
    """

    @functools.cache  # once for all dictionaries that go from one site to another
    def least_squares(site: str, target: str, layer: int):
        x, y = (np.asarray(samples[of, layer], np.float64) for of in (site, target))
        return _least_squares(x, y), x.mean(axis=0)

    def start(config: SAEConfig, params: dict[str, Array]) -> dict[str, Array]:
        x = samples[config.site, config.layer]
        if config.target is not None and config.bilinear_encoder:
            units = _of_hidden_units(lm, config, np.asarray(x, np.float64))
            params = params | (units if config.inputs is None else _in_features(inputs[config.layer], units))
        elif config.target is not None:
            m, mean = least_squares(config.site, config.target, config.layer)
            rows = np.asarray(params["w_dec"], np.float64).T @ m
            params = params | {"w_enc": _single(rows)}
            if config.encoder_bias:
                params["b_enc"] = _single(-rows @ mean)
        if config.activation == "jumprelu" and config.k is not None:
            z = np.asarray(SAE(params, config).preactivations(jnp.asarray(x, jnp.float32)))
            params = params | {
                "threshold": _single(np.maximum(np.quantile(z, 1 - config.k / z.shape[1], axis=0), 1e-3))
            }
        return params

    return start


def _in_features(sae: SAE, units: dict[str, Array]) -> dict[str, Array]:
    """Hidden units in the features of an SAE of x, and the encoder of this SAE."""
    its = {"w_in": jnp.asarray(sae.encoder, jnp.float32), "b_in": jnp.asarray(sae.decoder_bias, jnp.float32)}
    if not units:
        return its
    rows = np.asarray(units["w_enc"], np.float64)
    weights, biases = rows @ np.asarray(sae.decoder, np.float64), rows @ np.asarray(sae.decoder_bias, np.float64)
    return units | {"w_enc": _single(weights), "b_enc": _single(biases)} | its


def _single(array: np.ndarray) -> Float[Array, "..."]:
    return jnp.asarray(array, jnp.float32)


def _least_squares(x: Float[np.ndarray, "tokens d"], y: Float[np.ndarray, "tokens d"]) -> Float[np.ndarray, "d d"]:
    """M that minimises ``|y - M x|^2`` of the centred samples, with a small ridge."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    covariance = x.T @ x
    ridge = RIDGE * np.trace(covariance) / len(covariance)
    return np.linalg.solve(covariance + max(ridge, 1e-12) * np.eye(len(covariance)), x.T @ y).T


def _of_hidden_units(lm: LanguageModel, config: SAEConfig, x: Float[np.ndarray, "tokens d"]) -> dict[str, Array]:
    """Params from the hidden units of the MLP. Nothing if the dictionary does not go through one."""
    if (config.site, config.target) != ("mlp_in", "mlp_out") or not lm.config.bilinear:
        return {}
    mlp = {
        name: np.asarray(lm.params["layers"]["mlp"][name][config.layer], np.float64) for name in ("w_l", "w_r", "w_p")
    }
    left, right, down = mlp["w_l"], mlp["w_r"], mlp["w_p"].T
    hidden = (x @ left.T) * (x @ right.T)
    lengths = np.linalg.norm(down, axis=1)
    written = np.sqrt(np.mean(hidden**2, axis=0)) * lengths
    order = np.argsort(-written, kind="stable")
    chosen = np.resize(order, config.n_features)
    signs = np.where(hidden.mean(axis=0) < 0, -1.0, 1.0)[chosen]
    turns = np.arange(config.n_features) // len(order)
    signs = signs * np.where(turns % 2, -1.0, 1.0)
    share = 1.0 if lm.config.gate is None else 0.5
    size = np.sqrt(lengths[chosen] * share)[:, None]
    blocks = [signs[:, None] * size * left[chosen], size * right[chosen]]
    if config.linear_term:
        blocks.append(np.zeros_like(blocks[0]))
    columns = signs[:, None] * down[chosen] / np.maximum(lengths[chosen], 1e-30)[:, None]
    return {"w_enc": _single(np.concatenate(blocks)), "w_dec": _single(columns.T)}
