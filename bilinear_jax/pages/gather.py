"""Everything that feature pages state, found out in one run of the model: weights and data side by side."""

import dataclasses
from typing import Any

import numpy as np
from scipy import sparse

from bilinear_jax.cofiring import Observed, observe_all
from bilinear_jax.correlation import check_tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.pages.activity import Codes, Texts, activities, significant
from bilinear_jax.pages.facts import Feeds, InputFeature, OutputFeature, Site
from bilinear_jax.pages.options import PageOptions, checked_features
from bilinear_jax.pages.pairs import PairFinder, spectra
from bilinear_jax.pages.provenance import provenance
from bilinear_jax.tracer import Tracer


def gather(
    lm: LanguageModel,
    tracer: Tracer,
    features: list[int],
    *,
    tokens,
    options: PageOptions | None = None,
    command: str,
    dataset: str,
) -> Site:
    """What a site states of some output features, and of every input feature that their pages name.

    The model is run once, over ``options.rows`` rows of the dataset; the sparse codes of both SAEs at every token, and
    the pre-activations of the output features, are kept on the host, and everything else is computed from these. By
    default position 0 and padding don't count: they are shown, and are in no number. The same input gives the same
    facts: samples are drawn with a fixed seed for each feature. Numbers are rounded to 4 significant digits at the end.
    Progress bars show on a terminal.

    Args:
        tracer: of this model, with ``use_encoder=True``.
        features: output features, in the order of their pages.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array. Rows are taken evenly spaced.
        command, dataset: what to say of how the site was made, and of what; see ``facts.Provenance``.

    Raises:
        ValueError: for no feature, one that doesn't exist or is named twice; and as ``summaries.pair_summaries``, for
            the tracer and the tokens.

    Memory on the host: at most ``tokens (60 (k_in + k_out) + 4 U)`` bytes for U output features (0.4 GB for 512 rows of
    256 tokens, k = 20 and U = 200), 100 bytes for each pair of input features that fire together, and the facts
    themselves, about 1 MB a feature. On the device: one batch of the model, and ``batch seq (features + 4 d_hidden + 12
    U)`` numbers.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = lm.encode("One day, a little girl named Lily found a needle in her room.")
        >>> site = gather(lm, tracer, [7], tokens=tokens, command="", dataset="a sentence")
        >>> [page.activity.feature for page in site.outputs], site.provenance.rows
        ([7], 1)
        >>> {site.outputs[0].by_weight.pairs[0].i} <= {page.activity.feature for page in site.inputs}
        True
    """
    from tqdm.auto import tqdm

    options = options or PageOptions()
    features = checked_features(features, tracer)
    check_tracer(tracer, lm)
    number = min(options.rows, len(tokens))
    rows = np.arange(number) * len(tokens) // max(number, 1)
    chosen = np.asarray(tokens[rows])
    seen = observe_all(tracer, lm, chosen, features, options.batch_size)
    texts = Texts(lm, chosen, rows)
    inputs, outputs = Codes(_raw(seen, tracer), seen.counts), Codes(seen.outputs, seen.counts)

    weights = spectra(tracer, features, options)
    finder = PairFinder(tracer, features, seen, inputs, texts, options)
    found = {}
    for column, feature in enumerate(tqdm(features, desc="pairs of input features", disable=None)):
        found[feature] = finder.find(feature, column, outputs.of(feature)[0], weights[feature])

    of_outputs = activities(lm, tracer.out, features, outputs, texts, options)
    pages = [
        OutputFeature(
            activity=of_outputs[feature],
            norm=weights[feature].norm,
            effective_rank=weights[feature].effective_rank,
            eigenpairs=weights[feature].eigenpairs,
            explained=weights[feature].explained,
            by_weight=found[feature].by_weight,
            by_data=found[feature].by_data,
            heat_map=found[feature].heat_map,
        )
        for feature in features
    ]
    feeds: dict[int, list[Feeds]] = {}
    for feature in features:
        for one, (other, weight) in found[feature].feeds.items():
            feeds.setdefault(one, []).append(Feeds(feature, other, weight))
    named = sorted(one for one in feeds if one < tracer.inp.config.n_features)  # the constant input has no page
    of_inputs = activities(lm, tracer.inp, named, inputs, texts, options)
    read = [
        InputFeature(of_inputs[one], sorted(feeds[one], key=lambda feed: (-abs(feed.weight), feed.output)))
        for one in named
    ]
    counted = int(np.count_nonzero(seen.counts))
    origin = provenance(lm, tracer, chosen, counted=counted, command=command, dataset=dataset)
    return _rounded(Site(pages, read, origin))


def _raw(seen: Observed, tracer: Tracer) -> sparse.csr_array:
    """The codes of the input SAE as it gives them, before the norm of the MLP's input divides them."""
    codes = seen.inputs.copy()
    scale = np.repeat(seen.scale.astype(np.float64), np.diff(codes.indptr))
    codes.data /= np.where(codes.indices < tracer.inp.config.n_features, scale, 1)
    return codes


def _rounded(fact: Any) -> Any:
    """The same facts with every float rounded, and of Python's own types."""
    match fact:
        case float():
            return float(significant(np.array(fact)))
        case list() if fact and isinstance(fact[0], float):
            return significant(np.array(fact)).tolist()
        case list() | tuple():
            return type(fact)(_rounded(part) for part in fact)
        case dict():
            return {name: _rounded(part) for name, part in fact.items()}
        case _ if dataclasses.is_dataclass(fact):
            return type(fact)(**{field.name: _rounded(getattr(fact, field.name)) for field in dataclasses.fields(fact)})
    return fact
