"""Sampling text from a transformer, token by token, with a cache of keys and values.

The prompts of a batch fill the first slots of the cache. Each is padded at its end. The new tokens of all rows share
the slots after them, so a step writes one slot, whatever the lengths. A row attends to its own prompt and to its new
tokens so far, at the positions that it would have without the other rows.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key, PyTree

from bilinear_jax.nn.sites import NO_EDITS, edits_by_layer
from bilinear_jax.nn.transformer import (
    Edit,
    Layer,
    Site,
    TransformerConfig,
    apply_edit,
    embed,
    run_module,
    unembed,
    unembedding,
)

NOT_FINITE = -1  # in place of a token whose logits are not finite


def generate(
    config: TransformerConfig,
    params: PyTree,
    prompts: Int[Array | np.ndarray, "batch seq"],
    lengths: Int[Array | np.ndarray, " batch"] | None = None,
    *,
    max_length: int,
    temperature: float | int | Float[Array, ""] = 1.0,
    top_k: int | None = None,
    key: Key[Array, ""] | None = None,
    stop_token: int | None = None,
    edits: Mapping[Site, Edit] = NO_EDITS,
    compute_dtype=jnp.float32,
) -> Int[Array, "batch max_length"]:
    """The next ``max_length`` tokens of every prompt.

    Token t of row b is drawn from ``softmax(logits / temperature)``, restricted to the ``top_k`` largest logits, with
    the key ``fold_in(fold_in(key, b), t)``. So it depends on the row's place in the batch, but not on the other rows.
    If a job has several batches, give each its own key.

    One program is compiled for each bucket of prompt lengths and of new tokens (see ``bucket``), each batch size and
    each ``top_k``. ``temperature``, except 0, and ``stop_token`` do not need a new one. Inside your own ``jit``,
    ``max_length``, ``top_k`` and ``stop_token`` must be Python numbers, and traced values are not checked.

    Args:
        config: of the transformer.
        params: of the transformer.
        prompts: token ids, padded at the end of each row. The values in the padding do not matter.
        lengths: tokens in each prompt; all of ``seq`` by default.
        max_length: number of new tokens.
        temperature: 0 takes the most likely token; ties go to the first.
        top_k: sample among the ``top_k`` most likely tokens; ``None``: among all.
        key: of the random numbers; ``jax.random.key(0)`` by default.
        stop_token: a row that has drawn this token repeats it from then on. When all rows have drawn it, the loop ends.
        edits: as for ``nn.sites.forward``; compiled again at every call. An edit is given the prompts, padded to their
            bucket, and then one token at a time, so it must treat every token separately.
        compute_dtype: the dtype of activations, and of the weights when they are used.

    Returns:
        The new tokens. If the logits of a row are not finite, its tokens from there on are ``NOT_FINITE``, -1.

    Raises:
        ValueError: if a prompt and its new tokens do not fit ``n_ctx``, a prompt is empty, a token is outside the
            vocabulary, the temperature is negative, ``top_k`` or ``stop_token`` is outside the vocabulary, or
            ``max_length < 1``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=16, d_hidden=32, n_ctx=32, n_vocab=50)
        >>> prompts = jnp.array([[3, 14, 15], [9, 2, 0]])
        >>> params = Transformer(config).init(jax.random.key(0), prompts)["params"]
        >>> generate(config, params, prompts, jnp.array([3, 2]), max_length=5, top_k=10).shape
        (2, 5)
    """
    prompts, lengths = _checked(config, prompts, lengths, max_length, temperature, top_k, stop_token)
    width = bucket(prompts.shape[1], config.n_ctx)
    by_layer = tuple(edits_by_layer(config, edits))
    run = jax.jit(functools.partial(_tokens, edits=by_layer), **_STATIC) if edits else _generate
    return run(
        config,
        params,
        jnp.pad(prompts, ((0, 0), (0, width - prompts.shape[1]))),
        lengths,
        jax.random.key(0) if key is None else key,
        jnp.asarray(temperature, jnp.float32),
        max_length,
        -1 if stop_token is None else stop_token,
        slots=bucket(max_length, config.n_ctx),
        greedy=not isinstance(temperature, Tracer) and float(temperature) == 0,
        top_k=top_k,
        compute_dtype=compute_dtype,
    )[:, :max_length]


def sample(
    logits: Float[Array, "batch n_vocab"],
    keys: Key[Array, " batch"],
    temperature: float | int | Float[Array, ""],
    top_k: int | None = None,
) -> Int[Array, " batch"]:
    """One token a row from ``softmax(logits / temperature)`` over the ``top_k`` largest; at temperature 0, the largest.

    If the temperature is a Python 0, no random number is drawn.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not isinstance(temperature, Array) and temperature == 0:
        return greedy
    tokens = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    if top_k is not None:
        logits, tokens = jax.lax.top_k(logits, top_k)
    drawn = jax.vmap(jax.random.categorical)(keys, logits / jnp.where(temperature > 0, temperature, 1.0))
    drawn = jnp.take_along_axis(tokens, drawn[:, None], axis=-1)[:, 0].astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)


