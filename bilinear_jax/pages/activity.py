"""What the features of one SAE do on a dataset: contexts, histograms, logits; of all features from one run."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.pages.facts import Activity, Context, ContextGroup, Histogram, TokenEffect
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.rendering import pieces, shown_around, token_label
from bilinear_jax.visualizer import logit_effects

FEATURES_AT_ONCE = 64  # bounds the logits that are held, [64, n_vocab]; it changes no result


class Texts:
    """The dataset's rows as text, each read once; a token is named by its place among all, row by row."""

    def __init__(self, lm: LanguageModel, tokens: Int[np.ndarray, "rows seq"], rows: Int[np.ndarray, " rows"]):
        self.tokenizer, self.tokens, self.rows = lm.tokenizer, tokens, rows
        counts = np.asarray(lm.token_mask(tokens))
        self.last = np.where(counts.any(axis=1), tokens.shape[1] - 1 - np.argmax(counts[:, ::-1], axis=1), 0)
        self.label = functools.cache(functools.partial(token_label, lm.tokenizer))
        self._texts: dict[int, list[str]] = {}

    def around(self, place: int, window: int) -> tuple[int, int, int, list[str]]:
        """``(row of the dataset, position of the first token shown, place after the last one, texts)``."""
        row, position = divmod(place, self.tokens.shape[1])
        if row not in self._texts:
            self._texts[row] = pieces(self.tokenizer, self.tokens[row])
        texts = self._texts[row]
        start, stop = shown_around(texts, position, window, int(self.last[row]))
        return int(self.rows[row]), start, place - position + stop, texts[start:stop]


