"""How well SAEs stand in for the sites that they read: metrics as sums and counts, divided once at the end."""

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

from bilinear_jax.activations import check_dataset, check_names, no_token, not_finite, site_values, token_batches
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import Edit, Site

CLEAN, PATCHED, ZEROED = 0, 1, 2
"""What ``edited_loss`` does with a site: leave it, put in the SAE's reconstruction, put in 0."""


@dataclasses.dataclass(frozen=True)
class SAEMetrics:
    """What ``evaluate_saes`` measures of an SAE. Losses are in nats a token."""

    nmse: float  # sum |x - x_hat|^2 / sum |x|^2 over tokens: 0 is perfect, 1 is as bad as answering 0
    explained_variance: float  # 1 - sum |x - x_hat|^2 / sum |x - mean|^2: 1 is perfect, 0 is answering the mean; or nan
    mse: float  # squared error a coordinate: sum |x - x_hat|^2 / (tokens d_model), in squared units of the site
    l0: float  # codes other than 0 a token: k, or fewer where the top-k holds exact zeros
    l1: float  # sum of |codes| a token, in units of the site
    dead: float  # fraction of the features, 0 to 1, that no token activated
    loss_clean: float  # the model's cross entropy, untouched: its own loss on the text
    loss_patched: float  # the same with the site replaced by the SAE's reconstruction
    loss_zeroed: float  # the same with the site replaced by 0
    loss_added: float  # (patched - clean) / clean: the relative rise of the loss, 0 is perfect
    loss_recovered: float  # 1 - (patched - clean) / (zeroed - clean): 1 is perfect, 0 as bad as zeroing; or nan
    tokens: int  # number of tokens that the codes were measured on
    correlation: Mapping[int, float]  # by k: the mean r of correlation.low_rank_correlation; empty unless it was asked


class SAESums(NamedTuple):
    """What the metrics of one SAE's reconstruction are quotients of; ``merge`` adds those of two batches."""

    squared_error: Float[Array | np.ndarray, ""]  # sum |x - x_hat|^2
    squared_norm: Float[Array | np.ndarray, ""]  # sum |x|^2
    spread: Float[Array | np.ndarray, ""]  # sum |x - mean|^2, about the mean of these tokens
    mean: Float[Array | np.ndarray, " d_model"]  # of x; 0 where there are no tokens
    active: Float[Array | np.ndarray, ""]  # number of codes other than 0
    absolute: Float[Array | np.ndarray, ""]  # sum of |codes|
    fired: Float[Array | np.ndarray, " features"]  # tokens on which each feature's code is not 0
    tokens: Float[Array | np.ndarray, ""]  # number of tokens in the mask


