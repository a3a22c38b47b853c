"""How well a dictionary replaces the site that it reconstructs. Scores are sums and counts, divided once at the end.

An SAE reads x at a site and reconstructs it; a transcoder reconstructs another site of the same layer. y is the value
of the site that is reconstructed, x what the dictionary reads in the same run; ``y_hat = decode(encode(x), x, ids)``.
``measure.sums`` has the sums of one batch, as pure functions, and ``measure.controls`` the random dictionaries.
"""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from bilinear_jax.explain.mlp import mlp_tensor
from bilinear_jax.explain.samples import edited_loss
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import check_names
from bilinear_jax.measure.controls import random_dictionaries
from bilinear_jax.measure.correlation import sae_correlation
from bilinear_jax.measure.sums import (
    Place,
    SAESums,
    dictionary_sums,
    merge,
    nothing,
    places,
    reads,
    target,
)
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.store.files import finite_or_null

DENSITY_EDGES = (-math.inf, *(edge / 2 for edge in range(-12, 1)))
"""The edges of the bins of ``SAEMetrics.density``, by log10: ``-inf, -6, -5.5, ..., -0.5, 0``."""


@dataclasses.dataclass(frozen=True)
class SAEMetrics:
    """The scores of one SAE or transcoder, as ``evaluate_saes`` measures them. Losses are in nats per token.

    Sums are over the tokens that count; ``mean`` is that of y over them, d a coordinate of y.
    """

    nmse: float  # sum |y - y_hat|^2 / sum |y|^2: 0 is perfect, 1 is as bad as y_hat = 0
    explained_variance: float  # 1 - sum |y - y_hat|^2 / sum |y - mean|^2: 1 is perfect, 0 is as bad as the mean; or nan
    explained_variance_per_dim: float  # mean over d of 1 - sum (y - y_hat)_d^2 / sum (y - mean)_d^2, if y_d varies
    cosine: float  # mean of y . y_hat / (|y| |y_hat|): 1 is perfect; 0 for a token at which one of the two is 0
    mse: float  # squared error per coordinate: sum |y - y_hat|^2 / (tokens d_model), in squared units of the site
    l0: float  # codes other than 0 per token: k, or fewer where the top-k holds exact zeros
    l1: float  # sum of |codes| per token, in units of the codes
    dead: float  # fraction of the features, 0 to 1, that are active at no token
    density: tuple[int, ...]  # how many features fire at which share of the tokens: counts in bins of DENSITY_EDGES
    loss_clean: float  # the model's own cross entropy on the text
    loss_patched: float  # the same with y replaced by y_hat
    loss_zeroed: float  # the same with y replaced by 0
    loss_mean_ablated: float  # the same with y replaced by its mean
    loss_added: float  # (patched - clean) / clean: the relative increase of the loss; 0 is perfect
    loss_recovered: float  # 1 - (patched - clean) / (zeroed - clean): 1 is perfect, 0 is as bad as zeroing; or nan
    loss_recovered_mean: float  # 1 - (patched - clean) / (mean ablated - clean): 0 is as bad as the mean; or nan
    tokens: int  # number of tokens over which the codes were measured
    correlation: Mapping[int, float]  # by k: the mean r of low_rank_correlation; empty unless asked for


@functools.partial(jax.jit, static_argnames="wanted")
def _clean(lm: LanguageModel, wanted: tuple[Place, ...], tokens, mask):
    """The summed loss of the model itself, and the values of some sites, in one run."""
    options = {"compute_dtype": lm.compute_dtype}
    loss, got = sites.captured_loss(lm.config, lm.params, tokens, mask, wanted, **options)
    return loss, {place: got[place].astype(jnp.float32) for place in wanted}


_dictionary_sums = jax.jit(dictionary_sums)
_edited_loss = jax.jit(edited_loss, static_argnames="place")


