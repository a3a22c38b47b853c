"""Which input features fire together on a dataset, and what their pairs contribute to output features.

At a token, the pair (i, j) of input features adds to the pre-activation of an output feature

    2 c_i c_j (D^T Q D)_ij, or c_i^2 (D^T Q D)_ii          c: codes as the MLP sees them, see ``explain.account``

The weight depends on the output feature, the codes do not. So ``co_firing`` sums c_i c_j over the dataset once, for all
pairs that ever fire together. These sums give the mean contribution of every pair to any output feature.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import sparse

from bilinear_jax.errors import check_count
from bilinear_jax.explain.account import InputParts, activation, eps_of_norm, input_parts
from bilinear_jax.explain.directions import encoder_constant
from bilinear_jax.explain.overview import pair_weights
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """All pairs i <= j of input features that fire together at some token of a dataset. Arrays on the host.

    Every feature that fires has its pair i = j. If the MLP has biases, the constant input is the last feature, and
    fires at every token.
    """

    pairs: Int[np.ndarray, "n 2"]  # the input features of each pair, i <= j, in lexicographic order
    count: Int[np.ndarray, " n"]  # tokens at which both fire
    product: Float[np.ndarray, " n"]  # sum of c_i c_j over these tokens
    magnitude: Float[np.ndarray, " n"]  # sum of |c_i c_j|
    tokens: int  # number of tokens in the mask, with those at which no feature of a pair fires

    def find(self, pairs: Int[np.ndarray, "m 2"]) -> "CoFiring":
        """The sums of the given pairs, in that order; 0 for a pair that never fires. (i, j) and (j, i) are the same."""
        size = 1 + int(max(self.pairs.max(initial=0), pairs.max(initial=0)))
        keys, wanted = (
            first.astype(np.int64) * size + last for first, last in (self.pairs.T, np.sort(pairs, axis=1).T)
        )
        place = np.searchsorted(keys, wanted)
        there = np.append(keys, -1)[place] == wanted
        sums = (np.where(there, np.append(sums, 0)[place], 0) for sums in (self.count, self.product, self.magnitude))
        return CoFiring(pairs, *sums, tokens=self.tokens)


def co_firing(tracer: Tracer, tokens, *, token_mask=None, batch_size: int = 16) -> CoFiring:
    """How often, and how strongly, the input features of a tracer fire together, in one pass over a dataset.

    The sums are exact, in float64 on the host. A progress bar shows on a terminal.

    Args:
        tracer, tokens, token_mask, batch_size: as for ``pair_summaries``.

    Raises:
        ValueError: for the tracer, the tokens and the mask, as ``pair_summaries``.

    Memory: on the host, about 100 bytes for every pair that fires together, and ``50 k`` bytes for every token of a
    batch; on the device, one batch of the model.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = co_firing(tracer, lm.encode("One day, a little girl named Lily found a needle."))
        >>> bool((found.count <= found.tokens).all()), bool((found.pairs[:, 0] <= found.pairs[:, 1]).all())
        (True, True)
    """
    tracer.require_encoder()
    fired = CoFiringSums()
    for seen in observe(tracer, tokens, token_mask=token_mask, batch_size=batch_size, description="co-firing"):
        fired.add(seen)
    return fired.finished()


def strongest_pairs(tracer: Tracer, found: CoFiring, feature: int, n: int = 50) -> Int[np.ndarray, "n 2"]:
    """The n pairs of largest mean |contribution| to an output feature on a dataset.

    There are fewer if fewer contribute. ``tracer.top_interactions`` finds the pairs of largest weight, without data.

    Args:
        tracer: with ``use_encoder=True``.
        found: what ``co_firing`` returns for this tracer.
        feature: the output feature.
        n: number of pairs, at least 1.

    Memory: ``in (in + features)`` numbers, and ``1024 features`` numbers of ``D^T Q D`` at a time.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = co_firing(tracer, lm.encode("One day, a little girl named Lily found a needle."))
        >>> strongest_pairs(tracer, found, 7, n=3).shape
        (3, 2)
    """
    check_count("n", n)
    size = magnitudes(found, pair_weights(tracer.q(feature), tracer.basis, found.pairs))
    return found.pairs[largest(size, n)]


def magnitudes(found: CoFiring, weights: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """Sums over tokens of the |contributions| of the pairs of ``found``, which have these weights."""
    return np.abs(entries(found.pairs) * weights) * found.magnitude


def largest(size: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " n"]:
    """The indices of the n largest values above 0, largest first. Ties go to the first."""
    least = np.partition(size, -n)[-n] if len(size) > n else 0
    order = np.flatnonzero((size >= least) & (size > 0))
    return order[np.argsort(-size[order], kind="stable")][:n]


# What the model computes: first on the device, then on the host


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["features", "directions", "encoder", "sae"], meta_fields=["firing"]
)
@dataclasses.dataclass(frozen=True)
class Outputs:
    """The encoders of some output features."""

    features: Any  # [U]
    directions: Any  # [U, d_model]: u
    encoder: Any  # [U]: b_enc - u . b_dec_out
    sae: SAE
    firing: bool  # whether the terms of each are summed over the tokens at which it fires, or over the mask

    @staticmethod
    def of(tracer: Tracer, features: list[int], firing: bool = False) -> "Outputs":
        index = np.asarray(features, np.int32)
        return Outputs(
            jnp.asarray(index), tracer.directions[index], encoder_constant(tracer.out, index), tracer.out, firing
        )


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a tracer's features do at all tokens, in the order of the dataset. It holds the tokens outside the mask too.

    "Output features" are those that were asked for.
    """

    counts: Bool[np.ndarray, " tokens"]  # whether the token is in the mask
    scale: Float[np.ndarray, " tokens"]  # 1 / rms(r) if a norm lies between the input SAE and the MLP, else 1
    inputs: sparse.csr_array  # [tokens, features]: c, codes as the MLP sees them, in float64; with the constant input
    outputs: sparse.csr_array  # [tokens, features]: all codes of the output SAE; empty if there is no output feature
    z: Float[np.ndarray, "tokens U"]  # pre-activations of the output features; 0 outside the mask
    terms: Float[np.ndarray, "U 7"]  # sums over the mask of each kind of term, except the encoder's; of
    # ``observe_all``, over those tokens of the mask at which the output feature fires
    magnitude: Float[np.ndarray, "U 7"]  # sums of their absolute values
    encoder: Float[np.ndarray, " U"]  # b_enc - u . b_dec_out of the output features, in float64
    with_bias: Float[np.ndarray, "U features"]  # 2 D^T Q b: the term of each input feature with the decoder bias

    @functools.cached_property
    def counted(self) -> sparse.csr_array:
        """``inputs``, without the codes of tokens outside the mask."""
        return only(self.inputs, self.counts)

    def where(self, column: int, places: Int[np.ndarray, " n"]) -> "Observed":
        """One output feature at the tokens at which it fires, all of which are in the mask of the result.

        Of an observation by ``observe_all``. The feature is named by its place among those observed.
        """
        one = [column]
        return Observed(
            counts=np.ones(len(places), bool),
            scale=self.scale[places],
            inputs=self.inputs[places],
            outputs=self.outputs[places],
            z=self.z[places][:, one],
            terms=self.terms[one],
            magnitude=self.magnitude[one],
            encoder=self.encoder[one],
            with_bias=self.with_bias[one],
        )


