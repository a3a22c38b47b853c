"""What goes into the MLP of a layer and comes out of it, at every token of some text: what forms are scored on."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.explain.directions import Directions
from bilinear_jax.language import Batch, LanguageModel
from bilinear_jax.nn import sites
from bilinear_jax.nn.attention import rms_norm
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.transformer import Edit, Site
from bilinear_jax.tensor import BilinearTensor, with_constant

Place = tuple[str, int]
"""A site of one layer: (name, layer)."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """The MLP of one layer as it is scored: its tensor, in coordinates of mlp_in, and what reads its output."""

    lm: LanguageModel  # the model that is run; of a bilinear form, the one with its gated MLPs
    layer: int
    tensor: BilinearTensor  # of mlp_in; of a transcoder, that of its pre-activations; with inputs, of their codes
    outputs: SAE | Directions
    directions: Float[Array, "U out"]  # the output directions
    inputs: SAE | None = None  # an SAE of mlp_in whose codes are read in place of mlp_in; None: mlp_in itself

    @property
    def sae(self) -> SAE | None:
        """The dictionary whose features are the outputs; None if they are plain directions.

        Without its layer and tag, which do not change a number: so what is compiled for one serves all that are alike.
        """
        return _unnamed(self.outputs) if isinstance(self.outputs, SAE) else None

    @property
    def reads(self) -> SAE | None:
        """``inputs``, in the same way without its layer and tag."""
        return self.inputs and _unnamed(self.inputs)


def _unnamed(sae: SAE) -> SAE:
    return SAE(sae.params, dataclasses.replace(sae.config, layer=0, tag=None))


@functools.partial(jax.jit, static_argnums=2)
def read(inputs: SAE | None, mlp_in: Float[Array, "... d_model"], n_in: int) -> Float[Array, "... in"]:
    """mlp_in, or the codes of an SAE of it; with the constant input, if there is room for it in ``n_in``."""
    return extended(mlp_in if inputs is None else inputs.encode(mlp_in), n_in)


class Samples(NamedTuple):
    """The tokens that count of some text, in order, on the host."""

    x: Float[np.ndarray, "tokens in"]  # the tensor's input: mlp_in or codes of it, with its 1 if there are biases
    y: Float[np.ndarray, "tokens out"]  # what the directions read: mlp_out; of a transcoder, its pre-activations
    codes: Float[np.ndarray, "tokens k"]  # the active codes of the outputs; none of plain directions
    features: Int[np.ndarray, "tokens k"]  # their features
    token: Int[np.ndarray, " tokens"]  # the token itself
    previous: Int[np.ndarray, " tokens"]  # the one before it

    @property
    def moment(self) -> Float[np.ndarray, "in in"]:
        """``E[x x^T]`` over the tokens, in float64."""
        x = self.x.astype(np.float64)
        return x.T @ x / len(x)

    def fired(self, features: Int[np.ndarray, " U"], n_features: int) -> Bool[np.ndarray, "U tokens"]:
        """Whether each of some features is active at each token. A feature may be named twice."""
        once, row = np.unique(features, return_inverse=True)
        place = np.full(n_features, -1)
        place[once] = np.arange(len(once))
        found = np.zeros((len(once), len(self.x)), bool)
        token, slot = np.nonzero((self.codes != 0) & (place[self.features] >= 0))
        found[place[self.features[token, slot]], token] = True
        return found[row]


def gather(layer: Layer, tokens, token_mask=None, batch_size: int = 16) -> Samples:
    """The samples of a text. The model is run once.

    Args:
        tokens, token_mask, batch_size: as for ``LanguageModel.batches``.

    Raises:
        ValueError: if the tokens do not fit the model, the mask leaves none, or a value is not finite.

    Memory: on the host, ``tokens (in + out + 2 k)`` numbers of 4 bytes.
    """
    found: list[list[Any]] = []
    for batch in layer.lm.batches(tokens, token_mask, batch_size, description="activations"):
        with jax.default_matmul_precision("highest"):
            got = jax.device_get(_ends(layer.lm, layer.layer, layer.tensor, layer.sae, layer.reads, batch.tokens))
        counted, ids = np.asarray(batch.mask), np.asarray(batch.tokens)
        previous = np.concatenate([ids[:, :1], ids[:, :-1]], axis=1)  # position 0 has none; it does not count
        x, y, *codes = (array[counted] for array in got)
        if not all(np.isfinite(array).all() for array in (x, y, *codes)):
            raise batch.not_finite()
        found.append([x, y, *codes, ids[counted], previous[counted]])
    return Samples(*map(np.concatenate, zip(*found, strict=True)))


def halves(tokens, choose, token_mask) -> tuple[Any, Any, Sequence[Any]]:
    """The scoring rows, the choosing rows, and the masks of the choosing and of the scoring rows.

    Without rows to choose on, they are the first half of the tokens. ``ValueError`` if there is only one row then.
    """
    tokens = sites.token_array(tokens)
    if choose is not None:
        return tokens, choose, (None, token_mask)
    if len(tokens) < 2:
        raise ValueError("tokens is one row, but it takes two: one to choose the parts on, and one to score them on")
    half = len(tokens) // 2
    masks = (None, None) if token_mask is None else (token_mask[:half], token_mask[half:])
    return tokens[half:], tokens[:half], masks


def second_moment(
    lm: LanguageModel,
    layer: int,
    site: str,
    n_in: int,
    tokens,
    token_mask=None,
    batch_size: int = 16,
    *,
    inputs: SAE | None = None,
    firing: tuple[SAE, int] | None = None,
) -> Float[np.ndarray, "in in"]:
    """``C = E[x x^T]`` over the tokens that count, in float64, one batch at a time.

    x is what the MLP's tensor reads (``explain.mlp.mlp_tensor``): mlp_in, or for the site resid_mid ``r / rms(r)``;
    with a constant input if ``n_in`` has room for it. With ``inputs``, x are the codes of this SAE of mlp_in. With
    ``firing``, a dictionary of the layer's outputs and its feature, half of the weight is on the tokens at which this
    feature fires, as ``parts.firing_metrics``.
    """
    total, number, own, fired = 0.0, 0, 0.0, 0
    for batch, read in each_input(lm, (site, layer), n_in, tokens, token_mask, batch_size, inputs=inputs):
        x, mask = np.asarray(read, np.float64), np.asarray(batch.mask)
        if firing is not None:
            here = x[mask & np.asarray(_fires(lm, layer, _unnamed(firing[0]), jnp.asarray(firing[1]), batch.tokens))]
            own, fired = own + here.T @ here, fired + len(here)
        x = x[mask]
        total, number = total + x.T @ x, number + len(x)
    return np.asarray((own / fired + total / number) / 2 if fired else total / number)


def each_input(
    lm: LanguageModel,
    site: Place,
    n_in: int,
    tokens,
    token_mask=None,
    batch_size: int = 16,
    *,
    inputs: SAE | None = None,
) -> Iterator[tuple[Batch, Float[Array, "batch seq in"]]]:
    """Batches of a text, and what the MLP's tensor reads at each of their tokens: see ``second_moment``.

    Raises:
        ValueError: if the tokens do not fit the model, or a value is not finite.
    """
    for batch in lm.batches(tokens, token_mask, batch_size, description="inputs of the MLP"):
        x = tensor_inputs(lm, site, n_in, batch.tokens, inputs)
        if not bool(jnp.isfinite(x).all()):
            raise batch.not_finite()
        yield batch, x


def edited_loss(
    lm: LanguageModel,
    place: Place,
    value: Float[Array, "..."] | float,
    tokens: Int[Array, "batch seq"],
    token_mask: Bool[Array, "batch seq"],
) -> sites.SummedLoss:
    """The summed cross entropy, and the number of tokens, with a site replaced by ``value`` at the tokens of the mask.

    A pure function. ``value`` broadcasts to ``[batch, seq, d_model]``: a reconstruction, the mean of the site, or 0.

    Example:
        >>> import bilinear_jax as bj
        >>> lm, tokens = bj.load("ts-nano"), jnp.asarray(bj.load_corpus("ts-nano")[:2], jnp.int32)
        >>> zeroed = edited_loss(lm, ("mlp_out", 2), 0.0, tokens, lm.token_mask(tokens))
        >>> bool(zeroed.total / zeroed.tokens > lm.loss(tokens))
        True
    """

    def edit(old):
        return jnp.where(token_mask[..., None], jnp.broadcast_to(value, old.shape).astype(old.dtype), old)

    edits: dict[Site, Edit] = {place: edit}
    return sites.loss(lm.config, lm.params, tokens, token_mask, edits, compute_dtype=lm.compute_dtype)


def extended(x: Float[Array, "... d_model"], n_in: int) -> Float[Array, "... n_in"]:
    """x with the constant input, if a tensor of ``n_in`` inputs has room for it."""
    return x if n_in == x.shape[-1] else with_constant(x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def tensor_inputs(
    lm: LanguageModel, site: Place, n_in: int, tokens: Int[Array, "batch seq"], inputs: SAE | None = None
):
    """What the MLP's tensor reads at every token, ``[batch, seq, n_in]``: see ``second_moment``."""
    x = sites.capture(lm.config, lm.params, tokens, [site], compute_dtype=lm.compute_dtype)[site].astype(jnp.float32)
    if site[0] == "resid_mid" and lm.config.norms[1]:
        x = rms_norm(x, eps=lm.config.rms_eps)
    return read(inputs, x, n_in)


