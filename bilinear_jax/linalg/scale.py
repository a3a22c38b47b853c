"""Arithmetic on numbers of any scale and type: powers of two are taken out first, and no digit changes.

The squares of numbers below 1e-19 or above 1e19 leave the range of float32. A norm, or a ratio of squares, of such
numbers would be 0, infinite or NaN.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def as_floats(name: str, x: Any) -> Float[Array, "..."]:
    """``x`` as float32, or as float64 if it is that; integers would wrap around, and half floats overflow early.

    Raises:
        ValueError: if x does not hold real numbers.

    Example:
        >>> as_floats("left", jnp.array([100], jnp.int8))
        Array([100.], dtype=float32)
    """
    try:
        x = jnp.asarray(x)
    except TypeError as error:
        raise ValueError(f"{name} must be an array of real numbers, got {x!r:.60}") from error
    if x.dtype in (jnp.float32, jnp.float64):
        return x
    if not (x.dtype == bool or jnp.issubdtype(x.dtype, jnp.integer) or jnp.issubdtype(x.dtype, jnp.floating)):
        raise ValueError(f"{name} has the dtype {x.dtype}, but must hold real numbers: give it as float32")
    return x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="axis")
def unit_scale(
    x: Float[Array, "..."], axis: int | tuple[int, ...] | None = None
) -> tuple[Float[Array, "..."], Int[Array, "..."]]:
    """``(x / 2^e, e)``, with the largest ``|x / 2^e|`` along the axis, or of all, between 1/2 and 1.

    The quotient has the digits of x. Its squares stay in the range of floats, which end at 1e-38 and 3e38 in float32.
    In derivatives, e is constant. It is 0 if all x are 0, or one is not finite.

    Example:
        >>> scaled, exponent = unit_scale(jnp.array([6.0, -12.0]))  # 12 = 0.75 * 2^4
        >>> scaled.tolist(), int(exponent)
        ([0.375, -0.75], 4)
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=axis, keepdims=axis is not None, initial=0)
    exponents = _exponent(largest)
    return shift(x, -exponents), exponents


@jax.jit
def shift(x: Float[Array, "..."], exponents: Int[Array, "..."]) -> Float[Array, "..."]:
    """``x 2^e``, also where 2^e alone would leave the range of floats. Derivatives are right at 0 too.

    Example:
        >>> shift(jnp.array(2.0**-120), jnp.array(200)).item() == 2.0**80
        True
    """
    float_type = jnp.finfo(x.dtype)
    most = 2 * float_type.maxexp + float_type.nmant  # beyond it, every result is 0 or infinite
    left = jnp.broadcast_to(jnp.clip(exponents, -most, most), x.shape)
    for parts in (3, 2, 1):  # with one sign, so that no step leaves the range unless the result does
        x = x * _power_of_two(left // parts, x.dtype)
        left = left - left // parts
    return x


# By the bits of a float: jnp.ldexp and jnp.frexp are dozens of operations, which every program compiles.
def _layout(dtype) -> tuple[Any, int, int]:
    """The integer with the bits of a float, how many of them are digits, and the bits of the exponent of 1."""
    float_type = jnp.finfo(dtype)
    return jnp.dtype(f"int{float_type.bits}"), float_type.nmant, float_type.maxexp - 1


def _power_of_two(exponents: Int[Array, "..."], dtype) -> Float[Array, "..."]:
    """``2^e``, for exponents of normal floats."""
    integer, digits, bias = _layout(dtype)
    return jax.lax.bitcast_convert_type((exponents.astype(integer) + bias) << digits, dtype)


def _exponent(x: Float[Array, "..."]) -> Int[Array, "..."]:
    """e with ``1/2 <= x / 2^e < 1``, for x that are not negative; 0 if x is 0, subnormal or not finite."""
    integer, digits, bias = _layout(x.dtype)
    field = jax.lax.bitcast_convert_type(x, integer) >> digits
    return jnp.where((field == 0) | (field > 2 * bias), 0, field - bias + 1).astype(jnp.int32)


def lengths(x: Float[Array, "..."], axis: int | tuple[int, ...] = -1) -> Float[Array, "..."]:
    """``sqrt(sum x^2)`` along the axes, also where the squares would leave the range of floats.

    Example:
        >>> lengths(jnp.array([3.0, 4.0]) * 2.0**-120).item() == 5 * 2.0**-120
        True
    """
    scaled, exponents = unit_scale(x, axis)
    squares = jnp.sum(scaled**2, axis=axis)
    zero = squares <= 0
    return shift(jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares))), exponents.reshape(squares.shape))


def unit_columns(columns: Float[Array, "d_model features"]) -> Float[Array, "d_model features"]:
    """Every column scaled to unit length. A zero column stays zero."""

    def divided(columns, sizes):
        return columns / jnp.broadcast_to(jnp.where(sizes > 0, sizes, 1), columns.shape)

    columns = divided(columns, jnp.max(jnp.abs(columns), axis=0))  # so that no square underflows
    return divided(columns, jnp.linalg.norm(columns, axis=0))
