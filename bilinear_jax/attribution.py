"""The exact account of an output feature: why it fires at a token, term by term, and how much of that a few pairs are.

An output feature with encoder row u has the pre-activation ``u . (y - b_dec_out) + b_enc`` (what the top-k of its SAE
selects from), and the MLP's output y is quadratic in its input: ``u . y = x^T Q x``. The input SAE writes what it reads
as

    x = D f + b + p + e          f codes, b decoder bias, p coordinates passed through, e the error of the SAE

so that the pre-activation is, exactly, the sum of

    pairs            sum_ij f_i f_j (D^T Q D)_ij                  input features two at a time, those that are active
    feature_bias     sum_i 2 f_i (D^T Q b)_i                      an input feature with the decoder bias
    bias             b^T Q b
    passthrough      2 p^T Q (D f + b) + p^T Q p                  0 unless the input SAE passes coordinates through
    error_cross      2 e^T Q (D f + b + p)                        what the input SAE misses, with what it holds
    error_error      e^T Q e                                      and with itself
    encoder          b_enc - u . b_dec_out                        the same at every token

Where the input SAE reads the residual stream r before the norm, the MLP sees ``x = r / rms(r)``: every term but the last
is that of r times ``1 / rms(r)^2`` of its token. Where the MLP has biases, the constant input is one more feature, the
last, which fires at every token with code 1 (as in ``Tracer.basis``): its pairs are the linear and the constant terms,
and carry one or no factor ``1 / rms(r)``.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.activations import check_dataset, token_batches
from bilinear_jax.correlation import check_tracer
from bilinear_jax.interactions import Interactions
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import RMS_EPSILON
from bilinear_jax.tracer import Tracer

TOKENS_AT_ONCE = 256  # bounds the decoder columns that are held, [tokens, k, in]; it changes no result
TERMS = ("pairs", "feature_bias", "bias", "passthrough", "error_cross", "error_error", "encoder")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*TERMS, "codes", "indices", "preactivation"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Account:
    """The terms of one output feature's pre-activation, at each token. They add up to it: see ``total``.

    k: the active input features of a token, and one more if the MLP has biases: the constant input, always the last.
    """

    pairs: Float[Array, "... k k"]  # c_i c_j (D^T Q D)_ij; symmetric: two features together make twice their entry
    feature_bias: Float[Array, "... k"]  # 2 c_i (D^T Q b)_i
    bias: Float[Array, "..."]  # b^T Q b
    passthrough: Float[Array, "..."]  # 2 p^T Q (D c + b) + p^T Q p; 0 unless the input SAE passes coordinates through
    error_cross: Float[Array, "..."]  # 2 e^T Q (D c + b + p)
    error_error: Float[Array, "..."]  # e^T Q e
    encoder: Float[Array, "..."]  # b_enc - u . b_dec_out: the same at every token
    codes: Float[Array, "... k"]  # c: codes as the MLP sees them, f or f / rms(r); 1 for the constant input
    indices: Int[Array, "... k"]  # the input feature of each row and column of pairs; n_features: the constant input
    preactivation: Float[Array, "..."]  # what the output SAE's encoder makes of the model's own mlp_out

    @property
    def terms(self) -> dict[str, Float[Array, "..."]]:
        """Each kind of term, summed up over features: ``[...]`` by name, in the order of the formula."""
        summed = {name: getattr(self, name) for name in TERMS}
        return summed | {"pairs": self.pairs.sum(axis=(-2, -1)), "feature_bias": self.feature_bias.sum(axis=-1)}

    @property
    def total(self) -> Float[Array, "..."]:
        """The sum of all terms: ``preactivation``, to rounding of the dtype that the model computes in."""
        return functools.reduce(jnp.add, self.terms.values())

    @property
    def magnitude(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Sums of the terms' absolute values, each pair and each feature a term: of the pairs, and of all."""
        pairs = jnp.abs(self.pairs).sum(axis=(-2, -1))
        single = (jnp.abs(getattr(self, name)) for name in TERMS[2:])
        return pairs, functools.reduce(jnp.add, single, pairs + jnp.abs(self.feature_bias).sum(axis=-1))


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "basis", "projected", "direction", "encoder", "inp"],
    meta_fields=["normed"],
)
@dataclasses.dataclass(frozen=True)
class OutputFeature:
    """What the account of one output feature needs; a pytree, made by ``output_feature``."""

    q: Array  # [in, in]: its interaction matrix
    basis: Array  # [in, features]: D, the constant input included, as Tracer.basis
    projected: Array  # [in, features]: Q D
    direction: Array  # [d_model]: u
    encoder: Array  # []: b_enc - u . b_dec_out
    inp: SAE  # the input SAE
    normed: bool  # the input SAE reads the residual stream, which a norm divides by rms(r)


