"""How well an SAE replaces the site that it reads. Metrics are sums and counts, divided once at the end."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.tracer import mlp_tensor
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.scale import shift, unit_scale
from bilinear_jax.measure.activations import check_names, site_values
from bilinear_jax.measure.correlation import sae_correlation
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import Edit, Site
from bilinear_jax.store.files import finite_or_null

CLEAN, PATCHED, ZEROED = 0, 1, 2
"""What ``edited_loss`` does with a site: leave it, replace it by the SAE's reconstruction, or replace it by 0."""


@dataclasses.dataclass(frozen=True)
class SAEMetrics:
    """The metrics of one SAE, as ``evaluate_saes`` measures them. Losses are in nats per token."""

    nmse: float  # sum |x - x_hat|^2 / sum |x|^2 over tokens: 0 is perfect, 1 is as bad as x_hat = 0
    explained_variance: float  # 1 - sum |x - x_hat|^2 / sum |x - mean|^2: 1 is perfect, 0 is as bad as the mean; or nan
    mse: float  # squared error per coordinate: sum |x - x_hat|^2 / (tokens d_model), in squared units of the site
    l0: float  # codes other than 0 per token: k, or fewer where the top-k holds exact zeros
    l1: float  # sum of |codes| per token, in units of the codes
    dead: float  # fraction of the features, 0 to 1, that are active at no token
    loss_clean: float  # the model's own cross entropy on the text
    loss_patched: float  # the same with the site replaced by the SAE's reconstruction
    loss_zeroed: float  # the same with the site replaced by 0
    loss_added: float  # (patched - clean) / clean: the relative increase of the loss; 0 is perfect
    loss_recovered: float  # 1 - (patched - clean) / (zeroed - clean): 1 is perfect, 0 is as bad as zeroing; or nan
    tokens: int  # number of tokens over which the codes were measured
    correlation: Mapping[int, float]  # by k: the mean r of low_rank_correlation; empty unless asked for


class SAESums(NamedTuple):
    """The sums from which the metrics of one SAE are computed. ``merge`` adds those of two batches.

    Squares are divided by ``4^exponent``, so that they stay in the range of float32; after ``merge``, exponent is 0.
    """

    squared_error: Float[Array | np.ndarray, ""]  # sum |x - x_hat|^2 / 4^exponent
    squared_norm: Float[Array | np.ndarray, ""]  # sum |x|^2 / 4^exponent
    spread: Float[Array | np.ndarray, ""]  # sum |x - mean|^2 / 4^exponent, with the mean of these tokens
    exponent: Int[Array | np.ndarray, ""] | Float[np.ndarray, ""]  # the largest |x| is about 2^exponent
    mean: Float[Array | np.ndarray, " d_model"]  # of x; 0 if there are no tokens
    active: Float[Array | np.ndarray, ""]  # number of codes other than 0
    absolute: Float[Array | np.ndarray, ""]  # sum of |codes|
    fired: Float[Array | np.ndarray, " features"]  # tokens on which each feature's code is not 0
    tokens: Float[Array | np.ndarray, ""]  # number of tokens in the mask


