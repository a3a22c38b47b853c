"""What the features of one SAE do on a dataset: contexts, histograms and logits, for all features from one run."""

import functools
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from bilinear_jax.explain.logits import LogitEffects
from bilinear_jax.measure.cofiring import best_of_rows
from bilinear_jax.pages.facts import Activity, Context, ContextGroup, Histogram, TokenEffect
from bilinear_jax.pages.options import PageOptions
from bilinear_jax.show.text import pieces, shown_around, token_label


class Texts:
    """The dataset's rows as text; each row is decoded once. A token's place is its number among all, row by row."""

    def __init__(
        self,
        tokenizer: Any,
        tokens: Int[np.ndarray, "rows seq"],
        rows: Int[np.ndarray, " rows"],  # of the dataset
        counts: Bool[np.ndarray, " tokens"],  # which tokens count, row by row
    ):
        self.tokenizer, self.tokens, self.rows, counts = tokenizer, tokens, rows, counts.reshape(tokens.shape)
        self.last = np.where(counts.any(axis=1), tokens.shape[1] - 1 - np.argmax(counts[:, ::-1], axis=1), 0)
        self.label = functools.cache(functools.partial(token_label, tokenizer))
        self._texts: dict[int, list[str]] = {}

    def around(self, place: int, window: int) -> "Around":
        """The tokens that are shown around one token."""
        row, position = divmod(place, self.tokens.shape[1])
        if row not in self._texts:
            self._texts[row] = pieces(self.tokenizer, self.tokens[row])
        texts = self._texts[row]
        start, stop = shown_around(texts, position, window, int(self.last[row]))
        return Around(int(self.rows[row]), start, place - position + stop, texts[start:stop])


class Around(NamedTuple):
    """Some tokens of one row, as a context shows them."""

    row: int  # of the dataset
    start: int  # the position of the first token in its row
    stop: int  # the place after the last token
    texts: list[str]


class Firing(NamedTuple):
    """The tokens at which a feature fires, in order; only tokens that count (see ``LanguageModel.batches``)."""

    places: Int[np.ndarray, " n"]  # among all tokens, row by row
    codes: Float[np.ndarray, " n"]


class Codes:
    """The codes of an SAE at all tokens, feature by feature.

    Codes of tokens that do not count (see ``LanguageModel.batches``) are shown in contexts, but used nowhere else.
    """

    def __init__(self, codes: sparse.csr_array, counts: Bool[np.ndarray, " tokens"]):
        columns = codes.tocsc()
        columns.sort_indices()
        self.ends, self.places, self.values = columns.indptr, columns.indices, columns.data
        self.counts, self.shown = counts, significant(columns.data)

    def of(self, feature: int) -> "Firing":
        """Where a feature fires, and its codes there."""
        part = slice(self.ends[feature], self.ends[feature + 1])
        kept = self.counts[self.places[part]]
        return Firing(self.places[part][kept], self.values[part][kept])

    def between(self, feature: int, start: int, stop: int) -> list[float]:
        """A feature's rounded codes at the places from start to stop, with tokens that do not count."""
        part = slice(self.ends[feature], self.ends[feature + 1])
        first, last = part.start + np.searchsorted(self.places[part], (start, stop))
        found = [0.0] * (stop - start)
        for place, value in zip(self.places[first:last].tolist(), self.shown[first:last].tolist(), strict=True):
            found[place - start] = value
        return found


def context(texts: Texts, codes: Codes, feature: int, place: int, window: int, second: int | None = None) -> Context:
    """The tokens around one token, with the codes of one feature or of two."""
    row, first, stop, shown = texts.around(place, window)
    start = stop - len(shown)
    values = None if second is None else codes.between(second, start, stop)
    return Context(row, first, place - start, shown, codes.between(feature, start, stop), values)


def activities(
    name: str, features: list[int], codes: Codes, texts: Texts, options: PageOptions, effects: LogitEffects
) -> dict[int, Activity]:
    """What each of these features does: see ``facts.Activity``. Sorted by |activation|; ties go to the first token.

    Args:
        name: of the SAE, for the progress bar.
        effects: the logit effects of these features, ``[U, options.logits]``.
    """
    from tqdm.auto import tqdm

    counted = int(np.count_nonzero(codes.counts))
    raised = _token_effects(texts, effects.raised, effects.raised_by)
    lowered = _token_effects(texts, effects.lowered, effects.lowered_by)
    bar = tqdm(zip(features, raised, lowered, strict=True), total=len(features), desc=f"pages of {name}", disable=None)
    return {feature: _activity(feature, codes, texts, options, counted, *sides) for feature, *sides in bar}


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
        """The chosen contexts, from the range between the smallest and largest of ``ends``; empty if there are none."""
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


def _histogram(values: Float[np.ndarray, " n"], bins: int) -> Histogram:
    """A histogram with bars of equal width, from the lowest value or 0 to the largest value or 0."""
    if not len(values):
        return Histogram([], [])
    counts, edges = np.histogram(values, np.linspace(min(values.min(), 0), max(values.max(), 0), bins + 1))
    return Histogram(edges.tolist(), counts.tolist())


def _token_effects(texts: Texts, ids, effects) -> list[list[TokenEffect]]:
    """The tokens whose logits each feature changes, with their labels."""
    rows = zip(np.asarray(ids).tolist(), np.asarray(effects).tolist(), strict=True)
    return [[TokenEffect(texts.label(token), effect) for token, effect in zip(*row, strict=True)] for row in rows]


def significant(values: Float[np.ndarray, "*n"], digits: int = 4) -> Float[np.ndarray, "*n"]:
    """The values rounded to this many significant digits. Written as decimals they have no more digits.

    Example:
        >>> significant(np.array([0.0, 12345.6, -0.000123456])).tolist()
        [0.0, 12350.0, -0.0001235]
    """
    size = np.where(values == 0, 1, np.abs(values))
    power = np.clip(digits - 1 - np.floor(np.log10(size)), -22, 22)  # 10.0 ** 22 is the largest exact power of 10
    up, down = 10.0 ** np.maximum(power, 0), 10.0 ** np.maximum(-power, 0)
    return np.asarray(np.round(values * up / down) / up * down)
