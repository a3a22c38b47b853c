"""How well an SAE stands in for the site that it reads: metrics as sums and counts, divided once at the end."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.activations import check_dataset, site_values, token_batches
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import Edit, Site


@dataclasses.dataclass(frozen=True)
class SAEMetrics:
    """What ``evaluate_sae`` measures. Losses are in nats a token."""

    nmse: float  # sum ||x - x_hat||^2 / sum ||x||^2 over tokens: 0 is perfect, 1 is as bad as answering 0
    mse: float  # squared error a coordinate: sum ||x - x_hat||^2 / (tokens d_model), in squared units of the site
    l0: float  # codes other than 0 a token: k, or fewer where the top-k holds exact zeros
    l1: float  # sum of |codes| a token, in units of the site
    dead: float  # fraction of the features, 0 to 1, that no token activated
    loss_clean: float  # the model's cross entropy, untouched
    loss_patched: float  # the same with the site replaced by the SAE's reconstruction
    loss_zeroed: float  # the same with the site replaced by 0
    loss_added: float  # (patched - clean) / clean: the relative rise of the loss, 0 is perfect
    loss_recovered: float  # 1 - (patched - clean) / (zeroed - clean): 1 is perfect, 0 as bad as zeroing; or nan
    tokens: int  # number of tokens that the codes were measured on


class SAESums(NamedTuple):
    """The sums that ``SAEMetrics`` is a quotient of; those of two batches add up, ``fired`` too."""

    squared_error: Float[Array, ""]  # sum ||x - x_hat||^2
    squared_norm: Float[Array, ""]  # sum ||x||^2
    active: Float[Array, ""]  # number of codes other than 0
    absolute: Float[Array, ""]  # sum of |codes|
    fired: Float[Array, " features"]  # tokens on which each feature's code is not 0
    tokens: Float[Array, ""]  # number of tokens in the mask
    losses: Float[Array, "3"]  # summed cross entropy: clean, patched, zeroed
    predicted: Float[Array, ""]  # number of tokens whose loss is summed


def sae_sums(
    lm: LanguageModel, sae: SAE, tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> SAESums:
    """The sums of one batch; a pure function, for your own ``jit`` and loop. Arguments as in ``evaluate_sae``."""
    (x,) = site_values(lm, [sae], tokens)
    codes = sae.encode(x, sparse=True)
    counted = token_mask[..., None].astype(x.dtype)
    error = jnp.sum(((x - sae.decode(codes, x)) * counted) ** 2)
    nonzero = ((codes.values != 0) & token_mask[..., None]).astype(x.dtype)

    def reconstructed(value):
        found = value.astype(jnp.float32)
        return sae.decode(sae.encode(found, sparse=True), found).astype(value.dtype)

    def loss(which):
        """Summed loss with the site left as it is (0), reconstructed (1) or zeroed (2): one compilation for all."""

        def edit(value):
            other = jax.lax.switch(which, [lambda v: v, reconstructed, jnp.zeros_like], value)
            return jnp.where(token_mask[..., None], other, value)

        edits: dict[Site, Edit] = {(sae.config.site, sae.config.layer): edit}
        return sites.loss(lm.config, lm.params, tokens, token_mask, edits, compute_dtype=lm.compute_dtype)

    losses, predicted = jax.lax.map(loss, jnp.arange(3))
    return SAESums(
        squared_error=error,
        squared_norm=jnp.sum((x * counted) ** 2),
        active=jnp.sum(nonzero),
        absolute=jnp.sum(jnp.abs(codes.values) * counted),
        fired=jnp.zeros(sae.config.n_features).at[codes.indices].add(nonzero),
        tokens=jnp.sum(counted),
        losses=losses,
        predicted=predicted[0],
    )


_sae_sums = jax.jit(sae_sums)


def evaluate_sae(lm: LanguageModel, sae: SAE, tokens, token_mask=None, batch_size: int = 16) -> SAEMetrics:
    """Reconstruction, sparsity and the effect on the model's loss of one SAE, over a token dataset.

    The clean loss, the loss with the SAE's site replaced by its reconstruction, and with the site replaced by 0
    are taken in the same pass. Everything is summed over the dataset and divided once, so that the numbers don't
    depend on ``batch_size``. A progress bar shows on a terminal.

    Args:
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        token_mask: ``[rows, seq]``, by default all but position 0 and the padding at the end of each row. Only
            these tokens are encoded and counted; only at these the site is replaced, elsewhere it keeps its value;
            and only the losses of predicting these are summed (position 0 is never predicted).

    Raises:
        ValueError: for an SAE that doesn't fit the model, tokens that don't, or a mask that leaves no token.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel(jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"], config)
        >>> sae = SAE.init(SAEConfig("mlp_out", 1, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> metrics = evaluate_sae(lm, sae, tokens)
        >>> metrics.l0, metrics.tokens, 0 < metrics.nmse < 1
        (2.0, 25, True)

    Source: the metrics of Gao et al. 2024, section 2; loss added is the measure of the bilinear-MLP paper.
    """
    from tqdm.auto import tqdm

    check_dataset(tokens, token_mask)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batch_size = min(batch_size, len(tokens))
    total = None
    with tqdm(total=len(tokens), desc=f"evaluate {sae.name}", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, batch_size):
            sums = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), _sae_sums(lm, sae, batch, mask))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
            bar.update(min(batch_size, len(tokens) - start))
    if total is None or not total.tokens:
        raise ValueError("the token mask leaves no token to measure: pass a token_mask with some True")
    return _quotients(total, sae.config.d_model)


def _quotients(sums: SAESums, d_model: int) -> SAEMetrics:
    clean, patched, zeroed = (_ratio(loss, sums.predicted) for loss in np.asarray(sums.losses))
    return SAEMetrics(
        nmse=_ratio(sums.squared_error, sums.squared_norm),
        mse=_ratio(sums.squared_error, sums.tokens * d_model),
        l0=_ratio(sums.active, sums.tokens),
        l1=_ratio(sums.absolute, sums.tokens),
        dead=_ratio(np.sum(np.asarray(sums.fired) == 0), len(sums.fired)),
        loss_clean=clean,
        loss_patched=patched,
        loss_zeroed=zeroed,
        loss_added=_ratio(patched - clean, clean),
        loss_recovered=1 - _ratio(patched - clean, zeroed - clean),
        tokens=int(sums.tokens),
    )


def _ratio(numerator, denominator) -> float:
    """The quotient as a float; nan where there is nothing to divide by."""
    return float(numerator) / float(denominator) if denominator else float("nan")
