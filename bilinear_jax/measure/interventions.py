"""Interventions that check an account: ablate pairs of input features, or steer a feature.

The MLP writes ``y = B(x, x)``, where B is the symmetric form

    B(a, b) = down ((left a) * (right b) + (left b) * (right a)) / 2

Split the input into parts, ``x = D c + b + p + e``, as in ``explain.account``. Then a pair of input features writes the
vector

    y_ij = 2 c_i c_j B(d_i, d_j), or c_i^2 B(d_i, d_i) for a feature with itself          d_i: column i of D

into the residual stream. To ablate some pairs P, the model is run with ``y' = y - sum over P of y_ij`` in place of y.
Since ``u . B(d_i, d_j) = (D^T Q D)_ij``, the pre-activation of an output feature changes by exactly the terms that
``account`` gives for these pairs. Other output features that these pairs act on change too, and so does the loss.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5; steering
by a decoder column: Templeton et al. 2024, "Scaling Monosemanticity".
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.account import eps_of_norm, input_parts, site_pair
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.cofiring import entries
from bilinear_jax.measure.pairs import check_request, checked_pairs
from bilinear_jax.nn import sites
from bilinear_jax.nn.activations import SparseCodes
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import Edit, Site
from bilinear_jax.tensor import BilinearTensor

REMOVE = ("these", "other_pairs", "all_else")
"""What ``removed`` takes away: the given pairs; all other pairs; or all that the MLP writes except the given pairs."""


# Ablation of pairs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an output feature and the model do in one of the runs that ``ablate_pairs`` compares."""

    fires: int  # tokens at which the output SAE's top-k selects the feature, with a code other than 0
    kept: int  # tokens at which it fires here and in the clean run
    code: float  # its mean code over the tokens at which it fires in the clean run; nan if there are none
    loss: float  # the model's cross entropy in nats per token; nan if the mask leaves no token to predict


@dataclasses.dataclass(frozen=True)
class Ablation:
    """How an output feature and the loss change when some pairs of input features are ablated."""

    pairs: Int[np.ndarray, "n 2"]  # the input features of each pair
    remove: str  # "these", "other_pairs" or "all_else": what was taken away, see ``removed``
    tokens: int  # number of tokens in the mask
    change: float  # mean change of the feature's pre-activation over the tokens in the mask
    preactivation: float  # mean pre-activation over the tokens at which it fires in the clean run; nan if none
    preactivation_ablated: float  # the same in both ablated runs
    clean: Outcome  # the run without an intervention
    whole: Outcome  # y' in place of y: what the pairs write is gone for all features
    alone: Outcome  # only the code of this feature changes; see ``code_alone``


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pairs", "vectors", "tensor", "inp"], meta_fields=["norm_eps"]
)
@dataclasses.dataclass(frozen=True)
class PairEffects:
    """What some pairs of input features write, for ``removed``. A pytree, made by ``pair_effects``."""

    pairs: Array  # [n, 2] int: the input features of each pair
    vectors: Array  # [n, d_model]: 2 B(d_i, d_j), or B(d_i, d_i): what a pair writes per unit of c_i c_j
    tensor: BilinearTensor  # the MLP
    inp: SAE  # the input SAE, without its token lookup: what features write does not depend on tokens
    norm_eps: float | None  # of the norm, if the input SAE reads the residual stream before it