def sae_sums(
    lm: LanguageModel, saes: Iterable[SAE], tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> tuple[SAESums, ...]:
    """The sums of one batch, for each SAE, from one run of as many layers as they need.

    A pure function, for your own ``jit`` and loop. Arguments as in ``evaluate_saes``.
    """
    saes = tuple(saes)
    counted = token_mask[..., None].astype(jnp.float32)
    number = jnp.sum(counted)

    def sums(sae: SAE, x: Float[Array, "batch seq d_model"]) -> SAESums:
        codes = sae.encode(x, sparse=True)
        nonzero = ((codes.values != 0) & token_mask[..., None]).astype(jnp.float32)
        mean = jnp.sum(x * counted, axis=(0, 1)) / jnp.maximum(number, 1)
        return SAESums(
            squared_error=jnp.sum(((x - sae.decode(codes, x)) * counted) ** 2),
            squared_norm=jnp.sum((x * counted) ** 2),
            spread=jnp.sum(((x - mean[None, None]) * counted) ** 2),
            mean=mean,
            active=jnp.sum(nonzero),
            absolute=jnp.sum(jnp.abs(codes.values) * counted),
            fired=jnp.zeros(sae.config.n_features).at[codes.indices].add(nonzero),
            tokens=number,
        )

    return tuple(sums(sae, x) for sae, x in zip(saes, site_values(lm, saes, tokens), strict=True))


def merge(a: SAESums, b: SAESums) -> SAESums:
    """The sums of both batches together, in float64 on the host.

    All fields add up but two, with n tokens: ``mean = (n_a mean_a + n_b mean_b) / n`` and
    ``spread = spread_a + spread_b + |mean_b - mean_a|^2 n_a n_b / n``, in which nothing cancels.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    a, b = (jax.tree.map(functools.partial(np.asarray, dtype=np.float64), sums) for sums in (a, b))
    total = jax.tree.map(np.add, a, b)
    share = b.tokens / max(total.tokens, 1)
    shift = b.mean - a.mean
    return total._replace(mean=a.mean + share * shift, spread=a.spread + b.spread + a.tokens * share * np.sum(shift**2))


def edited_loss(
    lm: LanguageModel, sae: SAE, how, tokens: Int[Array, "batch seq"], token_mask: Bool[Array, "batch seq"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed cross entropy, and of how many tokens, with the SAE's site left, reconstructed or zeroed.

    A pure function. ``how`` is ``CLEAN``, ``PATCHED`` or ``ZEROED``, and may be traced: one compilation for all three.
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
    """Reconstruction, sparsity and the effect on the model's loss of SAEs, in one pass over a token dataset.

    For each batch the model is run once for its clean loss, once for the activations of all SAEs, once for each site
    with the site replaced by 0, and once for each SAE with its site replaced by the reconstruction. Everything is
    summed over the dataset, in float64, and divided once, so that the numbers don't depend on ``batch_size``. Each SAE
    is compiled for once: call it again with other parameters, during training for instance, and nothing is compiled.
    A progress bar shows on a terminal. ``table`` and ``to_json`` write the result down.

    Args:
        saes: at any sites and layers, with different names.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        token_mask: ``[rows, seq]``, by default all but position 0 and the padding at the end of each row. Only
            these tokens are encoded and counted; only at these the site is replaced, elsewhere it keeps its value;
            and only the losses of predicting these are summed (position 0 is never predicted).
        correlation_ks: numbers of eigenpairs at which ``correlation.low_rank_correlation`` is measured too, for those
            SAEs that read the ``mlp_out`` of a bilinear model; it costs more than all the rest.

    Returns:
        For each SAE's name its metrics.

    Raises:
        ValueError: for no SAE, two of the same name, one that doesn't fit the model, tokens that don't, a mask that
            leaves no token; for a model or an SAE that gives values that are not finite; and, with
            ``correlation_ks``, as ``low_rank_correlation`` does.

    Memory: one batch of the activations of all sites, and of the codes, ``batch_size * seq * (d_model + 2 k)`` numbers
    an SAE, beside one run of the model.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> tokens = jnp.arange(30).reshape(5, 6) % 10
        >>> lm = LanguageModel(jax.jit(Transformer(config).init)(jax.random.key(0), tokens)["params"], config)
        >>> saes = [SAE.init(SAEConfig(site, 1, d_model=8, expansion=4, k=2), jax.random.key(1)) for site in
        ...         ("mlp_in", "mlp_out")]
        >>> metrics = evaluate_saes(lm, saes, tokens)["1-mlp-out-x4-k2"]
        >>> metrics.l0, metrics.tokens, 0 < metrics.nmse < 1
        (2.0, 25, True)

    Source: the metrics of Gao et al. 2024, section 2; loss added is the measure of the bilinear-MLP paper.
    """
    from tqdm.auto import tqdm

    saes = tuple(dataclasses.replace(sae, source=None) for sae in saes)  # of no account, and compiled for
    check_names(saes)
    check_dataset(tokens, token_mask)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    batch_size = min(batch_size, len(tokens))
    correlations = _correlations(lm, saes, tokens, token_mask, batch_size, tuple(correlation_ks))

    runs = [(saes[0], CLEAN), *((sae, PATCHED) for sae in saes)]
    runs += [(sae, ZEROED) for sae in {_site(sae): sae for sae in reversed(saes)}.values()]
    totals: list[SAESums] = []
    losses: dict[tuple, float] = {}
    predicted = 0.0
    with tqdm(total=len(tokens), desc="evaluate SAEs", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, token_mask, batch_size):
            sums = _sae_sums(lm, saes, batch, mask)
            totals = [merge(*pair) for pair in zip(totals or map(_nothing, sums), sums, strict=True)]
            summed = {_key(sae, how): _edited_loss(lm, sae, how, batch, mask) for sae, how in runs}
            losses = {key: losses.get(key, 0.0) + float(loss) for key, (loss, _) in summed.items()}
            if not all(map(math.isfinite, losses.values())):
                raise not_finite(start, min(batch_size, len(tokens) - start))
            predicted += float(summed[_key(saes[0], CLEAN)][1])
            bar.update(min(batch_size, len(tokens) - start))
    if not totals[0].tokens:
        raise no_token()
    means = {key: _ratio(loss, predicted) for key, loss in losses.items()}
    found = {}
    for sae, sums, correlation in zip(saes, totals, correlations, strict=True):
        clean, patched, zeroed = (means[_key(sae, how)] for how in (CLEAN, PATCHED, ZEROED))
        found[sae.name] = _metrics(sae, sums, clean, patched, zeroed, correlation)
    return found


def evaluate_sae(lm: LanguageModel, sae: SAE, tokens, token_mask=None, batch_size: int = 16) -> SAEMetrics:
    """The metrics of one SAE: ``evaluate_saes`` of it alone."""
    return evaluate_saes(lm, [sae], tokens, token_mask, batch_size)[sae.name]


def _site(sae: SAE) -> tuple[str, int]:
    return sae.config.site, sae.config.layer


def _key(sae: SAE, how: int) -> tuple:
    """What a loss depends on: nothing, the SAE, or its site."""
    return {CLEAN: (), PATCHED: (sae.name,), ZEROED: _site(sae)}[how]


def _nothing(like: SAESums) -> SAESums:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)


def _correlations(lm, saes, tokens, token_mask, batch_size: int, ks) -> list[dict[int, float]]:
    """For each SAE the mean r by k; nothing for those that have none."""
    from bilinear_jax.correlation import low_rank_correlation
    from bilinear_jax.tracer import Tracer

    found = []
    for sae in saes:
        tensor = lm.config.bilinear and lm.config.gate is None
        if not ks or not tensor or sae.config.site != "mlp_out" or sae.config.bilinear_encoder:
            found.append({})
            continue
        inp = dataclasses.replace(sae, config=dataclasses.replace(sae.config, site="mlp_in"))  # of no account
        tracer = Tracer(lm, sae.config.layer, inp, sae)
        got = low_rank_correlation(tracer, lm, tokens, ks, token_mask=token_mask, batch_size=batch_size)
        found.append(dict(zip(got.ks.tolist(), got.mean.tolist(), strict=True)))
    return found


def _metrics(sae: SAE, sums: SAESums, clean: float, patched: float, zeroed: float, correlation) -> SAEMetrics:
    varies = sums.spread > 1e-12 * sums.squared_norm  # what is less is float32's rounding, of one token for instance
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
    """The quotient as a float; nan where there is nothing to divide by."""
    return float(numerator) / float(denominator) if denominator else float("nan")


# The result, written down


def table(metrics: Mapping[str, SAEMetrics]) -> str:
    """A Markdown table, a row for each SAE; ``loss`` is the language model's own, in nats a token.

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
    """All metrics of all SAEs, ``{name: {"nmse": ..., ...}}``, as strict JSON: what is not a finite number is null."""
    entries = {name: dataclasses.asdict(one) for name, one in metrics.items()}
    return json.dumps(finite_or_null(entries), indent=2, allow_nan=False)


def finite_or_null(value):
    """What strict JSON can say of a value, or of all values in dicts: None for a number that is not finite."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def mean_loss(lm: LanguageModel, tokens, batch_size: int = 16) -> tuple[float, int]:
    """The mean cross entropy in nats, and of how many tokens: all but position 0 and the padding at rows' ends.

    Args:
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
        batch_size: rows a step; it shows in the last digits alone.

    Raises:
        ValueError: for tokens that the model can't read, if none of them is predicted, or if the loss is not finite.

    Example:
        >>> import bilinear_jax as bj
        >>> loss, count = mean_loss(bj.load("ts-nano"), bj.checkpoint.corpus("ts-nano")[:2])
        >>> 1 < loss < 3, count <= 2 * 255
        (True, True)
    """
    from tqdm.auto import tqdm

    check_dataset(tokens, None)
    total, count = 0.0, 0
    with tqdm(total=len(tokens), desc="loss", disable=None, unit="row") as bar:
        for start, batch, mask in token_batches(lm, tokens, None, min(batch_size, len(tokens))):
            number = int(mask.sum())
            if number:
                total, count = total + float(lm.loss(batch, mask)) * number, count + number
            if not math.isfinite(total):
                raise not_finite(start, min(len(batch), len(tokens) - start))
            bar.update(min(len(batch), len(tokens) - bar.n))
    if not count:
        raise ValueError("no token is predicted: rows need at least two tokens that are no padding")
    return total / count, count


def attn_scale_losses(lm: LanguageModel, tokens, batch_size: int = 16) -> dict[float, float]:
    """The ``mean_loss`` with the attention's output scaled by 1 and by ``1 / sqrt(2 n_layer)``, by that factor.

    Published files from before November 2024 don't say which of the two a model was trained with. On text like that
    which it was trained on, the right one is lower by far.

    Example:
        >>> import bilinear_jax as bj
        >>> losses = attn_scale_losses(bj.load("ts-nano", attn_scale=1), bj.checkpoint.corpus("ts-nano")[:2])
        >>> [round(scale, 4) for scale in losses], min(losses, key=losses.get) < 1
        ([1.0, 0.3536], True)
    """
    scales = (1.0, 1 / math.sqrt(2 * lm.config.n_layer))
    models = (dataclasses.replace(lm, config=dataclasses.replace(lm.config, attn_scale=scale)) for scale in scales)
    return {scale: mean_loss(model, tokens, batch_size)[0] for scale, model in zip(scales, models, strict=True)}
