"""How well a few eigenpairs of an output feature predict its activation on real text.

The eigenpairs of an interaction matrix can be read from the weights. On data they make a prediction. The k eigenpairs
of largest |eigenvalue| predict, at an MLP input x,

    y_k = sum_{i <= k} l_i (v_i . x)^2

With all eigenpairs this is the feature's pre-activation, up to a constant. ``low_rank_correlation`` compares ``y_k`` to
the activation that the output SAE gives.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.2.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.errors import check_count
from bilinear_jax.explain.directions import encoder_rows
from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.explain.parts import checked_numbers
from bilinear_jax.explain.samples import Layer, gather
from bilinear_jax.explain.spectra import top_eigh
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor

FEATURES_AT_ONCE = 128  # limits the memory for eigenvectors; it does not change the result


@functools.partial(jax.tree_util.register_dataclass, data_fields=["r", "count", "ks"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LowRankCorrelation:
    """What ``low_rank_correlation`` measures. Its properties leave out features whose r is nan."""

    r: Array  # [n_ks, features]: Pearson's r of prediction and activation; nan if it is undefined or tokens are too few
    count: Array  # [features] int: tokens at which each feature's activation is not 0
    ks: Array  # [n_ks] int, ascending: the number of eigenpairs of each row of r

    @property
    def features(self) -> Int[Array, " n_ks"]:
        """The number of features that have an r."""
        return jnp.sum(~jnp.isnan(self.r), axis=1)

    @property
    def mean(self) -> Float[Array, " n_ks"]:
        """The mean r over features; nan if none has one."""
        return jnp.nanmean(self.r, axis=1)

    @property
    def quartiles(self) -> Float[Array, "3 n_ks"]:
        """The quartiles of r over features: 25 %, 50 % and 75 % of them lie below (linearly interpolated)."""
        return jnp.nanquantile(self.r, jnp.array([0.25, 0.5, 0.75]), axis=1)

    def share_above(self, threshold: float = 0.75) -> Float[Array, " n_ks"]:
        """The share of features, 0 to 1, whose r exceeds the threshold; nan if none has an r."""
        return jnp.sum(self.r > threshold, axis=1) / self.features


def low_rank_correlation(
    tracer: Tracer,
    tokens,
    ks: Iterable[SupportsIndex] = (1, 2, 4, 8, 16, 32, 64),
    *,
    token_mask=None,
    batch_size: int = 16,
    min_count: int = 10,
) -> LowRankCorrelation:
    """For every output feature, Pearson's r between its activation and the prediction of its k largest eigenpairs.

        Q      = V diag(l) V^T                              of the feature's encoder row u, |l_1| >= |l_2| >= ...
        y_k(x) = sum_{i <= k} l_i (v_i . x)^2               prediction; x: the MLP's input, with its 1 if it has biases
        y(x)                                                the feature's code: encoder of mlp(x), and its top-k
        r_k    = cov(y_k, y) / sqrt(var y_k var y)          over the tokens at which y != 0

    A feature has r = nan unless it is active at more than ``min_count`` tokens. r is also nan if the activations or the
    predictions are constant up to rounding: their standard deviation is at most 1e-6 of their root mean square. If k is
    the number of inputs, ``y_k = u . mlp(x)`` differs from the code by a constant, so r = 1.

    The model is run over the data once. x is always the input of its MLP, even if the input SAE reads the residual
    stream before the norm. Predictions are computed on the host, one product ``[active, in] x [in, k]`` per feature,
    with the highest matmul precision; they are summed and correlated in float64, centred. The result does not depend on
    ``batch_size``. Progress bars show on a terminal. ``figures.correlation_curve(found.ks, found.r)`` draws the result.

    Args:
        tracer: with ``use_encoder=True``; its model is run. Its input SAE does not matter.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array. The paper takes 256 rows.
        ks: numbers of eigenpairs, each in 1 ... in.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``).
        batch_size: rows that are run through the model at once.
        min_count: features that are active at this number of tokens or fewer are left out.

    Raises:
        ValueError: if the directions of the tracer are decoder columns; if ks or min_count is out of range; if the
            tokens or the mask do not fit; if an activation is not finite; or if no feature is active often enough.

    Memory: on the host, in numbers of 4 bytes, ``tokens (in + 12 k_sae)`` for what the model gives at the tokens in the
    mask (k_sae: the active features of a token), ``128 max(ks) in`` for eigenvectors, and ``active (in + 8 max(ks))``
    for one feature at a time. On the device, one batch of the model, or what ``spectra.top_eigh`` needs for 128
    features.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jax.random.randint(jax.random.key(2), (40, 6), 0, 10)
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> configs = [SAEConfig(site, 1, d_model=8, expansion=4, k=4) for site in ("mlp_in", "mlp_out")]
        >>> tracer = Tracer(lm, 1, *(SAE.init(config, jax.random.key(1)) for config in configs))
        >>> found = low_rank_correlation(tracer, tokens, ks=(1, 8))
        >>> found.r.shape, found.mean.round(3).tolist()[1]
        ((2, 32), 1.0)
    """
    tracer.require_encoder()
    options = {"token_mask": token_mask, "batch_size": batch_size, "min_count": min_count}
    tensor = mlp_tensor(tracer.lm, tracer.layer)  # of mlp_in, also where the input SAE reads another site
    return sae_correlation(tracer.lm.original, tensor, tracer.out, tokens, ks, **options)


def sae_correlation(
    lm: LanguageModel,
    tensor: BilinearTensor,
    out: SAE,
    tokens,
    ks: Iterable[SupportsIndex],
    *,
    token_mask=None,
    batch_size: int = 16,
    min_count: int = 10,
) -> LowRankCorrelation:
    """``low_rank_correlation`` without an input SAE.

    Args:
        tensor: the MLP of the SAE's layer, ``explain.mlp.mlp_tensor``.
        out: the output SAE, at ``mlp_out``; its encoder must be linear.
    """
    ks = checked_numbers("k", ks, tensor.n_in)
    check_count("min_count", min_count)
    directions = encoder_rows(out)
    samples = gather(Layer(lm, out.config.layer, tensor, out, directions), tokens, token_mask, batch_size)
    x, codes, code_features = samples.x, samples.codes, samples.features
    # The active codes, sorted by feature.
    token, slot = np.nonzero(codes)
    count = np.bincount(code_features[token, slot], minlength=len(directions))
    order = np.argsort(code_features[token, slot], kind="stable")
    token, activation = token[order], codes[token, slot][order].astype(np.float64)
    ends = np.cumsum(count)
    included = np.flatnonzero(count > min_count)
    if not included.size:
        raise ValueError(
            f"no feature of {out.name} is active at more than {min_count} of the {len(x)} tokens that count; the most "
            f"active one is active at {count.max()}: give more tokens, a mask with more True, or a smaller min_count"
        )

    from tqdm.auto import tqdm

    r = np.full((len(ks), len(directions)), np.nan, np.float32)
    bar = tqdm(total=len(included), desc=f"features of {out.name}", disable=None)
    with bar, one_blas_thread():
        for start in range(0, len(included), FEATURES_AT_ONCE):
            features = included[start : start + FEATURES_AT_ONCE]
            for feature, values, vectors in zip(
                features, *_eigenpairs(tensor, directions, features, ks[-1]), strict=True
            ):
                entries = slice(ends[feature] - count[feature], ends[feature])
                predicted = _predictions(x[token[entries]], values, vectors, ks)
                r[:, feature] = _pearson(predicted, activation[entries])
            bar.update(len(features))
    return LowRankCorrelation(jnp.asarray(r), jnp.asarray(count, jnp.int32), jnp.asarray(ks, jnp.int32))


def _eigenpairs(tensor: BilinearTensor, directions, features: Int[np.ndarray, " U"], k: int):
    """The k eigenpairs of largest |value| of each feature, ``[U, k]`` and ``[U, k, in]``, on the host."""
    # The last group is filled up with its last feature, so there is only one shape to compile.
    padded = np.pad(features, (0, FEATURES_AT_ONCE - len(features)), mode="edge")
    top = top_eigh(tensor, directions[padded], k)
    values, vectors = jax.device_get((top.values, top.vectors))
    return values[: len(features)], vectors[: len(features)]


def _predictions(
    x: Float[np.ndarray, "n in"], values: Float[np.ndarray, " k"], vectors: Float[np.ndarray, "k in"], ks: Sequence[int]
) -> Float[np.ndarray, "n n_ks"]:
    """``y_k(x) = sum_{i <= k} l_i (v_i . x)^2`` for every k in ks, in float64."""
    terms = values * (x @ vectors.T).astype(np.float64) ** 2
    return np.cumsum(terms, axis=1)[:, np.asarray(ks) - 1]


def _pearson(predicted: Float[np.ndarray, "n n_ks"], true: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n_ks"]:
    """Pearson's r of each column with ``true``; nan if either is constant up to float32 rounding."""
    (p, p_scale), (y, y_scale) = _deviations(predicted), _deviations(true[:, None])
    scale = p_scale * y_scale
    return np.divide((p * y).sum(axis=0), scale, out=np.full(len(scale), np.nan), where=scale > 0)


def _deviations(values: Float[np.ndarray, "n m"]) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, " m"]]:
    """Each column minus its mean, and the norm of the difference, or 0 if that is only rounding."""
    deviations = values - values.mean(axis=0)
    norms = np.linalg.norm(deviations, axis=0)
    return deviations, np.where(norms > 1e-6 * np.linalg.norm(values, axis=0), norms, 0)