def output_feature(tracer: Tracer, lm: LanguageModel, feature) -> OutputFeature:
    """One output feature, ready for ``account_at``. Memory: ``in (in + features)`` numbers; no features x features.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or belongs to another model, or if feature
            names several.
        IndexError: if there is no such feature.
    """
    check_tracer(tracer, lm)
    q, out = tracer.q(feature), tracer.out
    if q.ndim != 2:
        raise ValueError(f"name one output feature, by an int; got {feature!r}")
    with jax.default_matmul_precision("highest"):
        projected = q @ tracer.basis
        encoder = -(out.w_enc[feature] @ out.b_dec)
    if out.config.encoder_bias:
        encoder = encoder + out.params["b_enc"][feature]
    inp = dataclasses.replace(tracer.inp, source=None)  # of no account, and compiled for
    normed = inp.config.site == "resid_mid" and lm.config.norms[1]
    return OutputFeature(q, tracer.basis, projected, tracer.directions[feature], encoder, inp, normed)


def account_at(
    feature: OutputFeature, x: Float[Array, "*tokens d_model"], y: Float[Array, "*tokens d_model"]
) -> Account:
    """The account from what the input SAE reads, x, and the MLP's output y. Pure: for your own jit, vmap and grad.

    With the highest matmul precision. Memory: ``tokens (features + k^2)`` numbers, and ``512 k in`` for columns.
    """
    inp, extended = feature.inp, feature.q.shape[0] > x.shape[-1]
    with jax.default_matmul_precision("highest"):
        sparse = inp.encode(x, sparse=True)
        error = x - inp.decode(sparse, x)
        passed = jnp.zeros_like(x)
        if inp.config.passthrough:
            dims = jnp.asarray(inp.config.passthrough)
            passed = passed.at[..., dims].set(x[..., dims])
        scale = jnp.ones_like(x[..., :1])
        if feature.normed:
            scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + RMS_EPSILON)
        codes, indices = sparse.values * scale, sparse.indices
        if extended:  # the constant input: code 1, and no coordinate of x
            codes = jnp.concatenate([codes, jnp.ones_like(scale)], axis=-1)
            last = jnp.full((*indices.shape[:-1], 1), inp.config.n_features, indices.dtype)
            indices = jnp.concatenate([indices, last], axis=-1)
        bias = inp.decode(jnp.zeros_like(inp.b_dec, shape=inp.config.n_features), jnp.zeros_like(inp.b_dec))
        parts = [jnp.broadcast_to(bias, x.shape) * scale, passed * scale, error * scale]
        if extended:
            parts = [jnp.concatenate([part, jnp.zeros_like(scale)], axis=-1) for part in parts]
        shape = x.shape[:-1]
        flat = [array.reshape(-1, array.shape[-1]) for array in (codes, indices, *parts)]
        number = min(TOKENS_AT_ONCE, len(flat[0]))
        terms = jax.lax.map(lambda token: _terms(feature, *token), tuple(flat), batch_size=max(number, 1))
        preactivation = y @ feature.direction + feature.encoder
    terms = {name: array.reshape(*shape, *array.shape[1:]) for name, array in terms.items()}
    encoder = jnp.broadcast_to(feature.encoder, shape)
    return Account(**terms, encoder=encoder, codes=codes, indices=indices, preactivation=preactivation)