@functools.partial(jax.jit, static_argnums=1)
def _fires(lm: LanguageModel, layer: int, sae: SAE, feature: Int[Array, ""], tokens) -> Bool[Array, "batch seq"]:
    """Where a feature of a dictionary of the layer's outputs fires."""
    site = ("mlp_out" if sae.config.target is None else "mlp_in", layer)
    got = sites.capture(lm.config, lm.params, tokens, [site], compute_dtype=lm.compute_dtype)[site]
    return sae.encode(got.astype(jnp.float32), sparse=True).fires(feature)


@functools.partial(jax.jit, static_argnums=1)
def _ends(lm: LanguageModel, layer: int, tensor: BilinearTensor, sae: SAE | None, inputs: SAE | None, tokens):
    """x, y, the codes and their features at every token of a batch."""
    wanted = [("mlp_in", layer), ("mlp_out", layer)]
    got = sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype)
    mlp_in, y = (got[site].astype(jnp.float32) for site in wanted)
    x = read(inputs, mlp_in, tensor.n_in)
    if sae is None:
        nothing = jnp.zeros((*tokens.shape, 0))
        return x, y, nothing, nothing.astype(jnp.int32)
    through = sae.config.target is not None
    codes = sae.encode(mlp_in if through else y, sparse=True)
    return x, tensor.apply(x) if through else y, codes.values, codes.indices