def only(codes: sparse.csr_array, kept: Bool[np.ndarray, " tokens"]) -> sparse.csr_array:
    """Sparse codes ``[tokens, features]``, emptied at the tokens that are not kept."""
    rows = np.repeat(kept, np.diff(codes.indptr))
    ends = np.append(0, np.cumsum(np.where(kept, np.diff(codes.indptr), 0)))
    return sparse.csr_array((codes.data[rows], codes.indices[rows], ends), codes.shape)


def observe(
    tracer: Tracer,
    tokens,
    features: list[int] | None = None,
    *,
    token_mask=None,
    batch_size: int = 16,
    description: str,
) -> Iterator[Observed]:
    """What the input SAE gives, batch by batch; with ``features``, also what these output features do."""
    outputs = Outputs.of(tracer, features) if features else None
    plain = _of_weights(tracer, outputs)
    for got in _batches(tracer, tokens, outputs, token_mask, batch_size, description):
        yield _observed(got, plain)


def observe_all(tracer: Tracer, tokens, features: list[int], batch_size: int) -> Observed:
    """``observe`` for all tokens together, with terms where each output feature fires."""
    outputs = Outputs.of(tracer, features, firing=True)
    batches = list(_batches(tracer, tokens, outputs, None, batch_size, "running the model"))
    together = {name: np.concatenate([got[name] for got in batches]) for name in batches[0]}
    return _observed(together, _of_weights(tracer, outputs))


class _OfWeights(NamedTuple):
    """What an observation needs from the weights, on the host."""

    inputs: int  # input features, the constant input included
    outputs: int  # output features
    encoder: Float[np.ndarray, " U"]
    with_bias: Float[np.ndarray, "U features"]


