"""What a model loses if one layer's MLP is replaced by the explanations of its output features.

At every token, the pre-activation of each feature is replaced by what its explanation predicts. The output SAE makes
codes of them, and its reconstruction replaces the MLP's output. The loss of removing the MLP, its output 0, is the
scale:

    recovered = 1 - (replaced - clean) / (removed - clean)        1: nothing is lost; 0: as bad as no MLP

Beside it stand the SAE's own reconstruction, which is as good as any explanation can be, and the mean output of each
token, which knows nothing of the context.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bilinear_jax.explain.directions import encoder_constant
from bilinear_jax.explain.lookups import token_means
from bilinear_jax.explain.parts import Pairs, Parts, partial_sums
from bilinear_jax.explain.samples import Layer, Samples, edited_loss, read
from bilinear_jax.explain.ways import Way
from bilinear_jax.linalg.devices import one_blas_thread
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE

FEATURES_AT_ONCE = 32  # whose predictions are computed together; does not change the result


@dataclasses.dataclass(frozen=True)
class Recovered:
    """The losses of a model with one MLP replaced, in nats a token, and the shares of the MLP's effect that remain."""

    clean: float  # loss of the model itself
    removed: float  # with the MLP's output 0
    losses: tuple[float, ...]  # with the explanations, for each number of parts
    sae_loss: float  # with the output SAE's reconstruction
    token_loss: float  # with the mean output of each token

    @property
    def recovered(self) -> tuple[float, ...]:
        """Of the explanations, for each number of parts."""
        return tuple(map(self._share, self.losses))

    @property
    def sae_recovered(self) -> float:
        """Of the output SAE's reconstruction."""
        return self._share(self.sae_loss)

    @property
    def token_recovered(self) -> float:
        """Of the mean output of each token."""
        return self._share(self.token_loss)

    def _share(self, loss: float) -> float:
        cost = self.removed - self.clean
        return 1 - (loss - self.clean) / cost if cost else float("nan")


class Explanations(NamedTuple):
    """The explanations of all output features."""

    parts: Parts | Pairs  # [features, k]
    constants: Float[Array, "features numbers"]  # added to the sum of the first parts


def explanations(layer: Layer, way: Way, numbers: tuple[int, ...], choosing: Samples) -> Explanations:
    """The parts of all features, and the constants that bring their means to those of the samples.

    Memory: ``features k in`` numbers of 4 bytes, and for 32 features at a time ``k tokens``, twice.
    """
    directions, x = np.asarray(layer.directions), jnp.asarray(choosing.x)
    padded = np.pad(np.arange(len(directions)), (0, -len(directions) % FEATURES_AT_ONCE), mode="edge")  # one shape
    found, constants = [], []
    with one_blas_thread():
        for start in range(0, len(directions), FEATURES_AT_ONCE):
            some = padded[start : start + FEATURES_AT_ONCE]
            rows = directions[some]
            z = choosing.y @ rows.T
            parts = way.choose(jnp.asarray(rows), z, choosing.fired(some, len(directions)))
            predicted = np.asarray(jnp.mean(partial_sums(x, parts, numbers), axis=-1))
            found.append(parts)
            constants.append(z.mean(axis=0)[:, None] - predicted)
    join = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(directions)], *found)
    return Explanations(join, jnp.asarray(np.concatenate(constants)[: len(directions)]))


def recovered(
    layer: Layer,
    way: Way,
    numbers: tuple[int, ...],
    choosing: Samples,
    tokens,
    token_mask=None,
    batch_size: int = 16,
) -> Recovered:
    """The losses on some text with the explanations of all features in place of the layer's MLP.

    Args:
        layer: its outputs are an SAE of mlp_out, read by its encoder rows.
        way: how the parts are chosen.
        numbers: numbers of parts.
        choosing: the samples that the constants and the mean output of each token are taken from.
        tokens, token_mask, batch_size: as for ``LanguageModel.batches``. The output is replaced at the tokens that
            count, and their losses are summed.

    Raises:
        ValueError: if the tokens do not fit the model, or a value is not finite.

    Memory: ``numbers batch_size seq features`` numbers of 4 bytes, and those of ``explanations``.
    """
    sae = layer.sae
    assert sae is not None
    if sae.config.thresholded:  # a token of an explanation may have more active features than one of the model
        sae = SAE(sae.params, dataclasses.replace(sae.config, max_active=sae.config.n_features))
    table = jnp.asarray(token_means(choosing.token, choosing.y, layer.lm.config.n_vocab))
    every = explanations(layer, way, numbers, choosing)
    total, predicted = np.zeros(len(numbers) + 4), 0.0
    for batch in layer.lm.batches(tokens, token_mask, batch_size, description="replace the MLP"):
        ends = layer.layer, layer.reads, layer.tensor.n_in, sae
        summed, number = _losses(layer.lm, *ends, every, numbers, table, batch.tokens, batch.mask)
        total, predicted = total + np.asarray(summed, np.float64), predicted + float(number)
        if not np.isfinite(total).all():
            raise batch.not_finite()
    clean, removed, sae_loss, token_loss, *losses = (total / predicted).tolist()
    return Recovered(clean, removed, tuple(losses), sae_loss, token_loss)


@functools.partial(jax.jit, static_argnames=("layer", "n_in", "numbers"))
def _losses(lm, layer: int, inputs: SAE | None, n_in: int, sae: SAE, every: Explanations, numbers, table, tokens, mask):
    """The summed losses of a batch, in the order of the fields of ``Recovered``, the explanations last."""
    wanted, place = [("mlp_in", layer), ("mlp_out", layer)], ("mlp_out", layer)
    clean, got = sites.captured_loss(lm.config, lm.params, tokens, mask, wanted, compute_dtype=lm.compute_dtype)
    mlp_in, y = (got[site].astype(jnp.float32) for site in wanted)
    x = read(inputs, mlp_in, n_in)
    flat = x.reshape(-1, x.shape[-1])

    def predict(one):
        parts, constants = one
        return partial_sums(flat, jax.tree.map(lambda part: part[None], parts), numbers)[0] + constants[:, None]

    z = jax.lax.map(predict, tuple(every), batch_size=FEATURES_AT_ONCE)
    constant = encoder_constant(sae, jnp.arange(sae.config.n_features))

    def written(z_hat):
        return sae.decode(sae.codes_of(z_hat.T.reshape(*y.shape[:-1], -1)), y, tokens)

    made = [written(z[:, n] + constant[:, None]) for n in range(len(numbers))]
    values = [jnp.zeros_like(y), sae(y, tokens)[0], table[tokens], *made]
    losses = [edited_loss(lm, place, value, tokens, mask).total for value in values]
    return jnp.stack([clean.total, *losses]), clean.tokens