def evaluate_saes(
    lm: LanguageModel,
    saes: Iterable[SAE],
    tokens,
    token_mask=None,
    batch_size: int = 16,
    *,
    correlation_ks: Iterable[SupportsIndex] = (),
) -> dict[str, SAEMetrics]:
    """Measure the reconstruction, the sparsity and the effect on the model's loss of SAEs and transcoders.

    For each batch the model is run

    - once for its own loss, and for all that the dictionaries read and reconstruct,
    - once per dictionary, with the site that it reconstructs replaced by its reconstruction,
    - twice per site that is reconstructed, with the site replaced by 0, and by its mean.

    The mean is known only after all batches, so the last of these are a second pass over the dataset. All sums are in
    float64 and are divided once, so the result does not depend on ``batch_size``. Each dictionary is compiled once: a
    second call with other parameters, for instance during training, compiles nothing. Progress bars show on a terminal.
    ``table`` and ``to_json`` turn the result into text.

    Args:
        saes: SAEs and transcoders at any sites and layers, with different names.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        token_mask: ``[rows, seq]``; by default the tokens that count (see ``LanguageModel.batches``). Only these
            tokens are encoded and counted. The site is replaced at these tokens only. Only the losses of predicting
            these tokens are summed; position 0 is never predicted.
        batch_size: rows that are run through the model at once.
        correlation_ks: numbers of eigenpairs at which ``low_rank_correlation`` is measured too, for dictionaries that
            read the ``mlp_out`` of a bilinear model. It costs more than everything else here.

    Returns:
        The scores of each dictionary, by its name. Each formula is in ``SAEMetrics``.

    Raises:
        ValueError: if there is no SAE, two have the same name, or one does not fit the model; if the tokens do not fit
            the model, or the mask leaves no token; if the model or an SAE gives values that are not finite; and, with
            ``correlation_ks``, as ``low_rank_correlation``.

    Memory: one run of the model; ``batch_size * seq * d_model`` numbers for each site and two more, and the codes of
    one dictionary at a time. Those of a thresholded activation are dense: any number of features of a token counts.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> saes = [SAE.init(SAEConfig(site, 1, d_model=8, expansion=4, k=2), jax.random.key(1)) for site in
        ...         ("mlp_in", "mlp_out")]
        >>> metrics = evaluate_saes(lm, saes, tokens)["1-mlp-out-x4-k2"]
        >>> metrics.l0, metrics.tokens, 0 < metrics.nmse < 1, sum(metrics.density)
        (2.0, 25, True, 32)

    Source: the metrics of Gao et al. 2024, section 2; ``loss_added`` is the measure of the bilinear-MLP paper.
    ``explained_variance`` is that of SAELens (6) and of dictionary_learning (``frac_variance_explained``); the mean
    over coordinates is scikit-learn's ``r2_score``. ``loss_recovered`` is their ``ce_loss_score`` and
    ``frac_recovered``, and mean ablation the other usual baseline.
    """
    saes = tuple(saes)
    check_names(saes)
    correlations = _correlations(lm, saes, tokens, token_mask, batch_size, tuple(correlation_ks))

    wanted, targets = places(saes), tuple(dict.fromkeys(map(target, saes)))
    totals: list[SAESums] = []
    losses: dict[Any, float] = collections.defaultdict(float)  # by what was done, in which SAE or site
    predicted = 0.0
    for batch in lm.batches(tokens, token_mask, batch_size, description="evaluate SAEs"):
        clean, values = _clean(lm, wanted, batch.tokens, batch.mask)
        sums: list[SAESums] = []
        found: dict[Any, sites.SummedLoss] = {"clean": clean}
        for sae in saes:
            one, y_hat = _dictionary_sums(sae, values[reads(sae)], values[target(sae)], batch.mask, batch.tokens)
            sums.append(one)
            found["patched", sae.name] = _edited_loss(lm, target(sae), y_hat, batch.tokens, batch.mask)
        for place in targets:
            zero = jnp.zeros_like(values[place])
            found["zeroed", place] = _edited_loss(lm, place, zero, batch.tokens, batch.mask)
        totals = [merge(*pair) for pair in zip(totals or map(nothing, sums), sums, strict=True)]
        for key, summed in found.items():
            losses[key] += float(summed.total)
        predicted += float(clean.tokens)
        if not all(map(math.isfinite, [*losses.values(), *(np.sum(total.squared_error) for total in totals)])):
            raise batch.not_finite()
    means = {target(sae): jnp.asarray(total.mean, jnp.float32) for sae, total in zip(saes, totals, strict=True)}
    for batch in lm.batches(tokens, token_mask, batch_size, description="ablate to the mean"):
        for place, mean in means.items():
            every = jnp.broadcast_to(mean, (*batch.tokens.shape, len(mean)))
            losses["mean", place] += float(_edited_loss(lm, place, every, batch.tokens, batch.mask).total)
        if not all(map(math.isfinite, losses.values())):
            raise batch.not_finite()
    by_run = {key: _ratio(loss, predicted) for key, loss in losses.items()}
    return {
        sae.name: _metrics(sae, total, by_run, correlation)
        for sae, total, correlation in zip(saes, totals, correlations, strict=True)
    }


