"""Random dictionaries to compare trained ones with: ``random_dictionaries``.

Scores of a dictionary say little alone: many sites can be reconstructed, or replaced at a small loss, without any
learned direction. So the same scores of a random dictionary stand beside them. It has nothing that was learned, but all
that can be given to it without learning a direction:

    d_f    random unit vectors, one per feature: encoder row and decoder column are the same direction
    z_f    = d_f . (x - mean x)
    codes  = the k largest z, none below 0         k: the active features per token of the trained dictionary, rounded
    y_hat  = mean r + s D codes + r_0(x)           r = y - r_0(x)

``r_0`` is what the trained dictionary adds beside its features: the skip, the passthrough and the row that it looks up
for each token, as trained. In the coordinates that pass through, D is 0. The means are those of the counted tokens of
the text. s is fitted to the text:

    s = sum (r - mean r) . D codes / sum |D codes|^2          the least squared error; 0 if there is no code

So the explained variance of a control is never below that of the mean (and, with a skip or a lookup, of these). That
is the fairest comparison: a control that loses by its scale or its offset would show nothing about directions, and what
a lookup explains without any feature shows in the score of its control. A top-k dictionary that is bilinear or
thresholded has the same linear top-k control. Of a transcoder the control reads and writes random directions of two
sites that have nothing in common, so what it explains is close to 0.

Controls at training time, such as a frozen random decoder or a random model, are others.

Source: Heap et al. 2025, "Sparse autoencoders can interpret randomly initialized transformers", on why controls matter.
"""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.scale import unit_columns, unit_scale
from bilinear_jax.measure.activations import check_names
from bilinear_jax.measure.sums import Place, coded, places, reads, target
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE


def random_dictionaries(
    lm: LanguageModel, saes: Iterable[SAE], tokens, token_mask=None, batch_size: int = 16, *, seed: int = 0
) -> dict[str, SAE]:
    """For each trained dictionary a random one of the same size, site, target and number of active features.

    What it is stands at the top of ``measure.controls``. Its config has the activation ``topk_relu``, a linear encoder
    and an encoder bias; the name it has follows from that. The model is run over the text twice.

    Args:
        lm, saes, tokens, token_mask, batch_size: as for ``evaluate_saes``.
        seed: of the directions. Dictionaries of one shape have the same ones.

    Returns:
        The random dictionaries, by the names of the trained ones.

    Raises:
        ValueError: as ``evaluate_saes``.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> random_dictionaries(lm, [sae], jnp.arange(30).reshape(5, 6) % 10)["0-mlp-out-x4-k2"].name
        '0-mlp-out-x4-reluk2-random'
    """
    saes = tuple(saes)
    check_names(saes)
    sums = [_Sums() for _ in saes]
    for batch in lm.batches(tokens, token_mask, batch_size, description="means of the sites"):
        values = _values(lm, places(saes), batch.tokens)
        for sae, total in zip(saes, sums, strict=True):
            found = jax.device_get(_moments(sae, values[reads(sae)], values[target(sae)], batch.tokens, batch.mask))
            if not all(np.isfinite(part).all() for part in found):
                raise batch.not_finite()
            total.add(*found)
    drawn = [_drawn(sae, total, seed) for sae, total in zip(saes, sums, strict=True)]
    fits = [np.zeros(2) for _ in saes]
    for batch in lm.batches(tokens, token_mask, batch_size, description="scales of the controls"):
        values = _values(lm, places(saes), batch.tokens)
        for control, fit in zip(drawn, fits, strict=True):
            found = _fit(control, values[reads(control)], values[target(control)], batch.tokens, batch.mask)
            dot, square, e, f = jax.device_get(found)
            fit += np.float64(dot) * 2.0 ** (np.float64(e) + f), np.float64(square) * 4.0 ** np.float64(f)
    scales = [dot / square if square > 0 else 0.0 for dot, square in fits]
    return {
        sae.name: SAE(control.params | {"w_dec": control.w_dec * jnp.float32(scale)}, control.config)
        for sae, control, scale in zip(saes, drawn, scales, strict=True)
    }


@dataclasses.dataclass
class _Sums:
    """Sums over the counted tokens, in float64."""

    x: np.ndarray | float = 0.0
    rest: np.ndarray | float = 0.0  # of r = y - r_0(x)
    active: float = 0.0
    tokens: float = 0.0

    def add(self, x, rest, active, tokens) -> None:
        self.x, self.rest = self.x + x.astype(np.float64), self.rest + rest.astype(np.float64)
        self.active, self.tokens = self.active + float(active), self.tokens + float(tokens)


def _values_of(lm: LanguageModel, wanted: tuple[Place, ...], tokens) -> dict[Place, Array]:
    got = sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    return {place: got[place].astype(jnp.float32) for place in wanted}


_values = jax.jit(_values_of, static_argnames="wanted")


def _beside(sae: SAE, x: Float[Array, "batch seq d_model"], tokens) -> Float[Array, "batch seq d_model"]:
    """r_0: what the dictionary adds beside its features and its bias."""
    return sae.beside(x, tokens) - jnp.broadcast_to(sae.decoder_bias, x.shape)


@jax.jit
def _moments(sae: SAE, x, y, tokens, mask: Bool[Array, "batch seq"]):
    """Sums of x, of r and of active features over the counted tokens, and the number of these."""
    _, active, _, _ = coded(sae, x, mask, tokens)
    sums = (jnp.sum(part, axis=(0, 1), where=mask[..., None]) for part in (x, y - _beside(sae, x, tokens)))
    return *sums, active, jnp.sum(mask)


def _drawn(sae: SAE, sums: _Sums, seed: int) -> SAE:
    """The random dictionary with s = 1."""
    c = sae.config
    mean_x, mean_rest = (jnp.asarray(part / max(sums.tokens, 1), jnp.float32) for part in (sums.x, sums.rest))
    config = dataclasses.replace(
        c,
        activation="topk_relu",
        k=max(1, round(sums.active / max(sums.tokens, 1))),
        encoder_bias=True,
        centred=False,
        normalize=None,
        apply_normalize=False,
        bilinear_encoder=False,
        product_bias=False,
        linear_term=False,
        inputs=None,
        inputs_k=None,
        reads=None,
        max_active=None,
        tag="random" if c.tag is None else f"{c.tag}-random",
    )
    directions = unit_columns(jax.random.normal(jax.random.key(seed), (c.d_model, c.n_features)))
    written = directions.at[jnp.asarray(c.passthrough, jnp.int32)].set(0)
    params = {"w_enc": directions.T, "b_enc": -(mean_x @ directions), "w_dec": written, "b_dec": mean_rest}
    if c.skip:
        params["w_skip"] = sae.params["w_skip"]
    if c.token_lookup is not None:
        params["w_lookup"] = sae.params["w_lookup"] * c.scale  # the control has no normalize
    return SAE(params, config)


@jax.jit
def _fit(control: SAE, x, y, tokens, mask: Bool[Array, "batch seq"]):
    """``sum (r - mean r) . D codes / 2^(e + f)``, ``sum |D codes|^2 / 4^f``, e and f, over the counted tokens."""
    counted = mask[..., None]
    rest, e = unit_scale(
        jnp.where(counted, y - _beside(control, x, tokens) - jnp.broadcast_to(control.decoder_bias, y.shape), 0)
    )
    written, f = unit_scale(jnp.where(counted, control.decode_directions(control.encode(x, sparse=True)), 0))
    return jnp.sum(rest * written), jnp.sum(written**2), e, f