class Codes:
    """The codes of an SAE at all tokens, feature by feature; those of tokens that don't count are context alone."""

    def __init__(self, codes: sparse.csr_array, counts: Bool[np.ndarray, " tokens"]):
        columns = codes.tocsc()
        columns.sort_indices()
        self.ends, self.places, self.values = columns.indptr, columns.indices, columns.data
        self.counts, self.shown = counts, significant(columns.data)

    def of(self, feature: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """``(places, codes)``: the tokens that count at which a feature fires, in order, and how much."""
        part = slice(self.ends[feature], self.ends[feature + 1])
        kept = self.counts[self.places[part]]
        return self.places[part][kept], self.values[part][kept]

    def between(self, feature: int, start: int, stop: int) -> list[float]:
        """A feature's codes at the places from start to stop, those that don't count too; rounded."""
        part = slice(self.ends[feature], self.ends[feature + 1])
        first, last = part.start + np.searchsorted(self.places[part], (start, stop))
        found = [0.0] * (stop - start)
        for place, value in zip(self.places[first:last].tolist(), self.shown[first:last].tolist(), strict=True):
            found[place - start] = value
        return found


def context(texts: Texts, codes: Codes, feature: int, place: int, window: int, second: int | None = None) -> Context:
    """What stands around a token, with the codes of a feature, or of two."""
    row, first, stop, shown = texts.around(place, window)
    start = stop - len(shown)
    values = None if second is None else codes.between(second, start, stop)
    return Context(row, first, place - start, shown, codes.between(feature, start, stop), values)


def activities(
    lm: LanguageModel, sae: SAE, features: list[int], codes: Codes, texts: Texts, options: PageOptions
) -> dict[int, Activity]:
    """What each of some features does: see ``facts.Activity``. Sorting by |activation|; of equals the first token."""
    from tqdm.auto import tqdm

    counted = int(np.count_nonzero(codes.counts))
    effects = token_effects(lm, sae, features, texts, options.logits)
    return {
        feature: _activity(feature, codes, texts, options, counted, *effect)
        for feature, effect in tqdm(
            zip(features, effects, strict=True), total=len(features), desc=f"features of {sae.name}", disable=None
        )
    }


def _activity(
    feature: int,
    codes: Codes,
    texts: Texts,
    options: PageOptions,
    counted: int,
    raised: list[TokenEffect],
    lowered: list[TokenEffect],
) -> Activity:
    places, values = codes.of(feature)
    size = np.abs(values)
    order = np.argsort(-size, kind="stable")
    top = best_of_rows(places // texts.tokens.shape[1], size)[: options.contexts]

    def group(chosen: np.ndarray, ends: np.ndarray) -> ContextGroup:
        """The contexts chosen, from a range that has these two ends; [] if the feature is dead."""
        if not len(ends):
            return ContextGroup(0.0, 0.0, 0.0, [])
        low, high = ends.min(), ends.max()
        share = np.mean((size >= low) & (size <= high))
        shown = [context(texts, codes, feature, int(places[one]), options.window) for one in chosen]
        return ContextGroup(float(low), float(high), float(share), shown)

    lower, random = [], np.random.default_rng(feature)
    for part in np.array_split(order, options.groups):
        left = part[~np.isin(part, top)]
        drawn = np.sort(random.permutation(len(left))[: options.samples])
        if drawn.size:
            lower.append(group(left[drawn], size[part]))
    tokens = Counter(texts.tokens.ravel()[places[top]].tolist()).most_common(options.top_tokens)
    return Activity(
        feature=feature,
        density=len(places) / counted,
        largest=float(size[top[0]]) if len(top) else 0.0,
        top_tokens=[texts.label(token) for token, _ in tokens],
        top=group(top, size[top]),
        lower=lower,
        histogram=_histogram(values, options.bins),
        raised=raised,
        lowered=lowered,
    )


def best_of_rows(rows: Int[np.ndarray, " n"], size: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """The largest of each row, the largest first; of equals the first. ``rows`` ascend.

    Example:
        >>> best_of_rows(np.array([0, 0, 0, 4, 6]), np.array([1.0, 3.0, 3.0, 2.0, 3.0])).tolist()
        [1, 4, 3]
    """
    if not len(rows):
        return np.zeros(0, int)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    largest = np.maximum.reduceat(size, starts)
    is_largest = np.flatnonzero(size == np.repeat(largest, np.diff(starts, append=len(rows))))
    first = is_largest[np.searchsorted(is_largest, starts)]
    return first[np.argsort(-largest, kind="stable")]


def _histogram(values: Float[np.ndarray, " n"], bins: int) -> Histogram:
    """Bars of equal width from 0, or the lowest, up to the largest, or 0."""
    if not len(values):
        return Histogram([], [])
    counts, edges = np.histogram(values, np.linspace(min(values.min(), 0), max(values.max(), 0), bins + 1))
    return Histogram(edges.tolist(), counts.tolist())


def token_effects(
    lm: LanguageModel, sae: SAE, features: list[int], texts: Texts, k: int
) -> list[tuple[list[TokenEffect], list[TokenEffect]]]:
    """``(raised, lowered)`` of each feature, as ``logit_effects``."""
    if not k or not features:
        return [([], [])] * len(features)
    sae = dataclasses.replace(sae, source=None)
    padded = jnp.asarray(np.pad(features, (0, -len(features) % FEATURES_AT_ONCE), mode="edge"), jnp.int32)
    found = jax.device_get(_effects(lm, sae, padded.reshape(-1, FEATURES_AT_ONCE), k))
    sides = ((found.raised, found.raised_by), (found.lowered, found.lowered_by))
    listed = []
    for ids, effects in sides:
        ids, effects = (part.reshape(-1, part.shape[-1])[: len(features)].tolist() for part in (ids, effects))
        listed.append(
            [
                [TokenEffect(texts.label(token), effect) for token, effect in zip(*row, strict=True)]
                for row in zip(ids, effects, strict=True)
            ]
        )
    return list(zip(*listed, strict=True))


@functools.partial(jax.jit, static_argnames="k")
def _effects(lm: LanguageModel, sae: SAE, features, k: int):
    def some(part):
        return jax.vmap(lambda feature: logit_effects(lm, sae, feature, k))(part)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(some, features)


def significant(values: Float[np.ndarray, "*n"], digits: int = 4) -> Float[np.ndarray, "*n"]:
    """Rounded to so many significant digits, so that the shortest decimal of each has no more of them.

    Example:
        >>> significant(np.array([0.0, 12345.6, -0.000123456])).tolist()
        [0.0, 12350.0, -0.0001235]
    """
    size = np.where(values == 0, 1, np.abs(values))
    power = np.clip(digits - 1 - np.floor(np.log10(size)), -22, 22)  # 10.0 ** 22 is the last that is exact
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    return np.asarray(np.round(values * up / down) / up * down)
