"""The bilinear form of a gated transformer: every MLP as the bilinear one that is nearest to it where it is used.

A gated MLP, ``w_p (gate(w_l x) * (w_r x))``, is not a third-order tensor. But for every hidden unit, with ``a`` the
value of its left side and ``b`` that of its right side,

    gate(a) b  ~  c_0 + c_1 a + c_2 b + c_3 a^2 + c_4 a b

by least squares over tokens: five normal equations a unit, and nothing else is fitted. With these coefficients the MLP
is bilinear, with the same hidden units, a constant input and a linear map: see ``measure.quadratic``. For Gaussian x it
is the best quadratic function of x altogether: by Stein's identity nothing outside the plane of a and b is needed, and
b^2 is not.

How far such a form can be trusted is measured on other tokens, and belongs to it: see ``measure.certificate``.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from tqdm.auto import tqdm

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import Batch, LanguageModel
from bilinear_jax.measure.certificate import Certificate, certify
from bilinear_jax.measure.quadratic import (
    MASSIVE,
    after_layers,
    check_gated,
    embedded,
    massive,
    sides,
    through_layers,
    with_coefficients,
)
from bilinear_jax.nn.sites import token_array
from bilinear_jax.nn.transformer import GATES, NEVER

LINEAR, QUADRATIC = 3, 5
"""How many of the terms 1, a, b, a^2, a b a fit uses."""

_PAIRS = [(i, j) for i in range(5) for j in range(i, 5)]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lm", "original", "certificate", "controls", "mean"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class BilinearForm:
    """A model with bilinear MLPs in place of gated ones, the gated model, and how far the one stands for the other."""

    lm: LanguageModel  # its MLPs are tensors; position 0 keeps the original MLP
    original: LanguageModel  # the model as it was given
    certificate: Certificate  # measured on tokens that the fit has not seen
    controls: dict[str, Any]  # by name, the coefficients [n_layer, 5, d_hidden] of other forms
    mean: Float[Any, "n_layer d_model"]  # of each MLP's output

    def certify(self, tokens, token_mask=None, **options) -> Certificate:
        """The certificate on other tokens, or of a form that was trained since. See ``measure.certificate.certify``."""
        given = {"controls": self.controls, "mean": self.mean} | options
        return certify(self.original, self.lm, tokens, token_mask, **given)


def bilinear_form(
    lm: LanguageModel,
    tokens,
    *,
    layers: Iterable[int] | None = None,
    held_out=None,
    token_mask=None,
    sequential: bool = False,
    batch_size: int = 8,
    loss_tokens: int = 512,
) -> BilinearForm:
    """Fit the bilinear form of a gated model on some tokens, and certify it on others.

    Args:
        lm: a model with gated MLPs. A model whose MLPs are bilinear already is its own form.
        tokens: token ids ``[rows, seq]`` of text like the one that the form is to be used on.
        layers: the layers to replace; None: all.
        held_out: token ids ``[rows, seq]`` for the certificate. None: the last quarter of the rows of ``tokens``, which
            the fit then does not see.
        token_mask: ``[rows, seq]`` of ``tokens``, those that count; by default as in ``LanguageModel.batches``.
            Position 0 and positions with a massive output (see ``quadratic.massive``) are left out of the fit. There
            the form keeps the original MLP; and in a layer with a massive output anywhere, also at position 0, the form
            looks for others wherever it is used.
        sequential: fit each layer on the residual stream that the form's own earlier layers make, not on the model's.
            It takes ``rows * seq * d_model`` numbers of memory. Without it, memory does not grow with the tokens.
        batch_size: rows at once.
        loss_tokens: about how many held-out tokens the losses of single layers are measured on, see ``certify``.

    Raises:
        ValueError: if the MLPs have no gated side, there are too few rows, or a value is not finite.
        UnknownNameError: if a layer does not exist.

    Example:
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(2, 2, 8, 12, 16, 10, gate="silu")
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> form = bilinear_form(lm, jax.random.randint(jax.random.key(1), (40, 16), 0, 10))
        >>> form.lm.config.gate is None, bool((form.certificate.r2 > 0.9).all())
        (True, True)
    """
    check_gated(lm)
    chosen = _chosen(lm, layers)
    tokens, held_mask = token_array(tokens), None
    if held_out is None:
        if len(tokens) < 4:
            raise ValueError(
                f"there are {len(tokens)} rows of tokens, of which a quarter is held out: give at least 4, or held_out"
            )
        first = len(tokens) - len(tokens) // 4
        tokens, held_out = tokens[:first], tokens[first:]
        if token_mask is not None:
            token_mask, held_mask = token_mask[:first], token_mask[first:]
    fit = _sequential if sequential else _at_once
    sums, coefficients = fit(lm, tokens, token_mask, batch_size, chosen)
    above = _thresholds(sums, chosen)
    order = np.random.default_rng(0).permutation(lm.config.d_hidden)
    controls = {"linear": jnp.asarray(_solved(sums, LINEAR)), "shuffled": jnp.asarray(coefficients[:, :, order])}
    mean = jnp.asarray(sums["output"] / np.maximum(sums["count"], 1)[:, None], jnp.float32)
    form = lm if lm.config.gate is None else with_coefficients(lm, jnp.asarray(coefficients), above)
    options = {"batch_size": batch_size, "loss_tokens": loss_tokens}
    certificate = certify(lm, form, held_out, held_mask, controls=controls, mean=mean, **options)
    return BilinearForm(form, lm, certificate, controls, mean)


def _chosen(lm: LanguageModel, layers: Iterable[int] | None) -> list[int]:
    """The layers to replace, ascending."""
    known = range(lm.config.n_layer)
    found = list(known) if layers is None else sorted({int(layer) for layer in layers})
    for layer in found:
        if layer not in known:
            raise UnknownNameError("layer", layer, known, of="this model")
    return found


Sums = dict[str, np.ndarray]


def _moments(lm: LanguageModel, mlp, x, y, mask) -> dict[str, Any]:
    """The sums of one layer over the tokens in a batch that the fit uses."""
    long, median = massive(y, mask)
    filled = mask.at[:, 0].set(jnp.any(mask, axis=1))
    used = mask.at[:, 0].set(False) & ~long
    a, b = sides(mlp, x)
    hidden = GATES[lm.config.gate](a) * b
    one = jnp.broadcast_to(used[..., None], a.shape).astype(jnp.float32)
    terms = [one, one * a, one * b, one * a * a, one * a * b]
    return {
        "gram": jnp.stack([jnp.sum(terms[i] * terms[j], axis=(0, 1)) for i, j in _PAIRS]),
        "target": jnp.stack([jnp.sum(term * hidden, axis=(0, 1)) for term in terms]),
        "output": jnp.sum(jnp.where(used[..., None], y.astype(jnp.float32), 0), axis=(0, 1)),
        "count": jnp.sum(used),
        "massive": jnp.sum(filled & long),
        "median": median,
        "batches": (median > 0).astype(jnp.float32),
    }


@jax.jit
def _all_layers(lm: LanguageModel, x, mask) -> tuple[Any, dict[str, Any]]:
    """The residual stream after the layers, and the sums of each layer."""

    def visit(params, _, values):
        return _moments(lm, params["mlp"], values["mlp_in"], values["mlp_out"], mask)

    return through_layers(lm, x, visit)


_embedded = jax.jit(embedded)


def _at_once(lm, tokens, token_mask, batch_size: int, chosen: Sequence[int]) -> tuple[Sums, np.ndarray]:
    """The sums on the model's own residual stream, and the coefficients."""
    sums: Sums = {}
    for batch in lm.batches(tokens, token_mask, batch_size, description="fit"):
        _add(sums, _all_layers(lm, _embedded(lm, batch.tokens), batch.mask)[1], batch)
    return sums, _solved(sums, QUADRATIC)


