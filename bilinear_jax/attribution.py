"""The exact account of an output feature's pre-activation: why it fires at a token, term by term.

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

Where the input SAE reads the residual stream r before the norm, the MLP sees ``x = r / rms(r)``: every term but the
last is that of r times ``1 / rms(r)^2`` of its token. Where the MLP has biases, the constant input is one more feature,
the last, which fires at every token with code 1 (as in ``Tracer.basis``): its pairs are the linear and the constant
terms, and carry one or no factor ``1 / rms(r)``.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bilinear_jax.correlation import check_tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import RMS_EPSILON
from bilinear_jax.tensor import with_constant
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

    pairs: Array  # [..., k, k]: c_i c_j (D^T Q D)_ij; symmetric: two features together make twice their entry
    feature_bias: Array  # [..., k]: 2 c_i (D^T Q b)_i
    bias: Array  # [...]: b^T Q b
    passthrough: Array  # [...]: 2 p^T Q (D c + b) + p^T Q p; 0 unless the input SAE passes coordinates through
    error_cross: Array  # [...]: 2 e^T Q (D c + b + p)
    error_error: Array  # [...]: e^T Q e
    encoder: Array  # [...]: b_enc - u . b_dec_out: the same at every token
    codes: Array  # [..., k]: c: codes as the MLP sees them, f or f / rms(r); 1 for the constant input
    indices: Array  # [..., k] int: the input feature of each row and column of pairs; n_features: the constant input
    preactivation: Array  # [...]: what the output SAE's encoder makes of the model's own mlp_out

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
    q = tracer.q(feature)
    if q.ndim != 2:
        raise ValueError(f"name one output feature, by an int; got {feature!r}")
    with jax.default_matmul_precision("highest"):
        projected = q @ tracer.basis
    inp = dataclasses.replace(tracer.inp, source=None)  # of no account, and compiled for
    constant, normed = encoder_constant(tracer.out, feature), reads_before_norm(lm, inp)
    return OutputFeature(q, tracer.basis, projected, tracer.directions[feature], constant, inp, normed)


def encoder_constant(out: SAE, features) -> Float[Array, "*U"]:
    """``b_enc - u . b_dec`` of some features: what their pre-activations are without an input."""
    with jax.default_matmul_precision("highest"):
        constant = -(out.w_enc[features] @ out.b_dec)
    return constant + out.params["b_enc"][features] if out.config.encoder_bias else constant


def reads_before_norm(lm: LanguageModel, inp: SAE) -> bool:
    """Whether there is a norm between what an SAE reads and the MLP."""
    return inp.config.site == "resid_mid" and lm.config.norms[1]


def account_at(
    feature: OutputFeature, x: Float[Array, "*tokens d_model"], y: Float[Array, "*tokens d_model"]
) -> Account:
    """The account from what the input SAE reads, x, and the MLP's output y. Pure: for your own jit, vmap and grad.

    With the highest matmul precision. Memory: ``tokens (features + k^2)`` numbers, and ``512 k in`` for columns.
    """
    with jax.default_matmul_precision("highest"):
        parts = input_parts(feature.inp, x, normed=feature.normed, extended=feature.q.shape[0] > x.shape[-1])
        shape = x.shape[:-1]
        flat = [array.reshape(-1, array.shape[-1]) for array in parts]
        number = max(min(TOKENS_AT_ONCE, len(flat[0])), 1)
        terms = jax.lax.map(lambda token: _terms(feature, InputParts(*token)), tuple(flat), batch_size=number)
        preactivation = y @ feature.direction + feature.encoder
    terms = {name: array.reshape(*shape, *array.shape[1:]) for name, array in terms.items()}
    encoder = jnp.broadcast_to(feature.encoder, shape)
    return Account(**terms, encoder=encoder, codes=parts.codes, indices=parts.indices, preactivation=preactivation)


class InputParts(NamedTuple):
    """The input of the MLP, ``read + bias + passed + error``, in parts; ``in`` includes the constant input."""

    codes: Float[Array, "... k"]  # c: codes as the MLP sees them, and 1 for the constant input
    indices: Int[Array, "... k"]  # their input features
    scale: Float[Array, "... 1"]  # 1 / rms(r) where there is a norm in between, else 1
    read: Float[Array, "... in"]  # D c, the constant input being part of it
    bias: Float[Array, "... in"]  # b
    passed: Float[Array, "... in"]  # p
    error: Float[Array, "... in"]  # e


def input_parts(inp: SAE, x: Float[Array, "... d_model"], *, normed: bool, extended: bool) -> InputParts:
    """What the input SAE makes of x, as the MLP sees it: if ``normed``, over rms(x); if ``extended``, with its 1."""
    codes = inp.encode(x, sparse=True)
    reconstruction = inp.decode(codes, x)
    bias = inp.decode(jnp.zeros(inp.config.n_features, x.dtype), jnp.zeros(inp.config.d_model, x.dtype))
    bias, passed = jnp.broadcast_to(bias, x.shape), jnp.zeros_like(x)
    if inp.config.passthrough:
        dims = jnp.asarray(inp.config.passthrough)
        passed = passed.at[..., dims].set(x[..., dims])
    scale = jnp.ones_like(x[..., :1])
    if normed:
        scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + RMS_EPSILON)
    values, indices = codes.values * scale, codes.indices
    vectors = [part * scale for part in (reconstruction - bias - passed, bias, passed, x - reconstruction)]
    if extended:
        last = jnp.full_like(indices[..., :1], inp.config.n_features)
        values, indices = with_constant(values), jnp.concatenate([indices, last], axis=-1)
        vectors = [with_constant(vectors[0]), *(jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)]) for v in vectors[1:])]
    return InputParts(values, indices, scale, *vectors)


def _terms(feature: OutputFeature, parts: InputParts) -> dict[str, Array]:
    """The terms of x^T Q x at one token."""
    columns = feature.basis.T[parts.indices] * parts.codes[:, None]  # [k, in], their sum is D c
    images = feature.projected.T[parts.indices] * parts.codes[:, None]  # and Q times them
    read, bias, passed, error = columns.sum(axis=0), parts.bias, parts.passed, parts.error
    q_bias, q_passed, q_error = (feature.q @ part for part in (bias, passed, error))
    return {
        "pairs": columns @ images.T,
        "feature_bias": 2 * columns @ q_bias,
        "bias": bias @ q_bias,
        "passthrough": 2 * q_passed @ (read + bias) + passed @ q_passed,
        "error_cross": 2 * q_error @ (read + bias + passed),
        "error_error": error @ q_error,
    }


def site_pair(lm: LanguageModel, inp: SAE, tokens: Int[Array, "batch seq"]) -> tuple[Array, Array]:
    """What the input SAE reads, and the output of the MLP of its layer: ``[batch, seq, d_model]`` in float32."""
    wanted = [(inp.config.site, inp.config.layer), ("mlp_out", inp.config.layer)]
    got = sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    return got[wanted[0]].astype(jnp.float32), got[wanted[1]].astype(jnp.float32)


@jax.jit
def _account(lm: LanguageModel, feature: OutputFeature, tokens: Int[Array, "batch seq"]) -> Account:
    return account_at(feature, *site_pair(lm, feature.inp, tokens))


def account(tracer: Tracer, lm: LanguageModel, tokens, feature) -> Account:
    """The exact account of an output feature's pre-activation at every token of some rows.

    The formula is at the top of ``attribution``. Only the active input features of a token are looked at: a block of
    k x k pairs, never features x features.

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
    ``in (in + features)`` numbers. For a whole dataset: ``cofiring.pair_summaries``.

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