def pair_effects(tracer: Tracer, pairs) -> PairEffects:
    """What pairs of input features write into the residual stream.

    Args:
        pairs: ``[n, 2]`` input features; no pair twice.

    Memory: ``n (4 hidden + out)`` numbers.
    """
    pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
    with jax.default_matmul_precision("highest"):
        (left_i, right_i), (left_j, right_j) = (
            (columns @ tracer.tensor.left.T, columns @ tracer.tensor.right.T)
            for columns in (tracer.basis.T[pairs[:, 0]], tracer.basis.T[pairs[:, 1]])
        )
        vectors = (left_i * right_j + left_j * right_i) @ tracer.tensor.down.T
    vectors = vectors * jnp.asarray(entries(pairs)[:, None] / 2, vectors.dtype)
    norm_eps = eps_of_norm(tracer.lm, tracer.inp)
    config = dataclasses.replace(tracer.inp.config, token_lookup=None)
    inp = SAE({name: value for name, value in tracer.inp.params.items() if name != "w_lookup"}, config)
    return PairEffects(jnp.asarray(pairs), vectors, tracer.tensor, inp, norm_eps)


def removed(
    effects: PairEffects, x: Float[Array, "*tokens d_model"], y: Float[Array, "*tokens d_model"], remove: str = "these"
) -> Float[Array, "*tokens d_model"]:
    """What an ablation takes away from the MLP's output y, if the input SAE reads x: ``y' = y - removed``.

    - "these": ``sum over P of y_ij``, the given pairs.
    - "other_pairs": ``B(D c, D c) - sum over P of y_ij``, all other pairs. What the decoder bias, the coordinates
      passed through, rows looked up and the input SAE's error write stays, alone and together with features.
    - "all_else": ``y - sum over P of y_ij``, everything except the given pairs. Then ``y'`` is what these pairs write,
      and the pre-activation of an output feature is their part of the account plus the term ``encoder``.

    If the MLP has biases, the constant input is an input feature, as in ``explain.account``. What the biases write
    alone is the pair of the constant input with itself, and is treated as any other pair.

    A pure function, for your own ``jit``, ``vmap`` and ``grad``; with the highest matmul precision.

    Memory: ``tokens (features + n)`` numbers; with "other_pairs", also ``3 tokens hidden``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = lm.encode("One day, a little girl named Lily found a needle.")
        >>> x, y = site_pair(lm, tracer.inp, tokens)
        >>> found = tracer.top_interactions(n=5, feature=7)
        >>> effects = pair_effects(tracer, jnp.stack([found.i, found.j], axis=1))
        >>> change = removed(effects, x, y)
        >>> loss = lm.loss(tokens, edits={("mlp_out", 2): lambda y: y - change})
    """
    if remove not in REMOVE:
        raise ValueError(f"remove must be one of {', '.join(REMOVE)}, got {remove!r}")
    with jax.default_matmul_precision("highest"):
        extended = effects.tensor.n_in > x.shape[-1]
        parts = input_parts(effects.inp, x, norm_eps=effects.norm_eps, extended=extended)
        dense = SparseCodes(parts.codes, parts.indices, effects.inp.config.n_features + extended).dense()
        shown = (dense[..., effects.pairs[:, 0]] * dense[..., effects.pairs[:, 1]]) @ effects.vectors
        if remove == "these":
            return shown
        return (effects.tensor.apply(parts.read) if remove == "other_pairs" else y) - shown