def _sequential(lm, tokens, token_mask, batch_size: int, chosen: Sequence[int]) -> tuple[Sums, np.ndarray]:
    """The sums and the coefficients, each layer on the residual stream of a form with the layers before it."""
    batches = list(lm.batches(tokens, token_mask, batch_size))
    streams = [np.asarray(_embedded(lm, batch.tokens)) for batch in batches]
    layers, found, coefficients = lm.params["layers"], [], []
    for layer in tqdm(range(lm.config.n_layer), desc="fit", unit="layer", disable=None):
        params = jax.tree.map(lambda a, i=layer: a[i : i + 1], layers)
        one = dataclasses.replace(lm, config=dataclasses.replace(lm.config, n_layer=1), params={"layers": params})
        sums: Sums = {}
        for batch, x in zip(batches, streams, strict=True):
            _add(sums, _all_layers(one, x, batch.mask)[1], batch)
        found.append(sums)
        coefficients.append(_solved(sums, QUADRATIC))
        after = one
        if layer in chosen and lm.config.gate is not None:
            after = with_coefficients(one, coefficients[-1], _thresholds(sums, [0]))
        streams = [np.asarray(after_layers(after, x)) for x in streams]
    return {name: np.concatenate([sums[name] for sums in found]) for name in found[0]}, np.concatenate(coefficients)


def _add(sums: Sums, found: dict[str, Any], batch: Batch) -> None:
    """Add the sums of a batch, in float64."""
    for name, value in jax.device_get(found).items():
        if not np.isfinite(value).all():
            raise batch.not_finite()
        sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)


def _solved(sums: Sums, terms: int) -> np.ndarray:
    """The coefficients ``[n_layer, 5, d_hidden]`` of the least-squares fit with the first ``terms`` terms.

    Each term is scaled to mean square 1 first. A term that is always 0, or that the others make (a unit that is always
    0, say), gets no more than it needs: the Gram matrix has a ridge of 1e-9.
    """
    gram = np.zeros((*sums["gram"].shape[::2], 5, 5))
    for place, (i, j) in enumerate(_PAIRS):
        gram[..., i, j] = gram[..., j, i] = sums["gram"][:, place]
    gram, target = gram[..., :terms, :terms], np.moveaxis(sums["target"], 1, -1)[..., :terms]
    size = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    size = np.where(size > 0, size, 1)
    scaled = gram / (size[..., :, None] * size[..., None, :]) + 1e-9 * np.eye(terms)
    solution = np.linalg.solve(scaled, (target / size)[..., None])[..., 0] / size
    return np.moveaxis(np.pad(solution, ((0, 0), (0, 0), (0, 5 - terms))), -1, 1).astype(np.float32)


def _thresholds(sums: Sums, chosen: Sequence[int]) -> np.ndarray | None:
    """``original_above`` of each layer: 0 if it is not replaced, what is massive if any output is. None: not needed."""
    median = sums["median"] / np.maximum(sums["batches"], 1)
    above = np.where(sums["massive"] > 0, MASSIVE * median, NEVER)
    above[[layer for layer in range(len(above)) if layer not in chosen]] = 0
    return above.astype(np.float32) if (above < NEVER).any() else None
