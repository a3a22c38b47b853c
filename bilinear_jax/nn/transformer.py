"""A transformer with bilinear MLPs: config, Flax modules and the sites of a layer.

The architecture (Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability"):

    x   = w_e[tokens]
    x  <- x + attn_scale * attention(norm(x))          resid_pre -> resid_mid
    x  <- x + w_p (gate(w_l norm(x)) * (w_r norm(x)))  resid_mid -> resid_post
    logits = w_u norm(x)

with RMSNorm without a gain, rotary positions and untied embeddings. With ``gate=None`` the MLP is bilinear, so it is a
third-order tensor. The other gates are for comparison.

The layers are stacked: every array under ``params["layers"]`` has ``n_layer`` as its first axis.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree, Shaped

from bilinear_jax.nn.configs import LARGEST_SIZE, check_sizes, check_types

SITES = ("resid_pre", "attn_out", "scores", "pattern", "resid_mid", "mlp_in", "mlp_out", "resid_post")
"""The places inside a layer that can be captured and edited, in the order in which they are computed."""

GATES: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}

REMAT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "layer": jax.checkpoint_policies.nothing_saveable,
}
"""What a layer keeps for its backward pass: the products with its weights, or only its input."""

RMS_EPSILON = 1e-8
ROTARY_BASE = 10_000.0
QUERY_BLOCK = 128  # queries processed at once if the scores are neither captured nor edited

Site = str | tuple[str, int]
Edit = Callable[[Array], Array]
Tap = Callable[[str, Array], Array]


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape and the options of a transformer; hashable, so it can be a static argument of ``jit``."""

    n_layer: int  # number of layers
    n_head: int  # attention heads a layer
    d_model: int  # width of the residual stream
    d_hidden: int  # hidden units of an MLP
    n_ctx: int  # longest sequence, in tokens
    n_vocab: int  # vocabulary size
    bilinear: bool = True  # False: the plain MLP w_p gate(w_l x)
    gate: str | None = None  # None, "relu", "silu" or "gelu", applied to the left side
    bias: bool = False  # biases in the MLP
    attention_bias: bool = False  # biases on queries, keys and values
    normalization: bool | tuple[bool, ...] = (True, True, True)  # before attention, before MLP, final
    attn_scale: float | None = None  # factor on the attention's output; None becomes 1 / sqrt(2 n_layer)
    tokenizer: str | None = None  # name of the tokenizer
    dataset: str | None = None  # name of the training data
    pad_id: int | None = None  # the token that pads a row at its end; None: not known

    def __post_init__(self):
        check_types(self)
        check_sizes(self, "n_layer", "n_head", "d_model", "d_hidden", "n_ctx", "n_vocab")
        if self.d_model % (2 * self.n_head):
            raise ValueError(
                f"d_model ({self.d_model}) must be a multiple of 2 n_head ({2 * self.n_head}): "
                "all heads have the same width, and rotary positions pair the coordinates of a head"
            )
        if self.gate not in GATES:
            raise ValueError(f"unknown gate {self.gate!r}; choose one of {list(GATES)}")
        three = (self.normalization,) * 3 if isinstance(self.normalization, bool) else self.normalization
        if len(three) != 3:
            raise ValueError(f"normalization is {three}, but it must be one bool or three (attention, MLP, final)")
        object.__setattr__(self, "normalization", three)
        if self.attn_scale is None:
            object.__setattr__(self, "attn_scale", 1 / math.sqrt(2 * self.n_layer))
        if not abs(self.attention_factor) <= float(jnp.finfo(jnp.float32).max):
            raise ValueError(f"attn_scale must be a finite number in float32, got {self.attn_scale}")
        if self.pad_id is not None and not 0 <= self.pad_id <= LARGEST_SIZE:
            raise ValueError(f"pad_id must be a token id in 0 ... {LARGEST_SIZE}, got {self.pad_id}")

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.d_model // self.n_head

    @property
    def norms(self) -> tuple[bool, bool, bool]:
        """Whether there is a norm before attention, before the MLP, and at the end."""
        return cast(tuple[bool, bool, bool], self.normalization)

    @property
    def attention_factor(self) -> float:
        """``attn_scale``, never None: a config replaces None when it is made."""
        return cast(float, self.attn_scale)


