"""The exact account of an output feature's pre-activation: why it fires at a token, term by term.

An output feature with encoder row u has the pre-activation ``u . (y - b_dec_out) + b_enc``, from which the top-k of its
SAE selects. The MLP's output y is quadratic in the MLP's input: ``u . y = x^T Q x``. The input SAE splits what it reads
into

    x = D f + b + p + e          f codes, b decoder bias, p coordinates passed through, e the error of the SAE

With a token lookup, p has the row of the token too. So the pre-activation is exactly the sum of

    pairs            sum_ij f_i f_j (D^T Q D)_ij                  pairs of active input features
    feature_bias     sum_i 2 f_i (D^T Q b)_i                      an input feature with the decoder bias
    bias             b^T Q b                                      the decoder bias with itself
    passthrough      2 p^T Q (D f + b) + p^T Q p                  0 unless the input SAE passes through or looks up
    error_cross      2 e^T Q (D f + b + p)                        the error of the input SAE with all the rest
    error_error      e^T Q e                                      the error with itself
    form             u . (y - y_form)                             what a bilinear form of a gated MLP leaves out
    encoder          b_enc - u . b_dec_out                        the same at every token

If the input SAE reads the residual stream r before the norm, the MLP sees ``x = r / rms(r)``. All terms but the last
two are then those of r, times ``1 / rms(r)^2`` of its token. If the MLP has biases, the constant input is one more
feature, the last one (as in ``Tracer.basis``). Its code is 1 at every token. Its pairs are the linear and the constant
terms, which carry one factor ``1 / rms(r)`` or none.

The account of a bilinear form explains the gated model that it describes, at every position: x and y are those of a run
with the gated MLPs, and ``y_form`` is what the form's MLP makes of the same input. All terms but the last two are then
read from the form. Where the term ``form`` is large, they do not explain the activation.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Float, Int

from bilinear_jax.explain.directions import encoder_constant
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel, not_finite
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import MLP, run_module
from bilinear_jax.tensor import with_constant

TOKENS_AT_ONCE = 256  # limits the decoder columns held at once, [tokens, k, in]; does not change the result
TERMS = {
    "pairs": "pairs of input features",
    "feature_bias": "input features with the input SAE's decoder bias",
    "bias": "the input SAE's decoder bias with itself",
    "passthrough": "coordinates that the input SAE passes through, and rows that it looks up",
    "error_cross": "the input SAE's error with what it reconstructs",
    "error_error": "the input SAE's error with itself",
    "form": "what the bilinear form leaves out",
    "encoder": "the constant of the output SAE's encoder",
}
"""The kinds of terms in the order of the formula, each with its description."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[*TERMS, "codes", "indices", "preactivation"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Account:
    """The terms of one output feature's pre-activation at each token. Their sum is the pre-activation, see ``total``.

    k is the number of active input features of a token, plus one if the MLP has biases: the constant input, always the
    last.
    """

    pairs: Array  # [..., k, k]: c_i c_j (D^T Q D)_ij; symmetric, so a pair i != j contributes its entry twice
    feature_bias: Array  # [..., k]: 2 c_i (D^T Q b)_i
    bias: Array  # [...]: b^T Q b
    passthrough: Array  # [...]: 2 p^T Q (D c + b) + p^T Q p; 0 unless the input SAE passes through or looks up
    error_cross: Array  # [...]: 2 e^T Q (D c + b + p)
    error_error: Array  # [...]: e^T Q e
    form: Array  # [...]: u . (y - y_form); 0 unless the model is a bilinear form of a gated one
    encoder: Array  # [...]: b_enc - u . b_dec_out: the same at every token
    codes: Array  # [..., k]: c: codes as the MLP sees them, f or f / rms(r); 1 for the constant input
    indices: Array  # [..., k] int: the input feature of each row and column of pairs; n_features: the constant input
    preactivation: Array  # [...]: the output SAE's pre-activation, or u . y, from the model's own mlp_out

    @property
    def terms(self) -> dict[str, Float[Array, "..."]]:
        """Each kind of term, summed over features: ``[...]`` by name, in the order of the formula."""
        summed = {name: getattr(self, name) for name in TERMS}
        return summed | {"pairs": self.pairs.sum(axis=(-2, -1)), "feature_bias": self.feature_bias.sum(axis=-1)}

    @property
    def total(self) -> Float[Array, "..."]:
        """The sum of all terms. It equals ``preactivation`` up to rounding in the dtype of the model's computation."""
        return functools.reduce(jnp.add, self.terms.values())

    @property
    def magnitude(self) -> "Magnitude":
        """Sums of the absolute values of the terms. Each pair and each feature is a term of its own."""
        pairs = jnp.abs(self.pairs).sum(axis=(-2, -1))
        single = (jnp.abs(getattr(self, name)) for name in list(TERMS)[2:])
        whole = functools.reduce(jnp.add, single, pairs + jnp.abs(self.feature_bias).sum(axis=-1))
        return Magnitude(pairs, whole)


