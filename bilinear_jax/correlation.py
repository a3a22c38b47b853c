"""How well the few strongest patterns of an output feature predict when, and how much, it fires on real text.

The eigenpairs of an interaction matrix are read from the weights alone. On the data they are a prediction: with the k
of largest |eigenvalue|, at an MLP input x,

    y_k = sum_{i <= k} l_i (v_i . x)^2

and with all of them it is the feature's pre-activation, up to a constant. ``low_rank_correlation`` compares ``y_k`` to
the activation that the output SAE gives.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.2.
"""

import dataclasses
import functools
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.activations import check_dataset, not_finite, token_batches
from bilinear_jax.devices import one_blas_thread
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.spectra import top_eigh
from bilinear_jax.tracer import Tracer, mlp_tensor

FEATURES_AT_ONCE = 128  # bounds the eigenvectors that are held; it changes no result


@functools.partial(jax.tree_util.register_dataclass, data_fields=["r", "count", "ks"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LowRankCorrelation:
    """What ``low_rank_correlation`` measures. Its summaries leave out features whose r is nan."""

    r: Array  # [n_ks, features]: Pearson's r of prediction and activation; nan where too few or where it is undefined
    count: Array  # [features] int: tokens at which each feature's activation is not 0
    ks: Array  # [n_ks] int, ascending: how many eigenpairs each row of r predicts from

    @property
    def features(self) -> Int[Array, " n_ks"]:
        """How many features have an r."""
        return jnp.sum(~jnp.isnan(self.r), axis=1)

    @property
    def mean(self) -> Float[Array, " n_ks"]:
        """The mean r over features; nan where none has one."""
        return jnp.nanmean(self.r, axis=1)

    @property
    def quartiles(self) -> Float[Array, "3 n_ks"]:
        """Over features, the r that a quarter, a half and three quarters of them lie below (linearly interpolated)."""
        return jnp.nanquantile(self.r, jnp.array([0.25, 0.5, 0.75]), axis=1)

    def share_above(self, threshold: float = 0.75) -> Float[Array, " n_ks"]:
        """The share of features, 0 to 1, whose r exceeds the threshold; nan where none has an r."""
        return jnp.sum(self.r > threshold, axis=1) / self.features


def low_rank_correlation(
    tracer: Tracer,
    lm: LanguageModel,
    tokens,
    ks: Iterable[SupportsIndex] = (1, 2, 4, 8, 16, 32, 64),
    *,
    token_mask=None,
    batch_size: int = 16,
    min_count: int = 10,
) -> LowRankCorrelation:
    """Pearson's r, for every output feature, of its activation and of what its k largest eigenpairs predict.

        Q      = V diag(l) V^T                              of the feature's encoder row u, |l_1| >= |l_2| >= ...
        y_k(x) = sum_{i <= k} l_i (v_i . x)^2               prediction; x: the MLP's input, with its 1 if it has biases
        y(x)                                                the feature's code: encoder of mlp(x), and its top-k
        r_k    = cov(y_k, y) / sqrt(var y_k var y)          over the tokens at which y != 0

    A feature has r = nan unless it is active at more than ``min_count`` tokens, and where its activations or its
    predictions are constant up to rounding: where their standard deviation is at most 1e-6 of their root mean square.
    With k the number of inputs, ``y_k = u . mlp(x)``, which differs from the code by a constant, so that r = 1.

    The model is run over the data once; x is what its MLP sees, also where the input SAE of the tracer reads the
    residual stream before the norm. Then each feature's active tokens are taken together, one product ``[active, in] x
    [in, k]`` a feature, on the host. Products have the highest matmul precision; predictions are summed up and
    correlated in float64, about their means. The result doesn't depend on ``batch_size``. Progress bars show on a
    terminal. ``figures.correlation_curve(found.ks, found.r)`` draws what was found.

    Args:
        tracer: of this model, and with ``use_encoder=True``; only its output SAE matters.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array. The paper takes 256 rows.
        ks: numbers of eigenpairs, each in 1 ... in.
        token_mask: ``[rows, seq]``, the tokens that count; by default all but position 0 and the padding at the end of
            each row.
        batch_size: rows that are run through the model at once.
        min_count: a feature is left out unless it is active at more tokens than that.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or belongs to another model, ks or min_count is
            out of range, tokens or mask don't fit, an activation is not finite, or no feature is active often enough.

    Memory on the host, in numbers of 4 bytes: ``tokens (in + 12 k_sae)`` for what the model gave at the tokens that
    count, k_sae being the active features of a token, ``128 max(ks) in`` for eigenvectors, and for one feature at a
    time ``active (in + 8 max(ks))``. On the device: one batch of the model, or what ``spectra.top_eigh`` needs for
    128 features.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jax.random.randint(jax.random.key(2), (40, 6), 0, 10)
        >>> lm = LanguageModel(jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"], config)
        >>> configs = [SAEConfig(site, 1, d_model=8, expansion=4, k=4) for site in ("mlp_in", "mlp_out")]
        >>> tracer = Tracer(lm, 1, *(SAE.init(config, jax.random.key(1)) for config in configs))
        >>> found = low_rank_correlation(tracer, lm, tokens, ks=(1, 8))
        >>> found.r.shape, found.mean.round(3).tolist()[1]
        ((2, 32), 1.0)
    """
    ks = _checked_ks(ks, tracer.tensor.n_in)
    if min(batch_size, min_count) < 1:
        raise ValueError(f"batch_size and min_count must be at least 1, got {batch_size} and {min_count}")
    check_tracer(tracer, lm)
    check_dataset(tokens, token_mask)

    x, codes, code_features = _stream(tracer, lm, tokens, token_mask, min(batch_size, len(tokens)))
    # The active entries, in order of their features.
    token, slot = np.nonzero(codes)
    count = np.bincount(code_features[token, slot], minlength=tracer.n_features)
    order = np.argsort(code_features[token, slot], kind="stable")
    token, activation = token[order], codes[token, slot][order].astype(np.float64)
    ends = np.cumsum(count)
    included = np.flatnonzero(count > min_count)
    if not included.size:
        raise ValueError(
            f"no feature of {tracer.out.name} is active at more than {min_count} of the {len(x)} tokens that count; "
            f"the most active one is at {count.max()}: give more tokens, a mask with more True, or a smaller min_count"
        )

    from tqdm.auto import tqdm

    r = np.full((len(ks), tracer.n_features), np.nan, np.float32)
    bar = tqdm(total=len(included), desc=f"features of {tracer.out.name}", disable=None)
    with bar, one_blas_thread():
        for start in range(0, len(included), FEATURES_AT_ONCE):
            features = included[start : start + FEATURES_AT_ONCE]
            for feature, values, vectors in zip(features, *_eigenpairs(tracer, features, ks[-1]), strict=True):
                entries = slice(ends[feature] - count[feature], ends[feature])
                predicted = _predictions(x[token[entries]], values, vectors, ks)
                r[:, feature] = _pearson(predicted, activation[entries])
            bar.update(len(features))
    return LowRankCorrelation(jnp.asarray(r), jnp.asarray(count, jnp.int32), jnp.asarray(ks, jnp.int32))


def _checked_ks(ks: Iterable[SupportsIndex], inputs: int) -> list[int]:
    numbers = sorted({operator.index(k) for k in ks})
    if not numbers or numbers[0] < 1 or numbers[-1] > inputs:
        raise ValueError(f"ks are numbers of eigenpairs, each in 1 ... {inputs} (the inputs of the MLP), got {numbers}")
    return numbers


def check_tracer(tracer: Tracer, lm: LanguageModel) -> None:
    """Raises ``ValueError`` unless the tracer has encoder rows as its directions, and is one of this model."""
    if not tracer.use_encoder:
        raise ValueError(
            "the activations of a feature are what its encoder row reads, and this tracer has decoder columns: make it "
            "with use_encoder=True"
        )
    factors = jax.tree.leaves(mlp_tensor(lm, tracer.layer))
    if not all(
        np.array_equal(*pair, equal_nan=True) for pair in zip(jax.tree.leaves(tracer.tensor), factors, strict=True)
    ):
        raise ValueError(
            f"the MLP of layer {tracer.layer} of lm is not the one that was traced: give the model that the tracer was "
            "made of"
        )


@jax.jit
def _inputs_and_codes(lm: LanguageModel, sae: SAE, tokens: Int[Array, "batch seq"]):
    layer = sae.config.layer
    got = sites.capture(
        lm.config, lm.params, tokens, [("mlp_in", layer), ("mlp_out", layer)], compute_dtype=lm.compute_dtype
    )
    x, y = (got[site, layer].astype(jnp.float32) for site in ("mlp_in", "mlp_out"))
    codes = sae.encode(y, sparse=True)
    return x, codes.values, codes.indices


def _stream(
    tracer: Tracer, lm: LanguageModel, tokens, token_mask, batch_size: int
) -> tuple[Float[np.ndarray, "tokens in"], Float[np.ndarray, "tokens k"], Int[np.ndarray, "tokens k"]]:
    """At every token that counts: the tensor's input, the output SAE's active codes, and which features they are of."""
    from tqdm.auto import tqdm

    most, k = len(tokens) * tokens.shape[1], tracer.out.config.k
    x = np.empty((most, tracer.tensor.n_in), np.float32)  # for tokens that the mask leaves out, no page is touched
    codes, features = np.empty((most, k), np.float32), np.empty((most, k), np.int32)
    filled = 0
    with tqdm(total=len(tokens), desc="activations", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, batch_size):
            with jax.default_matmul_precision("highest"):
                got = jax.device_get(_inputs_and_codes(lm, tracer.out, batch))
            inputs, values, indices = (array[np.asarray(mask)] for array in got)
            if not (np.isfinite(inputs).all() and np.isfinite(values).all()):
                raise not_finite(start, min(len(batch), len(tokens) - start))
            part = slice(filled, filled + len(inputs))
            x[part, : inputs.shape[1]], codes[part], features[part] = inputs, values, indices
            x[part, inputs.shape[1] :] = 1  # the constant input, if there are biases
            filled = part.stop
            bar.update(min(batch_size, len(tokens) - start))
    return x[:filled], codes[:filled], features[:filled]


def _eigenpairs(tracer: Tracer, features: Int[np.ndarray, " U"], k: int):
    """The k eigenpairs of largest |value| of these features, ``[U, k]`` and ``[U, k, in]``, on the host."""
    # The last group is filled up with its last feature, so that there is one shape to compile for.
    padded = np.pad(features, (0, FEATURES_AT_ONCE - len(features)), mode="edge")
    top = top_eigh(tracer.tensor, tracer.directions[padded], k)
    values, vectors = jax.device_get((top.values, top.vectors))
    return values[: len(features)], vectors[: len(features)]


def _predictions(
    x: Float[np.ndarray, "n in"], values: Float[np.ndarray, " k"], vectors: Float[np.ndarray, "k in"], ks: list[int]
) -> Float[np.ndarray, "n n_ks"]:
    """``y_k(x) = sum_{i <= k} l_i (v_i . x)^2`` for every k in ks, in float64."""
    terms = values * (x @ vectors.T).astype(np.float64) ** 2
    return np.cumsum(terms, axis=1)[:, np.asarray(ks) - 1]


def _pearson(predicted: Float[np.ndarray, "n n_ks"], true: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n_ks"]:
    """Pearson's r of each column with ``true``; nan where either is constant up to float32's rounding."""
    (p, p_scale), (y, y_scale) = _deviations(predicted), _deviations(true[:, None])
    scale = p_scale * y_scale
    return np.divide((p * y).sum(axis=0), scale, out=np.full(len(scale), np.nan), where=scale > 0)


def _deviations(values: Float[np.ndarray, "n m"]) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, " m"]]:
    """Each column about its mean, and the norm of that, or 0 where it is nothing but rounding."""
    deviations = values - values.mean(axis=0)
    norms = np.linalg.norm(deviations, axis=0)
    return deviations, np.where(norms > 1e-6 * np.linalg.norm(values, axis=0), norms, 0)
