"""The loss of a dictionary on a batch of tokens: x is what it reads, y what it reconstructs (of an SAE, y = x).

    loss  = mean over prefixes of  sum |y - y_hat|^2 / sum |y|^2         the fraction that it misses
          + aux_coefficient sum |e - e_hat|^2 / sum |e|^2                only with k_aux > 0 and dead features
          + weight (l0 / k - 1)^2                                        only with jumprelu
          + weight sum |codes| / (tokens rms(|y|))                       only with relu: l1, in units of y

- Prefixes: with ``matryoshka`` shares, the first features alone must reconstruct too, and each y_hat has its own term
  beside that of all features (Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse
  autoencoders").
- In the second line e = y - y_hat is taken as a constant, and ``e_hat = W_dec TopK_aux(z)`` reconstructs it from the
  ``k_aux`` largest pre-activations among the dead features: those that fired on none of the last ``dead_after``
  tokens. It gives dead features a gradient, from what the others miss (Gao et al. 2024, section 2.4, appendix A.2).
- l0 is the mean number of active features of a token. Its derivative by a threshold is the straight-through one
  (``nn.activations.step``), as is that of the codes (Rajamanoharan et al. 2024).

Where the number of active features varies, each token has ``training_slots`` places for them. If a token of the batch
has more, for instance at the beginning, the loss of this batch is computed densely. Both ways give the same numbers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.nn.activations import SparseCodes, batch_threshold, damage, jump, least_threshold, places, step
from bilinear_jax.nn.sae import SAEModule
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.nn.sparse import counted
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.training.sae_recipe import PLAIN, Loss


def training_slots(config: SAEConfig) -> int:
    """The places for the active features of a token, in training: 4 k, and at least 64; of JumpReLU twice as many.

    Those of JumpReLU are also for the features just below their threshold, of which there are about as many.
    """
    number = max(64, 4 * (config.k or 0))
    return min(config.n_features, 2 * number if config.activation == "jumprelu" else number)


class Parts(NamedTuple):
    """What a dictionary makes of a batch, sparse or dense."""

    written: list[Float[Array, "tokens d_model"]]  # W_dec codes, for each prefix and for all features
    fired: Bool[Array, " features"]  # whether each feature's code was not 0 on some token
    active: Float[Array, ""]  # l0: mean number of active features of a token
    size: Float[Array, ""]  # mean of sum |codes| of a token
    threshold: Float[Array, ""]  # of the batch; 0 unless batchtopk


def reconstruction_loss(
    config: SAEConfig,
    params: dict[str, Array],
    x: Float[Array, "tokens d_model"],
    y: Float[Array, "tokens d_model"] | None = None,
    *,
    tokens: Int[Array, " tokens"] | None = None,
    dead: Bool[Array, " features"] | None = None,
    loss: Loss = PLAIN,
    weight: Float[Array, ""] | float = 0.0,
    form: str = "scan",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of one dictionary on a batch: the formula in the docstring of this module.

    Args:
        config, params: in the published orientation, as ``nn.sae.SAEModule`` has them.
        x: what it reads.
        y: what it reconstructs. None: x.
        tokens: the token ids, for a dictionary with a lookup. Only the rows of these tokens have a gradient.
        dead: which features are dead, for the auxiliary loss. None: there is no auxiliary loss.
        loss: the other options.
        weight: of the sparsity loss.
        form: of the sparse products.

    Returns:
        The loss and its parts: ``nmse``, of all features; ``fired`` ``[features]``, whether each feature's code was not
        0 on some token; of thresholded activations ``l0``; of BatchTopK ``threshold``, that of this batch; and with
        ``k_aux > 0`` ``aux``, the auxiliary loss before its coefficient, which is 0 while no feature is dead. A batch
        of zeros has loss 0.
    """
    y = x if y is None else y
    module = SAEModule(config, form)

    def run(method: str, *args) -> Any:
        return run_module(module, params, *args, method=method)

    spans = [round(share * config.n_features) for share in loss.matryoshka] + [config.n_features]
    made = _thresholded(config, params, x, loss, spans, run) if config.thresholded else _top_k(x, spans, run)
    beside = run("beside", made.written[-1], x, tokens)
    errors = [y - (written + beside) for written in made.written]
    shares = [_share(error, y) for error in errors]
    total = sum(shares[1:], start=shares[0]) / len(shares)
    parts = {"nmse": shares[-1], "fired": made.fired}
    if config.thresholded:
        parts["l0"] = made.active
    if config.activation == "batchtopk":
        parts["threshold"] = made.threshold
    if config.activation == "jumprelu" and config.k is not None:
        total = total + weight * (made.active / config.k - 1) ** 2
    if config.activation == "relu":
        mean_square = jax.lax.stop_gradient(jnp.mean(jnp.sum(y**2, axis=-1)))
        total = total + weight * made.size / jnp.sqrt(jnp.where(mean_square > 0, mean_square, 1))
    if not loss.k_aux or dead is None:
        return total, parts
    missed = jax.lax.stop_gradient(errors[-1])

    def auxiliary():
        guess = run("decode_directions", run("encode_sparse", x, min(loss.k_aux, config.n_features), dead))
        return _share(missed - guess, missed)

    parts["aux"] = jax.lax.cond(jnp.any(dead), auxiliary, lambda: jnp.zeros_like(shares[-1]))
    return total + loss.aux_coefficient * parts["aux"], parts


