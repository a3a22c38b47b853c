"""Running a transformer with some of its sites captured or edited, as pure functions of its params.

A site is a name ("mlp_in": at every layer) or a pair ("mlp_in", 2): at that layer. The layers are cut into
segments within which the same sites are wanted, and each segment is one scan, so that nothing which was not
asked for is kept, and no layer after the last one needed is run.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

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

    A plain dict can't be one: JAX sorts the keys of dicts, and names don't compare with pairs.
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
"""Logits that ``loss`` holds at once, by default: half a gigabyte in float32."""


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
    """Logits, with the value of each site in ``edits`` replaced by a pure function of it.

    Args:
        tokens: token ids.
        edits: ``{"mlp_out": f}`` replaces the site at every layer, ``{("mlp_out", 1): f}`` at layer 1, by
            ``f(value)`` of the same shape. A layer's own edit wins over one for every layer.
        compute_dtype: of activations; norms, softmax and logits are in float32.
        beta: for a model with ``gate="silu"``: the gate is ``x sigmoid(beta x)``.
        remat: what a gradient keeps of every layer, the rest being computed a second time: ``None`` everything,
            "products" the products with weights, "layer" nothing but the layer's input. The numbers are the same.
        unroll: write the layers out one after another, not as a loop. A gradient takes 0.7 to 0.9 of the time on a CPU,
            where a loop copies all that it keeps; the compiled code grows with the layers, and on a CPU XLA undoes
            ``remat``.

    Raises:
        ValueError: for an unknown site, a layer out of range, an edit that changes the shape, an unknown ``remat``,
            or ``beta`` for another gate.
    """
    x, _ = _run(config, params, tokens, (), edits, config.n_layer, compute_dtype, beta, remat, unroll)
    return unembed(config, params["w_u"], x)


def capture(
    config: TransformerConfig,
    params: PyTree,
    tokens: Int[Array, "batch seq"],
    sites: Iterable[Site],
    edits: Mapping[Site, Edit] = NO_EDITS,
    *,
    compute_dtype=jnp.float32,
) -> Captured:
    """The values of the named sites, after any edits, and nothing else; later layers are not run.

    Returns:
        For a name: ``[n_layer, batch, seq, d_model]``; for a pair (name, layer): ``[batch, seq, d_model]``.
        ``scores`` and ``pattern`` have ``[batch, n_head, seq, seq]`` in place of the last three axes.

    Raises:
        ValueError: for no site, an unknown site, or a layer out of range.
    """
    sites = tuple(sites)
    if not sites:
        raise ValueError(f"name at least one site to capture, of {', '.join(SITES)}")
    depth = max(layers.stop for _, layers in (_resolve(config, site) for site in sites))
    _, values = _run(config, params, tokens, sites, edits, depth, compute_dtype)
    resolved = {site: _resolve(config, site) for site in sites}
    return Captured(
        {
            site: jnp.stack([values[name, i] for i in layers]) if isinstance(site, str) else values[name, layers[0]]
            for site, (name, layers) in resolved.items()
        }
    )


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
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The sum of the cross entropy over the tokens in ``token_mask``, and their number: divide once, at the end.

    A token's loss is in nats, for predicting it from those before it; position 0 is never predicted. No more than
    ``max_logits`` logits are held at once: beyond ``batch * seq * n_vocab`` of them, the sequence is cut into pieces,
    whose logits are computed one piece after another, and once more for a gradient. The other arguments are those
    of ``forward``.
    """
    x, _ = _run(config, params, tokens, (), edits, config.n_layer, compute_dtype, beta, remat, unroll)
    batch, seq = tokens.shape
    targets = jnp.roll(tokens, -1, axis=1)
    counted = jnp.roll(token_mask, -1, axis=1).at[:, -1].set(False).astype(jnp.float32)

    def piece(x, targets, counted):
        return jnp.sum(cross_entropy(unembed(config, params["w_u"], x), targets) * counted)

    pieces = min(seq, math.ceil(batch * seq * config.n_vocab / max_logits))
    if pieces == 1:
        return piece(x, targets, counted), jnp.sum(counted)
    width = math.ceil(seq / pieces)

    def cut(value):
        """[batch, seq, ...] as [pieces, batch, width, ...], filled up with zeros; rows stay where they are."""
        padding = [(0, 0), (0, pieces * width - seq)] + [(0, 0)] * (value.ndim - 2)
        return jnp.moveaxis(jnp.pad(value, padding).reshape(batch, pieces, width, *value.shape[2:]), 1, 0)

    add = jax.checkpoint(piece, prevent_cse=False)
    cuts = (cut(x), cut(targets), cut(counted))
    total, _ = jax.lax.scan(lambda total, part: (total + add(*part), None), jnp.zeros(()), cuts)
    return total, jnp.sum(counted)


@functools.partial(jax.jit, static_argnames="pad_id")
def default_token_mask(tokens: Int[Array, "batch seq"], pad_id: int | None) -> Bool[Array, "batch seq"]:
    """Every token but position 0 and, where ``pad_id`` is known, the run of padding at the end of each row."""
    counted = jnp.ones(tokens.shape, bool).at[:, 0].set(False)
    if pad_id is None:
        return counted
    padding = jnp.flip(jnp.cumprod(jnp.flip(tokens == pad_id, axis=1).astype(jnp.int32), axis=1), axis=1)
    return counted & (padding == 0)


def check_token_mask(tokens: Any, token_mask: Any) -> None:
    """Raises ``ValueError`` unless the mask has the shape of the tokens, and says of each yes or no."""
    if token_mask.shape != tokens.shape:
        raise ValueError(f"token_mask has shape {token_mask.shape}, the tokens {tokens.shape}: they must agree")
    if token_mask.dtype == bool or isinstance(token_mask, Tracer):
        return
    if not np.all((np.asarray(token_mask) == 0) | (np.asarray(token_mask) == 1)):
        raise ValueError("token_mask says which tokens count, by True and False, or 1 and 0: weights aren't supported")


def _resolve(config: TransformerConfig, site: Site) -> tuple[str, range]:
    """The name of a site and the layers that it stands for."""
    name, layer = (site, None) if isinstance(site, str) else site
    if name not in SITES:
        raise ValueError(f"unknown site {name!r}; choose one of {', '.join(SITES)}")
    if layer is None:
        return name, range(config.n_layer)
    if not 0 <= layer < config.n_layer:
        raise ValueError(f"{name} has layers 0 ... {config.n_layer - 1}, got {layer}")
    return name, range(int(layer), int(layer) + 1)


def edits_by_layer(config: TransformerConfig, edits: Mapping[Site, Edit]) -> list[dict[str, Edit]]:
    """The edits of each layer, by the names of its sites."""
    edited: list[dict[str, Edit]] = [{} for _ in range(config.n_layer)]
    for site in sorted(edits, key=lambda site: not isinstance(site, str)):  # a layer's own edit comes last, and wins
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
    x = embed(params["w_e"], tokens, compute_dtype)
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
