"""Everything that feature pages state, from the weights and from one run of the model over the data."""

import dataclasses
from typing import Any

import numpy as np
from scipy import sparse

from bilinear_jax.explain.logits import logit_effects_of
from bilinear_jax.explain.overview import feature_weights
from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.measure.cofiring import Observed, observe_all
from bilinear_jax.measure.pairs import PairMeasurer
from bilinear_jax.nn.sites import token_array
from bilinear_jax.pages.activity import Codes, Texts, activities, significant
from bilinear_jax.pages.facts import Feeds, InputFeature, OutputFeature, Site
from bilinear_jax.pages.making import making
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.pages.pairs import lay_out
from bilinear_jax.pages.provenance import provenance

OF_WEIGHTS = ("norm", "effective_rank", "eigenpairs", "explained")
"""The fields of ``FeatureWeights`` that are kept."""


def gather(
    tracer: Tracer,
    features: list[int],
    *,
    tokens,
    options: PageOptions | None = None,
    command: str,
    dataset: str,
) -> Site:
    """The facts of a site about some output features, and about every input feature that their pages name.

    The model is run over ``options.rows`` rows of the dataset, and again over the first and the last of them, on which
    eigenpairs are chosen and scored. The sparse codes of both SAEs at every token and
    the pre-activations of the output features are kept on the host. Everything else is computed from them. Position 0
    and padding do not count (see ``LanguageModel.batches``): they are shown, but no number contains them. The same
    input gives the same facts: samples are drawn with a fixed seed for each feature. Numbers are rounded to 4
    significant digits at the end. Progress bars show on a terminal.

    Args:
        tracer: with ``use_encoder=True``; its model is run.
        features: output features, in the order of their pages.
        tokens: token ids ``[rows, seq]``; may be a memory-mapped array. The rows that are used are evenly spaced.
        options: how much the pages show; by default ``PageOptions()``.
        command, dataset: how the site is made, and the name of the dataset; see ``facts.Provenance``.

    Raises:
        ValueError: if there is no feature, or one is named twice; and as ``pair_summaries``, for the tracer and the
            tokens.
        UnknownNameError: for an output feature that does not exist.

    Memory: on the host, at most ``tokens (60 (k_in + k_out) + 4 U)`` bytes for U output features (0.4 GB for 512 rows
    of 256 tokens, k = 20 and U = 200), 100 bytes for each pair of input features that fire together, and about 1 MB of
    facts per feature. On the device, one batch of the model, and ``batch seq (features + 4 d_hidden + 12 U)`` numbers.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> tracer = bj.Tracer(lm, layer=2)
        >>> tokens = lm.encode("One day, a little girl named Lily found a needle in her room.")
        >>> site = gather(tracer, [7], tokens=tokens, command="", dataset="a sentence")
        >>> [page.activity.feature for page in site.outputs], site.provenance.rows
        ([7], 1)
        >>> {site.outputs[0].by_weight.pairs[0].i} <= {page.activity.feature for page in site.inputs}
        True
    """
    options, lm, tokens = options or PageOptions(), tracer.lm, token_array(tokens)
    tracer.require_encoder()
    number = min(options.rows, len(tokens))
    rows = np.arange(number) * len(tokens) // max(number, 1)
    chosen = np.asarray(tokens[rows])

    # The weights, the data, and the logits of all features that have a page.
    request = {"eigenpairs": options.eigenpairs, "reads": options.reads, "pairs": options.pairs}
    asked = feature_weights(tracer, features, **request)
    seen = observe_all(tracer, chosen, features, options.batch_size)
    outputs, texts = Codes(seen.outputs, seen.counts), Texts(lm.tokenizer, chosen, rows, seen.counts)
    made = making(tracer, features, chosen, seen, outputs, texts, options)
    measurer, weights, measured = PairMeasurer(seen, chosen.shape[1]), {}, {}
    for column, one in enumerate(asked):
        its = made[one.feature]
        finds = () if its is None else {feature for square in its.squares for feature, _ in square.finds}
        shown = {"n": options.pairs, "places": options.pair_contexts, "also": finds}
        measured[one.feature] = measurer.measure(one, column, outputs.of(one.feature).places, **shown)
        weights[one.feature] = {name: getattr(one, name) for name in OF_WEIGHTS}  # its matrix is large
    n_inputs = tracer.inp.config.n_features
    named = sorted({one for some in measured.values() for one in some.named if one < n_inputs})
    of_outputs = logit_effects_of(lm, tracer.out, features, options.logits)
    of_inputs = logit_effects_of(lm, tracer.inp, named, options.logits)

    # The facts of the pages.
    inputs = Codes(_raw(seen, n_inputs), seen.counts)
    found, feeds = [], {one: [] for one in named}
    acts = activities(tracer.out.name, features, outputs, texts, options, of_outputs)
    for feature in features:
        why = lay_out(measured[feature], inputs, texts, options)
        lists = {"by_weight": why.by_weight, "by_data": why.by_data, "heat_map": why.heat_map}
        lists |= {"making": made[feature]}
        found.append(OutputFeature(activity=acts[feature], **weights[feature], **lists))
        for one, (other, weight) in why.feeds.items():
            if one < n_inputs:  # the constant input has no page
                feeds[one].append(Feeds(feature, other, weight))
    acts = activities(tracer.inp.name, named, inputs, texts, options, of_inputs)
    read = [
        InputFeature(acts[one], sorted(feeds[one], key=lambda feed: (-abs(feed.weight), feed.output))) for one in named
    ]
    counted = int(np.count_nonzero(seen.counts))
    return _rounded(Site(found, read, provenance(tracer, chosen, counted=counted, command=command, dataset=dataset)))


def _raw(seen: Observed, n_inputs: int) -> sparse.csr_array:
    """The codes as the input SAE gives them, not divided by the norm of the MLP's input."""
    codes = seen.inputs.copy()
    scale = np.repeat(seen.scale.astype(np.float64), np.diff(codes.indptr))
    codes.data /= np.where(codes.indices < n_inputs, scale, 1)
    return codes


def _rounded(fact: Any) -> Any:
    """The same facts with every number rounded, as Python's own types."""
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