def _terms(feature: OutputFeature, codes, indices, bias, passed, error) -> dict[str, Array]:
    """The terms of x^T Q x at one token."""
    columns = feature.basis.T[indices] * codes[:, None]  # [k, in], their sum is D c
    images = feature.projected.T[indices] * codes[:, None]  # and Q times them
    read = columns.sum(axis=0)
    q_bias, q_passed, q_error = (feature.q @ part for part in (bias, passed, error))
    return {
        "pairs": columns @ images.T,
        "feature_bias": 2 * columns @ q_bias,
        "bias": bias @ q_bias,
        "passthrough": 2 * q_passed @ (read + bias) + passed @ q_passed,
        "error_cross": 2 * q_error @ (read + bias + passed),
        "error_error": error @ q_error,
    }


def _account_of_tokens(lm: LanguageModel, feature: OutputFeature, tokens: Int[Array, "batch seq"]) -> Account:
    layer = feature.inp.config.layer
    wanted = [(feature.inp.config.site, layer), ("mlp_out", layer)]
    got = sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    return account_at(feature, *(got[site].astype(jnp.float32) for site in wanted))


_account = jax.jit(_account_of_tokens)


def account(tracer: Tracer, lm: LanguageModel, tokens, feature) -> Account:
    """The exact account of an output feature's pre-activation at every token of some rows.

    See the formula at the top of ``attribution``. Only the active input features of a token are looked at: a k x k block
    of pairs, never features x features.

    Args:
        tracer: of this model, with ``use_encoder=True``. Its input SAE may have a bilinear encoder, an applied
            normalisation or coordinates passed through; its output SAE a bias and an applied normalisation. (What an
            output SAE with a bilinear encoder selects from is of degree 4 in x: ``Tracer`` refuses it.)
        tokens: token ids ``[batch, seq]``, run through the model at once.
        feature: the output feature, an int.

    Returns:
        An ``Account`` whose arrays have ``[batch, seq]`` first. Every position is in it, position 0 and padding too.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or belongs to another model, feature names
            several, or tokens are none of the model's.
        IndexError: if there is no such feature.

    Memory: one batch of the model and of the input SAE's pre-activations, ``batch seq (features + k^2)``, and
    ``in (in + features)`` numbers. For a whole dataset: ``pair_summary``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = bj.attribution.account(tracer, lm, lm.encode("The dog was happy."), feature=7)
        >>> found.pairs.shape[2:] == (tracer.inp.config.k,) * 2
        True
        >>> bool(jnp.allclose(found.total, found.preactivation, atol=1e-4))
        True
    """
    return _account(lm, output_feature(tracer, lm, feature), lm._checked(tokens))


# Over a dataset


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        *("pairs", "weight", "mean", "mean_magnitude", "joint", "rates", "r2", "terms", "magnitude_pairs", "magnitude"),
        "tokens",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class PairSummary:
    """What some pairs of input features do to one output feature over a dataset, and what they leave out.

    A pair of two features stands for both of its entries, (i, j) and (j, i).
    """

    pairs: np.ndarray  # [n, 2] int: the input features of each pair, in the order given; n_features: constant input
    weight: np.ndarray  # [n]: (D^T Q D)_ij
    mean: np.ndarray  # [n]: mean contribution to the pre-activation over the tokens that count, signed
    mean_magnitude: np.ndarray  # [n]: mean |contribution|
    joint: np.ndarray  # [n]: share of the tokens, 0 to 1, at which both features fire
    rates: np.ndarray  # [n, 2]: share of the tokens at which each feature of the pair fires
    r2: np.ndarray  # [n]: of the first 1 ... n pairs, how well their sum predicts the pre-activation; see pair_summary
    terms: dict[str, float]  # mean of each kind of term, "shown" pairs and "pairs" that are not: the mean pre-activation
    magnitude_pairs: float  # mean over tokens of the sum of |terms| of all pairs
    magnitude: float  # the same of all terms
    tokens: int  # how many tokens count

    @property
    def interference(self) -> np.ndarray:
        """``[n]`` bool: has a weight, and never fired together: it tells of the weights, and of nothing on this data.

        How much that means depends on how often the two would meet: ``chance * tokens`` times, were they independent.
        """
        return (self.weight != 0) & (self.joint == 0)

    @property
    def chance(self) -> np.ndarray:
        """``[n]``: the joint firing rate of two features with these rates that know nothing of each other."""
        same = self.pairs[:, 0] == self.pairs[:, 1]
        return np.where(same, self.rates[:, 0], self.rates.prod(axis=1))

    @property
    def share(self) -> float:
        """The share of the pre-activation that the pairs are: of the |terms| of all tokens, 0 to 1; nan if these are 0.

        By absolute values, so that terms which cancel each other count: none is explained by another's absence.
        """
        return _ratio(self.mean_magnitude.sum(), self.magnitude)

    @property
    def share_of_pairs(self) -> float:
        """The same share of the |terms| of all pairs of input features alone."""
        return _ratio(self.mean_magnitude.sum(), self.magnitude_pairs)


