"""Products of weight rows with sparse codes, and derivatives that use only the active features.

A token has k active features: values ``v [tokens, k]`` at indices ``i [tokens, k]`` of the weight rows
``W [features, d_model]``. Decoding, encoding and both weight gradients need only three kernels:

    combine         y_t    =  sum_k v_tk W[i_tk]                   [tokens, d_model]
    dots            s_tk   =  W[i_tk] . x_t                        [tokens, k]
    scatter_outer   G[f]   =  sum over (t, k) with i_tk = f of v_tk x_t      [features, d_model]

Where the number of active features varies, ``counts [tokens]`` says how many of the k of each token count, the first
ones. The time of "scan" is then proportional to their sum, not to k (``_by_count``).

Each has three forms, which differ only in rounding, time and memory:

    "scan"      one active feature after another, or a few tokens; almost no memory beyond the result
    "gather"    all active rows at once, [tokens, k, d_model] unless the compiler fuses it away
    "dense"     the codes as a dense array, [tokens, features], and a matrix product

Measured on a 2-core CPU at 4096 tokens, d_model 1024, 8192 features, k 30, in milliseconds (combine, dots, scatter):
scan 10, 22, 36; gather 93, 109, 112; dense 239, 220, 249. Nothing has been measured on a GPU or TPU. There,
``fastest_form`` measures it; a recipe with ``form = "fastest"`` asks for that.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

FORMS = ("scan", "gather", "dense")
"""The forms of the kernels."""

_UNROLL = 5  # active features in one pass over the result in "scan": it is read and written once, not five times
_BLOCK = 64  # tokens whose active rows dots and scatter_outer hold together in "scan": they stay in the cache


def combine(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    rows: Float[Array, "features d_model"],
    form: str = "scan",
    counts: Int[Array, " tokens"] | None = None,
) -> Float[Array, "tokens d_model"]:
    """``y_t = sum_k values_tk rows[indices_tk]``, over the first ``counts`` of the k.

    Example:
        >>> combine(jnp.array([[2.0, 1.0]]), jnp.array([[0, 2]]), jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]]))
        Array([[2., 3.]], dtype=float32)
    """
    check_form(form)
    if counts is not None and form == "scan":

        def block(values, indices, most):
            start = jnp.zeros((values.shape[1], rows.shape[1]), rows.dtype)
            return _repeat(most, start, lambda j, total: total + values[j][:, None] * rows[indices[j]])

        return _by_count(block, counts, values, indices)
    values = counted(values, counts)
    if form == "dense":
        return _written_out(values, indices, rows.shape[0]) @ rows
    if form == "gather":
        return jnp.einsum("tk,tkd->td", values, rows[indices])

    def add(total, active):
        value, index = active
        return total + value[:, None] * rows[index], None

    start = jnp.zeros((values.shape[0], rows.shape[1]), rows.dtype)
    return jax.lax.scan(add, start, (values.T, indices.T), unroll=_UNROLL)[0]


def dots(
    indices: Int[Array, "tokens k"],
    rows: Float[Array, "features d_model"],
    x: Float[Array, "tokens d_model"],
    form: str = "scan",
    counts: Int[Array, " tokens"] | None = None,
) -> Float[Array, "tokens k"]:
    """``s_tk = rows[indices_tk] . x_t`` for the first ``counts`` of the k, else 0.

    Example:
        >>> dots(jnp.array([[0, 2]]), jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]]), jnp.array([[2.0, 1.0]]))
        Array([[2., 3.]], dtype=float32)
    """
    check_form(form)
    if form == "dense":
        return counted(jnp.take_along_axis(x @ rows.T, indices, axis=1), counts)
    if form == "gather":
        return counted(jnp.einsum("tkd,td->tk", rows[indices], x), counts)
    if counts is not None:

        def block(indices, x, most):
            def dot(j, found):
                return found.at[j].set(jnp.sum(rows[indices[j]] * x, axis=-1))

            return _repeat(most, jnp.zeros(indices.shape, x.dtype), dot).T

        return counted(_by_count(block, counts, indices, whole=(x,)), counts)
    return jax.lax.map(lambda token: rows[token[0]] @ token[1], (indices, x), batch_size=_BLOCK)


def scatter_outer(
    values: Float[Array, "tokens k"],
    indices: Int[Array, "tokens k"],
    x: Float[Array, "tokens d_model"],
    n_features: int,
    form: str = "scan",
    counts: Int[Array, " tokens"] | None = None,
) -> Float[Array, "features d_model"]:
    """``G[f] = sum of values_tk x_t`` over the pairs (t, k) with ``indices_tk = f``; other rows are 0.

    With ``counts``, only the first ``counts`` of the k of each token count.

    Example:
        >>> scatter_outer(jnp.array([[2.0, 1.0]]), jnp.array([[0, 2]]), jnp.array([[1.0, 3.0]]), 3)
        Array([[2., 6.],
               [0., 0.],
               [1., 3.]], dtype=float32)
    """
    check_form(form)
    start = jnp.zeros((n_features, x.shape[1]), x.dtype)
    if counts is not None and form == "scan":

        def add_block(total, values, indices, x, most):
            return _repeat(most, total, lambda j, total: total.at[indices[j]].add(values[j][:, None] * x))

        return _by_count(add_block, counts, values, indices, whole=(x,), carry=start)
    values = counted(values, counts)
    if form == "dense":
        return _written_out(values, indices, n_features).T @ x
    if form == "gather":
        return start.at[indices].add(values[:, :, None] * x[:, None, :])

    if not len(values):
        return start
    # Tokens 0, n, 2 n, ... together, then 1, 1 + n, ...: so rows on different devices stay there.
    block = min(_BLOCK, len(values))
    passes = -(-len(values) // block)
    filled_up = [(0, block * passes - len(values)), (0, 0)]
    cut = [jnp.pad(part, filled_up).reshape(block, passes, -1) for part in (values, indices, x)]

    def add(total, turn):
        value, index, vector = (jax.lax.dynamic_index_in_dim(part, turn, 1, keepdims=False) for part in cut)
        return total.at[index].add(value[:, :, None] * vector[:, None, :]), None

    return jax.lax.scan(add, start, jnp.arange(passes))[0]


def decode_at(
    values: Float[Array, "... k"],
    indices: Int[Array, "... k"],
    rows: Float[Array, "features d_model"],
    form: str = "scan",
    counts: Int[Array, "..."] | None = None,
    reached: Int[Array, "..."] | None = None,
) -> Float[Array, "... d_model"]:
    """``sum_k values_k rows[indices_k]``, for any leading axes, with derivatives in ``values`` and ``rows``.

    With ``counts``, the sum is over the first ``counts`` of the k values only, and only these have derivatives.
    With ``reached``, not below ``counts``, so many of the values have derivatives; those from ``counts`` on must be 0.

    Let ``g`` be the derivative with respect to the result. The derivative by the values is ``rows[indices_k] . g``
    (``dots``), and that by the rows is the sum of ``values_k g`` (``scatter_outer``), the only array as large as
    ``rows``. It works in ``jit``, in ``vmap`` and for reverse-mode derivatives of any order. It has a custom VJP, so it
    does not work in forward mode (``jax.jvp``).

    Raises:
        ValueError: if the form is not one of ``FORMS``.

    Example:
        >>> values, indices = jnp.array([2.0, 1.0]), jnp.array([0, 2])
        >>> rows = jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]])
        >>> decode_at(values, indices, rows)
        Array([2., 3.], dtype=float32)
        >>> jax.grad(lambda rows: decode_at(values, indices, rows)[1])(rows)[:, 1]
        Array([2., 0., 1.], dtype=float32)
    """
    flat_values, flat_indices = (part.reshape(-1, part.shape[-1]) for part in (values, indices))
    counts = None if counts is None else counts.reshape(-1)
    reached = counts if reached is None else reached.reshape(-1)
    flat = _decode(form, flat_values, flat_indices, rows.astype(values.dtype), counts, reached)
    return flat.reshape(*values.shape[:-1], rows.shape[1])


def linear_at(
    x: Float[Array, "... d_model"],
    rows: Float[Array, "features d_model"],
    y: Float[Array, "... features"],
    indices: Int[Array, "... k"],
    bias: Float[Array, " features"] | None = None,
    form: str = "scan",
    counts: Int[Array, "..."] | None = None,
) -> Float[Array, "... k"]:
    """``rows[indices_k] . x + bias[indices_k]``, looked up in ``y = x rows^T + bias``, for any leading axes.

    ``y`` was already computed to choose the indices, so its entries are used as they are. It has no derivative here, so
    no derivative of size ``[tokens, features]`` is computed. Let ``g_k`` be the derivative with respect to the result.
    The derivative by the rows is the sum of ``g_k x`` (``scatter_outer``), that by x is ``sum_k g_k rows[indices_k]``
    (``combine``), and that by the bias is ``g_k``. It works in ``jit``, in ``vmap`` and for reverse-mode derivatives of
    any order, not in forward mode. With ``counts``, only the first ``counts`` of the k have derivatives by x and rows.

    Raises:
        ValueError: if the form is not one of ``FORMS``.

    Example:
        >>> x, rows = jnp.array([2.0, 1.0]), jnp.array([[1.0, 0.0], [5.0, 5.0], [0.0, 3.0]])
        >>> linear_at(x, rows, rows @ x, jnp.array([1, 2]))
        Array([15.,  3.], dtype=float32)
        >>> jax.grad(lambda x: jnp.sum(linear_at(x, rows, rows @ x, jnp.array([1, 2]))))(x)
        Array([5., 8.], dtype=float32)
    """
    flat_x, flat_indices = (part.reshape(-1, part.shape[-1]) for part in (x, indices))
    chosen = jnp.take_along_axis(jax.lax.stop_gradient(y), indices, axis=-1)
    counts = None if counts is None else counts.reshape(-1)
    result = _linear(form, flat_x, rows.astype(x.dtype), chosen.reshape(flat_indices.shape), flat_indices, counts)
    result = result.reshape(indices.shape)
    if bias is None:
        return result
    part = bias.astype(x.dtype)[indices]
    return result + (part - jax.lax.stop_gradient(part))  # adds 0, only for the derivative: y includes the bias


def fastest_form(tokens: int, k: int, features: int, d_model: int, dtype=jnp.float32) -> str:
    """The form in which one decoding and its derivatives take the least time on this machine, at these shapes.

    It is measured: each form runs once to compile and then three times, and its shortest time counts. A form that runs
    out of memory is left out. The answer depends on the machine and its load, and the forms round differently. For a
    run that should be reproducible, call this once and keep the answer.
    """
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.random.normal(keys[0], (tokens, k), dtype)
    indices = jax.random.randint(keys[1], (tokens, k), 0, features)
    rows = jax.random.normal(keys[2], (features, d_model), dtype)
    seconds = {}
    for form in FORMS:

        def loss(values, rows, form=form):
            return jnp.sum(decode_at(values, indices, rows, form) ** 2)

        step = jax.jit(jax.grad(loss, argnums=(0, 1)))
        try:
            jax.block_until_ready(step(values, rows))
            seconds[form] = min(_seconds(step, values, rows) for _ in range(3))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    if not seconds:
        raise MemoryError(
            f"no form of the sparse products fits in memory at {tokens} tokens, {features} features of {d_model}: "
            "lower batch_size or the expansion"
        )
    return min(seconds, key=lambda form: seconds[form])


def check_form(form: str) -> None:
    """Raises ``ValueError`` if the form is not one of ``FORMS``."""
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r} of the sparse products; choose one of {', '.join(FORMS)}")


def _seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def counted(values: Float[Array, "tokens k"], counts: Int[Array, " tokens"] | None) -> Float[Array, "tokens k"]:
    """The first ``counts`` values of each token, and 0 for the others."""
    if counts is None:
        return values
    return jnp.where(jnp.arange(values.shape[1])[None] < counts[:, None], values, jnp.zeros_like(values))


def _repeat(most: Int[Array, ""], start: Array, add: Callable[[Array, Array], Array]) -> Array:
    """``add(j, total)`` for j = 0 ... most - 1, a number that is known only when it runs."""
    return jax.lax.fori_loop(0, most, add, start)


def _by_count(block: Callable, counts: Int[Array, " tokens"], *slotted: Array, whole=(), carry=None) -> Array:
    """Blocks of tokens with about as many active features, so that a block passes over few empty slots.

    Args:
        block: ``block([carry], *slotted, *whole, most)``, with slotted arrays as ``[k, block]``, whole ones as
            ``[block, d]``, and the largest count of the block. Without a carry it returns ``[block, ...]``.
        slotted: ``[tokens, k]``. Floating values are set to 0 from ``counts`` on.
        whole: ``[tokens, d]``.
        carry: what goes from block to block, and is returned; None: the results of all tokens are returned.
    """
    tokens = len(counts)
    size = max(1, min(_BLOCK, tokens))
    passes = max(1, -(-tokens // size))
    order = jnp.argsort(-counts)
    slotted = tuple(counted(part, counts) if jnp.issubdtype(part.dtype, jnp.floating) else part for part in slotted)

    def cut(part: Array) -> Array:
        filled = [(0, size * passes - tokens)] + [(0, 0)] * (part.ndim - 1)
        return jnp.pad(part[order], filled).reshape(passes, size, *part.shape[1:])

    parts = (*(jnp.swapaxes(cut(part), 1, 2) for part in slotted), *map(cut, whole), jnp.max(cut(counts), axis=1))
    if carry is not None:
        return jax.lax.scan(lambda carry, part: (block(carry, *part), None), carry, parts)[0]
    found = jax.lax.map(lambda part: block(*part), parts)
    return found.reshape(size * passes, *found.shape[2:])[:tokens][jnp.argsort(order)]


def _written_out(values, indices, n_features: int):
    """The codes as a dense array, [tokens, features]."""
    tokens = jnp.broadcast_to(jnp.arange(values.shape[0])[:, None], indices.shape)
    return jnp.zeros((values.shape[0], n_features), values.dtype).at[tokens, indices].add(values)


def _decode_value(form: str, values, indices, rows, counts, reached):
    return combine(values, indices, rows, form, counts)


def _decode_forward(form: str, *given):
    return _decode_value(form, *given), given


def _decode_backward(form: str, kept, g):
    values, indices, rows, counts, reached = kept
    by_rows = scatter_outer(values, indices, g, rows.shape[0], form, counts)
    return dots(indices, rows, g, form, reached), None, by_rows, None, None


_decode: Any = jax.custom_vjp(_decode_value, nondiff_argnums=(0,))
_decode.defvjp(_decode_forward, _decode_backward)


def _linear_forward(form: str, x, rows, chosen, indices, counts):
    return chosen, (x, rows, indices, counts)


def _linear_backward(form: str, kept, g):
    x, rows, indices, counts = kept
    by_rows = scatter_outer(g, indices, x, rows.shape[0], form, counts)
    return combine(g, indices, rows, form, counts), by_rows, None, None, None


_linear: Any = jax.custom_vjp(lambda form, x, rows, chosen, indices, counts: chosen, nondiff_argnums=(0,))
_linear.defvjp(_linear_forward, _linear_backward)
