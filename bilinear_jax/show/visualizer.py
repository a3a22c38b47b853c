"""What a feature means, on a terminal: the contexts that activate it most, and the logits that it changes."""

import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from bilinear_jax.errors import check_count
from bilinear_jax.explain.logits import logit_effects
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import (
    RankedRows,
    TopActivations,
    feature_codes,
    find_top,
    load_top_activations,
    locate,
    row_codes,
    top_activations,
)
from bilinear_jax.nn.sae import SAE
from bilinear_jax.show.text import (
    DARK,
    LIGHT,
    Context,
    Palette,
    context_text,
    pieces,
    shaded,
    shown_around,
    token_label,
)
from bilinear_jax.store.datasets import load_corpus
from bilinear_jax.store.sources import folder_of
from bilinear_jax.store.terminal import say
from weights_convert.files import inside

if TYPE_CHECKING:
    from bilinear_jax.show.html import Html

TOP_FILE = "top-activations.safetensors"
"""The file name of top activations in published repositories and beside models."""


class Visualizer:
    """Prints the contexts that activate an SAE's features most, with every token shaded by its activation.

        vis = Visualizer(lm, tracer.out)
        vis(3834, 751, k=5, dark=True)

    Args:
        lm: the model that the SAE belongs to. It is run only on the rows that are shown.
        sae: the SAE.
        tokens: the token dataset ``[rows, seq]`` over which the top activations were computed. By default the
            ``corpus.npy`` beside the model.
        top: the top activations: ``TopActivations``, ``RankedRows``, or what ``load_top_activations`` or
            ``top_activations`` returns; or a ``.safetensors`` file; or the folder or hub name of a repository with a
            ``top-activations.safetensors``. By default they are computed over ``tokens`` if these are given, and
            otherwise read from the file beside the model.
        tokenizer: by default the model's.

    Raises:
        ValueError: if the SAE does not fit the model, or if there are no tokens or top activations; the message says
            what to pass.
        FileNotFoundError: if the file of top activations does not exist.
    """

    def __init__(
        self,
        lm: LanguageModel,
        sae: SAE,
        tokens=None,
        top: TopActivations | RankedRows | Mapping[str, Any] | str | Path | None = None,
        *,
        tokenizer: Any = None,
    ):
        if sae.config.d_model != lm.config.d_model or sae.config.layer >= lm.config.n_layer:
            raise ValueError(
                f"SAE {sae.name} belongs to another model: it reads {sae.config.d_model} numbers at layer "
                f"{sae.config.layer}, but this model has {lm.config.n_layer} layers with d_model {lm.config.d_model}"
            )
        self.lm, self.sae, self._tokenizer = lm, sae, tokenizer
        computed = tokens is not None and top is None
        self.tokens = _corpus(lm) if tokens is None else tokens
        self.top = top_activations(lm, sae, tokens)[sae.name] if computed else _chosen(lm, sae, top)

    @property
    def tokenizer(self):
        return self.lm.tokenizer if self._tokenizer is None else self._tokenizer

    def __call__(
        self,
        *features: SupportsIndex,
        k: int = 5,
        dark: bool | None = None,
        color: bool | None = None,
        window: int = 10,
        logits: int = 6,
        file: Any = None,
    ) -> None:
        """Print each feature: its logits, then its ``k`` largest activations with the tokens around them.

        Args:
            features: feature numbers.
            k: contexts per feature.
            dark: colours for a dark background; False: for a light one. By default what the terminal says in
                ``COLORFGBG``; dark if it says nothing.
            color: force ANSI colours on or off. By default they are on if the output is a terminal or a notebook and
                ``NO_COLOR`` is not set. Without colours the token of the activation is in [brackets].
            window: tokens shown on either side.
            logits: tokens listed as raised and as lowered; 0 leaves them out.
            file: a text stream to print to; by default the standard output.

        Raises:
            ValueError: if k is below 1, or window or logits is below 0.
            UnknownNameError: for a feature that the SAE does not have.
        """
        stream = sys.stdout if file is None else file
        color = _colorful(stream) if color is None else color
        text = self.text(*features, k=k, dark=dark, color=color, window=window, logits=logits)
        say(text, stream, raw=color)  # with colours it is safe already: every token is visible

    def text(
        self,
        *features: SupportsIndex,
        k: int = 5,
        dark: bool | None = None,
        color: bool = False,
        window: int = 10,
        logits: int = 6,
    ) -> str:
        """What ``__call__`` prints, as a string; by default without colours."""
        dark = _dark_terminal() if dark is None else dark
        palette = (DARK if dark else LIGHT) if color else None
        found = self.contexts(*features, k=k, window=window)
        return "\n\n".join(self._block(feature, found[feature], palette, logits) for feature in found)

    def html(self, *features: SupportsIndex, k: int = 5, window: int = 10, logits: int = 6) -> "Html":
        """What ``__call__`` prints, as HTML for a notebook. Point at a token to see its value."""
        from bilinear_jax.show.html import contexts_fragment

        found, effects = self.contexts(*features, k=k, window=window), {}
        for feature in found if logits else ():
            moved = logit_effects(self.lm, self.sae, feature, k=logits)
            sides = (moved.raised.tolist(), moved.lowered.tolist())
            effects[feature] = tuple([token_label(self.tokenizer, token) for token in side] for side in sides)
        return contexts_fragment(found, effects, self.sae.name)

    def contexts(self, *features: SupportsIndex, k: int = 5, window: int = 10) -> dict[int, list[Context]]:
        """The ``k`` largest activations of each feature, with ``window`` tokens on either side; [] if it is dead."""
        check_count("k (contexts to show)", k)
        if window < 0:
            raise ValueError(f"window (tokens on either side) must be at least 0, got {window}")
        numbers = list(dict.fromkeys(self.sae.check_feature(feature) for feature in features))
        tops = {feature: self._largest(feature, k) for feature in numbers}
        rows = sorted({row for top in tops.values() for _, row, _ in top})
        if not rows:
            return {feature: [] for feature in numbers}
        codes = row_codes(self.lm, self.sae, self.tokens, rows)
        found, others = {}, []
        for feature, top in tops.items():
            activations = dict(zip(rows, feature_codes(codes, feature), strict=True))
            others += self._differences(feature, top, activations)
            found[feature] = [self._context(*one, activations[one[1]], window) for one in top]
        if others:
            more = f" ({len(others) - 1} more features differ too)" if len(others) > 1 else ""
            warnings.warn(
                f"{others[0]}{more}: the stored activations are from other tokens or another model. Pass tokens= to "
                "compute them again",
                stacklevel=2,
            )
        return found

    def _largest(self, feature: int, k: int) -> list[tuple[float, int, int]]:
        """The feature's largest activations, as (value, row, position)."""
        if isinstance(self.top, RankedRows):
            top, place = locate(self.lm, self.sae, self.tokens, self.top, feature, k), 0
        else:
            top, place = self.top, feature
        columns = (np.asarray(part[place]).tolist() for part in (top.values, top.rows, top.positions))
        return [one for one in zip(*columns, strict=True) if one[1] >= 0][:k]

    def _differences(self, feature: int, top, activations: dict[int, np.ndarray]) -> list[str]:
        """A message about the first stored activation that differs from what the model gives on these tokens."""
        for value, row, position in top:
            found = activations[row][position] if position < len(activations[row]) else 0.0
            if abs(value - found) > 0.05 * abs(top[0][0]):
                return [
                    f"feature {feature} of SAE {self.sae.name}: the stored activation at row {row}, position "
                    f"{position} is {value:.3g}, but the model gives {found:.3g}"
                ]
        return []

    def _context(self, value: float, row: int, position: int, activations: np.ndarray, window: int) -> Context:
        ids = np.asarray(self.tokens[row])
        texts = pieces(self.tokenizer, ids)
        counted = np.flatnonzero(np.asarray(self.lm.token_mask(ids[None]))[0])
        last = int(counted[-1]) if counted.size else 0  # padding is not shown
        start, stop = shown_around(texts, position, window, last)
        return Context(value, row, position, start, tuple(texts[start:stop]), activations[start:stop])

    def _block(self, feature: int, contexts: list[Context], palette: Palette | None, logits: int) -> str:
        def strong(text: str) -> str:
            return text if palette is None else shaded(text, None, palette, strong=True)

        lines = [f"{strong(f'feature {feature}')}  of SAE {self.sae.name}"]
        if logits:
            effects = logit_effects(self.lm, self.sae, feature, k=logits)
            for name, ids in (("raises", effects.raised), ("lowers", effects.lowered)):
                lines.append(f"{name}  {'  '.join(token_label(self.tokenizer, token) for token in ids.tolist())}")
        if not contexts:
            ranked = isinstance(self.top, RankedRows)
            silent = "none of its published rows activates it after position 0" if ranked else "no token activates it"
            return "\n".join([*lines, f"dead: {silent}"])
        strongest = max(abs(context.value) for context in contexts)
        decimals = min(max(2 - math.floor(math.log10(strongest)), 0), 6) if strongest else 0
        values = [f"{context.value:.{decimals}f}" for context in contexts]
        width = max(map(len, values))
        for value, context in zip(values, contexts, strict=True):
            lines.append(f"{strong(value.rjust(width))} : {context_text(context, strongest, palette)}")
        return "\n".join(lines)