def _of_weights(tracer: Tracer, outputs: Outputs | None) -> _OfWeights:
    inputs = tracer.basis.shape[1]
    if outputs is None:
        return _OfWeights(inputs, tracer.n_features, np.zeros(0), np.zeros((0, inputs)))
    with jax.default_matmul_precision("highest"):
        bias = jnp.pad(tracer.inp.decoder_bias, (0, tracer.tensor.n_in - tracer.inp.config.d_model))
        with_bias = np.asarray(2 * tracer.tensor.matvec(outputs.directions, bias) @ tracer.basis, np.float64)
    return _OfWeights(inputs, tracer.n_features, np.asarray(outputs.encoder, np.float64), with_bias)


def _observed(got: dict[str, np.ndarray], plain: _OfWeights) -> Observed:
    inputs = _sparse(got["codes"], got["indices"], plain.inputs)
    if "z" not in got:
        nothing = sparse.csr_array((len(got["counts"]), plain.outputs))
        none = np.zeros((len(got["counts"]), 0), np.float32)
        sums = np.zeros((0, 7))
        return Observed(got["counts"], got["scale"], inputs, nothing, none, sums, sums, plain.encoder, plain.with_bias)
    outputs = _sparse(got["out_codes"], got["out_indices"], plain.outputs)
    return Observed(
        got["counts"],
        got["scale"],
        inputs,
        outputs,
        got["z"],
        got["terms"].sum(axis=0, dtype=np.float64),
        got["magnitude"].sum(axis=0, dtype=np.float64),
        plain.encoder,
        plain.with_bias,
    )


def _sparse(values: np.ndarray, indices: np.ndarray, features: int) -> sparse.csr_array:
    ends = np.arange(len(values) + 1) * values.shape[1]
    codes = sparse.csr_array((values.ravel().astype(np.float64), indices.ravel(), ends), (len(values), features))
    codes.eliminate_zeros()
    codes.sort_indices()
    return codes


def _batches(tracer: Tracer, tokens, outputs, token_mask, batch_size: int, description: str):
    """The results of ``_of_tokens`` batch by batch, on the host: one line per token, and sums for each dataset row."""
    lm, inp = tracer.lm, tracer.inp
    norm_eps = eps_of_norm(lm, inp)
    for batch in lm.batches(tokens, token_mask, batch_size, description=description):
        got = jax.device_get(_of_tokens(lm, tracer.tensor, inp, outputs, batch.tokens, batch.mask, norm_eps=norm_eps))
        sums = {name: got.pop(name)[: batch.rows] for name in ("terms", "magnitude") if name in got}
        got = {name: array[: batch.rows].reshape(-1, *array.shape[2:]) for name, array in got.items()}
        counted = [*sums.values(), *(array[got["counts"]] for array in got.values())]
        if not all(np.isfinite(array).all() for array in counted):
            raise batch.not_finite()
        yield got | sums


@functools.partial(jax.jit, static_argnames="norm_eps")
def _of_tokens(lm, tensor: BilinearTensor, inp: SAE, outputs: Outputs | None, tokens, mask, *, norm_eps: float | None):
    """The codes at each token of a batch; for each output feature the pre-activation, and sums of its terms by row."""
    with jax.default_matmul_precision("highest"):
        x, y, left_out = activation(lm, inp, tokens)
        parts = input_parts(inp, x, tokens, norm_eps=norm_eps, extended=tensor.n_in > x.shape[-1])
        found = {"counts": mask, "codes": parts.codes, "indices": parts.indices, "scale": parts.scale[..., 0]}
        if outputs is None:
            return found
        codes = outputs.sae.encode(y, sparse=True)
        z = y @ outputs.directions.T
        form = jnp.zeros_like(z) if left_out is None else left_out @ outputs.directions.T
        terms = jnp.stack([*_terms(tensor, inp, outputs.directions, parts), form], axis=-1)
    summed = jnp.broadcast_to(mask[..., None], z.shape)
    if outputs.firing:
        summed &= jnp.any(
            (codes.indices[..., None] == outputs.features[None, None, None]) & (codes.values != 0)[..., None], axis=-2
        )
    terms = jnp.where(summed[..., None], terms, 0)
    return found | {
        "out_codes": codes.values,
        "out_indices": codes.indices,
        "z": jnp.where(mask[..., None], z + jnp.broadcast_to(outputs.encoder, z.shape), 0),
        "terms": terms.sum(axis=1),
        "magnitude": jnp.abs(terms).sum(axis=1),
    }


