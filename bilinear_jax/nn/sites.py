"""Running a transformer with some of its sites captured or edited, as pure functions of its params.

A site is a name, "mlp_in", at every layer, or a pair, ("mlp_in", 2), at one layer. The layers are cut into segments
that want the same sites, and each segment is one scan. So only what was asked for is kept, and no layer after the last
one needed is run.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.configs import check_plain
from bilinear_jax.nn.transformer import (
    SITES,
    Edit,
    LayerStack,
    Site,
    TransformerConfig,
    cross_entropy,
    embed,
    run_module,
    unembed,
)


@jax.tree_util.register_pytree_node_class
class Captured(Mapping[Site, Array]):
    """The values of captured sites, by the names or (name, layer) pairs that were asked for; a pytree.

    It is not a plain dict, because JAX sorts the keys of a dict, and names cannot be compared with pairs.
    """

    def __init__(self, values: Mapping[Site, Array]):
        self._values = dict(values)

    def __getitem__(self, site: Site) -> Array:
        if site not in self._values:
            raise KeyError(f"{site!r} was not captured; captured: {', '.join(map(repr, self._values))}")
        return self._values[site]

    def __iter__(self):
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Captured({ {site: value.shape for site, value in self._values.items()} })"

    def tree_flatten(self):
        return tuple(self._values.values()), tuple(self._values)

    @classmethod
    def tree_unflatten(cls, sites, values):
        return cls(dict(zip(sites, values, strict=True)))


NO_EDITS: Mapping[Site, Edit] = MappingProxyType({})

MAX_LOGITS = 2**27
"""How many logits ``loss`` holds at once by default: half a gigabyte in float32."""


def forward(
    config: TransformerConfig,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    edits: Mapping[Site, Edit] = NO_EDITS,
    *,
    compute_dtype=jnp.float32,
    beta: Float[Array, ""] | None = None,
    remat: str | None = None,
    unroll: bool = False,
) -> Float[Array, "batch seq n_vocab"]:
    """Logits. The value of each site in ``edits`` is replaced by a pure function of it.

    Args:
        tokens: token ids ``[batch, seq]``.
        edits: ``{"mlp_out": f}`` replaces the value at every layer by ``f(value)``, ``{("mlp_out", 1): f}`` at layer 1.
            f keeps the shape. An edit for one layer replaces an edit for every layer.
        compute_dtype: the dtype of activations. Norms, softmax and logits are in float32.
        beta: for a model with ``gate="silu"``: the gate is ``x sigmoid(beta x)``.
        remat: what a gradient keeps of every layer; the rest is computed a second time. ``None`` keeps everything,
            "products" the products with weights, "layer" only the layer's input. The numbers are the same.
        unroll: write the layers out one after another, not as a loop. On a CPU, a gradient takes 0.7 to 0.9 of the
            time, because a loop copies all that it keeps. But the compiled code grows with the layers, and XLA undoes
            ``remat`` on a CPU.

    Raises:
        UnknownNameError: if a site or a layer does not exist.
        ValueError: if an edit changes the shape, ``remat`` is unknown, or ``beta`` is given for another gate.
    """
    x, _ = _run(config, params, tokens, (), edits, config.n_layer, compute_dtype, beta, remat, unroll)
    return unembed(config, params, x)


def capture(
    config: TransformerConfig,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    sites: Iterable[Site],
    edits: Mapping[Site, Edit] = NO_EDITS,
    *,
    compute_dtype=jnp.float32,
) -> Captured:
    """The values of the named sites, after any edits. Later layers are not run.

    Returns:
        For a name: ``[n_layer, batch, seq, d_model]``; for a pair (name, layer): ``[batch, seq, d_model]``. For
            ``scores`` and ``pattern`` the last three axes are ``[batch, n_head, seq, seq]``.

    Raises:
        ValueError: if no site is named.
        UnknownNameError: if a site or a layer does not exist.
    """
    sites = _named(sites)
    depth = max(layers.stop for _, layers in (_resolve(config, site) for site in sites))
    _, values = _run(config, params, tokens, sites, edits, depth, compute_dtype)
    return _captured(config, sites, values)


def _named(sites: Iterable[Site]) -> tuple[Site, ...]:
    sites = tuple(sites)
    if not sites:
        raise ValueError(f"there is no site to capture: name at least one of {', '.join(SITES)}")
    return sites


def _captured(config: TransformerConfig, sites: tuple[Site, ...], values) -> Captured:
    resolved = {site: _resolve(config, site) for site in sites}
    return Captured(
        {
            site: jnp.stack([values[name, i] for i in layers]) if isinstance(site, str) else values[name, layers[0]]
            for site, (name, layers) in resolved.items()
        }
    )


class SummedLoss(NamedTuple):
    """The summed loss of some tokens. Add up those of several batches, and divide once at the end."""

    total: Float[Array, ""]  # summed cross entropy, in nats
    tokens: Float[Array, ""]  # how many tokens


def loss(
    config: TransformerConfig,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    token_mask: Bool[Array, "batch seq"],
    edits: Mapping[Site, Edit] = NO_EDITS,
    *,
    compute_dtype=jnp.float32,
    beta: Float[Array, ""] | None = None,
    remat: str | None = None,
    unroll: bool = False,
    max_logits: int = MAX_LOGITS,
) -> SummedLoss:
    """The cross entropy summed over the tokens in ``token_mask``, and the number of these tokens.

    The loss of a token, in nats, is that of predicting it from the tokens before it. Position 0 is never predicted. For
    a mean over batches, divide once, at the end. The arguments not named here are those of ``forward``.

    Memory: at most ``max_logits`` logits at once. If ``batch * seq * n_vocab`` is larger, the sequence is cut into
    pieces. Their logits are computed one piece after another, and a second time for a gradient.
    """
    x, _ = _run(config, params, tokens, (), edits, config.n_layer, compute_dtype, beta, remat, unroll)
    return _summed(config, params, x, tokens, token_mask, max_logits)


def captured_loss(
    config: TransformerConfig,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    token_mask: Bool[Array, "batch seq"],
    sites: Iterable[Site],
    edits: Mapping[Site, Edit] = NO_EDITS,
    *,
    compute_dtype=jnp.float32,
    max_logits: int = MAX_LOGITS,
) -> tuple[SummedLoss, Captured]:
    """``loss`` and ``capture`` in one run of the model."""
    sites = _named(sites)
    x, values = _run(config, params, tokens, sites, edits, config.n_layer, compute_dtype)
    return _summed(config, params, x, tokens, token_mask, max_logits), _captured(config, sites, values)


def _summed(config, params, x, tokens, token_mask, max_logits: int) -> SummedLoss:
    """The summed loss, from the residual stream after all layers."""
    batch, seq = tokens.shape
    targets = jnp.roll(tokens, -1, axis=1)
    counted = jnp.roll(token_mask, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)

    def piece(x, targets, counted):
        return jnp.sum(cross_entropy(unembed(config, params, x), targets) * counted)

    pieces = min(seq, math.ceil(batch * seq * config.n_vocab / max_logits))
    if pieces == 1:
        return SummedLoss(piece(x, targets, counted), jnp.sum(counted))
    width = math.ceil(seq / pieces)

    def cut(value):
        """[batch, seq, ...] as [pieces, batch, width, ...], filled up with zeros. Rows stay on their devices."""
        padding = [(0, 0), (0, pieces * width - seq)] + [(0, 0)] * (value.ndim - 2)
        return jnp.moveaxis(jnp.pad(value, padding).reshape(batch, pieces, width, *value.shape[2:]), 1, 0)

    add = jax.checkpoint(piece, prevent_cse=False)
    cuts = (cut(x), cut(targets), cut(counted))
    total, _ = jax.lax.scan(lambda total, part: (total + add(*part), None), jnp.zeros(()), cuts)
    return SummedLoss(total, jnp.sum(counted))


@functools.partial(jax.jit, static_argnames="pad_id")
def default_token_mask(tokens: Int[Array, "batch seq"], pad_id: int | None) -> Bool[Array, "batch seq"]:
    """The tokens that count by default (see ``LanguageModel.batches``). If ``pad_id`` is None, all but position 0."""
    counted = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    if pad_id is None:
        return counted
    padding = jnp.flip(jnp.cumprod(jnp.flip(tokens == pad_id, axis=1).astype(jnp.int32), axis=1), axis=1)
    return counted & (padding == 0)


def token_array(tokens: Any) -> Any:
    """The tokens as an array: arrays, also memory-mapped ones, as they are, and rows of integers in lists as NumPy's.

    Raises:
        ValueError: if they are neither, the rows are of unequal length, or a masked array hides some.
    """
    if hasattr(tokens, "ndim"):
        check_plain(tokens, "tokens")
        return tokens
    try:
        array = np.asarray(tokens)
    except ValueError:
        lengths = sorted({len(row) for row in tokens})
        raise ValueError(
            f"rows of {', '.join(map(str, lengths[:5]))} tokens are no array [rows, seq]: fill them up to one length, "
            "and give a token_mask that is False there"
        ) from None
    if array.dtype.kind not in "iu":
        raise ValueError(
            f"tokens are {tokens!r:.60}, but they must be integers [rows, seq]: for a text, use lm.encode(text)"
        )
    return array


def check_token_mask(tokens: Any, token_mask: Any) -> None:
    """Raises ``ValueError`` unless the mask has the shape of the tokens and holds only True and False, or 1 and 0."""
    if token_mask.shape != tokens.shape:
        raise ValueError(
            f"token_mask has shape {token_mask.shape}, but the tokens have shape {tokens.shape}: give one value a token"
        )
    if token_mask.dtype == bool or isinstance(token_mask, Tracer):
        return
    if not np.all((np.asarray(token_mask) == 0) | (np.asarray(token_mask) == 1)):
        raise ValueError("token_mask has values other than True and False, or 1 and 0: weights are not supported")


def _resolve(config: TransformerConfig, site: Site) -> tuple[str, range]:
    """The name of a site, and the layers it stands for."""
    name, layer = (site, None) if isinstance(site, str) else site
    if name not in SITES:
        raise UnknownNameError("site", repr(name), SITES)
    if layer is None:
        return name, range(config.n_layer)
    if not 0 <= layer < config.n_layer:
        raise UnknownNameError("layer", layer, range(config.n_layer), of=f"this model's {name}")
    return name, range(int(layer), int(layer) + 1)


def edits_by_layer(config: TransformerConfig, edits: Mapping[Site, Edit]) -> list[dict[str, Edit]]:
    """The edits of each layer, by site name."""
    edited: list[dict[str, Edit]] = [{} for _ in range(config.n_layer)]
    for site in sorted(edits, key=lambda site: not isinstance(site, str)):  # last, so that a layer's own edit wins
        name, layers = _resolve(config, site)
        for layer in layers:
            edited[layer][name] = edits[site]
    return edited


def _run(config, params, tokens, sites, edits, depth, compute_dtype, beta=None, remat=None, unroll=False):
    """The residual stream after ``depth`` layers, and the captured values by (name, layer)."""
    wanted: list[set[str]] = [set() for _ in range(config.n_layer)]
    for site in sites:
        name, layers = _resolve(config, site)
        for layer in layers:
            wanted[layer].add(name)
    edited = edits_by_layer(config, edits)
    x = embed(config, params, tokens, compute_dtype)
    values = {}
    start = 0
    while start < depth:
        stop = start + 1
        while stop < depth and wanted[stop] == wanted[start] and edited[stop] == edited[start]:
            stop += 1
        whole = start == 0 and stop == config.n_layer
        layers = params["layers"] if whole else jax.tree.map(lambda a, s=start, e=stop: a[s:e], params["layers"])
        stack = LayerStack(config, stop - start)
        now = frozenset(wanted[start]), edited[start]
        x, captured = run_module(stack, {"layers": layers}, x, *now, beta, remat, unroll)
        values |= {(name, start + i): value[i] for name, value in captured.items() for i in range(stop - start)}
        start = stop
    return x, values