def code_alone(
    out: SAE, feature, y: Float[Array, "*tokens d_model"], change: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """A feature's code if its own pre-activation falls by ``change``, and no other changes.

        z       = pre-activations of y, with z_feature - change in place of z_feature
        code    = that of the feature in activation(z); NaN if any z is not finite

    In the run ``alone`` the MLP's output is ``y + d_out (code - clean code)``. It shows what the change of this feature
    does downstream while everything else that the MLP writes stays.
    """
    codes = out.codes_of(out.preactivations(y).at[..., feature].add(-change))
    its_own = jnp.where(codes.indices == feature, codes.values, 0).sum(axis=-1)
    return jnp.where(jnp.isnan(codes.values).any(axis=-1), jnp.nan, its_own)


def ablate_pairs(
    tracer: Tracer,
    tokens,
    pairs: Mapping[int, Any],
    *,
    remove: str = "these",
    token_mask=None,
    batch_size: int = 16,
) -> dict[int, Ablation]:
    """Ablate some pairs of input features, or everything else, and measure output features and the loss.

    The formula is at the top of ``measure.interventions``. Two ablated runs are compared to the clean run.

    - ``whole``: the MLP's output is ``y' = y - removed(...)``. The pairs are gone for all features.
    - ``alone``: y changes along the feature's decoder column only, by the change of its code (``code_alone``). The
      change of the loss is the part that goes through this feature.

    The feature's pre-activation is the same in both runs, ``u . (y' - b_dec) + b_enc``. Its code may differ: in
    ``whole`` the other features change too, and the top-k chooses among all.

    If the pairs are necessary, the feature stops firing with "these". If they are sufficient, it keeps firing with
    "all_else". A few pairs are often neither. Sums over tokens are divided once, so the result does not depend on
    ``batch_size``. A progress bar shows on a terminal.

    Args:
        tracer: with ``use_encoder=True``; its model is run. See ``account`` for its SAEs.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        pairs: the pairs of each output feature, as for ``pair_summaries``. Each output feature is ablated separately.
        remove: "these" (the given pairs), "other_pairs" or "all_else" (with the error and the bias of the input SAE).
            See ``removed``.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``). The MLP's output
            changes at these tokens only, and only the losses of predicting these tokens are summed.
        batch_size: rows that are run through the model at once.

    Raises:
        ValueError: for an unknown ``remove``, and as ``pair_summaries``.
        UnknownNameError: for an output feature or an input feature that does not exist.

    Cost: the model is run once for all output features, and twice more for each of them.

    Memory: one batch of the model and of the pre-activations of both SAEs, and that of ``pair_effects`` and
    ``removed``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = bj.load_corpus("ts-nano")[:4]
        >>> pairs = {7: tracer.top_interactions(n=50, feature=7)}
        >>> found = bj.ablate_pairs(tracer, tokens, pairs)[7]
        >>> found.clean.fires == found.clean.kept >= found.whole.kept, found.tokens
        (True, 1020)
    """
    if remove not in REMOVE:
        raise ValueError(f"remove must be one of {', '.join(REMOVE)}, got {remove!r}")
    check_request(pairs)
    tracer.require_encoder()
    lm, out = tracer.lm, tracer.out
    chosen = {out.check_feature(feature): given for feature, given in pairs.items()}
    chosen = {feature: checked_pairs(tracer, feature, given) for feature, given in chosen.items()}
    effects = {feature: pair_effects(tracer, some) for feature, some in chosen.items()}

    sums = dict.fromkeys(chosen, _Sums())
    clean, predicted, counted = 0.0, 0.0, 0
    for batch in lm.batches(tokens, token_mask, batch_size, description="ablating pairs"):
        x, y = _site_pair(lm, tracer.inp, batch.tokens)
        loss, number = _loss(lm, jnp.zeros_like(y), batch.tokens, batch.mask, layer=tracer.layer)
        clean, predicted, counted = clean + float(loss), predicted + float(number), counted + int(batch.mask.sum())
        for feature, total in sums.items():
            given = (out, jnp.int32(feature), tracer.directions[feature], x, y, batch.mask)
            ablated = _ablated(effects[feature], *given, remove=remove)
            losses = (
                _loss(lm, change, batch.tokens, batch.mask, layer=tracer.layer)[0]
                for change in (ablated.whole, ablated.alone)
            )
            runs = (run._replace(loss=loss) for run, loss in zip(ablated.sums.runs[1:], losses, strict=True))
            found = jax.tree.map(float, jax.device_get(ablated.sums._replace(runs=(ablated.sums.runs[0], *runs))))
            if not all(map(math.isfinite, [clean, *jax.tree.leaves(found)])):
                raise batch.not_finite()
            sums[feature] = jax.tree.map(operator.add, total, found)
    return {
        feature: _result(chosen[feature], remove, counted, predicted, clean, total) for feature, total in sums.items()
    }


class _RunSums(NamedTuple):
    """Sums over the tokens in the mask, for one of the runs that are compared: clean, whole, alone."""

    fires: Any = 0.0  # tokens at which the feature fires
    kept: Any = 0.0  # tokens at which it fires here and in the clean run
    code: Any = 0.0  # of its codes where it fires in the clean run
    loss: Any = 0.0  # cross entropy; 0 for the clean run, which is summed once for all features


class _Sums(NamedTuple):
    """Sums over the tokens in the mask, for one output feature."""

    change: Any = 0.0  # of its pre-activation
    z: Any = 0.0  # pre-activations where it fires in the clean run
    z_ablated: Any = 0.0  # the same in both ablated runs
    runs: tuple[_RunSums, ...] = (_RunSums(), _RunSums(), _RunSums())  # clean, whole, alone


class _Ablated(NamedTuple):
    """One batch of the two ablated runs."""

    whole: Float[Array, "batch seq d_model"]  # what is taken away from the MLP's output
    alone: Float[Array, "batch seq d_model"]
    sums: _Sums  # without losses


@jax.jit
def _site_pair(lm: LanguageModel, inp: SAE, tokens: Int[Array, "batch seq"]):
    return site_pair(lm, inp, tokens)


@functools.partial(jax.jit, static_argnames="layer")
def _loss(lm: LanguageModel, change: Float[Array, "batch seq d_model"], tokens, mask, *, layer: int):
    """The summed cross entropy, and the number of tokens, with ``change`` taken away from the MLP's output."""
    edits: dict[Site, Edit] = {("mlp_out", layer): lambda y: y.astype(jnp.float32) - change}
    return sites.loss(lm.config, lm.params, tokens, mask, edits, compute_dtype=lm.compute_dtype)


@functools.partial(jax.jit, static_argnames="remove")
def _ablated(effects: PairEffects, out: SAE, feature, direction, x, y, mask, *, remove: str) -> _Ablated:
    with jax.default_matmul_precision("highest"):
        whole = jnp.where(mask[..., None], removed(effects, x, y, remove), 0)
        fall = whole @ direction
        nothing = jnp.zeros_like(fall)
        clean = code_alone(out, feature, y, nothing)
        codes = (clean, code_alone(out, feature, y - whole, nothing), code_alone(out, feature, y, fall))
        alone = jnp.where(mask[..., None], _written(out, feature, clean - codes[2]), 0)
        z = out.preactivations(y)[..., feature]
    fired = mask & (clean != 0)

    def run(code) -> _RunSums:
        fires = mask & (code != 0)
        return _RunSums(fires.sum(), (fires & fired).sum(), jnp.where(fired, code, 0).sum())

    of_z = (jnp.where(fired, z, 0).sum(), jnp.where(fired, z - fall, 0).sum())
    return _Ablated(whole, alone, _Sums(-fall.sum(), *of_z, tuple(map(run, codes))))


def _written(sae: SAE, feature, amount: Float[Array, "*tokens"]) -> Float[Array, "*tokens d_model"]:
    """What the SAE's reconstruction gains if a feature's code grows by ``amount``."""
    codes = SparseCodes(amount[..., None], jnp.full((*amount.shape, 1), feature), sae.config.n_features)
    return sae.decode_directions(codes)


def _result(pairs, remove: str, tokens: int, predicted: float, clean: float, sums: _Sums) -> Ablation:
    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else float("nan")

    untouched, *ablated = sums.runs
    fired = untouched.fires
    runs = (
        Outcome(int(run.fires), int(run.kept), ratio(run.code, fired), ratio(run.loss, predicted))
        for run in (untouched._replace(loss=clean), *ablated)
    )
    means = (sums.change / tokens, ratio(sums.z, fired), ratio(sums.z_ablated, fired))
    return Ablation(pairs, remove, tokens, *means, *runs)


# Steering


def steer(
    sae: SAE,
    feature,
    *,
    add: float | int | Float[Array, "..."] | None = None,
    to: float | int | Float[Array, "..."] | None = None,
    where: Bool[Array, "..."] | None = None,
) -> dict[Site, Edit]:
    """Edits that turn a feature up, down or off at the site that its SAE reconstructs. Pass them as ``edits``.

        add:  x' = x + add d                        d: the feature's decoder column, ``sae.decoder``
        to:   x' = x + (to - code(x)) d             code: after the SAE's own top-k, so to=0 removes the feature

    The rest of x stays as it is, with the SAE's error. ``lm.loss``, ``lm.logits``, ``lm.capture``, ``lm.generate`` and
    the functions of ``nn.sites`` take the result. The edit changes the SAE's own site, or of a transcoder its target,
    where the decoder columns write; x is the value there. At ``attn_out`` the model then multiplies it by its
    ``attn_scale``. At ``mlp_in`` only the MLP of that layer reads it. At ``resid_mid`` the norm before the MLP divides
    by the rms of the changed vector.

    The encoder may find another code in x' than the one that was set: other features and its bias also play a part.

    Args:
        feature: the feature's number. It may be traced; then it is not checked.
        add: how often the decoder column is added: a number, or an array that broadcasts to ``[batch, seq]``.
        to: the new code of the feature: a number, or an array that broadcasts to ``[batch, seq]``. Not of a
            transcoder: its codes are those of another site, which an edit of its target does not see.
        where: ``[batch, seq]``, the tokens that are changed; by default all, with position 0.

    Returns:
        ``{(site, layer): edit}``, with one entry.

    Raises:
        ValueError: unless exactly one of ``add`` and ``to`` is given, and is finite; for ``to`` of a transcoder.
        UnknownNameError: if the SAE has no such feature.

    Example:
        >>> import bilinear_jax as bj
        >>> lm, sae = bj.load("ts-nano"), bj.load_sae("ts-nano", site="mlp-out", layer=2)
        >>> edits = bj.steer(sae, 7, add=5.0)
        >>> tokens = lm.encode("Once upon a time")
        >>> loss, text = lm.loss(tokens, edits=edits), lm.generate("Once upon a time", max_length=5, edits=edits)
    """
    if (add is None) == (to is None):
        raise ValueError("give exactly one of add (how much of the feature to add) and to (the code to set it to)")
    if to is not None and sae.config.target is not None:
        raise ValueError(
            f"{sae.name} is a transcoder: its codes are read at {sae.config.site}, but its features write to "
            f"{sae.config.target}, so the edit cannot tell the code that it would replace: give add instead of to"
        )
    amount = jnp.asarray(add if to is None else to, jnp.float32)
    if not isinstance(amount, JaxTracer) and not np.isfinite(amount).all():
        raise ValueError(f"{'add' if to is None else 'to'} must be finite, got {add if to is None else to}")
    if not isinstance(feature, JaxTracer):
        feature = sae.check_feature(feature)
    where = None if where is None else jnp.asarray(where)

    def edit(x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        wide = x.astype(jnp.float32)
        for name, given in (("add" if to is None else "to", amount), ("where", where)):
            if given is not None and not _broadcasts(jnp.shape(given), x.shape[:-1]):
                raise ValueError(
                    f"{name} has shape {jnp.shape(given)}, but it must broadcast to the tokens, {x.shape[:-1]}"
                )
        more = jnp.broadcast_to(amount, x.shape[:-1])
        if to is not None:
            codes = sae.encode(wide, sparse=True)
            more = more - jnp.where(codes.indices == feature, codes.values, 0).sum(axis=-1)
        if where is not None:
            more = jnp.where(jnp.broadcast_to(where, more.shape), more, 0)
        return (wide + _written(sae, feature, more)).astype(x.dtype)

    return {(sae.config.reconstructs, sae.config.layer): edit}


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, whole) for size, whole in ends)