def _terms(tensor: BilinearTensor, inp: SAE, directions, parts: InputParts) -> list[Float[Array, "batch seq U"]]:
    """The terms of many output features that the tensor and the input SAE give, in the order of the account.

    They are computed without Q: ``a^T Q b = g . ((L a) * (R b) + (R a) * (L b)) / 2``, with the gates ``g = down^T u``.
    """
    gates = (directions @ tensor.down).T
    bias = jnp.pad(inp.decoder_bias, (0, tensor.n_in - inp.config.d_model))  # without the scale of each token
    left, right = ((bias @ factor.T)[:, None] for factor in (tensor.left, tensor.right))
    q_bias = (tensor.left.T @ (right * gates) + tensor.right.T @ (left * gates)) / 2  # [in, U]

    def halves(a):
        return a @ tensor.left.T, a @ tensor.right.T

    def with_bias(a):
        return 2 * parts.scale * (a @ q_bias)

    read, error = halves(parts.read), halves(parts.error)
    twice = error[0] * read[1] + error[1] * read[0]  # times the gates: 2 e^T Q (D c)
    passthrough = jnp.zeros((*parts.read.shape[:-1], gates.shape[1]), parts.read.dtype)
    if inp.config.passthrough or inp.config.token_lookup is not None:
        passed = halves(parts.passed)
        passthrough = (passed[0] * (read[1] + passed[1]) + passed[1] * read[0]) @ gates + with_bias(parts.passed)
        twice = twice + error[0] * passed[1] + error[1] * passed[0]
    return [
        (read[0] * read[1]) @ gates,
        with_bias(parts.read),
        parts.scale**2 * (bias @ q_bias)[None, None],
        passthrough,
        twice @ gates + with_bias(parts.error),
        (error[0] * error[1]) @ gates,
    ]


# Sums on the host


class CoFiringSums:
    """The sums of ``CoFiring``, and those of each input feature's |codes| times the scale, batch by batch."""

    def __init__(self):
        self.tokens = 0
        self.scaled: Any = 0  # [features]
        self.sums: list[Any] = [0, 0, 0]  # [features, features] each: of tokens, products and |products|

    def add(self, seen: Observed) -> None:
        codes = seen.counted
        self.tokens += int(np.count_nonzero(seen.counts))
        self.scaled += abs(codes).T @ seen.scale.astype(np.float64)
        fires = sparse.csr_array((np.ones_like(codes.data), codes.indices, codes.indptr), codes.shape)
        self.sums = [
            total + kind.T.tocsr() @ kind for total, kind in zip(self.sums, (fires, codes, abs(codes)), strict=True)
        ]

    def finished(self) -> CoFiring:
        size = self.sums[0].shape[0]
        keys, sums = [], []
        for total in self.sums:
            upper: Any = sparse.triu(total, format="csr")
            upper.sort_indices()
            keys.append(np.repeat(np.arange(size), np.diff(upper.indptr)) * size + upper.indices)
            sums.append(np.zeros(len(keys[0])))
            sums[-1][np.searchsorted(keys[0], keys[-1])] = upper.data  # sums that cancel to 0 may be missing here
        pairs = np.stack(np.divmod(keys[0], size), axis=1).astype(np.int32)
        count, product, magnitude = sums
        return CoFiring(pairs, count.astype(np.int64), product, magnitude, self.tokens)


def pair_products(codes: sparse.csc_array, pairs: Int[np.ndarray, "n 2"]) -> sparse.csc_array:
    """``c_i c_j`` of some pairs at every token, ``[tokens, n]``."""
    products = codes[:, pairs[:, 0]].multiply(codes[:, pairs[:, 1]]).tocsc()
    products.sort_indices()
    return products


def entries(pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """How many entries of D^T Q D each pair stands for: 1 if i = j, else 2."""
    return np.where(pairs[:, 0] == pairs[:, 1], 1, 2)


def best_of_rows(rows: Int[np.ndarray, " n"], size: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The index of the largest value of each row, the largest first. Ties go to the first. ``rows`` ascend.

    Example:
        >>> best_of_rows(np.array([0, 0, 0, 4, 6]), np.array([1.0, 3.0, 3.0, 2.0, 3.0])).tolist()
        [1, 4, 3]
    """
    if not len(rows):
        return np.zeros(0, int)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    largest = np.maximum.reduceat(size, starts)
    is_largest = np.flatnonzero(size == np.repeat(largest, np.diff(starts, append=len(rows))))
    first = is_largest[np.searchsorted(is_largest, starts)]
    return first[np.argsort(-largest, kind="stable")]
