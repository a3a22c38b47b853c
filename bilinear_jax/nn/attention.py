"""Attention: RMSNorm, rotary positions, grouped queries, and the Flax module."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from bilinear_jax.nn.architecture import TransformerConfig

QUERY_BLOCK = 64  # queries that attend_causally processes at once

Tap = Callable[[str, Array], Array]


def rms_norm(
    x: Float[Array, "... width"], gain: Float[Array, " width"] | None = None, eps: float = 1e-8
) -> Float[Array, "... width"]:
    """``gain * x / sqrt(mean(x^2) + eps)`` over the last axis, computed in float32. None is a gain of 1."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)
    if gain is not None:
        normed = normed * jnp.broadcast_to(gain.astype(jnp.float32), normed.shape)
    return normed.astype(x.dtype)


def rotary_frequencies(
    d_head: int, theta: float = 10_000.0, scaling: tuple[float, float, float, float] | None = None
) -> Float[Array, " half"]:
    """The angle by which each pair of coordinates turns from one position to the next, in radians, ``[d_head / 2]``.

    It is ``f_i = theta^(-2 i / d_head)``. Llama 3 divides slow frequencies. ``scaling`` is (factor, low, high, n), and
    with ``t = n f / (2 pi)``, the turns of a pair over n positions, and ``s = (t - low) / (high - low)``, clipped to
    0 ... 1, the frequency is ``s f + (1 - s) f / factor``.

    Example:
        >>> [round(f, 4) for f in rotary_frequencies(4, scaling=(2.0, 1.0, 4.0, 8.0)).tolist()]
        [0.5455, 0.005]
    """
    frequencies = theta ** -(jnp.arange(d_head // 2, dtype=jnp.float32) / (d_head // 2))
    if scaling is None:
        return frequencies
    factor, low, high, n_ctx = scaling
    kept = jnp.clip((n_ctx * frequencies / (2 * math.pi) - low) / (high - low), 0, 1)
    return kept * frequencies + (1 - kept) * frequencies / factor


def rotary_turns(
    positions: Int[Array, "... seq"],
    d_head: int,
    theta: float = 10_000.0,
    scaling: tuple[float, float, float, float] | None = None,
) -> tuple[Float[Array, "... seq half"], Float[Array, "... seq half"]]:
    """The cosines and the sines of the angles by which ``rotate`` turns at these positions, ``[..., seq, d_head / 2]``.

    All layers turn by the same angles. A loop over layers is given them, because in a loop XLA on a CPU computes them
    again for every row and head of every layer.
    """
    frequencies = rotary_frequencies(d_head, theta, scaling)
    angles = jnp.einsum("...s,f->...sf", positions.astype(jnp.float32), frequencies)
    return jnp.cos(angles), jnp.sin(angles)


def model_turns(config: TransformerConfig, length: int) -> tuple[Array, Array]:
    """``rotary_turns`` of the positions 0 ... length - 1 of a model, ``[length, d_head / 2]`` each."""
    return rotary_turns(jnp.arange(length), config.d_head, config.rope_theta, config.rope_scaling)


def rotate(
    x: Float[Array, "... seq head d_head"], turns: tuple[Float[Array, "... seq half"], Float[Array, "... seq half"]]
) -> Float[Array, "... seq head d_head"]:
    """Rotary position embedding in the half-split form: coordinate i is paired with i + d_head / 2.

    The pair (x_i, x_{i + d_head/2}) at position p is rotated by the angle ``p f_i``, see ``rotary_frequencies``;
    ``turns`` are those of ``rotary_turns``.
    """
    half = x.shape[-1] // 2
    cos, sin = (jnp.broadcast_to(part[..., None, :].astype(x.dtype), (*x.shape[:-1], half)) for part in turns)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def as_floating(x: Array, weight: Array) -> Array:
    """``x``, or in the dtype of the weight if it is not of floating point: a weight is never rounded to integers."""
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(weight.dtype)


def linear(x: Shaped[Array, "... inp"], weight: Float[Array, "out inp"], bias: Float[Array, " out"] | None = None):
    """``weight x + bias`` over the last axis, in the dtype of ``x``, or of the weight if ``x`` holds integers."""
    x = as_floating(x, weight)
    weight = weight.astype(x.dtype)
    y = _summed_wide(x, weight) if x.dtype == jnp.bfloat16 else jnp.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + jnp.broadcast_to(bias.astype(x.dtype), y.shape)


@jax.custom_vjp
def _summed_wide(x: Array, weight: Array) -> Array:
    """``weight x`` of bfloat16 numbers, summed in float32 and rounded once; its gradients too.

    A CPU that multiplies bfloat16 numbers does so only if the result is asked for in float32. It does not work in
    forward mode (``jax.jvp``).
    """
    return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=jnp.float32).astype(x.dtype)


def _summed_wide_backward(kept, cotangent):
    x, weight = kept
    with_x = jnp.einsum("...o,oi->...i", cotangent, weight, preferred_element_type=jnp.float32)
    with_weight = jnp.einsum("...o,...i->oi", cotangent, x, preferred_element_type=jnp.float32)
    return with_x.astype(x.dtype), with_weight.astype(weight.dtype)


_summed_wide.defvjp(lambda x, weight: (_summed_wide(x, weight), (x, weight)), _summed_wide_backward)


def attend(
    q: Float[Array, "batch seq n_head d_head"],
    k: Float[Array, "batch keys n_kv_head d_head"],
    v: Float[Array, "batch keys n_kv_head d_head"],
    seen: Bool[Array, "#batch seq keys"],
    tap: Tap | None = None,
) -> Float[Array, "batch seq n_head d_head"]:
    """``softmax(q . k / sqrt(d_head)) v`` over the keys that each query may see (``seen``); softmax in float32.

    Query head h reads the head ``h // (n_head / n_kv_head)`` of keys and values.
    """
    tap = tap or untouched
    batch, seq, n_head, d_head = q.shape
    grouped = n_head > k.shape[2]
    if grouped:
        q = q.reshape(batch, seq, k.shape[2], -1, d_head)
        scores = jnp.einsum("bknd,bqngd->bngqk", k, q).reshape(batch, n_head, seq, -1)
    else:
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
    scores = tap("scores", jnp.where(seen[:, None], scores / math.sqrt(d_head), -jnp.inf))
    pattern = tap("pattern", jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(v.dtype))
    if grouped:
        pattern = pattern.reshape(batch, k.shape[2], -1, *pattern.shape[2:])
        # In this order XLA on a CPU reads the values of a cache as they lie, and copies none.
        mixed = jnp.einsum("bknd,bngqk->bndgq", v, pattern)
        return mixed.transpose(0, 4, 1, 3, 2).reshape(batch, seq, n_head, d_head)
    return jnp.einsum("bhqk,bkhd->bqhd", pattern, v)


def attend_causally(
    q: Float[Array, "batch seq n_head d_head"],
    k: Float[Array, "batch seq n_kv_head d_head"],
    v: Float[Array, "batch seq n_kv_head d_head"],
) -> Float[Array, "batch seq n_head d_head"]:
    """``attend`` where each token sees itself and those before it, in half of the time and without a tap.

    Queries are processed in blocks. Each block uses only the keys up to its end: up to half of the work and of the
    memory. The division by the sum of the softmax comes after the product with the values, which is smaller. Heads come
    before positions, and the queries of one head of keys are one matrix, so XLA on a CPU copies nothing in between.
    """
    batch, seq, n_head, d_head = q.shape
    n_kv_head = k.shape[2]
    q = (q / math.sqrt(d_head)).reshape(batch, seq, n_kv_head, -1, d_head).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    blocks = []
    for start in range(0, seq, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, seq)
        grouped = q[:, :, :, start:stop]
        rows = grouped.reshape(batch, n_kv_head, -1, d_head)
        scores = jnp.einsum("bnqd,bnkd->bnqk", rows, k[:, :, :stop]).astype(jnp.float32)
        scores = scores.reshape(*grouped.shape[:-1], stop)
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((stop - start, stop), bool), start), scores.shape)
        scores = jnp.where(seen, scores, -jnp.inf)
        likely = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
        total = jnp.sum(likely, axis=-1, keepdims=True)
        weights = likely.astype(v.dtype).reshape(batch, n_kv_head, -1, stop)
        mixed = jnp.einsum("bnqk,bnkd->bnqd", weights, v[:, :, :stop]).reshape(grouped.shape)
        blocks.append((mixed.astype(jnp.float32) / total).astype(v.dtype))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(batch, seq, n_head, d_head)