def rms_norm(x: Float[Array, "... d_model"]) -> Float[Array, "... d_model"]:
    """``x / sqrt(mean(x^2) + 1e-8)`` over the last axis, computed in float32, without a gain."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + RMS_EPSILON)).astype(x.dtype)


def rotate(
    x: Float[Array, "... seq head d_head"], positions: Int[Array, "... seq"]
) -> Float[Array, "... seq head d_head"]:
    """Rotary position embedding in the half-split form: coordinate i is paired with i + d_head / 2.

    The pair (x_i, x_{i + d_head/2}) at position p is rotated by the angle ``p * 10000^(-2 i / d_head)``.
    """
    half = x.shape[-1] // 2
    frequencies = ROTARY_BASE ** -(jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.einsum("...s,f->...sf", positions.astype(jnp.float32), frequencies)[..., None, :]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    cos, sin = (jnp.broadcast_to(part, (*x.shape[:-1], half)) for part in (cos, sin))
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def as_floating(x: Array, weight: Array) -> Array:
    """``x``, or in the dtype of the weight if it is not of floating point: a weight is never rounded to integers."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(weight.dtype)


def linear(x: Shaped[Array, "... inp"], weight: Float[Array, "out inp"], bias: Float[Array, " out"] | None = None):
    """``weight x + bias`` over the last axis, in the dtype of ``x``, or of the weight if ``x`` holds integers."""
    x = as_floating(x, weight)
    y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype))
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


def swish(x: Float[Array, "..."], beta: Float[Array, ""] | float) -> Float[Array, "..."]:
    """``x sigmoid(beta x)``: SiLU at beta 1, and exactly ``x / 2`` at beta 0."""
    return x * jax.nn.sigmoid(jnp.asarray(beta, x.dtype) * x)


def attend(
    q: Float[Array, "batch seq n_head d_head"],
    k: Float[Array, "batch keys n_head d_head"],
    v: Float[Array, "batch keys n_head d_head"],
    seen: Bool[Array, "#batch seq keys"],
    tap: Tap | None = None,
) -> Float[Array, "batch seq n_head d_head"]:
    """``softmax(q . k / sqrt(d_head)) v`` over the keys that each query may see (``seen``); softmax in float32."""
    tap = tap or _untouched
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = tap("scores", jnp.where(seen[:, None], scores, -jnp.inf))
    pattern = tap("pattern", jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype))
    return jnp.einsum("bhqk,bkhd->bqhd", pattern, v)


def run_module(module: nn.Module, params: PyTree, *args, **kwargs) -> Any:
    """``module.apply`` with params only. All modules are run through this function."""
    return module.apply({"params": params}, *args, **kwargs)


def _untouched(site: str, value: Array) -> Array:
    return value


def _weight_init(fan_in: int, scale: float = 1.0):
    return nn.initializers.normal(scale / math.sqrt(fan_in))


class Attention(nn.Module):
    """Causal self-attention with rotary positions. Taps ``scores`` and ``pattern``.

    With a cache (``generation``), the caller gives ``positions`` and, for every query, the keys ``seen``. Its tap for
    ``keys`` and ``values``, ``[batch, seq, n_head, d_head]``, returns those of the tokens in the cache as well.

    With ``blocks``, queries are processed in blocks. Each block uses only the keys up to its end, and the scores and
    the pattern are not tapped. This saves up to half of the work and of the memory. On a CPU, a gradient takes 0.8 of
    the time at 256 tokens, and 0.55 at 1024.
    """

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        tap: Tap = _untouched,
        positions: Int[Array, "batch seq"] | None = None,
        seen: Bool[Array, "batch seq keys"] | None = None,
        blocks: bool = False,
    ) -> Float[Array, "batch seq d_model"]:
        c = self.config
        batch, seq, _ = x.shape
        positions = jnp.arange(seq) if positions is None else positions
        seen = jnp.tril(jnp.ones((1, seq, seq), bool)) if seen is None else seen
        init, square = _weight_init(c.d_model), (c.d_model, c.d_model)

        def heads(name: str):
            bias = self.param(f"b_{name}", nn.initializers.zeros, (c.d_model,)) if c.attention_bias else None
            y = linear(x, self.param(f"w_{name}", init, square), bias)
            return y.reshape(batch, seq, c.n_head, c.d_head)

        q = rotate(heads("q"), positions)
        k, v = tap("keys", rotate(heads("k"), positions)), tap("values", heads("v"))
        if blocks:
            cuts = [(start, start + QUERY_BLOCK) for start in range(0, seq, QUERY_BLOCK)]
            parts = [attend(q[:, i:j], k[:, :j], v[:, :j], seen[:, i:j, :j]) for i, j in cuts]
            mixed = jnp.concatenate(parts, axis=1)
        else:
            mixed = attend(q, k, v, seen, tap)
        mixed = mixed.reshape(batch, seq, c.d_model)
        return linear(mixed, self.param("w_o", _weight_init(c.d_model, (2 * c.n_layer) ** -0.5), square))