class Magnitude(NamedTuple):
    """Sums of the absolute values of an account's terms, at each token."""

    pairs: Float[Array, "..."]  # of the pairs
    whole: Float[Array, "..."]  # of all terms


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "basis", "projected", "direction", "encoder", "inp"],
    meta_fields=["norm_eps"],
)
@dataclasses.dataclass(frozen=True)
class OutputFeature:
    """What the account of one output feature needs. It is a pytree, made by ``output_feature``."""

    q: Array  # [in, in]: its interaction matrix
    basis: Array  # [in, features]: D with the constant input, as Tracer.basis
    projected: Array  # [in, features]: Q D
    direction: Array  # [d_model]: u
    encoder: Array  # []: b_enc - u . b_dec_out; 0 for a plain direction
    inp: SAE  # the input SAE
    norm_eps: float | None  # of the norm, if the input SAE reads the residual stream before it


def output_feature(tracer: Tracer, feature) -> OutputFeature:
    """One output feature, ready for ``account_at``.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or no input SAE, or if feature names more than
            one.
        UnknownNameError: if the feature does not exist.

    Memory: ``in (in + features)`` numbers. No features x features matrix is formed.
    """
    tracer.require_encoder(out=False)
    q = tracer.q(feature)
    if q.ndim != 2:
        raise ValueError(f"feature is {feature!r}, but it must be one output feature, an int")
    with jax.default_matmul_precision("highest"):
        projected = q @ tracer.basis
    constant, norm_eps = encoder_constant(tracer.outputs, feature), eps_of_norm(tracer.lm, tracer.inp)
    return OutputFeature(q, tracer.basis, projected, tracer.directions[feature], constant, tracer.inp, norm_eps)


def eps_of_norm(lm: LanguageModel, inp: SAE) -> float | None:
    """``rms_eps`` of the norm between the site that an SAE reads and the MLP. None if there is no norm."""
    return lm.config.rms_eps if inp.config.site == "resid_mid" and lm.config.norms[1] else None


def account_at(
    feature: OutputFeature,
    x: Float[Array, "*tokens d_model"],
    y: Float[Array, "*tokens d_model"],
    left_out: Float[Array, "*tokens d_model"] | None = None,
    tokens: Int[Array, "*tokens"] | None = None,
) -> Account:
    """The account from x, what the input SAE reads, and y, the MLP's output. Pure: for your own jit, vmap and grad.

    ``left_out`` is the part of y that the tracer's tensor does not give; None: nothing. ``tokens`` are the token ids,
    which an input SAE with a lookup needs. It uses the highest matmul precision.

    Memory: ``tokens (features + k^2)`` numbers, and ``512 k in`` for columns.
    """
    with jax.default_matmul_precision("highest"):
        extended = feature.q.shape[0] > x.shape[-1]
        parts = input_parts(feature.inp, x, tokens, norm_eps=feature.norm_eps, extended=extended)
        shape = x.shape[:-1]
        flat = [array.reshape(-1, array.shape[-1]) for array in parts]
        number = max(min(TOKENS_AT_ONCE, len(flat[0])), 1)
        terms = jax.lax.map(lambda token: _terms(feature, InputParts(*token)), tuple(flat), batch_size=number)
        preactivation = y @ feature.direction + feature.encoder
        form = jnp.zeros_like(preactivation) if left_out is None else left_out @ feature.direction
    terms = {name: array.reshape(*shape, *array.shape[1:]) for name, array in terms.items()}
    encoder = jnp.broadcast_to(feature.encoder, shape)
    return Account(
        **terms, form=form, encoder=encoder, codes=parts.codes, indices=parts.indices, preactivation=preactivation
    )


class InputParts(NamedTuple):
    """The input of the MLP in parts, ``read + bias + passed + error``. ``in`` includes the constant input."""

    codes: Float[Array, "... k"]  # c: codes as the MLP sees them, and 1 for the constant input
    indices: Int[Array, "... k"]  # their input features
    scale: Float[Array, "... 1"]  # 1 / rms(r) if there is a norm in between, else 1
    read: Float[Array, "... in"]  # D c, with the constant input
    bias: Float[Array, "... in"]  # b
    passed: Float[Array, "... in"]  # p
    error: Float[Array, "... in"]  # e


def input_parts(
    inp: SAE,
    x: Float[Array, "... d_model"],
    tokens: Int[Array, "..."] | None = None,
    *,
    norm_eps: float | None,
    extended: bool,
) -> InputParts:
    """The parts of x, as the MLP sees them: divided by rms(x) with ``norm_eps``; ``extended`` by the constant input.

    ``tokens`` are for an input SAE with a lookup.
    """
    codes = inp.encode(x, sparse=True)
    reconstruction = inp.decode(codes, x, tokens)
    bias, passed = jnp.broadcast_to(inp.decoder_bias.astype(x.dtype), x.shape), jnp.zeros_like(x)
    if inp.config.passthrough:
        dims = jnp.asarray(inp.config.passthrough)
        passed = passed.at[..., dims].set(x[..., dims])
    if inp.config.token_lookup is not None:
        passed = inp.beside(x, tokens) - bias
    scale = jnp.ones_like(x[..., :1])
    if norm_eps is not None:
        scale = jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + norm_eps)
    values, indices = codes.values * scale, codes.indices
    vectors = [part * scale for part in (reconstruction - bias - passed, bias, passed, x - reconstruction)]
    if extended:
        last = jnp.full_like(indices[..., :1], inp.config.n_features)
        values, indices = with_constant(values), jnp.concatenate([indices, last], axis=-1)
        vectors = [with_constant(vectors[0]), *(jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, 1)]) for v in vectors[1:])]
    return InputParts(values, indices, scale, *vectors)


