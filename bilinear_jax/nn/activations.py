"""The activations of dictionaries: which features of a token are active, and what their codes are.

With pre-activations z, all of one token, or for BatchTopK in training all of a batch:

    topk         z_f  for the k largest z, by value: codes can be negative
    topk_relu    max(z_f, 0)  for the k largest z
    batchtopk    z_f  if z_f > 0 and z_f > t; in training z_f >= t, where t is the (k tokens)-th largest z of the batch
                 (``batch_threshold``), and afterwards t is the mean of the thresholds of training
    jumprelu     z_f  if z_f > 0 and z_f > t_f
    relu         max(z_f, 0)

Sources: Gao et al. 2024 (top-k); Bussmann et al. 2024, "BatchTopK sparse autoencoders"; Rajamanoharan et al. 2024,
"Jumping ahead: improving reconstruction fidelity with JumpReLU sparse autoencoders".
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

_RUN = 32  # features in a run of ``largest`` and ``least_threshold``, and in a word of ``places``


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["n_features"])
@dataclasses.dataclass(frozen=True)
class SparseCodes:
    """The k active features of each token. Every other feature is exactly 0."""

    values: Float[Array, "... k"]  # the codes, largest first
    indices: Int[Array, "... k"]  # the feature of each code
    n_features: int  # number of all features

    def fires(self, feature: Int[Array, ""]) -> Bool[Array, "..."]:
        """Whether a feature is active at each token, with a code other than 0."""
        return jnp.any((self.indices == feature) & (self.values != 0), axis=-1)

    def dense(self) -> Float[Array, "... features"]:
        """The same codes as a dense array over all features."""
        flat_values, flat_indices = (part.reshape(-1, part.shape[-1]) for part in (self.values, self.indices))
        rows = jnp.broadcast_to(jnp.arange(flat_values.shape[0])[:, None], flat_values.shape)
        dense = jnp.zeros((flat_values.shape[0], self.n_features), self.values.dtype)
        dense = dense.at[rows, flat_indices].set(flat_values)
        return dense.reshape(*self.values.shape[:-1], self.n_features)


def largest(y: Float[Array, "... features"], k: int) -> Int[Array, "... k"]:
    """The indices of the k largest entries. They are the same as those of ``jax.lax.top_k``, also for ties.

    NaN counts as ``-inf``, whatever its sign bit, so it never takes the place of another entry.

    If there are many features, only those in the k runs of 32 with the largest maxima are ranked. No other can be among
    the k largest. This takes less time than ``top_k`` of all on a CPU.

    Example:
        >>> largest(jnp.array([[1.0, 5.0, 3.0, 5.0]]), 3).tolist()
        [[1, 3, 2]]
    """
    y, lowest = jax.lax.stop_gradient(y), jnp.array(-jnp.inf, y.dtype)

    def top(entries):
        return jax.lax.top_k(jnp.where(jnp.isnan(entries), lowest, entries), k)[1]

    runs = y.shape[-1] // _RUN
    if y.shape[-1] % _RUN or runs < 4 * k:
        return top(y)
    cut = y.reshape(*y.shape[:-1], runs, _RUN)
    maxima = jax.lax.reduce(cut, lowest, _larger, (cut.ndim - 1,))
    chosen = jnp.sort(jax.lax.top_k(maxima, k)[1], axis=-1)  # sorted, so that ties keep their order
    entries = jnp.take_along_axis(cut, chosen[..., None], axis=-2).reshape(*y.shape[:-1], k * _RUN)
    places = top(entries)
    return jnp.take_along_axis(chosen, places // _RUN, axis=-1) * _RUN + places % _RUN


def _larger(a, b):
    """The larger of two entries, as ``top_k`` ranks them: 0 above -0. No comparison with NaN is true, so b is not NaN.

    In XLA, ``jnp.max`` of ``jnp.where(jnp.isnan(...))`` takes 15 times as long.
    """
    return jnp.where((b > a) | ((b == a) & ~jnp.signbit(b)), b, a)


def damage(z: Float[Array, "... features"]) -> Float[Array, "... 1"]:
    """0 where all entries are finite, else NaN. Added to what is chosen from z, it shows also what was not chosen.

    Example:
        >>> damage(jnp.array([[1.0, 2.0], [-jnp.inf, 2.0]])).tolist()
        [[0.0], [nan]]
    """
    return jnp.sum(0 * jax.lax.stop_gradient(z), axis=-1, keepdims=True)  # several times as fast as isfinite


def is_active(z: Float[Array, "*tokens features"], threshold: Float[Array, "..."] | None) -> Bool[Array, "..."]:
    """Whether each feature is active under a thresholded activation. ``threshold`` is a number, or one per feature.

    Example:
        >>> is_active(jnp.array([[-1.0, 0.5, 2.0]]), jnp.array(1.0)).tolist()
        [[False, False, True]]
    """
    if threshold is None:
        return z > 0
    least = jnp.maximum(threshold, 0).astype(z.dtype)
    return z > jnp.broadcast_to(least, z.shape)


def first_slots(
    z: Float[Array, "*tokens features"], chosen: Bool[Array, "*tokens features"], slots: int
) -> tuple[Int[Array, "*tokens slots"], Int[Array, "*tokens"]]:
    """The indices of the chosen features of each token, the largest z first, and how many are chosen.

    If fewer are chosen than there are slots, the rest are indices of others. If more are, some have no slot.

    Example:
        >>> indices, counts = first_slots(jnp.array([[3.0, 1.0, 2.0]]), jnp.array([[True, False, True]]), 2)
        >>> indices.tolist(), counts.tolist()
        ([[0, 2]], [2])
    """
    z = jax.lax.stop_gradient(z)
    counts = jnp.sum(chosen, axis=-1, dtype=jnp.int32)
    return largest(jnp.where(chosen, z, jnp.array(-jnp.inf, z.dtype)), slots), counts


def places(
    groups: Sequence[Bool[Array, "*tokens features"]], slots: int
) -> tuple[Int[Array, "*tokens slots"], tuple[Int[Array, "*tokens"], ...]]:
    """The indices of the chosen features of each token: those of the first group, then of the next, each by number.

    No feature is in two groups. Unlike ``first_slots`` it ranks nothing: groups become bits, 32 features a word, and
    slot s is the s-th bit that is set. On a CPU, with 8192 features and 120 slots, this takes a tenth of the time.

    Returns:
        The indices, and how many are chosen in the first group, in the first two, and so on. If fewer are chosen than
        there are slots, the rest are indices without a meaning. If more are, some have no slot.

    Example:
        >>> first, second = jnp.array([[False, False, True]]), jnp.array([[True, False, False]])
        >>> indices, counts = places([first, second], 2)
        >>> indices.tolist(), [count.tolist() for count in counts]
        ([[2, 0]], [[1], [2]])
    """
    n_features = groups[0].shape[-1]
    packed = [_packed(group) for group in groups]
    words, per_group = jnp.concatenate(packed, axis=-1), packed[0].shape[-1]
    ends = jnp.cumsum(_ones(words), axis=-1)  # bits set up to each word
    slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (*words.shape[:-1], slots))
    last = words.shape[-1] - 1
    word = jnp.zeros_like(slot)  # how many words end at or before the slot, by bisection
    for bit in reversed(range(words.shape[-1].bit_length())):
        further = word + 2**bit
        end = jnp.take_along_axis(ends, jnp.minimum(further - 1, last), axis=-1)
        word = jnp.where((further <= last + 1) & (end <= slot), further, word)
    word = jnp.minimum(word, last)
    bits = jnp.take_along_axis(words, word, axis=-1)
    rest = slot - (jnp.take_along_axis(ends, word, axis=-1) - _ones(bits))
    place = jnp.zeros_like(slot)
    for width in (16, 8, 4, 2, 1):
        below = _ones(bits & jnp.uint32(2**width - 1))
        above = rest >= below
        rest = jnp.where(above, rest - below, rest)
        bits = jnp.where(above, bits >> jnp.uint32(width), bits)
        place = jnp.where(above, place + width, place)
    indices = jnp.minimum(word % per_group * _RUN + place, n_features - 1)
    return indices, tuple(ends[..., per_group * (i + 1) - 1] for i in range(len(groups)))


def _packed(chosen: Bool[Array, "... features"]) -> Array:
    """32 features as the bits of a word."""
    filled = [(0, 0)] * (chosen.ndim - 1) + [(0, -chosen.shape[-1] % _RUN)]
    cut = jnp.pad(chosen, filled).reshape(*chosen.shape[:-1], -1, _RUN)
    bits = jnp.broadcast_to(jnp.uint32(1) << jnp.arange(_RUN, dtype=jnp.uint32), cut.shape)
    # The sum of different bits is their "or", which XLA cannot reduce over devices.
    return jnp.sum(jnp.where(cut, bits, jnp.zeros_like(bits)), axis=-1, dtype=jnp.uint32)


def _ones(words: Array) -> Array:
    return jax.lax.population_count(words).astype(jnp.int32)


def least_threshold(z: Float[Array, "tokens n"], number: int) -> Float[Array, ""]:
    """A number at or below ``batch_threshold(z, number)``, and close to it where few large entries are neighbours.

    It is the ``number``-th largest of the maxima of runs of entries. They are entries too, so as many are at least it.

    Example:
        >>> float(least_threshold(jnp.array([[5.0, 1.0], [3.0, -2.0]]), 2))
        3.0
    """
    z = jax.lax.stop_gradient(z)
    run = _RUN
    while run > 1 and (z.shape[-1] % run or z.size // run < 4 * number):
        run //= 2
    if run > 1:
        cut = z.reshape(*z.shape[:-1], -1, run)
        z = jnp.max(cut, axis=-1)  # NaN, if one is there: it counts as 0, so the result is lower
    return batch_threshold(z, number)


def batch_threshold(z: Float[Array, "tokens n"], number: int) -> Float[Array, ""]:
    """The ``number``-th largest of all positive entries of z; 0 if there are fewer. Exact, without a sort.

    It halves the range of the bits of positive float32 numbers, which have the order of the numbers: 31 counts.

    Example:
        >>> float(batch_threshold(jnp.array([[5.0, 1.0], [3.0, -2.0]]), 2))
        3.0
    """
    z = jax.lax.stop_gradient(z).astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(jnp.where(z > 0, z, 0), jnp.int32)  # NaN counts as 0

    def halve(_, bounds):
        low, high = bounds  # at least ``number`` entries are >= low, or low is 0; fewer are >= high
        middle = low + (high - low) // 2
        enough = jnp.sum(bits >= middle, dtype=jnp.int32) >= number
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    infinity = jnp.int32(0x7F800001)
    low, _ = jax.lax.fori_loop(0, 32, halve, (jnp.int32(0), infinity))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _near(z: Array, threshold: Array, bandwidth: float) -> Array:
    """The kernel of the straight-through derivative: 1 / width within half a width of the threshold, else 0."""
    width = bandwidth * threshold
    inside = jnp.abs(z - threshold) < width / 2
    return jnp.where(inside, 1 / jnp.where(inside, width, 1), 0).astype(z.dtype)


def jump(z: Float[Array, "..."], threshold: Float[Array, "..."], bandwidth: float) -> Float[Array, "..."]:
    """``z`` where ``z > threshold``, else 0, of arrays of equal shape, with a derivative by the threshold t.

    That derivative is the straight-through one, ``-(t / width) [|z - t| < width / 2]`` with ``width = bandwidth t``. It
    is the derivative of the expected value, with the density of z estimated from the entries near t. The published
    width is the same for all thresholds; in units of t it needs no scale of the activations.

    Example:
        >>> jump(jnp.array([0.9, 1.2]), jnp.array([1.0, 1.0]), 0.5).tolist()
        [0.0, 1.2000000476837158]

    Source: Rajamanoharan et al. 2024, equation 11.
    """
    return _jump(z, threshold, bandwidth)


def _jump_value(z, threshold, bandwidth):
    return jnp.where(z > threshold, z, jnp.zeros_like(z))


def _jump_forward(z, threshold, bandwidth):
    return _jump_value(z, threshold, bandwidth), (z, threshold)


def _jump_backward(bandwidth, kept, g):
    z, threshold = kept
    return jnp.where(z > threshold, g, jnp.zeros_like(g)), -g * threshold * _near(z, threshold, bandwidth)


_jump: Any = jax.custom_vjp(_jump_value, nondiff_argnums=(2,))
_jump.defvjp(_jump_forward, _jump_backward)


def step(z: Float[Array, "..."], threshold: Float[Array, "..."], bandwidth: float) -> Float[Array, "..."]:
    """1 where ``z > threshold``, else 0, with the straight-through derivative by the threshold t, as ``jump``.

    The derivative is ``-(1 / width) [|z - t| < width / 2]``, with ``width = bandwidth t``; that by z is 0.

    Source: Rajamanoharan et al. 2024, equation 12.
    """
    return _step(z, threshold, bandwidth)


def _step_value(z, threshold, bandwidth):
    return (z > threshold).astype(z.dtype)


def _step_forward(z, threshold, bandwidth):
    return _step_value(z, threshold, bandwidth), (z, threshold)


def _step_backward(bandwidth, kept, g):
    z, threshold = kept
    return jnp.zeros_like(z), -g * _near(z, threshold, bandwidth)


_step: Any = jax.custom_vjp(_step_value, nondiff_argnums=(2,))
_step.defvjp(_step_forward, _step_backward)