def bucket(length: int, n_ctx: int) -> int:
    """The length to which ``length`` is padded: a multiple of 16 up to 128, then 4 to 8 sizes for every doubling.

    Beyond 64 tokens, at most a quarter is padding. No bucket is wider than ``n_ctx``.

    >>> [bucket(n, 1000) for n in (1, 16, 17, 130, 300, 990)]
    [16, 16, 32, 160, 320, 1000]
    """
    step = max(16, 2 ** (length - 1).bit_length() // 8)
    return min(-(-length // step) * step, n_ctx)


def _tokens(
    config: TransformerConfig,
    params: PyTree,
    prompts: Int[Array, "batch seq"],
    lengths: Int[Array, " batch"],
    key: Key[Array, ""],
    temperature: Float[Array, ""],
    max_length: Int[Array, ""] | int,
    stop_token: Int[Array, ""] | int,
    *,
    slots: int,
    greedy: bool,
    top_k: int | None,
    compute_dtype,
    edits: tuple[dict[str, Edit], ...] = (),
) -> Int[Array, "batch {slots}"]:
    batch, width = prompts.shape
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    in_prompt = jnp.arange(width)[None] < lengths[:, None]
    stacked = jax.tree.map(lambda a: a.astype(compute_dtype), params["layers"])
    layers = [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(config.n_layer)]
    last = {"w_e": unembedding(params).astype(compute_dtype)} | {
        name: params[name] for name in ("final_gain",) if name in params
    }

    # [batch, n_kv_head, d_head, slots] without axes of size 1: exactly the operand of attention's two products. After
    # any other operation, even a reshape, XLA on a CPU copies the whole cache several times a step.
    heads = tuple(size for size in (batch, config.n_kv_head) if size > 1)

    def to_cache(a):
        return a.transpose(0, 2, 3, 1).reshape(*heads, config.d_head, -1)

    def from_cache(a):
        return a.reshape(batch, config.n_kv_head, config.d_head, -1).transpose(0, 3, 1, 2)

    def draw(x, t):
        """Token t of every row, from the residual stream of the token before it."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, t)
        logits = unembed(config, last, x)
        drawn = sample(logits, keys, 0 if greedy else temperature, top_k)
        return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), drawn, NOT_FINITE)

    def through_layer(edited, weights, x, cached, *attention):
        def tap(site, value):
            if site in ("keys", "values"):
                return cached(value)
            return apply_edit(site, edited[site], value) if site in edited else value

        return run_module(Layer(config), weights, x, tap, *attention)

    def prompt_layer(x, weights, edited: Mapping[str, Edit] = MappingProxyType({})):
        """The residual stream after a layer, and the keys and values of the prompts with room for the new tokens."""
        cache = []

        def cached(value):
            cache.append(to_cache(jnp.pad(value, ((0, 0), (0, slots), (0, 0), (0, 0)))))
            return value

        return through_layer(edited, weights, x, cached, None, None, not edited), cache

    def run_prompts():
        x, cache = embed(config, params, jnp.where(in_prompt, prompts, 0), compute_dtype), []
        if edits:
            for weights, edited in zip(layers, edits, strict=True):
                x, added = prompt_layer(x, weights, edited)
                cache += added
        else:  # a loop, which compiles one layer
            x, parts = jax.lax.scan(prompt_layer, x, stacked)
            cache = [part[i] for i in range(config.n_layer) for part in parts]
        return jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0], cache

    def step(state):
        """Draws token t from the cache and from token t - 1, which it adds to the cache."""
        t, token, finished, new, cache = state
        old, cache = iter(cache), []

        def cached(value):
            cache.append(jax.lax.dynamic_update_slice_in_dim(next(old), to_cache(value), width + t - 1, axis=-1))
            return from_cache(cache[-1])

        in_new = jnp.broadcast_to(jnp.arange(slots)[None] < t, (batch, slots))
        seen = jnp.concatenate([in_prompt, in_new], axis=1)[:, None]
        x = embed(config, params, token[:, None], compute_dtype)
        for weights, edited in zip(layers, edits or ({},) * config.n_layer, strict=True):
            x = through_layer(edited, weights, x, cached, (lengths + (t - 1))[:, None], seen)
        return emit(t, draw(x[:, 0], t), finished, new, cache)

    def emit(t, token, finished, new, cache):
        token = jnp.where(finished, stop_token, token)
        new = jax.lax.dynamic_update_slice_in_dim(new, token[:, None], t, axis=1)
        return t + 1, token, finished | (token == stop_token), new, cache

    def going(state):
        t, _, finished, _, _ = state
        return (t < max_length) & ~jnp.all(finished)

    x, cache = run_prompts()
    new = jnp.full((batch, slots), stop_token, jnp.int32)
    state = emit(jnp.int32(0), draw(x, 0), jnp.zeros(batch, bool), new, cache)
    return jax.lax.while_loop(going, step, state)[3]


_STATIC: Any = {"static_argnums": 0, "static_argnames": ("slots", "greedy", "top_k", "compute_dtype")}
_generate = jax.jit(_tokens, **_STATIC)


def _checked(config, prompts, lengths, max_length, temperature, top_k, stop_token) -> tuple[Array, Array]:
    """Prompts and lengths as int32 arrays. Checks all values that are not traced, and cuts off common padding."""

    def concrete(value):
        return not isinstance(value, Tracer)

    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_length is {max_length!r}, but the number of new tokens must be an int of at least 1")
    if concrete(temperature) and not temperature >= 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if top_k is not None and not 1 <= top_k <= config.n_vocab:
        raise ValueError(f"top_k is {top_k}, but it must be between 1 and {config.n_vocab} (the vocabulary), or None")
    if stop_token is not None and not 0 <= stop_token < config.n_vocab:
        raise ValueError(f"stop_token {stop_token} lies outside the vocabulary 0 ... {config.n_vocab - 1}")
    if prompts.shape[0] < 1 or prompts.shape[1] < 1:
        raise ValueError(
            f"prompts have shape {prompts.shape}, but they must be [batch, seq], with at least one of each"
        )
    if lengths is None:
        lengths = np.full(prompts.shape[0], prompts.shape[1], np.int32)
    if lengths.shape != prompts.shape[:1]:
        raise ValueError(
            f"lengths have shape {lengths.shape}, but there are {prompts.shape[0]} rows: give one length for each row"
        )
    if concrete(lengths):
        lengths = np.asarray(lengths, np.int32)
        if lengths.min() < 1 or lengths.max() > prompts.shape[1]:
            row = int(np.argmax((lengths < 1) | (lengths > prompts.shape[1])))
            raise ValueError(
                f"lengths[{row}] is {lengths[row]}, but it must be between 1 and {prompts.shape[1]}: give an empty "
                "prompt one token, such as the tokenizer's beginning-of-text token"
            )
        prompts = prompts[:, : lengths.max()]
    if prompts.shape[1] + max_length > config.n_ctx:
        fit = config.n_ctx - prompts.shape[1]
        fix = f"at most {fit} new tokens fit" if fit > 0 else f"shorten it to {config.n_ctx - 1} tokens or fewer"
        raise ValueError(
            f"a prompt of {prompts.shape[1]} tokens and {max_length} new tokens do not fit the context of "
            f"{config.n_ctx}: {fix}"
        )
    if concrete(prompts) and concrete(lengths):
        prompts = np.asarray(prompts)
        outside = (prompts < 0) | (prompts >= config.n_vocab)
        outside &= np.arange(prompts.shape[1])[None] < lengths[:, None]
        if outside.any():
            raise ValueError(
                f"token {prompts[outside][0]} lies outside the vocabulary 0 ... {config.n_vocab - 1}: tokenize with "
                "this model's own tokenizer"
            )
    return jnp.asarray(prompts, jnp.int32), jnp.asarray(lengths, jnp.int32)