def _terms(feature: OutputFeature, parts: InputParts) -> dict[str, Array]:
    """The terms of x^T Q x at one token."""
    columns = feature.basis.T[parts.indices] * parts.codes[:, None]  # [k, in]; the sum is D c
    images = feature.projected.T[parts.indices] * parts.codes[:, None]  # Q times these
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


class SitePair(NamedTuple):
    """The two ends of what is explained, in float32."""

    x: Float[Array, "batch seq d_model"]  # what the input SAE reads
    y: Float[Array, "batch seq d_model"]  # the output of the MLP of its layer


def site_pair(lm: LanguageModel, inp: SAE, tokens: Int[Array, "batch seq"]) -> SitePair:
    """What the input SAE reads, and the output of the MLP in its layer."""
    wanted = [(inp.config.site, inp.config.layer), ("mlp_out", inp.config.layer)]
    got = sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    return SitePair(got[wanted[0]].astype(jnp.float32), got[wanted[1]].astype(jnp.float32))


class Activation(NamedTuple):
    """What an account explains, in float32."""

    x: Float[Array, "batch seq d_model"]  # what the input SAE reads
    y: Float[Array, "batch seq d_model"]  # the output of the MLP of its layer
    left_out: Float[Array, "batch seq d_model"] | None  # y - y_form; None unless the model is a bilinear form


def activation(lm: LanguageModel, inp: SAE, tokens: Int[Array, "batch seq"]) -> Activation:
    """The two ends of an account. Those of a bilinear form come from a run of the model with its gated MLPs."""
    if lm.config.original_gate is None:
        return Activation(*site_pair(lm, inp, tokens), None)
    original, layer = lm.original, inp.config.layer
    wanted = [(site, layer) for site in (inp.config.site, "mlp_in", "mlp_out")]
    got = sites.capture(original.config, original.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    x, mlp_in, y = (got[site].astype(jnp.float32) for site in wanted)
    mlp = {name: weight[layer] for name, weight in lm.params["layers"]["mlp"].items()}
    with jax.default_matmul_precision("highest"):
        return Activation(x, y, y - run_module(MLP(lm.config), mlp, mlp_in))


@jax.jit
def _account(lm: LanguageModel, feature: OutputFeature, tokens: Int[Array, "batch seq"]) -> Account:
    return account_at(feature, *activation(lm, feature.inp, tokens), tokens)


def account(tracer: Tracer, tokens, feature) -> Account:
    """The exact account of an output feature's pre-activation, at every token of some rows.

    The formula is in the docstring of ``explain.account``. Only the active input features of a token are used: a block
    of k x k pairs, never features x features.

    Args:
        tracer: with ``use_encoder=True``. Its model is run; of a bilinear form, the model with its gated MLPs. The
            input SAE may have a bilinear encoder, an applied normalisation, passthrough or a token lookup. The output
            SAE may have a bias and an applied normalisation, but ``Tracer`` does not accept one with a bilinear
            encoder, because its pre-activations are of degree 4 in x. For a plain direction as output, the
            pre-activation is ``u . y``.
        tokens: token ids ``[batch, seq]``, run through the model in one batch.
        feature: the output feature, an int.

    Returns:
        An ``Account`` whose arrays have ``[batch, seq]`` first. It has every position, including position 0 and
        padding.

    Raises:
        ValueError: if the tracer has decoder columns as its directions or no input SAE, if feature names more than one,
            or if the model cannot read the tokens; or, outside ``jit``, if a value is not finite.
        UnknownNameError: if the feature does not exist.

    Memory: one batch of the model and of the input SAE's pre-activations, ``batch seq (features + k^2)``, and
    ``in (in + features)`` numbers. For a whole dataset, use ``pair_summaries``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> found = bj.account(tracer, lm.encode("The dog was happy."), feature=7)
        >>> found.pairs.shape[2:] == (tracer.inp.config.k,) * 2
        True
        >>> bool(jnp.allclose(found.total, found.preactivation, atol=1e-4))
        True
    """
    found = _account(tracer.lm, output_feature(tracer, feature), tracer.lm.check_tokens(tokens))
    sound = jnp.isfinite(found.total + found.preactivation).all()
    if not isinstance(sound, JaxTracer) and not sound:
        raise not_finite("at these tokens")
    return found
