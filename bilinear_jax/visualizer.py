"""What a feature means, on a terminal: the contexts that activate it most, and the logits that it moves."""

import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from bilinear_jax.activations import (
    RankedRows,
    TopActivations,
    check_feature,
    feature_codes,
    find_top,
    load_top_activations,
    locate,
    row_codes,
    top_activations,
)
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.rendering import (
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

if TYPE_CHECKING:
    from bilinear_jax.pages.render import Html

TOP_FILE = "top-activations.safetensors"
"""Under this name published repositories have them, and models may."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["raised", "raised_by", "lowered", "lowered_by"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LogitEffects:
    """The tokens whose logits a feature moves most; ``by`` is in logits a unit of activation, before 1 / rms."""

    raised: Array | np.ndarray  # [k] int: token ids, the most raised first
    raised_by: Array | np.ndarray  # [k]
    lowered: Array | np.ndarray  # [k] int: token ids, the most lowered first
    lowered_by: Array | np.ndarray  # [k]


def logit_effects(lm: LanguageModel, sae: SAE, feature, k: int = 10) -> LogitEffects:
    """The tokens whose logits a feature raises and lowers through the direct path ``w_u @ w_dec[:, feature]``.

    Per unit of activation, of what the feature writes into the residual stream: no later layer is taken into
    account, and the final norm's scale, one positive factor ``1 / rms`` for all logits of a token, is left out.
    Logits are not centred. At ``attn_out`` the model's ``attn_scale`` is multiplied in. An SAE at ``mlp_in`` doesn't
    write: there the effects are those of its direction in the residual stream that the norm reads.

    Args:
        feature: the feature's number; may be traced, and then isn't checked.
        k: tokens on either side.

    Raises:
        ValueError: for a feature that the SAE doesn't have.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import Transformer, TransformerConfig
        >>> config = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> params = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 6), int))["params"]
        >>> lm = LanguageModel(params, config)
        >>> sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> effects = logit_effects(lm, sae, 3, k=2)
        >>> bool(effects.raised_by[0] > effects.lowered_by[0]), effects.lowered.shape
        (True, (2,))

    Source: the "logit lens" of a decoder direction, as feature dashboards show it (Bricken et al. 2023).
    """
    if k < 0:
        raise ValueError(f"the number of tokens on either side is at least 0, got {k}")
    if not isinstance(feature, Tracer):
        feature = check_feature(sae, feature)
    effects = direct_effects(lm, sae, feature)
    raised_by, raised = jax.lax.top_k(effects, min(k, len(effects)))
    lowered_by, lowered = jax.lax.top_k(-effects, min(k, len(effects)))
    return LogitEffects(raised, raised_by, lowered, -lowered_by)


def direct_effects(lm: LanguageModel, sae: SAE, feature) -> Float[Array, " n_vocab"]:
    """How much a feature raises every token's logit, see ``logit_effects``."""
    effects = jnp.einsum("vd,d->v", lm.params["w_u"], sae.w_dec[:, feature])
    return lm.config.attention_factor * effects if sae.config.site == "attn_out" else effects