def evaluate_sae(lm: LanguageModel, sae: SAE, tokens, token_mask=None, batch_size: int = 16) -> SAEMetrics:
    """The metrics of one SAE: ``evaluate_saes`` with this SAE alone."""
    return evaluate_saes(lm, [sae], tokens, token_mask, batch_size)[sae.name]


def controls(
    lm: LanguageModel, saes: Iterable[SAE], tokens, token_mask=None, batch_size: int = 16, *, seed: int = 0
) -> dict[str, SAEMetrics]:
    """The scores of random dictionaries, to be read beside those of the trained ones, which should be better.

    For each dictionary, ``random_dictionaries`` makes one of the same size, site, target and mean number of active
    features. Its encoder rows and decoder columns are the same random unit directions. Its bias is the mean of the site
    and its one scale the best for this text, so nothing but directions is compared. The formulas, and what a skip and a
    passthrough do, are at the top of ``measure.controls``.

    The arguments are those of ``evaluate_saes``; ``seed`` is that of the directions. The model is run over the text
    twice more than by ``evaluate_saes``.

    Returns:
        The scores of each control, by the name of the trained dictionary.

    Example:
        >>> import bilinear_jax as bj
        >>> lm, sae = bj.load("ts-nano"), bj.load_sae("ts-nano", site="mlp-out", layer=2)
        >>> tokens = bj.load_corpus("ts-nano")[:4]
        >>> control = bj.evaluation.controls(lm, [sae], tokens)[sae.name]
        >>> control.explained_variance < 0.5 < bj.evaluate_saes(lm, [sae], tokens)[sae.name].explained_variance
        True
    """
    drawn = random_dictionaries(lm, saes, tokens, token_mask, batch_size, seed=seed)
    renamed = {
        name: SAE(sae.params, dataclasses.replace(sae.config, tag=f"control-{number}"))  # names must differ
        for number, (name, sae) in enumerate(drawn.items())
    }
    found = evaluate_saes(lm, renamed.values(), tokens, token_mask, batch_size)
    return {name: found[sae.name] for name, sae in renamed.items()}


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


