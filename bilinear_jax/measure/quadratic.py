"""Gated MLPs with a quadratic function of each hidden unit in place of its gate.

A hidden unit of a gated MLP, ``w_p (gate(w_l x + b_l) * (w_r x + b_r)) + b_p``, is ``gate(a) b`` with a and b its two
sides. In its place stands

    c_0 + c_1 a + c_2 b + c_3 a^2 + c_4 a b  =  a (c_1 + c_3 a + c_4 b) + c_2 b + c_0

so the MLP becomes a bilinear one of the same width, with a constant input and a linear map:

    w_p ((w_l x + b_l) * (w_r' x + b_r')) + w_s x + b_p'

    w_r' = diag(c_3) w_l + diag(c_4) w_r      b_r' = c_1 + c_3 b_l + c_4 b_r
    w_s  = w_p diag(c_2) w_r                  b_p' = b_p + w_p (c_0 + c_2 b_r)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.attention import linear, model_turns
from bilinear_jax.nn.transformer import NEVER, Layer, embed, run_module

MASSIVE = 50.0
"""The output of an MLP at a token is massive if it is this many times as long as the median of its layer.

In SmolLM2-135M, position 0 has 768 and 81 times the median in two layers, and no usual token more than 43 times it.
"""

Coefficients = Float[Any, "n_layer 5 d_hidden"]
"""Of 1, a, b, a^2 and a b, for every hidden unit."""

Visit = Callable[[PyTree, PyTree, dict[str, Array]], PyTree]


def check_gated(lm: LanguageModel) -> None:
    """Raise ``ValueError`` unless the MLPs have two sides, and are not those of a bilinear form already."""
    if not lm.config.bilinear:
        raise ValueError(
            "this model has plain MLPs (bilinear=False), without a right side: only gated and bilinear MLPs have a "
            "bilinear form"
        )
    if lm.config.original_gate is not None:
        raise ValueError("this model is a bilinear form already: give the model that it was made from")


def sides(
    mlp: PyTree, x: Float[Array, "... d_model"]
) -> tuple[Float[Array, "... d_hidden"], Float[Array, "... d_hidden"]]:
    """a and b of an MLP at its inputs, in float32."""
    a, b = (linear(x, mlp[f"w_{side}"], mlp.get(f"b_{side}")) for side in "lr")
    return a.astype(jnp.float32), b.astype(jnp.float32)


def quadratic_output(
    mlp: PyTree, coefficients: Float[Array, "5 d_hidden"], x: Float[Array, "... d_model"]
) -> Float[Array, "... d_model"]:
    """The output of one gated MLP with these coefficients in place of its gate, from its own weights."""
    a, b = sides(mlp, x)
    c = [jnp.broadcast_to(row, a.shape) for row in coefficients]
    hidden = a * (c[1] + c[3] * a + c[4] * b) + c[2] * b + c[0]
    return linear(hidden.astype(x.dtype), mlp["w_p"], mlp.get("b_p"))


def with_coefficients(
    lm: LanguageModel, coefficients: Coefficients, above: Float[Any, " n_layer"] | None = None
) -> LanguageModel:
    """A gated model with bilinear MLPs of these coefficients. Position 0 keeps the original MLP.

    ``above``: for each layer, the length of the original's output from which also other positions keep it. None: no
    position does. Arrays that are equal in both models are shared.
    """
    config = dataclasses.replace(
        lm.config, gate=None, bias=True, linear=True, original_gate=lm.config.gate, original_above=above is not None
    )
    mlp = lm.params["layers"]["mlp"]
    n_layer, d_hidden, d_model = mlp["w_l"].shape
    sizes = {"b_l": d_hidden, "b_r": d_hidden, "b_p": d_model}
    zeros = {name: jnp.zeros((n_layer, size), mlp["w_l"].dtype) for name, size in sizes.items() if name not in mlp}
    original = mlp | zeros
    new = original | _bilinear(original, coefficients)
    layers = lm.params["layers"] | {"mlp": new, "original": original}
    if above is not None:
        layers["original_above"] = jnp.asarray(above, jnp.float32)
    return dataclasses.replace(lm, config=config, params=lm.params | {"layers": layers})


@jax.jit
def _bilinear(mlp: PyTree, coefficients: Coefficients) -> PyTree:
    def each(one):
        mlp, c = one
        wide = {name: weight.astype(jnp.float32) for name, weight in mlp.items()}
        rows = c[:, :, None]
        right = rows[3] * wide["w_l"] + rows[4] * wide["w_r"]
        new = {
            "w_r": right,
            "b_r": c[1] + c[3] * wide["b_l"] + c[4] * wide["b_r"],
            "w_s": wide["w_p"] @ (rows[2] * wide["w_r"]),
            "b_p": wide["b_p"] + wide["w_p"] @ (c[0] + c[2] * wide["b_r"]),
        }
        return {name: value.astype(mlp["w_l"].dtype) for name, value in new.items()}

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(each, (mlp, coefficients))


def embedded(lm: LanguageModel, tokens: Any) -> Float[Array, "batch seq d_model"]:
    """The residual stream before the first layer."""
    return embed(lm.config, lm.params, tokens, lm.compute_dtype)


def through_layers(
    lm: LanguageModel,
    x: Float[Array, "batch seq d_model"],
    visit: Visit,
    extras: PyTree = (),
    swap: Visit | None = None,
) -> tuple[Float[Array, "batch seq d_model"], PyTree]:
    """The residual stream after the last layer, given that before the first, and what ``visit`` returns, by layer.

    ``visit(params, extra, values)`` is given the params of a layer, its part of ``extras`` (arrays with ``n_layer`` as
    their first axis), and the values of the sites in it. ``swap`` is given the same, with the values up to ``mlp_out``,
    and returns another ``mlp_out``.
    """

    turns = model_turns(lm.config, x.shape[1])

    def body(x, scanned):
        params, extra = scanned
        values = {}

        def tap(site, value):
            values[site] = value
            if site == "mlp_out" and swap is not None:
                values[site] = swap(params, extra, values)
            return values[site]

        x = run_module(Layer(lm.config), params, x, tap, blocks=True, turns=turns)
        return x, visit(params, extra, values)

    return jax.lax.scan(body, x, (lm.params["layers"], extras))


@jax.jit
def after_layers(lm: LanguageModel, x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
    """The residual stream after the last layer, given that before the first."""
    return through_layers(lm, x, lambda *_: ())[0]


@jax.jit
def after_swapped(
    lm: LanguageModel, coefficients: Coefficients, above: Float[Array, " n_layer"], x: Float[Array, "batch seq d_model"]
) -> Float[Array, "batch seq d_model"]:
    """``after_layers`` of ``with_coefficients(lm, coefficients, above)``, which is not made: no weight is copied."""

    def swap(params, extra, values):
        c, above = extra
        y = values["mlp_out"]
        return jnp.where(kept(y, above)[..., None], y, quadratic_output(params["mlp"], c, values["mlp_in"]))

    return through_layers(lm, x, lambda *_: (), (coefficients, above), swap)[0]


def massive(
    y: Float[Array, "batch seq d_model"], mask: Bool[Array, "batch seq"]
) -> tuple[Bool[Array, "batch seq"], Float[Array, ""]]:
    """Where the output of an MLP is ``MASSIVE`` times as long as its median over the tokens of the mask; the median.

    Position 0 has no part in the median. If the mask has no token, nothing is massive, and the median is 0.
    """
    length = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    median = jnp.nan_to_num(jnp.nanmedian(jnp.where(mask.at[:, 0].set(False), length, jnp.nan)))
    return (length > MASSIVE * median) & (median > 0), median


def kept(y: Float[Array, "batch seq d_model"], above: Float[Array, ""] | float) -> Bool[Array, "batch seq"]:
    """Where a form keeps the original MLP, whose output is y: at position 0, and where ``|y|`` reaches ``above``."""
    length = jnp.linalg.norm(y.astype(jnp.float32), axis=-1)
    return (length >= above).at[:, 0].set(True)


def thresholds(lm: LanguageModel) -> Float[Array, " n_layer"]:
    """``above`` of every layer of a bilinear form."""
    layers = lm.params["layers"]
    return layers.get("original_above", jnp.full(lm.config.n_layer, NEVER))