class Visualizer:
    """Prints the contexts that activate an SAE's features most, every token shaded by its own activation.

        vis = Visualizer(lm, tracer.out)
        vis(3834, 751, k=5, dark=True)

    Args:
        lm: the model that the SAE belongs to; it is run on the rows that are shown, and on no others.
        sae: the SAE.
        tokens: the token dataset ``[rows, seq]`` that the top activations are from. By default the ``corpus.npy``
            that lies beside the model.
        top: the top activations: ``TopActivations``, ``RankedRows``, what ``load_top_activations`` or
            ``top_activations`` returns, or a ``.safetensors`` file, or the folder or hub name of the repository in
            which ``top-activations.safetensors`` lies. By default the one beside the model; where ``tokens`` are
            given, they are computed over those.
        tokenizer: by default the model's.

    Raises:
        ValueError: where there is nothing to show, naming what to pass.
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
                f"SAE {sae.name} reads {sae.config.d_model} coordinates at layer {sae.config.layer}; the model has "
                f"{lm.config.n_layer} layers of {lm.config.d_model}: it belongs to another model"
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
            k: contexts a feature.
            dark: colours for a dark background, or a light one; by default what the terminal says of itself in
                ``COLORFGBG``, and else dark.
            color: force ANSI colours on or off; by default on where the output is a terminal or a notebook, and
                ``NO_COLOR`` isn't set. Without colours the token of the activation stands in [brackets].
            window: tokens shown on either side.
            logits: tokens listed as raised and as lowered; 0 leaves them out.
            file: a text stream to print to; by default the standard output.

        Raises:
            ValueError: for a feature that the SAE doesn't have.
        """
        stream = sys.stdout if file is None else file
        color = _colorful(stream) if color is None else color
        text = self.text(*features, k=k, dark=dark, color=color, window=window, logits=logits)
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream)

    def text(
        self,
        *features: SupportsIndex,
        k: int = 5,
        dark: bool | None = None,
        color: bool = False,
        window: int = 10,
        logits: int = 6,
    ) -> str:
        """What ``__call__`` prints, as a string; in colours only on request."""
        dark = _dark_terminal() if dark is None else dark
        palette = (DARK if dark else LIGHT) if color else None
        found = self.contexts(*features, k=k, window=window)
        return "\n\n".join(self._block(feature, found[feature], palette, logits) for feature in found)

    def html(self, *features: SupportsIndex, k: int = 5, window: int = 10, logits: int = 6) -> "Html":
        """What ``__call__`` prints, as HTML that a notebook shows: the value of each token under the pointer."""
        from bilinear_jax.pages.render import contexts_fragment

        found, effects = self.contexts(*features, k=k, window=window), {}
        for feature in found if logits else ():
            moved = logit_effects(self.lm, self.sae, feature, k=logits)
            sides = (moved.raised.tolist(), moved.lowered.tolist())
            effects[feature] = tuple([token_label(self.tokenizer, token) for token in side] for side in sides)
        return contexts_fragment(found, effects, self.sae.name)

    def contexts(self, *features: SupportsIndex, k: int = 5, window: int = 10) -> dict[int, list[Context]]:
        """The ``k`` largest activations of each feature with ``window`` tokens on either side; none of a dead one."""
        if k < 1:
            raise ValueError(f"k is the number of contexts to show, at least 1; got {k}")
        if window < 0:
            raise ValueError(f"window is the number of tokens on either side, at least 0; got {window}")
        numbers = list(dict.fromkeys(check_feature(self.sae, feature) for feature in features))
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
            more = f", and {len(others) - 1} more features likewise" if len(others) > 1 else ""
            warnings.warn(
                f"{others[0]}{more}: the stored ones are from other tokens, or another model; pass tokens= to compute "
                "them anew",
                stacklevel=2,
            )
        return found

    def _largest(self, feature: int, k: int) -> list[tuple[float, int, int]]:
        """(value, row, position) of the feature's largest activations."""
        if isinstance(self.top, RankedRows):
            top, place = locate(self.lm, self.sae, self.tokens, self.top, feature, k), 0
        else:
            top, place = self.top, feature
        columns = (np.asarray(part[place]).tolist() for part in (top.values, top.rows, top.positions))
        return [one for one in zip(*columns, strict=True) if one[1] >= 0][:k]

    def _differences(self, feature: int, top, activations: dict[int, np.ndarray]) -> list[str]:
        """Where the model gives another activation on these tokens than the one that is stored; the first alone."""
        for value, row, position in top:
            found = activations[row][position] if position < len(activations[row]) else 0.0
            if abs(value - found) > 0.05 * abs(top[0][0]):
                return [
                    f"feature {feature} of SAE {self.sae.name}: the stored activation at row {row}, position "
                    f"{position} is {value:.3g}, the model gives {found:.3g}"
                ]
        return []

    def _context(self, value: float, row: int, position: int, activations: np.ndarray, window: int) -> Context:
        ids = np.asarray(self.tokens[row])
        texts = pieces(self.tokenizer, ids)
        counted = np.flatnonzero(np.asarray(self.lm.token_mask(ids[None]))[0])
        last = int(counted[-1]) if counted.size else 0  # padding isn't shown
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
    """The token dataset that lies beside the model."""
    from bilinear_jax.checkpoint import corpus

    return corpus(_source(lm))


def _source(lm: LanguageModel) -> str:
    if lm.source is None:
        raise ValueError("this model was not loaded from anywhere: pass tokens=, a token dataset [rows, seq]")
    return lm.source


def _chosen(lm: LanguageModel, sae: SAE, top) -> TopActivations | RankedRows:
    if isinstance(top, TopActivations | RankedRows):
        return top
    if isinstance(top, Mapping):
        return find_top(top, sae, "the top activations given")
    from bilinear_jax.sources import folder_of

    path = Path(_source(lm) if top is None else top)
    if path.suffix != ".safetensors":
        path = folder_of(str(path), [TOP_FILE]) / TOP_FILE
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: pass tokens= to compute the top activations over them")
    return find_top(load_top_activations(path), sae, str(path))


def _colorful(file: Any) -> bool:
    """Whether ANSI colours belong into a stream: a terminal's or a notebook's, unless the user set NO_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if type(file).__module__.startswith("ipykernel"):
        return True
    return hasattr(file, "isatty") and file.isatty() and os.environ.get("TERM") != "dumb"


def _dark_terminal() -> bool:
    """What a terminal says of its background in COLORFGBG ("15;0": white on black); dark where it says nothing."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return not background.isdigit() or int(background) in (*range(7), 8)
