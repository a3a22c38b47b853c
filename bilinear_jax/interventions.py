"""Interventions that check an account: pairs of input features taken out of the forward pass, and features steered.

What the MLP writes is the symmetric form ``B(a, b) = down ((left a) * (right b) + (left b) * (right a)) / 2`` of its
input with itself, ``y = B(x, x)``. With the input in parts, ``x = D c + b + p + e`` as in ``attribution``, a pair of
input features writes the vector

    y_ij = 2 c_i c_j B(d_i, d_j), or c_i^2 B(d_i, d_i) for a feature with itself          d_i: column i of D

into the residual stream. To ablate some pairs P is to run the model with ``y' = y - sum over P of y_ij`` in place of y.
Since ``u . B(d_i, d_j) = (D^T Q D)_ij``, the pre-activation of an output feature falls by exactly the entries that
``attribution.account`` gives these pairs; other output features that the pairs take part in change as well, and so does
the loss.

Source: Pearce, Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability", section 5; steering
by a decoder column: Templeton et al. 2024, "Scaling Monosemanticity".
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.activations import check_dataset, check_feature, no_token, not_finite, token_batches
from bilinear_jax.attribution import input_parts, reads_before_norm, site_pair
from bilinear_jax.cofiring import entries
from bilinear_jax.correlation import check_tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE, SparseCodes, TopKSAE
from bilinear_jax.nn.sparse import largest
from bilinear_jax.nn.transformer import Edit, Site, run_module
from bilinear_jax.summaries import check_request, checked_pairs
from bilinear_jax.tensor import BilinearTensor
from bilinear_jax.tracer import Tracer

REMOVE = ("these", "other_pairs", "all_else")
"""What ``removed`` takes away: some pairs; all pairs but them; or all that the MLP writes but them."""


# Ablation of pairs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What an output feature and the model do in one of the runs that ``ablate_pairs`` compares."""

    fires: int  # tokens at which the output SAE's top-k selects the feature, with a code other than 0
    kept: int  # those of them at which it fires in the untouched run too
    code: float  # its mean code over the tokens at which it fires in the untouched run; nan if there are none
    loss: float  # the model's cross entropy in nats a token; nan if the mask leaves none to predict


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What is left of an output feature without some pairs of input features, and what that does to the loss."""

    pairs: Int[np.ndarray, "n 2"]  # the input features of each
    remove: str  # "these", "other_pairs" or "all_else": what was taken away, see ``removed``
    tokens: int  # how many tokens count
    change: float  # mean change of its pre-activation over the tokens that count
    preactivation: float  # mean pre-activation over the tokens at which it fires untouched; nan if there are none
    preactivation_ablated: float  # the same in both ablated runs
    clean: Outcome  # untouched
    whole: Outcome  # y' in place of y: whatever the pairs write is gone, for other features as well
    alone: Outcome  # the feature's code alone is what its new pre-activation makes of it; see ``code_alone``


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["pairs", "vectors", "tensor", "inp"], meta_fields=["normed"]
)
@dataclasses.dataclass(frozen=True)
class PairEffects:
    """What some pairs of input features write, ready for ``removed``; a pytree, made by ``pair_effects``."""

    pairs: Array  # [n, 2] int: the input features of each
    vectors: Array  # [n, d_model]: 2 B(d_i, d_j), or B(d_i, d_i): what they write a unit of c_i c_j
    tensor: BilinearTensor  # the MLP
    inp: SAE  # the input SAE
    normed: bool  # it reads the residual stream, which a norm divides by rms(r)


def pair_effects(tracer: Tracer, lm: LanguageModel, pairs) -> PairEffects:
    """What pairs of input features ``[n, 2]``, distinct ones, write into the residual stream.

    Memory: ``n (4 hidden + out)`` numbers.
    """
    pairs = np.asarray(pairs, np.int32).reshape(-1, 2)
    with jax.default_matmul_precision("highest"):
        (left_i, right_i), (left_j, right_j) = (
            (columns @ tracer.tensor.left.T, columns @ tracer.tensor.right.T)
            for columns in (tracer.basis.T[pairs[:, 0]], tracer.basis.T[pairs[:, 1]])
        )
        vectors = (left_i * right_j + left_j * right_i) @ tracer.tensor.down.T
    inp = dataclasses.replace(tracer.inp, source=None)  # of no account, and compiled for
    vectors = vectors * jnp.asarray(entries(pairs)[:, None] / 2, vectors.dtype)
    return PairEffects(jnp.asarray(pairs), vectors, tracer.tensor, inp, reads_before_norm(lm, inp))


def removed(
    effects: PairEffects, x: Float[Array, "*tokens d_model"], y: Float[Array, "*tokens d_model"], remove: str = "these"
) -> Float[Array, "*tokens d_model"]:
    """What an ablation takes away from the MLP's output y, where the input SAE reads x: ``y' = y - removed``.

    - "these": ``sum over P of y_ij``, the pairs given;
    - "other_pairs": ``B(D c, D c) - sum over P of y_ij``, every other pair. What the decoder bias, coordinates passed
      through and the input SAE's error write, alone and with features, stays;
    - "all_else": ``y - sum over P of y_ij``, everything but the pairs: ``y'`` is what they write, and the
      pre-activation of an output feature is what the account gives them, plus its term ``encoder``.

    Where the MLP has biases, the constant input is an input feature as in ``attribution``: what the biases alone write
    is a pair of it with itself, and goes or stays with the others.

    Pure: for your own ``jit``, ``vmap`` and ``grad``. With the highest matmul precision. Memory: ``tokens (features +
    n)`` numbers; with "other_pairs", also ``3 tokens hidden``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = lm.encode("One day, a little girl named Lily found a needle.")
        >>> x, y = bj.attribution.site_pair(lm, tracer.inp, tokens)
        >>> found = tracer.top_interactions(n=5, feature=7)
        >>> effects = pair_effects(tracer, lm, jnp.stack([found.i, found.j], axis=1))
        >>> change = removed(effects, x, y)
        >>> loss = lm.loss(tokens, edits={("mlp_out", 2): lambda y: y - change})
    """
    if remove not in REMOVE:
        raise ValueError(f"remove must be one of {', '.join(REMOVE)}, got {remove!r}")
    with jax.default_matmul_precision("highest"):
        extended = effects.tensor.n_in > x.shape[-1]
        parts = input_parts(effects.inp, x, normed=effects.normed, extended=extended)
        dense = SparseCodes(parts.codes, parts.indices, effects.inp.config.n_features + extended).dense()
        shown = (dense[..., effects.pairs[:, 0]] * dense[..., effects.pairs[:, 1]]) @ effects.vectors
        if remove == "these":
            return shown
        return (effects.tensor.apply(parts.read) if remove == "other_pairs" else y) - shown


def code_alone(
    out: SAE, feature, y: Float[Array, "*tokens d_model"], change: Float[Array, "*tokens"]
) -> Float[Array, "*tokens"]:
    """A feature's code where its pre-activation, and that of no other feature, falls by ``change``.

        z       = pre-activations of y, but z_feature - change in place of z_feature
        code    = z_feature if it is among the k largest of z, else 0

    With the code changed by this alone, the MLP's output is ``y + d_out (code - untouched code)``: what the change of
    one feature does, downstream of it, when everything else that the MLP writes stays.
    """
    z = run_module(TopKSAE(out.config), out.params, y, method="preactivations")
    z = z.at[..., feature].add(-change)
    selected = (largest(z, out.config.k) == feature).any(axis=-1)
    return jnp.where(selected, z[..., feature], 0)


def ablate_pairs(
    tracer: Tracer,
    lm: LanguageModel,
    tokens,
    pairs: Mapping[int, Any],
    *,
    remove: str = "these",
    token_mask=None,
    batch_size: int = 16,
) -> dict[int, Ablation]:
    """What becomes of output features, and of the loss, without some pairs of input features, or with them alone.

    The formula is at the top of ``interventions``. Two ablated runs are compared to the untouched one. In ``whole``,
    the MLP's output is ``y' = y - removed(...)``: the pairs are gone for whatever reads them. In ``alone``, y changes
    along the feature's decoder column only, by the change of its code (``code_alone``): how much of the loss goes
    through this feature. The pre-activation is the same in both, ``u . (y' - b_dec) + b_enc``; the code may differ, as
    in ``whole`` other features gain and lose too, and a top-k chooses among all.

    Pairs that are needed show in "these": the feature falls silent. Pairs that are enough show in "all_else": it keeps
    firing. Few pairs are often neither. Sums over tokens are divided once: the result doesn't depend on ``batch_size``.
    A progress bar shows on a terminal.

    Args:
        tracer: of this model, with ``use_encoder=True``; see ``attribution.account`` for its SAEs.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        pairs: for each output feature its pairs, as for ``summaries.pair_summaries``. Each output feature is ablated by
            itself.
        remove: "these" pairs; the "other_pairs"; or "all_else", the error of the input SAE and its bias included. See
            ``removed``.
        token_mask: ``[rows, seq]``, the tokens that count; by default all but position 0 and the padding at the end of
            each row. Only at these the MLP's output is changed, and only the losses of predicting these are summed.
        batch_size: rows that are run through the model at once.

    Raises:
        ValueError: for an unknown ``remove`` or output feature, and as ``summaries.pair_summaries``.

    Cost: the model is run once for all output features, and twice more for each. Memory: one batch of the model and of
    the pre-activations of both SAEs, and that of ``pair_effects`` and ``removed``.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = bj.checkpoint.corpus("ts-nano")[:4]
        >>> pairs = {7: tracer.top_interactions(n=50, feature=7)}
        >>> found = bj.interventions.ablate_pairs(tracer, lm, tokens, pairs)[7]
        >>> found.clean.fires == found.clean.kept >= found.whole.kept, found.tokens
        (True, 1020)
    """
    from tqdm.auto import tqdm

    if remove not in REMOVE:
        raise ValueError(f"remove must be one of {', '.join(REMOVE)}, got {remove!r}")
    check_request(pairs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    check_tracer(tracer, lm)
    check_dataset(tokens, token_mask)
    chosen = {check_feature(tracer.out, feature): given for feature, given in pairs.items()}
    chosen = {feature: checked_pairs(tracer, feature, given) for feature, given in chosen.items()}
    effects = {feature: pair_effects(tracer, lm, some) for feature, some in chosen.items()}
    out = dataclasses.replace(tracer.out, source=None)

    sums = {feature: dict.fromkeys(_SUMS, 0.0) for feature in chosen}
    clean, predicted, counted = 0.0, 0.0, 0
    with tqdm(total=len(tokens), desc="ablating pairs", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, min(batch_size, len(tokens))):
            x, y = _site_pair(lm, effects[next(iter(chosen))].inp, batch)
            loss, number = _loss(lm, jnp.zeros_like(y), batch, mask, layer=tracer.layer)
            clean, predicted, counted = clean + float(loss), predicted + float(number), counted + int(mask.sum())
            for feature, total in sums.items():
                direction, index = tracer.directions[feature], jnp.int32(feature)
                changes, found = _ablated(effects[feature], out, index, direction, x, y, mask, remove=remove)
                for name, change in changes.items():
                    found[f"loss {name}"] = _loss(lm, change, batch, mask, layer=tracer.layer)[0]
                found = {name: float(value) for name, value in jax.device_get(found).items()}
                if not all(map(math.isfinite, [clean, *found.values()])):
                    raise not_finite(start, min(len(batch), len(tokens) - start))
                for name, value in found.items():
                    total[name] += value
            bar.update(min(len(batch), len(tokens) - start))
    if not counted:
        raise no_token()
    for total in sums.values():
        total["loss clean"] = clean
    return {feature: _result(chosen[feature], remove, counted, predicted, total) for feature, total in sums.items()}


_RUNS = ("clean", "whole", "alone")
_SUMS = ("change", "z", "z ablated", *(f"{kind} {run}" for run in _RUNS for kind in ("fires", "kept", "code", "loss")))


@jax.jit
def _site_pair(lm: LanguageModel, inp: SAE, tokens: Int[Array, "batch seq"]):
    return site_pair(lm, inp, tokens)


@functools.partial(jax.jit, static_argnames="layer")
def _loss(lm: LanguageModel, change: Float[Array, "batch seq d_model"], tokens, mask, *, layer: int):
    """The summed cross entropy, and of how many tokens, with ``change`` taken away from the MLP's output."""
    edits: dict[Site, Edit] = {("mlp_out", layer): lambda y: y.astype(jnp.float32) - change}
    return sites.loss(lm.config, lm.params, tokens, mask, edits, compute_dtype=lm.compute_dtype)


@functools.partial(jax.jit, static_argnames="remove")
def _ablated(effects: PairEffects, out: SAE, feature, direction, x, y, mask, *, remove: str):
    """What both ablated runs take away from y, and the sums of ``_SUMS`` over the tokens of a batch but the losses."""
    with jax.default_matmul_precision("highest"):
        whole = jnp.where(mask[..., None], removed(effects, x, y, remove), 0)
        fall = whole @ direction
        nothing = jnp.zeros_like(fall)
        codes = {
            "clean": code_alone(out, feature, y, nothing),
            "whole": code_alone(out, feature, y - whole, nothing),
            "alone": code_alone(out, feature, y, fall),
        }
        alone = _written(out, feature, codes["clean"] - codes["alone"])
        z = run_module(TopKSAE(out.config), out.params, y, method="preactivations")[..., feature]
    fired = mask & (codes["clean"] != 0)
    found = {"change": -fall.sum(), "z": jnp.where(fired, z, 0).sum(), "z ablated": jnp.where(fired, z - fall, 0).sum()}
    for run, code in codes.items():
        fires = mask & (code != 0)
        found |= {f"fires {run}": fires.sum(), f"kept {run}": (fires & fired).sum()}
        found[f"code {run}"] = jnp.where(fired, code, 0).sum()
    return {"whole": whole, "alone": jnp.where(mask[..., None], alone, 0)}, found


def _written(sae: SAE, feature, amount: Float[Array, "*tokens"]) -> Float[Array, "*tokens d_model"]:
    """What ``amount`` more of a feature's code adds to the SAE's reconstruction."""
    codes = SparseCodes(amount[..., None], jnp.full((*amount.shape, 1), feature), sae.config.n_features)
    return run_module(TopKSAE(sae.config), sae.params, codes, method="decode_directions")


def _result(pairs, remove: str, tokens: int, predicted: float, sums: dict[str, float]) -> Ablation:
    def ratio(numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else float("nan")

    fired = sums["fires clean"]
    runs = (
        Outcome(
            int(sums[f"fires {run}"]),
            int(sums[f"kept {run}"]),
            ratio(sums[f"code {run}"], fired),
            ratio(sums[f"loss {run}"], predicted),
        )
        for run in _RUNS
    )
    means = (sums["change"] / tokens, ratio(sums["z"], fired), ratio(sums["z ablated"], fired))
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
    """Edits of the SAE's site that turn a feature up, down or off, for whatever takes ``edits``.

        add:  x' = x + add d                        d: the feature's decoder column, times normalize if that is applied
        to:   x' = x + (to - code(x)) d             code: after the SAE's own top-k, so ``to=0`` takes the feature out

    The rest of x, the SAE's error included, stays as it is. The result goes to ``lm.loss``, ``lm.logits``,
    ``lm.capture``, ``lm.generate`` and the functions of ``nn.sites``. What is changed is the SAE's own site: at
    ``attn_out`` the model multiplies it by its ``attn_scale``; at ``mlp_in`` the MLP of that layer alone reads it; at
    ``resid_mid`` the norm before the MLP divides by the rms of the changed vector.

    The encoder that reads x' need not find the new code: other features, and its own bias, have their say.

    Args:
        feature: the feature's number; may be traced, and then isn't checked.
        add: multiples of the decoder column that are added: a number, or an array that broadcasts to ``[batch, seq]``.
        to: the code that the feature is given; likewise.
        where: ``[batch, seq]``, the tokens that are changed; all of them by default, position 0 included.

    Raises:
        ValueError: unless one of ``add`` and ``to`` is given, and is finite; or if the SAE has no such feature.

    Example:
        >>> import bilinear_jax as bj
        >>> lm, sae = bj.load("ts-nano"), bj.load_sae("ts-nano", site="mlp-out", layer=2)
        >>> edits = bj.interventions.steer(sae, 7, add=5.0)
        >>> tokens = lm.encode("Once upon a time")
        >>> loss, text = lm.loss(tokens, edits=edits), lm.generate("Once upon a time", max_length=5, edits=edits)
    """
    if (add is None) == (to is None):
        raise ValueError("give one of add, how much of the feature is added, and to, the code that it is set to")
    amount = jnp.asarray(add if to is None else to, jnp.float32)
    if not isinstance(amount, JaxTracer) and not np.isfinite(amount).all():
        raise ValueError(f"{'add' if to is None else 'to'} must be finite, got {add if to is None else to}")
    if not isinstance(feature, JaxTracer):
        feature = check_feature(sae, feature)

    def edit(x: Float[Array, "batch seq d_model"]) -> Float[Array, "batch seq d_model"]:
        wide = x.astype(jnp.float32)
        for name, given in (("add" if to is None else "to", amount), ("where", where)):
            if given is not None and not _broadcasts(jnp.shape(given), x.shape[:-1]):
                raise ValueError(f"{name} has shape {jnp.shape(given)}, the tokens {x.shape[:-1]}: it must broadcast")
        more = jnp.broadcast_to(amount, x.shape[:-1])
        if to is not None:
            codes = sae.encode(wide, sparse=True)
            more = more - jnp.where(codes.indices == feature, codes.values, 0).sum(axis=-1)
        if where is not None:
            more = jnp.where(jnp.broadcast_to(where, more.shape), more, 0)
        return (wide + _written(sae, feature, more)).astype(x.dtype)

    return {(sae.config.site, sae.config.layer): edit}


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    ends = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, whole) for size, whole in ends)
