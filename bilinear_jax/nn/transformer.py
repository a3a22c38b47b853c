"""A transformer with bilinear or gated MLPs: Flax modules and the sites of a layer.

The architecture (Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability"):

    x   = w_e[tokens]
    x  <- x + attn_scale * attention(norm(x))          resid_pre -> resid_mid
    x  <- x + w_p (gate(w_l norm(x)) * (w_r norm(x)))  resid_mid -> resid_post
    logits = w_u norm(x)

with RMSNorm, rotary positions and untied embeddings. With ``gate=None`` the MLP is bilinear, so it is a third-order
tensor. With the options of ``TransformerConfig`` it is also a Llama, Mistral, Qwen or Gemma: gates, norms with gains,
grouped queries, other rotary frequencies, tied or scaled embeddings.

The layers are stacked: every array under ``params["layers"]`` has ``n_layer`` as its first axis.
"""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilinear_jax.nn.architecture import GATES, TransformerConfig
from bilinear_jax.nn.attention import Attention, Tap, linear, model_turns, rms_norm, untouched, weight_init

SITES = ("resid_pre", "attn_out", "scores", "pattern", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""The places inside a layer that can be captured and edited, in the order in which they are computed."""

REMAT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layer": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for its backward pass: the products with its weights, or only its input."""

NEVER = 3e38
"""A length that no output of an MLP reaches."""

Site = str | tuple[str, int]
Edit = Callable[[Array], Array]


def swish(x: Float[Array, "..."], beta: Float[Array, ""] | float) -> Float[Array, "..."]:
    """``x sigmoid(beta x)``: SiLU at beta 1, and exactly ``x / 2`` at beta 0."""
    return x * jax.nn.sigmoid(jnp.asarray(beta, x.dtype) * x)


def run_module(module: nn.Module, params: PyTree, *args, **kwargs) -> Any:
    """``module.apply`` with params only. All modules are run through this function."""
    return module.apply({"params": params}, *args, **kwargs)


class MLP(nn.Module):
    """``w_p (gate(w_l x) * (w_r x))``; with ``bilinear=False`` it is ``w_p gate(w_l x)``.

    With ``linear``, ``w_s x`` is added. If the gate is "silu" and ``beta`` is given, the gate is ``swish(x, beta)``.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "... d_model"], beta: Float[Array, ""] | None = None
    ) -> Float[Array, "... d_model"]:
        c = self.config
        if beta is not None and c.gate != "silu":
            raise ValueError(f"beta needs gate='silu', but this model has gate={c.gate!r}: leave beta out")

        def side(name: str):
            bias = self.param(f"b_{name}", nn.initializers.zeros, (c.d_hidden,)) if c.bias else None
            return linear(x, self.param(f"w_{name}", weight_init(c.d_model), (c.d_hidden, c.d_model)), bias)

        hidden = GATES[c.gate](side("l")) if beta is None else swish(side("l"), beta)
        if c.bilinear:
            hidden = hidden * side("r")
        bias = self.param("b_p", nn.initializers.zeros, (c.d_model,)) if c.bias else None
        init = weight_init(c.d_hidden, (2 * c.n_layer) ** -0.5)
        y = linear(hidden, self.param("w_p", init, (c.d_model, c.d_hidden)), bias)
        if c.linear:
            y = y + linear(x, self.param("w_s", weight_init(c.d_model), (c.d_model, c.d_model)))
        return y


class Layer(nn.Module):
    """One layer: attention and MLP, each added to the residual stream. ``tap`` sees and may edit every site.

    With ``original_gate``, position 0 goes through a second MLP, with that gate, in place of the bilinear one. With
    ``original_above``, so does every position at which the output of that MLP has at least this length.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        tap: Tap = untouched,
        positions: Int[Array, "batch seq"] | None = None,
        seen: Bool[Array, "batch seq keys"] | None = None,
        blocks: bool = False,
        beta: Float[Array, ""] | None = None,
        turns: tuple[Array, Array] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        c = self.config
        norm_attention, norm_mlp, _ = c.norms

        def norm(name: str, x):
            gain = self.param(f"{name}_gain", nn.initializers.ones, (c.d_model,)) if c.gains else None
            return rms_norm(x, gain, c.rms_eps)

        x = tap("resid_pre", x)
        attn_in = norm("attention", x) if norm_attention else x
        attn_out = Attention(c, name="attention")(attn_in, tap, positions, seen, blocks, turns)
        x = x + c.attention_factor * tap("attn_out", attn_out)
        x = tap("resid_mid", x)
        mlp_in = tap("mlp_in", norm("mlp", x) if norm_mlp else x)
        mlp_out = MLP(c, name="mlp")(mlp_in, beta)
        if c.original_gate is not None:
            mlp_out = self._some_original(mlp_in, mlp_out, starts=positions is None)
        x = x + tap("mlp_out", mlp_out)
        return tap("resid_post", x)

    def _some_original(self, x, y, starts: bool):
        """``y`` with the output of the original MLP at its positions. ``starts``: x begins at position 0."""
        original = MLP(self.config.original, name="original")
        first = original(x[:, :1]) if starts or self.is_initializing() else y[:, :1]
        if self.config.original_above:
            above = self.param("original_above", nn.initializers.constant(NEVER), ())

            def long_ones(original: nn.Module, x, y):
                whole = original(x)
                return jnp.where(jnp.linalg.norm(whole.astype(jnp.float32), axis=-1, keepdims=True) >= above, whole, y)

            y = nn.cond(above < NEVER, long_ones, lambda _, x, y: y, original, x, y)  # two MLPs only where needed
        return jnp.concatenate([first, y[:, 1:]], axis=1) if starts else y


def _scan_layers(
    config: TransformerConfig,
    length: int,
    x: Array,
    capture: Iterable[str] = (),
    edits: Mapping[str, Edit] = MappingProxyType({}),
    beta: Array | None = None,
    remat: str | None = None,
    unroll: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """``length`` layers as one scan over the stacked params ``layers``. Call it inside a compact module."""
    blocks = not {"scores", "pattern"} & {*capture, *edits}
    turns = model_turns(config, x.shape[1])

    def body(layer: Layer, x: Array, _):
        captured = {}

        def tap(site: str, value: Array) -> Array:
            if site in edits:
                value = apply_edit(site, edits[site], value)
            if site in capture:
                captured[site] = value
            return value

        return layer(x, tap, blocks=blocks, beta=beta, turns=turns), captured

    if remat is not None:
        if remat not in REMAT:
            raise ValueError(f"unknown remat {remat!r}; choose None or one of {list(REMAT)}")
        body = nn.remat(body, prevent_cse=unroll, policy=REMAT[remat])
    scan = nn.scan(
        body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=length,
        unroll=length if unroll else 1,
    )
    return scan(Layer(config, name="layers"), x, None)


class LayerStack(nn.Module):
    """``length`` consecutive layers. Returns the residual stream and the captured sites, ``[length, ...]`` each."""

    config: TransformerConfig
    length: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        capture: frozenset[str] = frozenset(),
        edits: Mapping[str, Edit] = MappingProxyType({}),
        beta: Float[Array, ""] | None = None,
        remat: str | None = None,
        unroll: bool = False,
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        return _scan_layers(self.config, self.length, x, capture, edits, beta, remat, unroll)


def apply_edit(site: str, edit: Edit, value: Array) -> Array:
    """``edit(value)`` in the dtype of the value; ``ValueError`` if the result is not an array of the same shape."""
    edited = edit(value)
    if isinstance(edited, tuple):
        raise ValueError(
            f"the edit of {site} returned a tuple: return the new value only; for an SAE, lambda x: sae(x)[0]"
        )
    edited = jnp.asarray(edited)
    if edited.shape != value.shape:
        raise ValueError(f"an edit must keep the shape: {site} is {value.shape}, the edit returned {edited.shape}")
    return edited.astype(value.dtype)


class Transformer(nn.Module):
    """The whole model: ``Transformer(config).apply({"params": params}, tokens)`` gives logits.

    ``compute_dtype`` is the dtype of activations. Logits are in float32.
    """

    config: TransformerConfig
    compute_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch seq"]) -> Float[Array, "batch seq n_vocab"]:
        c = self.config
        params = {"w_e": self.param("w_e", nn.initializers.normal(1.0), (c.n_vocab, c.d_model))}
        if not c.tied:
            params["w_u"] = self.param("w_u", weight_init(c.d_model, 0.1), (c.n_vocab, c.d_model))
        if c.gains and c.norms[2]:
            params["final_gain"] = self.param("final_gain", nn.initializers.ones, (c.d_model,))
        x, _ = _scan_layers(c, c.n_layer, embed(c, params, tokens, self.compute_dtype))
        return unembed(c, params, x)


def embed(config: TransformerConfig, params: PyTree, tokens: Int[Array, "batch seq"], compute_dtype=jnp.float32):
    """The residual stream before the first layer: the rows of ``w_e`` for the tokens, times ``embed_scale``."""
    x = params["w_e"][tokens].astype(compute_dtype)
    return x if config.embed_scale == 1 else x * jnp.asarray(config.embed_scale, compute_dtype)


def unembedding(params: PyTree) -> Float[Array, "n_vocab d_model"]:
    """The matrix that reads the logits: ``w_u``, or the embedding ``w_e`` if the two are tied."""
    return params.get("w_u", params["w_e"])


def unembed(config: TransformerConfig, params: PyTree, x: Float[Array, "... d_model"]):
    """The logits, in float32, from the residual stream after the last layer."""
    x = rms_norm(x, params.get("final_gain"), config.rms_eps) if config.norms[2] else x
    return linear(x, unembedding(params)).astype(jnp.float32)


def cross_entropy(
    logits: Float[Array, "batch seq n_vocab"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """``-log softmax(logits)[target]`` in nats: ``logsumexp(logits) - logits[target]``."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