def pair_summary(
    tracer: Tracer,
    lm: LanguageModel,
    tokens,
    feature,
    pairs,
    *,
    token_mask=None,
    batch_size: int = 16,
) -> PairSummary:
    """What some pairs of input features do to an output feature over a token dataset, in one pass of the model.

        contribution of (i, j)    2 c_i c_j (D^T Q D)_ij, or c_i^2 (D^T Q D)_ii            c codes as the MLP sees them
        s_m                       the sum of the contributions of the first m pairs
        r2[m - 1]                 1 - var(z - s_m) / var(z)                                 z: the pre-activation

    R^2 is that of ``z = s_m + constant`` with the constant that suits best, and no factor fitted: 1 where the pairs say
    all that varies, 0 where they say as much as none, and negative where they say what other terms take back. It is nan
    where z is constant. All sums are taken over tokens in float64 and divided once, so that the result doesn't depend
    on ``batch_size``. A progress bar shows on a terminal.

    Args:
        tracer: as for ``account``.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        feature: the output feature, an int.
        pairs: which pairs, in the order in which they are shown: what ``tracer.top_interactions(n, feature)`` found, or
            ``[n, 2]`` input features. (i, j) and (j, i) are one.
        token_mask: ``[rows, seq]``, the tokens that count; by default all but position 0 and the padding at the end of
            each row. Give the tokens at which the output feature fires, to learn about these alone.
        batch_size: rows that are run through the model at once.

    Raises:
        ValueError: as ``account``; and if there is no pair, one is given twice, was found for another output feature, or
            has an input feature that doesn't exist; if tokens or mask don't fit or leave nothing; or if an activation
            is not finite.
        IndexError: if there is no such output feature.

    Memory: that of ``account`` for one batch, and ``batch seq n`` numbers thrice.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> text = lm.encode("One day, a little girl named Lily found a needle in her room.")
        >>> found = pair_summary(tracer, lm, text, 7, tracer.top_interactions(n=5, feature=7))
        >>> found.mean.shape, bool(0 <= found.share <= found.share_of_pairs <= 1)
        ((5,), True)
        >>> bool(np.all(found.mean[found.interference] == 0))
        True
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_dataset(tokens, token_mask)
    output = output_feature(tracer, lm, feature)
    chosen = _checked_pairs(pairs, tracer, feature)
    weight = _weights(output, jnp.asarray(chosen))
    sums: dict[str, np.ndarray] = {}
    count = 0
    with tqdm(total=len(tokens), desc=f"pairs of output feature {feature}", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, min(batch_size, len(tokens))):
            got = jax.device_get(_of_tokens(lm, output, jnp.asarray(chosen), weight, batch))
            got = jax.tree.map(lambda array, kept=np.asarray(mask): array[kept], got)
            if not all(np.isfinite(array).all() for array in got.values()):
                raise ValueError(
                    f"the model gives values that are not finite in rows {start} ... {start + batch_size - 1}: check "
                    "its parameters, and its compute_dtype"
                )
            found = _summed(got)
            sums = {name: array + sums.get(name, 0) for name, array in found.items()}
            count += len(got["z"])
            bar.update(min(len(batch), len(tokens) - start))
    if not count:
        raise ValueError("the token mask leaves no token to measure: pass a token_mask with some True")
    means = {name: array / count for name, array in sums.items()}
    kinds = {"shown": means["mean"].sum(), **dict(zip(TERMS, means["terms"], strict=True))}
    kinds["pairs"] -= kinds["shown"]
    return PairSummary(
        pairs=chosen,
        weight=np.asarray(weight),
        mean=means["mean"],
        mean_magnitude=means["mean_magnitude"],
        joint=means["joint"],
        rates=means["fires"],
        r2=_r2(means),
        terms={name: float(value) for name, value in kinds.items()},
        magnitude_pairs=float(means["magnitude"][0]),
        magnitude=float(means["magnitude"][1]),
        tokens=count,
    )


def _checked_pairs(pairs, tracer: Tracer, feature) -> Int[np.ndarray, "n 2"]:
    if isinstance(pairs, Interactions):
        other = np.asarray(pairs.out)[np.asarray(pairs.out) != feature]
        if other.size:
            raise ValueError(f"these pairs were found for output feature {other[0]} too, not only for {feature}")
        pairs = np.stack([pairs.i, pairs.j], axis=-1)
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not len(pairs) or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"pairs are ints [n, 2], with n at least 1, got {pairs.dtype} of shape {pairs.shape}")
    features = tracer.basis.shape[1]
    outside = pairs[(pairs < 0) | (pairs >= features)]
    if outside.size:
        raise ValueError(f"input features of {tracer.inp.name} are 0 ... {features - 1}, got {outside[0]}")
    distinct, times = np.unique(np.sort(pairs, axis=1), axis=0, return_counts=True)
    if (times > 1).any():
        i, j = distinct[times > 1][0]
        raise ValueError(f"the pair ({i}, {j}) is given more than once, and would be counted so; (i, j) and (j, i) are one")
    return pairs.astype(np.int32)


@jax.jit
def _weights(feature: OutputFeature, pairs: Int[Array, "n 2"]) -> Float[Array, " n"]:
    return jnp.sum(feature.basis[:, pairs[:, 0]] * feature.projected[:, pairs[:, 1]], axis=0)


@jax.jit
def _of_tokens(lm: LanguageModel, feature: OutputFeature, pairs, weight, tokens) -> dict[str, Array]:
    """What the summary is of, at each token of a batch."""
    found = _account_of_tokens(lm, feature, tokens)
    codes = jnp.stack([_codes_of(found, pairs[:, side]) for side in (0, 1)], axis=-1)
    entries = jnp.where(pairs[:, 0] == pairs[:, 1], 1, 2).astype(weight.dtype)
    return {
        "z": found.preactivation,
        "terms": jnp.stack(list(found.terms.values()), axis=-1),
        "magnitude": jnp.stack(found.magnitude, axis=-1),
        "contributions": codes.prod(axis=-1) * jnp.broadcast_to(entries * weight, codes.shape[:-1]),
        "fires": codes != 0,
    }


def _codes_of(found: Account, features: Int[Array, " n"]) -> Float[Array, "... n"]:
    """The codes of some features, 0 where they are not active."""

    def one(feature):
        return jnp.where(found.indices == feature, found.codes, 0).sum(axis=-1)

    return jnp.moveaxis(jax.lax.map(one, features), 0, -1)


def _summed(got: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums over tokens, in float64."""
    z, contributions = got["z"].astype(np.float64), got["contributions"].astype(np.float64)
    residual = z[:, None] - np.cumsum(contributions, axis=1)
    per_token = {
        "mean": contributions,
        "mean_magnitude": np.abs(contributions),
        "joint": got["fires"].all(axis=-1),
        "fires": got["fires"],
        "terms": got["terms"],
        "magnitude": got["magnitude"],
        "z": z,
        "z^2": z**2,
        "residual": residual,
        "residual^2": residual**2,
    }
    return {name: array.sum(axis=0, dtype=np.float64) for name, array in per_token.items()}


def _r2(means: dict[str, np.ndarray]) -> np.ndarray:
    variance = means["z^2"] - means["z"] ** 2
    left_over = np.maximum(means["residual^2"] - means["residual"] ** 2, 0)
    constant = variance <= 1e-12 * means["z^2"]  # a standard deviation of 1e-6 of its size is float32's rounding
    return np.full_like(left_over, np.nan) if constant else 1 - left_over / variance


def _ratio(numerator, denominator) -> float:
    return float(numerator) / float(denominator) if denominator else float("nan")