def sae_sums(
    lm: LanguageModel, saes: Iterable[SAE], tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> tuple[SAESums, ...]:
    """The sums of one batch for each SAE. The model is run once, up to the last layer that an SAE reads.

    A pure function, for your own ``jit`` and loop. Arguments as in ``evaluate_saes``.
    """
    saes = tuple(saes)
    counted = token_mask[..., None]
    number = jnp.sum(counted, dtype=jnp.float32)

    def sums(sae: SAE, x: Float[Array, "batch seq d_model"]) -> SAESums:
        codes = sae.encode(x, sparse=True)
        nonzero = ((codes.values != 0) & counted).astype(jnp.float32)
        mean = jnp.sum(x, axis=(0, 1), where=counted) / jnp.maximum(number, 1)
        exponent = unit_scale(jnp.where(counted, x, 0))[1]

        def squares(part: Float[Array, "batch seq d_model"]) -> Float[Array, ""]:
            return jnp.sum(shift(part, -exponent) ** 2, where=counted)

        return SAESums(
            squared_error=squares(x - sae.decode(codes, x)),
            squared_norm=squares(x),
            spread=squares(x - mean[None, None]),
            exponent=exponent,
            mean=mean,
            active=jnp.sum(nonzero),
            absolute=jnp.sum(jnp.abs(codes.values), where=counted),
            fired=jnp.zeros(sae.config.n_features).at[codes.indices].add(nonzero),
            tokens=number,
        )

    return tuple(sums(sae, x) for sae, x in zip(saes, site_values(lm, saes, tokens), strict=True))


def merge(a: SAESums, b: SAESums) -> SAESums:
    """The sums of two batches together, in float64 on the host.

    All fields are added, except two. With n tokens in all, ``mean = (n_a mean_a + n_b mean_b) / n`` and
    ``spread = spread_a + spread_b + |mean_b - mean_a|^2 n_a n_b / n``. Nothing cancels in the latter.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    a, b = map(_unscaled, (a, b))
    total = jax.tree.map(np.add, a, b)
    share = b.tokens / max(total.tokens, 1)
    shift = b.mean - a.mean
    return total._replace(mean=a.mean + share * shift, spread=a.spread + b.spread + a.tokens * share * np.sum(shift**2))


def _unscaled(sums: SAESums) -> SAESums:
    """The same sums in float64, with the exponent 0."""
    sums = jax.tree.map(functools.partial(np.asarray, dtype=np.float64), sums)
    squares = {name: getattr(sums, name) * 4.0**sums.exponent for name in ("squared_error", "squared_norm", "spread")}
    return sums._replace(**squares, exponent=np.zeros_like(sums.exponent))


def edited_loss(
    lm: LanguageModel, sae: SAE, how, tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> sites.SummedLoss:
    """The summed cross entropy, and the number of tokens, with the SAE's site left, reconstructed or zeroed.

    A pure function. ``how`` is ``CLEAN``, ``PATCHED`` or ``ZEROED``. It may be traced, to compile once for all three.
    """

    def reconstructed(value):
        found = value.astype(jnp.float32)
        return sae.decode(sae.encode(found, sparse=True), found).astype(value.dtype)

    def edit(value):
        other = jax.lax.switch(how, [lambda v: v, reconstructed, jnp.zeros_like], value)
        return jnp.where(token_mask[..., None], other, value)

    edits: dict[Site, Edit] = {(sae.config.site, sae.config.layer): edit}
    return sites.loss(lm.config, lm.params, tokens, token_mask, edits, compute_dtype=lm.compute_dtype)


_sae_sums = jax.jit(sae_sums)
_edited_loss = jax.jit(edited_loss)


def evaluate_saes(
    lm: LanguageModel,
    saes: Iterable[SAE],
    tokens,
    token_mask=None,
    batch_size: int = 16,
    *,
    correlation_ks: Iterable[SupportsIndex] = (),
) -> dict[str, SAEMetrics]:
    """Measure the reconstruction, the sparsity and the effect on the model's loss of SAEs, in one pass over a dataset.

    For each batch the model is run

    - once for its own loss,
    - once for the activations that the SAEs read,
    - once per site, with the site replaced by 0,
    - once per SAE, with its site replaced by the SAE's reconstruction.

    All sums are in float64 and are divided once, so the result does not depend on ``batch_size``. Each SAE is compiled
    once: a second call with other parameters, for instance during training, compiles nothing. A progress bar shows on
    a terminal. ``table`` and ``to_json`` turn the result into text.

    Args:
        saes: at any sites and layers, with different names.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``). Only these
            tokens are encoded and counted. The site is replaced at these tokens only. Only the losses of predicting
            these tokens are summed; position 0 is never predicted.
        batch_size: rows that are run through the model at once.
        correlation_ks: numbers of eigenpairs at which ``low_rank_correlation`` is measured too, for SAEs that read the
            ``mlp_out`` of a bilinear model. It costs more than everything else here.

    Returns:
        The metrics of each SAE, by its name.

    Raises:
        ValueError: if there is no SAE, two have the same name, or one does not fit the model; if the tokens do not fit
            the model, or the mask leaves no token; if the model or an SAE gives values that are not finite; and, with
            ``correlation_ks``, as ``low_rank_correlation``.

    Memory: one run of the model; for each SAE also ``batch_size * seq * (d_model + 2 k)`` numbers, for the activations
    of its site and its codes.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> saes = [SAE.init(SAEConfig(site, 1, d_model=8, expansion=4, k=2), jax.random.key(1)) for site in
        ...         ("mlp_in", "mlp_out")]
        >>> metrics = evaluate_saes(lm, saes, tokens)["1-mlp-out-x4-k2"]
        >>> metrics.l0, metrics.tokens, 0 < metrics.nmse < 1
        (2.0, 25, True)

    Source: the metrics of Gao et al. 2024, section 2; ``loss_added`` is the measure of the bilinear-MLP paper.
    """
    saes = tuple(saes)
    check_names(saes)
    correlations = _correlations(lm, saes, tokens, token_mask, batch_size, tuple(correlation_ks))

    runs = [(saes[0], CLEAN), *((sae, PATCHED) for sae in saes)]
    runs += [(sae, ZEROED) for sae in {_site(sae): sae for sae in reversed(saes)}.values()]
    totals: list[SAESums] = []
    losses: dict[tuple, float] = {}
    predicted = 0.0
    for batch in lm.batches(tokens, token_mask, batch_size, description="evaluate SAEs"):
        sums = _sae_sums(lm, saes, batch.tokens, batch.mask)
        totals = [merge(*pair) for pair in zip(totals or map(_nothing, sums), sums, strict=True)]
        summed = {_key(sae, how): _edited_loss(lm, sae, how, batch.tokens, batch.mask) for sae, how in runs}
        losses = {key: losses.get(key, 0.0) + float(one.total) for key, one in summed.items()}
        if not all(map(math.isfinite, [*losses.values(), *(total.squared_error for total in totals)])):
            raise batch.not_finite()
        predicted += float(summed[_key(saes[0], CLEAN)].tokens)
    means = {key: _ratio(loss, predicted) for key, loss in losses.items()}
    found = {}
    for sae, sums, correlation in zip(saes, totals, correlations, strict=True):
        clean, patched, zeroed = (means[_key(sae, how)] for how in (CLEAN, PATCHED, ZEROED))
        found[sae.name] = _metrics(sae, sums, clean, patched, zeroed, correlation)
    return found


def evaluate_sae(lm: LanguageModel, sae: SAE, tokens, token_mask=None, batch_size: int = 16) -> SAEMetrics:
    """The metrics of one SAE: ``evaluate_saes`` with this SAE alone."""
    return evaluate_saes(lm, [sae], tokens, token_mask, batch_size)[sae.name]


def _site(sae: SAE) -> tuple[str, int]:
    return sae.config.site, sae.config.layer


def _key(sae: SAE, how: int) -> tuple:
    """What a loss depends on: nothing, the SAE or its site."""
    return {CLEAN: (), PATCHED: (sae.name,), ZEROED: _site(sae)}[how]


def _nothing(like: SAESums) -> SAESums:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)


def _correlations(lm, saes, tokens, token_mask, batch_size: int, ks) -> list[dict[int, float]]:
    """For each SAE the mean r by k; empty for an SAE to which ``low_rank_correlation`` does not apply."""
    found = []
    for sae in saes:
        tensor = lm.config.bilinear and lm.config.gate is None
        if not ks or not tensor or sae.config.site != "mlp_out" or sae.config.bilinear_encoder:
            found.append({})
            continue
        mlp, options = mlp_tensor(lm, sae.config.layer), {"token_mask": token_mask, "batch_size": batch_size}
        got = sae_correlation(lm, mlp, sae, tokens, ks, **options)
        found.append(dict(zip(got.ks.tolist(), got.mean.tolist(), strict=True)))
    return found


def _metrics(sae: SAE, sums: SAESums, clean: float, patched: float, zeroed: float, correlation) -> SAEMetrics:
    varies = sums.spread > 1e-12 * sums.squared_norm  # less is float32 rounding, for instance of one token
    return SAEMetrics(
        nmse=_ratio(sums.squared_error, sums.squared_norm),
        explained_variance=1 - _ratio(sums.squared_error, sums.spread if varies else 0),
        mse=_ratio(sums.squared_error, sums.tokens * sae.config.d_model),
        l0=_ratio(sums.active, sums.tokens),
        l1=_ratio(sums.absolute, sums.tokens),
        dead=_ratio(np.sum(np.asarray(sums.fired) == 0), len(sums.fired)),
        loss_clean=clean,
        loss_patched=patched,
        loss_zeroed=zeroed,
        loss_added=_ratio(patched - clean, clean),
        loss_recovered=1 - _ratio(patched - clean, zeroed - clean),
        tokens=int(sums.tokens),
        correlation=correlation,
    )


def _ratio(numerator, denominator) -> float:
    """The quotient as a float; nan if the denominator is 0."""
    return float(numerator) / float(denominator) if denominator else float("nan")


# The result as text


def table(metrics: Mapping[str, SAEMetrics]) -> str:
    """A Markdown table with one row per SAE. ``loss`` is the language model's own, in nats per token.

    Example:
        >>> numbers = dict(mse=2.0, l0=30.0, l1=9.0, dead=0.01, loss_patched=1.54, loss_zeroed=3.4, tokens=255)
        >>> losses = dict(loss_clean=1.4, loss_added=0.1, loss_recovered=0.93)
        >>> one = SAEMetrics(nmse=0.2, explained_variance=0.75, correlation={2: 0.5}, **numbers, **losses)
        >>> print(table({"2-mlp-out-x4-k30": one}))
        | SAE | nmse | explained variance | l0 | dead | loss | loss added | loss recovered | r at k = 2 |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | 2-mlp-out-x4-k30 | 0.2 | 0.75 | 30 | 0.01 | 1.4 | 0.1 | 0.93 | 0.5 |
    """
    ks = sorted({k for one in metrics.values() for k in one.correlation})
    names = ("nmse", "explained_variance", "l0", "dead", "loss_clean", "loss_added", "loss_recovered")
    titles = ["SAE", *(name.replace("_clean", "").replace("_", " ") for name in names), *(f"r at k = {k}" for k in ks)]
    rows = [
        [name, *(_written(getattr(one, column)) for column in names), *(_written(one.correlation.get(k)) for k in ks)]
        for name, one in metrics.items()
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [titles, ["---"] * len(titles), *rows])


def _written(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.4g}"


def to_json(metrics: Mapping[str, SAEMetrics]) -> str:
    """All metrics of all SAEs as strict JSON, ``{name: {"nmse": ..., ...}}``. Values that are not finite are null."""
    entries = {name: dataclasses.asdict(one) for name, one in metrics.items()}
    return json.dumps(finite_or_null(entries), indent=2, allow_nan=False)


def attn_scale_losses(lm: LanguageModel, tokens, batch_size: int = 16) -> dict[float, float]:
    """The model's mean loss with ``attn_scale`` 1 and ``1 / sqrt(2 n_layer)``, as ``{attn_scale: loss}``.

    Files published before November 2024 do not say with which of the two a model was trained. Compare the losses on
    text like the training text: that of the right factor is far lower.

    Example:
        >>> import bilinear_jax as bj
        >>> losses = attn_scale_losses(bj.load("ts-nano", attn_scale=1), bj.load_corpus("ts-nano")[:2])
        >>> [round(scale, 4) for scale in losses], min(losses, key=losses.get) < 1
        ([1.0, 0.3536], True)
    """
    scales = (1.0, 1 / math.sqrt(2 * lm.config.n_layer))
    models = (dataclasses.replace(lm, config=dataclasses.replace(lm.config, attn_scale=scale)) for scale in scales)
    return {
        scale: model.mean_loss(tokens, batch_size=batch_size).loss for scale, model in zip(scales, models, strict=True)
    }