def _corpus(lm: LanguageModel):
    """The token dataset beside the model."""
    return load_corpus(_source(lm))


def _source(lm: LanguageModel) -> str:
    if lm.source is None:
        raise ValueError("this model was not loaded from a folder: pass tokens=, a token dataset [rows, seq]")
    return lm.source


def _chosen(lm: LanguageModel, sae: SAE, top) -> TopActivations | RankedRows:
    if isinstance(top, TopActivations | RankedRows):
        return top
    if isinstance(top, Mapping):
        return find_top(top, sae, "the top activations given")
    path = Path(_source(lm) if top is None else top)
    if path.suffix != ".safetensors":
        path = inside(folder_of(str(path), [TOP_FILE, "config.json"]), TOP_FILE)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: pass tokens= to compute the top activations over them")
    return find_top(load_top_activations(path), sae, str(path))


def _colorful(file: Any) -> bool:
    """Whether to print ANSI colours: on a terminal or in a notebook, unless NO_COLOR is set."""
    if os.environ.get("NO_COLOR"):
        return False
    if type(file).__module__.startswith("ipykernel"):
        return True
    return hasattr(file, "isatty") and file.isatty() and os.environ.get("TERM") != "dumb"


def _dark_terminal() -> bool:
    """Whether COLORFGBG says that the terminal's background is dark ("15;0": white on black); dark if it is not set."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return not background.isdigit() or int(background) in (*range(7), 8)


def top_tokens(visualizer: Visualizer, features: Sequence[int]) -> dict[int, list[str]]:
    """The three most frequent tokens among each feature's ten largest activations; [] if it is dead."""
    found = {}
    for feature, contexts in visualizer.contexts(*features, k=10).items():
        tokens = Counter(text.strip() for context in contexts for text, _, focused in context.glyphs() if focused)
        found[feature] = [token for token, _ in tokens.most_common(3)]
    return found