def _metrics(sae: SAE, sums: SAESums, losses: Mapping[Any, float], correlation) -> SAEMetrics:
    clean, patched = losses["clean"], losses["patched", sae.name]
    zeroed, mean = losses["zeroed", target(sae)], losses["mean", target(sae)]
    error, norm, spread = (float(np.sum(part)) for part in (sums.squared_error, sums.squared_norm, sums.spread))
    varies = sums.spread > ROUNDING * sums.squared_norm
    by_dim = 1 - sums.squared_error[varies] / sums.spread[varies]
    return SAEMetrics(
        nmse=_ratio(error, norm),
        explained_variance=1 - _ratio(error, spread if spread > ROUNDING * norm else 0),
        explained_variance_per_dim=_ratio(np.sum(by_dim), len(by_dim)),
        cosine=_ratio(sums.cosine, sums.tokens),
        mse=_ratio(error, sums.tokens * sae.config.d_model),
        l0=_ratio(sums.active, sums.tokens),
        l1=_ratio(sums.absolute, sums.tokens),
        dead=_ratio(np.sum(sums.fired == 0), len(sums.fired)),
        density=_density(sums.fired, sums.tokens),
        loss_clean=clean,
        loss_patched=patched,
        loss_zeroed=zeroed,
        loss_mean_ablated=mean,
        loss_added=_ratio(patched - clean, clean),
        loss_recovered=1 - _ratio(patched - clean, zeroed - clean),
        loss_recovered_mean=1 - _ratio(patched - clean, mean - clean),
        tokens=int(sums.tokens),
        correlation=correlation,
    )


ROUNDING = 1e-12
"""A spread below this part of the squared norm is float32 rounding, for instance of one token."""


def _density(fired, tokens) -> tuple[int, ...]:
    """How many features fire at which share of the tokens. Each bin holds its lower edge, the last also its upper one.

    Example:
        >>> _density(np.array([0, 1, 10, 100]), 100)  # never, at 1 % of the tokens, at 10 %, always
        (1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 1)
    """
    with np.errstate(divide="ignore"):
        shares = np.log10(np.asarray(fired, np.float64) / float(tokens))
    return tuple(np.histogram(shares, DENSITY_EDGES)[0].tolist())


def _ratio(numerator, denominator) -> float:
    """The quotient as a float; nan if the denominator is 0."""
    return float(numerator) / float(denominator) if denominator else float("nan")


# The result as text


def table(metrics: Mapping[str, SAEMetrics], random: Mapping[str, SAEMetrics] = MappingProxyType({})) -> str:
    """A Markdown table with one row per SAE. ``loss`` is the language model's own, in nats per token.

    Args:
        metrics: as ``evaluate_saes`` gives them.
        random: as ``controls`` gives them; each is a row below that of its SAE.

    Example:
        >>> numbers = dict(mse=2.0, l0=30.0, l1=9.0, dead=0.01, cosine=0.9, density=(), tokens=255)
        >>> losses = dict(loss_clean=1.4, loss_patched=1.54, loss_zeroed=3.4, loss_mean_ablated=3.1, loss_added=0.1)
        >>> numbers |= losses | dict(loss_recovered=0.93, loss_recovered_mean=0.92, explained_variance_per_dim=0.7)
        >>> one = SAEMetrics(nmse=0.2, explained_variance=0.75, correlation={2: 0.5}, **numbers)
        >>> print(table({"2-mlp-out-x4-k30": one}))
        | SAE | nmse | explained variance | l0 | dead | loss | loss added | loss recovered | r at k = 2 |
        | --- | --- | --- | --- | --- | --- | --- | --- | --- |
        | 2-mlp-out-x4-k30 | 0.2 | 0.75 | 30 | 0.01 | 1.4 | 0.1 | 0.93 | 0.5 |
    """
    ks = sorted({k for one in metrics.values() for k in one.correlation})
    names = ("nmse", "explained_variance", "l0", "dead", "loss_clean", "loss_added", "loss_recovered")
    titles = ["SAE", *(name.replace("_clean", "").replace("_", " ") for name in names), *(f"r at k = {k}" for k in ks)]
    rows = []
    for name, one in metrics.items():
        lines = {name: one} | ({f"{name}, random": random[name]} if name in random else {})
        for label, scores in lines.items():
            numbers = (*(getattr(scores, column) for column in names), *(scores.correlation.get(k) for k in ks))
            rows.append([label, *map(_written, numbers)])
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