def _top_k(x, spans: list[int], run) -> Parts:
    codes = run("encode_sparse", x)
    return _of_sparse(codes, (), spans, run, (codes.values != 0).astype(x.dtype), jnp.zeros(()))


def _thresholded(config: SAEConfig, params: dict[str, Array], x, loss: Loss, spans: list[int], run) -> Parts:
    """The parts with a thresholded activation: from the active features if all have a place, else dense."""
    slots = training_slots(config)
    y = jax.lax.stop_gradient(run("linear_part", x))
    z = run("product", y)
    number = len(x) * (config.k or 0)
    threshold = params.get("threshold")
    unsound = damage(z)

    def activated(z, threshold):
        """Codes, and whether each is active, from pre-activations and thresholds of equal shape."""
        if config.activation == "jumprelu":
            z = jnp.maximum(z, 0)
            return jump(z, threshold, loss.bandwidth), step(z, threshold, loss.bandwidth)
        active = z > 0 if config.activation == "relu" else (z >= threshold) & (z > 0)
        return jnp.where(active, z, jnp.zeros_like(z)), active.astype(z.dtype)

    if config.activation == "batchtopk":
        least = jnp.broadcast_to(least_threshold(z, number), z.shape)
        indices, counts = places([(z >= least) & (z > 0)], slots)
        threshold = batch_threshold(counted(jnp.take_along_axis(z, indices, axis=-1), counts[-1]), number)
    elif config.activation == "jumprelu":
        # First the active ones, then those within the bandwidth below the threshold, which only move it.
        its = jnp.broadcast_to(jax.lax.stop_gradient(params["threshold"]), z.shape)
        active, close = z > jnp.maximum(its, 0), z > jnp.maximum(its * (1 - loss.bandwidth / 2), 0)
        indices, counts = places([active, close & ~active], slots)
    else:
        indices, counts = places([z > 0], slots)

    def sparse(x):
        values = run("at", x, y, indices, counts[0])
        its = threshold if threshold is None or not threshold.ndim else threshold[indices]
        codes, active = activated(values, its)
        codes = counted(codes, counts[-1]) + jnp.broadcast_to(unsound, codes.shape)
        found = SparseCodes(codes, indices, config.n_features)
        return _of_sparse(found, counts, spans, run, counted(active, counts[-1]), _scalar(threshold))

    def dense(x):
        z = run("product", run("linear_part", x))
        its = threshold
        if config.activation == "batchtopk":
            its = batch_threshold(z, number)
        elif threshold is not None:
            its = jnp.broadcast_to(threshold, z.shape)
        codes, active = activated(z, its)
        return _of_dense(codes + jnp.broadcast_to(unsound, codes.shape), spans, run, active, _scalar(its))

    return jax.lax.cond(jnp.max(counts[-1]) <= slots, sparse, jax.checkpoint(dense), x)


def _scalar(threshold) -> Float[Array, ""]:
    """The threshold of a batch; 0 where each feature has its own, or there is none."""
    return jnp.zeros(()) if threshold is None or jnp.ndim(threshold) else threshold


def _of_sparse(codes: SparseCodes, counts: Sequence[Int[Array, " tokens"]], spans, run, active, threshold) -> Parts:
    """``counts``: how many codes of each token count, and how many have derivatives; empty: all."""
    fired = jnp.zeros(codes.n_features, bool).at[codes.indices].max(codes.values != 0)

    def written(start: int, end: int):
        its = (
            codes.values
            if not start and end == codes.n_features
            else jnp.where((codes.indices >= start) & (codes.indices < end), codes.values, 0)
        )
        return run("decode_directions", SparseCodes(its, codes.indices, codes.n_features), *counts)

    return _parts(written, spans, fired, active, codes.values, threshold)


def _of_dense(codes: Float[Array, "tokens features"], spans, run, active, threshold) -> Parts:
    def written(start: int, end: int):
        inside = (jnp.arange(codes.shape[1]) >= start) & (jnp.arange(codes.shape[1]) < end)
        return run("decode_directions", jnp.where(jnp.broadcast_to(inside, codes.shape), codes, 0))

    return _parts(written, spans, jnp.any(codes != 0, axis=0), active, codes, threshold)


def _parts(written, spans: list[int], fired, active, values, threshold) -> Parts:
    """``written(start, end)`` gives what the features of a span write; those of a prefix are sums of spans."""
    sums = []
    for start, end in zip([0, *spans], spans, strict=False):
        part = written(start, end)
        sums.append(sums[-1] + part if sums else part)
    return Parts(sums, fired, jnp.sum(active) / len(active), jnp.sum(jnp.abs(values)) / len(values), threshold)


def _share(part: Float[Array, "tokens d_model"], whole: Float[Array, "tokens d_model"]) -> Float[Array, ""]:
    """``sum |part|^2 / sum |whole|^2``, or 0 if the whole is 0. ``whole`` is a constant."""
    total = jnp.sum(whole**2)
    return jnp.sum(part**2) / jnp.where(total == 0, jnp.ones_like(total), total)