def untouched(site: str, value: Array) -> Array:
    """A tap that changes nothing."""
    return value


def weight_init(fan_in: int, scale: float = 1.0):
    """Normal, with the standard deviation ``scale / sqrt(fan_in)``."""
    return nn.initializers.normal(scale / math.sqrt(fan_in))


class Attention(nn.Module):
    """Causal self-attention with rotary positions. Taps ``scores`` and ``pattern``.

    With a cache (``generation``), the caller gives ``positions`` and, for every query, the keys ``seen``. Its tap for
    ``keys`` and ``values``, ``[batch, seq, n_kv_head, d_head]``, returns those of the tokens in the cache as well.

    With ``blocks``, the scores and the pattern are not tapped, and ``attend_causally`` does the work. ``turns`` are
    those of the positions (``rotary_turns``), if the caller has them already.
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
        turns: tuple[Array, Array] | None = None,
    ) -> Float[Array, "batch seq d_model"]:
        c = self.config
        batch, seq, _ = x.shape
        if turns is None:
            positions = jnp.arange(seq) if positions is None else positions
            turns = rotary_turns(positions, c.d_head, c.rope_theta, c.rope_scaling)
        seen = jnp.tril(jnp.ones((1, seq, seq), bool)) if seen is None else seen

        def heads(name: str, number: int, turned: bool = True):
            width = number * c.d_head
            bias = self.param(f"b_{name}", nn.initializers.zeros, (width,)) if c.attention_bias else None
            y = linear(x, self.param(f"w_{name}", weight_init(c.d_model), (width, c.d_model)), bias)
            y = y.reshape(batch, seq, number, c.d_head)
            if not turned:
                return y
            if c.qk_norm:
                y = rms_norm(y, self.param(f"{name}_gain", nn.initializers.ones, (c.d_head,)), c.rms_eps)
            return rotate(y, turns)

        q = heads("q", c.n_head)
        k, v = tap("keys", heads("k", c.n_kv_head)), tap("values", heads("v", c.n_kv_head, turned=False))
        mixed = attend_causally(q, k, v) if blocks else attend(q, k, v, seen, tap)
        width = c.n_head * c.d_head
        init = weight_init(width, (2 * c.n_layer) ** -0.5)
        return linear(mixed.reshape(batch, seq, width), self.param("w_o", init, (c.d_model, width)))
