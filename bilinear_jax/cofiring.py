"""What pairs of input features do to output features over a dataset: how often they meet, and what comes of it.

At a token, the pair (i, j) of input features adds to the pre-activation of an output feature

    2 c_i c_j (D^T Q D)_ij, or c_i^2 (D^T Q D)_ii          c: codes as the MLP sees them, see ``attribution``

The weight is the output feature's; the codes are not. So the sums of c_i c_j over a dataset, of those pairs that ever
fire together, are taken once (``co_firing``), and give the mean contribution of every pair to any output feature.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.activations import check_dataset, token_batches
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

    Memory on the host: 32 bytes for every pair that fires together, and ``8 k^2`` for every token of a batch, a few
    times over; on the device, one batch of the model.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = co_firing(tracer, lm, lm.encode("One day, a little girl named Lily found a needle."))
        >>> bool((found.count <= found.tokens).all()), bool((found.pairs[:, 0] <= found.pairs[:, 1]).all())
        (True, True)
    """
    check_tracer(tracer, lm)
    fired = CoFiringSums(tracer.basis.shape[1])
    for got in code_batches(tracer, lm, tokens, None, token_mask, batch_size, "co-firing"):
        fired.add(got)
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
    size = np.abs(entries(found.pairs) * pair_weights(tracer, feature, found.pairs)) * found.magnitude
    order = np.argsort(-size, kind="stable")[:n]
    return found.pairs[order[size[order] > 0]]


# One batch on the device


@functools.partial(jax.tree_util.register_dataclass, data_fields=["directions", "encoder"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Outputs:
    """Some output features."""

    directions: Any  # [U, d_model]: u
    encoder: Any  # [U]: b_enc - u . b_dec_out

    @staticmethod
    def of(tracer: Tracer, features: list[int]) -> "Outputs":
        index = np.asarray(features, np.int32)
        return Outputs(tracer.directions[index], np.asarray(encoder_constant(tracer.out, index)))


@functools.partial(jax.jit, static_argnames="normed")
def _of_tokens(lm, tensor: BilinearTensor, inp: SAE, outputs: Outputs | None, tokens, *, normed: bool):
    """The codes at each token of a batch, and of each output feature the pre-activation and its terms."""
    with jax.default_matmul_precision("highest"):
        x, y = site_pair(lm, inp, tokens)
        parts = input_parts(inp, x, normed=normed, extended=tensor.n_in > x.shape[-1])
        found = {"codes": parts.codes, "indices": parts.indices, "scale": parts.scale[..., 0]}
        if outputs is None:
            return found
        found["z"] = y @ outputs.directions.T
        found["terms"] = _terms(tensor, outputs.directions, parts)
    found["z"] = found["z"] + jnp.broadcast_to(outputs.encoder, found["z"].shape)
    return found


def _terms(tensor: BilinearTensor, directions, parts: InputParts) -> Float[Array, "batch seq U 6"]:
    """Every term but the encoder's, of many output features: ``a^T Q b = g . ((L a) * (R b) + (R a) * (L b)) / 2``."""
    gates = (directions @ tensor.down).T

    def form(a, b):
        (left_a, right_a), (left_b, right_b) = ((v @ tensor.left.T, v @ tensor.right.T) for v in (a, b))
        return (left_a * right_b + right_a * left_b) @ gates / 2

    read, bias, passed, error = parts.read, parts.bias, parts.passed, parts.error
    terms = [form(read, read), 2 * form(read, bias), form(bias, bias)]
    terms += [form(passed, 2 * (read + bias) + passed), 2 * form(error, read + bias + passed), form(error, error)]
    return jnp.stack(terms, axis=-1)


def code_batches(tracer: Tracer, lm: LanguageModel, tokens, outputs, token_mask, batch_size: int, description: str):
    """What ``_of_tokens`` finds, batch by batch, at the tokens that count, on the host."""
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_dataset(tokens, token_mask)
    inp = dataclasses.replace(tracer.inp, source=None)  # of no account, and compiled for
    normed, count = reads_before_norm(lm, inp), 0
    with tqdm(total=len(tokens), desc=description, disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, min(batch_size, len(tokens))):
            got = jax.device_get(_of_tokens(lm, tracer.tensor, inp, outputs, batch, normed=normed))
            got = {name: array[np.asarray(mask)] for name, array in got.items()}
            if not all(np.isfinite(array).all() for array in got.values()):
                raise ValueError(
                    f"the model gives values that are not finite in rows {start} ... {start + batch_size - 1}: check "
                    "its parameters, and its compute_dtype"
                )
            count += len(got["codes"])
            yield got
            bar.update(min(len(batch), len(tokens) - start))
    if not count:
        raise ValueError("the token mask leaves no token to measure: pass a token_mask with some True")


# Sums on the host


class CoFiringSums:
    """The sums of ``CoFiring``, and of each input feature's |codes| times the scale, batch by batch."""

    def __init__(self, features: int):
        self.features, self.tokens = features, 0
        self.keys, self.sums = np.zeros(0, np.int64), np.zeros((3, 0))
        self.scaled = np.zeros(features)

    def add(self, got: dict[str, np.ndarray]) -> None:
        codes, indices = got["codes"].astype(np.float64), got["indices"].astype(np.int64)
        self.tokens += len(codes)
        scaled = np.abs(codes) * got["scale"][:, None]
        self.scaled += np.bincount(indices.ravel(), scaled.ravel(), self.features)
        first, second = np.triu_indices(codes.shape[1])
        product = codes[:, first] * codes[:, second]
        low, high = (f(indices[:, first], indices[:, second]) for f in (np.minimum, np.maximum))
        fires = product != 0
        product = product[fires]
        keys = np.concatenate([self.keys, (low * self.features + high)[fires]])
        sums = np.concatenate([self.sums, [np.ones_like(product), product, np.abs(product)]], axis=1)
        self.keys, place = np.unique(keys, return_inverse=True)
        self.sums = np.stack([np.bincount(place, row, len(self.keys)) for row in sums])

    def finished(self) -> CoFiring:
        count, product, magnitude = self.sums
        pairs = np.stack(np.divmod(self.keys, self.features), axis=1).astype(np.int32)
        return CoFiring(pairs, count.astype(np.int64), product, magnitude, self.tokens)


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