class MLP(nn.Module):
    """``w_p (gate(w_l x) * (w_r x))``; with ``bilinear=False`` it is ``w_p gate(w_l x)``.

    If the gate is "silu" and ``beta`` is given, the gate is ``swish(x, beta)``.
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
            return linear(x, self.param(f"w_{name}", _weight_init(c.d_model), (c.d_hidden, c.d_model)), bias)

        hidden = GATES[c.gate](side("l")) if beta is None else swish(side("l"), beta)
        if c.bilinear:
            hidden = hidden * side("r")
        bias = self.param("b_p", nn.initializers.zeros, (c.d_model,)) if c.bias else None
        init = _weight_init(c.d_hidden, (2 * c.n_layer) ** -0.5)
        return linear(hidden, self.param("w_p", init, (c.d_model, c.d_hidden)), bias)


class Layer(nn.Module):
    """One layer: attention and MLP, each added to the residual stream. ``tap`` sees and may edit every site."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        tap: Tap = _untouched,
        positions: Int[Array, "batch seq"] | None = None,
        seen: Bool[Array, "batch seq keys"] | None = None,
        blocks: bool = False,
        beta: Float[Array, ""] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        c = self.config
        norm_attention, norm_mlp, _ = c.norms
        x = tap("resid_pre", x)
        attn_in = rms_norm(x) if norm_attention else x
        attn_out = Attention(c, name="attention")(attn_in, tap, positions, seen, blocks)
        x = x + c.attention_factor * tap("attn_out", attn_out)
        x = tap("resid_mid", x)
        mlp_in = tap("mlp_in", rms_norm(x) if norm_mlp else x)
        x = x + tap("mlp_out", MLP(c, name="mlp")(mlp_in, beta))
        return tap("resid_post", x)


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

    def body(layer: Layer, x: Array, _):
        captured = {}

        def tap(site: str, value: Array) -> Array:
            if site in edits:
                value = apply_edit(site, edits[site], value)
            if site in capture:
                captured[site] = value
            return value

        return layer(x, tap, blocks=blocks, beta=beta), captured

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
        w_e = self.param("w_e", nn.initializers.normal(1.0), (c.n_vocab, c.d_model))
        w_u = self.param("w_u", _weight_init(c.d_model, 0.1), (c.n_vocab, c.d_model))
        x, _ = _scan_layers(c, c.n_layer, embed(w_e, tokens, self.compute_dtype))
        return unembed(c, w_u, x)


def embed(w_e: Float[Array, "n_vocab d_model"], tokens: Int[Array, "batch seq"], compute_dtype=jnp.float32):
    """The residual stream before the first layer: the rows of ``w_e`` for the tokens."""
    return w_e[tokens].astype(compute_dtype)


def unembed(config: TransformerConfig, w_u: Float[Array, "n_vocab d_model"], x: Float[Array, "... d_model"]):
    """The logits, in float32, from the residual stream after the last layer."""
    x = rms_norm(x) if config.norms[2] else x
    return linear(x, w_u).astype(jnp.float32)


def cross_entropy(
    logits: Float[Array, "batch seq n_vocab"], targets: Int[Array, "batch seq"]
) -> Float[Array, "batch seq"]:
    """``-log softmax(logits)[target]`` in nats: ``logsumexp(logits) - logits[target]``."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen
