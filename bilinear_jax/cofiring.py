"""What pairs of input features do to output features over a dataset: how often they meet, and what comes of it.

At a token, the pair (i, j) of input features adds to the pre-activation of an output feature

    2 c_i c_j (D^T Q D)_ij, or c_i^2 (D^T Q D)_ii          c: codes as the MLP sees them, see ``attribution``

The weight is the output feature's; the codes are not. So the sums of c_i c_j over a dataset, of those pairs that ever
fire together, are taken once (``co_firing``), and give the mean contribution of every pair to any output feature.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy import sparse

from bilinear_jax.activations import check_dataset, no_token, not_finite, token_batches
from bilinear_jax.attribution import (
    InputParts,
    encoder_constant,
    input_parts,
    reads_before_norm,
    site_pair,
)
from bilinear_jax.correlation import check_tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.tracer import Tracer

TILE = 1024  # rows of D^T Q D that are held at once; it changes no result


@dataclasses.dataclass(frozen=True)
class CoFiring:
    """The pairs i <= j of input features that fire together at some token of a dataset, and how much. On the host.

    i = j is in it for every feature that fires. The constant input of an MLP with biases is the last feature, and
    fires at every token.
    """

    pairs: Int[np.ndarray, "n 2"]  # the input features of each pair, i <= j, in lexicographic order
    count: Int[np.ndarray, " n"]  # tokens at which both fire
    product: Float[np.ndarray, " n"]  # sum of c_i c_j over these tokens
    magnitude: Float[np.ndarray, " n"]  # sum of |c_i c_j|
    tokens: int  # how many tokens count, those at which none of a pair fires included

    def find(self, pairs: Int[np.ndarray, "m 2"]) -> "CoFiring":
        """These pairs, in this order, (i, j) and (j, i) being one; 0 for those that never fire together."""
        size = 1 + int(max(self.pairs.max(initial=0), pairs.max(initial=0)))
        keys, wanted = (
            first.astype(np.int64) * size + last for first, last in (self.pairs.T, np.sort(pairs, axis=1).T)
        )
        place = np.searchsorted(keys, wanted)
        there = np.append(keys, -1)[place] == wanted
        sums = (np.where(there, np.append(sums, 0)[place], 0) for sums in (self.count, self.product, self.magnitude))
        return CoFiring(pairs, *sums, tokens=self.tokens)


def co_firing(tracer: Tracer, lm: LanguageModel, tokens, *, token_mask=None, batch_size: int = 16) -> CoFiring:
    """How often, and how much, the input features of a tracer fire together over a token dataset; one pass.

    Exact; summed in float64 on the host. A progress bar shows on a terminal.

    Args:
        tokens, token_mask, batch_size: as for ``summaries.pair_summaries``.

    Raises:
        ValueError: as ``summaries.pair_summaries``, for the tracer, the tokens and the mask.

    Memory on the host: about 100 bytes for every pair that fires together, and ``50 k`` for every token of a batch; on
    the device, one batch of the model.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = co_firing(tracer, lm, lm.encode("One day, a little girl named Lily found a needle."))
        >>> bool((found.count <= found.tokens).all()), bool((found.pairs[:, 0] <= found.pairs[:, 1]).all())
        (True, True)
    """
    check_tracer(tracer, lm)
    fired = CoFiringSums()
    for seen in observe(tracer, lm, tokens, token_mask=token_mask, batch_size=batch_size, description="co-firing"):
        fired.add(seen)
    return fired.finished()


def strongest_pairs(tracer: Tracer, found: CoFiring, feature: int, n: int = 50) -> Int[np.ndarray, "n 2"]:
    """The n pairs of largest mean |contribution| to an output feature, fewer where no other contributes.

    What ``tracer.top_interactions`` is for the weights alone, on the data of ``found``.

    Memory: ``in (in + features)`` numbers, and ``1024 features`` of ``D^T Q D`` at a time.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = co_firing(tracer, lm, lm.encode("One day, a little girl named Lily found a needle."))
        >>> strongest_pairs(tracer, found, 7, n=3).shape
        (3, 2)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    size = magnitudes(found, pair_weights(tracer, feature, found.pairs))
    return found.pairs[largest(size, n)]


def magnitudes(found: CoFiring, weights: Float[np.ndarray, " pairs"]) -> Float[np.ndarray, " pairs"]:
    """Sums of the |contributions| of the pairs of ``found``, of these weights, over tokens."""
    return np.abs(entries(found.pairs) * weights) * found.magnitude


def largest(size: Float[np.ndarray, " m"], n: int) -> Int[np.ndarray, " n"]:
    """Which are the n largest of those above 0, the largest first and of equals the first."""
    least = np.partition(size, -n)[-n] if len(size) > n else 0
    order = np.flatnonzero((size >= least) & (size > 0))
    return order[np.argsort(-size[order], kind="stable")][:n]


# What the model gives, on the device and then on the host


@functools.partial(jax.tree_util.register_dataclass, data_fields=["directions", "encoder", "sae"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Some output features."""

    directions: Any  # [U, d_model]: u
    encoder: Any  # [U]: b_enc - u . b_dec_out
    sae: SAE

    @staticmethod
    def of(tracer: Tracer, features: list[int]) -> "Outputs":
        index = np.asarray(features, np.int32)
        sae = dataclasses.replace(tracer.out, source=None)  # of no account, and compiled for
        return Outputs(tracer.directions[index], encoder_constant(tracer.out, index), sae)


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a tracer's features do at some tokens, in the dataset's order: all of them, with those that don't count."""

    counts: Bool[np.ndarray, " tokens"]  # whether the token counts
    scale: Float[np.ndarray, " tokens"]  # 1 / rms(r) where a norm lies between the input SAE and the MLP, else 1
    inputs: sparse.csr_array  # [tokens, features]: c, codes as the MLP sees them, in float64; with the constant input
    outputs: sparse.csr_array  # [tokens, output features]: codes of the output SAE; empty if no output feature is named
    z: Float[np.ndarray, "tokens U"]  # pre-activations of the output features named; 0 where a token doesn't count
    terms: Float[np.ndarray, "U 6"]  # sums of each kind of term but the encoder's, over the tokens that count
    magnitude: Float[np.ndarray, "U 6"]  # sums of their absolute values

    @functools.cached_property
    def counted(self) -> sparse.csr_array:
        """``inputs``, without codes where a token doesn't count."""
        return only(self.inputs, self.counts)


def only(codes: sparse.csr_array, kept: Bool[np.ndarray, " tokens"]) -> sparse.csr_array:
    """Sparse codes ``[tokens, features]`` without those of the tokens that aren't kept."""
    rows = np.repeat(kept, np.diff(codes.indptr))
    ends = np.append(0, np.cumsum(np.where(kept, np.diff(codes.indptr), 0)))
    return sparse.csr_array((codes.data[rows], codes.indices[rows], ends), codes.shape)


def observe(
    tracer: Tracer,
    lm: LanguageModel,
    tokens,
    features: list[int] | None = None,
    *,
    token_mask=None,
    batch_size: int = 16,
    description: str,
) -> Iterator[Observed]:
    """What the model gives batch by batch; with output features, also what these and the output SAE do."""
    outputs = Outputs.of(tracer, features) if features else None
    for got in _batches(tracer, lm, tokens, outputs, token_mask, batch_size, description):
        yield _observed(tracer, got)


def observe_all(tracer: Tracer, lm: LanguageModel, tokens, features: list[int], batch_size: int) -> Observed:
    """``observe``, of all tokens together."""
    outputs = Outputs.of(tracer, features)
    batches = list(_batches(tracer, lm, tokens, outputs, None, batch_size, "running the model"))
    return _observed(tracer, {name: np.concatenate([got[name] for got in batches]) for name in batches[0]})


def _observed(tracer: Tracer, got: dict[str, np.ndarray]) -> Observed:
    inputs = _sparse(got["codes"], got["indices"], tracer.basis.shape[1])
    if "z" not in got:
        nothing = sparse.csr_array((len(got["counts"]), tracer.n_features))
        none = np.zeros((len(got["counts"]), 0), np.float32)
        return Observed(got["counts"], got["scale"], inputs, nothing, none, *np.zeros((2, 0, 6)))
    outputs = _sparse(got["out_codes"], got["out_indices"], tracer.n_features)
    sums = (got[name].sum(axis=0, dtype=np.float64) for name in ("terms", "magnitude"))
    return Observed(got["counts"], got["scale"], inputs, outputs, got["z"], *sums)


def _sparse(values: np.ndarray, indices: np.ndarray, features: int) -> sparse.csr_array:
    ends = np.arange(len(values) + 1) * values.shape[1]
    codes = sparse.csr_array((values.ravel().astype(np.float64), indices.ravel(), ends), (len(values), features))
    codes.eliminate_zeros()
    codes.sort_indices()
    return codes


def _batches(tracer: Tracer, lm: LanguageModel, tokens, outputs, token_mask, batch_size: int, description: str):
    """What ``_of_tokens`` finds, batch by batch, a token a row (but for sums, which are of rows), on the host."""
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_dataset(tokens, token_mask)
    inp = dataclasses.replace(tracer.inp, source=None)
    normed, count = reads_before_norm(lm, inp), 0
    with tqdm(total=len(tokens), desc=description, disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, min(batch_size, len(tokens))):
            got = jax.device_get(_of_tokens(lm, tracer.tensor, inp, outputs, batch, mask, normed=normed))
            rows = min(len(batch), len(tokens) - start)
            sums = {name: got.pop(name)[:rows] for name in ("terms", "magnitude") if name in got}
            got = {name: array[:rows].reshape(-1, *array.shape[2:]) for name, array in got.items()}
            if not all(np.isfinite(array[got["counts"]]).all() for array in got.values()):
                raise not_finite(start, rows)
            count += np.count_nonzero(got["counts"])
            yield got | sums
            bar.update(rows)
    if not count:
        raise no_token()


@functools.partial(jax.jit, static_argnames="normed")
def _of_tokens(lm, tensor: BilinearTensor, inp: SAE, outputs: Outputs | None, tokens, mask, *, normed: bool):
    """The codes at each token of a batch; of each output feature the pre-activation, and sums of its terms by row."""
    with jax.default_matmul_precision("highest"):
        x, y = site_pair(lm, inp, tokens)
        parts = input_parts(inp, x, normed=normed, extended=tensor.n_in > x.shape[-1])
        found = {"counts": mask, "codes": parts.codes, "indices": parts.indices, "scale": parts.scale[..., 0]}
        if outputs is None:
            return found
        codes = outputs.sae.encode(y, sparse=True)
        z = y @ outputs.directions.T
        terms = _terms(tensor, inp, outputs.directions, parts)
    terms = jnp.where(mask[:, :, None, None], terms, 0)
    return found | {
        "out_codes": codes.values,
        "out_indices": codes.indices,
        "z": jnp.where(mask[..., None], z + jnp.broadcast_to(outputs.encoder, z.shape), 0),
        "terms": terms.sum(axis=1),
        "magnitude": jnp.abs(terms).sum(axis=1),
    }


def _terms(tensor: BilinearTensor, inp: SAE, directions, parts: InputParts) -> Float[Array, "batch seq U 6"]:
    """Every term but the encoder's, of many output features: ``a^T Q b = g . ((L a) * (R b) + (R a) * (L b)) / 2``."""
    gates = (directions @ tensor.down).T
    bias = parts.bias[0, 0] / parts.scale[0, 0]  # the same at every token, but for the scale
    left, right = ((bias @ factor.T)[:, None] for factor in (tensor.left, tensor.right))
    q_bias = (tensor.left.T @ (right * gates) + tensor.right.T @ (left * gates)) / 2  # [in, U]

    def halves(a):
        return a @ tensor.left.T, a @ tensor.right.T

    def with_bias(a):
        return 2 * parts.scale * (a @ q_bias)

    read, error = halves(parts.read), halves(parts.error)
    twice = error[0] * read[1] + error[1] * read[0]  # whose product with the gates is 2 e^T Q (D c)
    passthrough = jnp.zeros((*parts.read.shape[:-1], gates.shape[1]), parts.read.dtype)
    if inp.config.passthrough:
        passed = halves(parts.passed)
        passthrough = (passed[0] * (read[1] + passed[1]) + passed[1] * read[0]) @ gates + with_bias(parts.passed)
        twice = twice + error[0] * passed[1] + error[1] * passed[0]
    terms = [
        (read[0] * read[1]) @ gates,
        with_bias(parts.read),
        parts.scale**2 * (bias @ q_bias)[None, None],
        passthrough,
        twice @ gates + with_bias(parts.error),
        (error[0] * error[1]) @ gates,
    ]
    return jnp.stack(terms, axis=-1)


# Sums on the host


class CoFiringSums:
    """The sums of ``CoFiring``, and of each input feature's |codes| times the scale, batch by batch."""

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
            sums[-1][np.searchsorted(keys[0], keys[-1])] = upper.data  # what cancels to 0 may be left out
        pairs = np.stack(np.divmod(keys[0], size), axis=1).astype(np.int32)
        count, product, magnitude = sums
        return CoFiring(pairs, count.astype(np.int64), product, magnitude, self.tokens)


def pair_products(codes: sparse.csc_array, pairs: Int[np.ndarray, "n 2"]) -> sparse.csc_array:
    """``c_i c_j`` of some pairs at every token, ``[tokens, n]``."""
    products = codes[:, pairs[:, 0]].multiply(codes[:, pairs[:, 1]]).tocsc()
    products.sort_indices()
    return products


def entries(pairs: Int[np.ndarray, "n 2"]) -> Int[np.ndarray, " n"]:
    """How many entries of D^T Q D a pair stands for."""
    return np.where(pairs[:, 0] == pairs[:, 1], 1, 2)


def pair_weights(tracer: Tracer, feature: int, pairs: Int[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    """(D^T Q D)_ij of some pairs, from a tile of rows at a time."""
    with jax.default_matmul_precision("highest"):
        projected = tracer.q(feature) @ tracer.basis
        weights = np.empty(len(pairs))
        for start in range(0, tracer.basis.shape[1], TILE):
            here = (pairs[:, 0] >= start) & (pairs[:, 0] < start + TILE)
            if here.any():
                tile = np.asarray(tracer.basis[:, start : start + TILE].T @ projected)
                weights[here] = tile[pairs[here, 0] - start, pairs[here, 1]]
    return weights
