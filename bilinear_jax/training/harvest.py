"""Activations of a language model as training data: one forward pass fills a shuffled buffer for every site."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn import sites as nn_sites
from bilinear_jax.nn.sae_config import site_name
from bilinear_jax.training.fit import BatchIterator
from bilinear_jax.training.mesh import place_rows

LayerSite = tuple[str, int]

TOKENS: LayerSite = ("tokens", 0)
"""The key of the token ids in a batch, next to the sites. It is no site of a model."""


class Harvest:
    """A ``BatchIterator`` over shuffled activations of single tokens: ``{(site, layer): [batch_size, d_model]}``.

    The tokens that count (see ``LanguageModel.batches``), in the order of ``rows``, are cut into chunks of

        size = batch_size * floor(buffer_tokens / batch_size)

    The model runs on one batch of rows after another until a chunk is full. Each run gives all sites; layers after the
    last site are not computed. A permutation shuffles the chunk. It depends only on ``seed`` and the number of the
    chunk, and it is the same for all sites, so row i of every site belongs to the same token. The chunk is served in
    ``size / batch_size`` batches. Every token that counts is served exactly once: if a chunk ends within a batch of
    rows, the next chunk begins there and runs that batch again.

    The state holds no activations, only the position where the chunk's rows began. After ``set_state`` the chunk is
    harvested again, and the batches that follow are bit-identical to those after ``get_state`` (on the same kind of
    device).

    Memory on the device (``nbytes``): ``4 * size * d_model * (number of sites)`` bytes, with ``tokens`` another
    ``4 * size``, and one run of the model while a chunk is filled. With a mesh, the buffer is sharded over its "data"
    axis.

    Args:
        lm: the model. It computes activations in ``lm.compute_dtype``; batches are float32.
        sites: pairs of a site and a layer, such as ("mlp_in", 2). A repeated pair is harvested once.
        rows: the source of token ids, ``[rows, seq]``.
        batch_size: tokens per batch.
        buffer_tokens: how many tokens the buffer may hold. A larger buffer mixes them better.
        seed: the seed of the permutations.
        mask: ``mask(tokens) -> [rows, seq]`` bool, the tokens that count. A pure function that JAX can trace. Default:
            all but position 0 and the padding at the end of each row.
        mesh: from ``training.mesh.make_mesh``. Rows and batches are sharded over "data".
        tokens: whether batches also have the token ids, ``batch[TOKENS]``, int32 ``[batch_size]``.

    Raises:
        ValueError: if the buffer cannot hold one batch, if there are no sites or the model does not have one, or if the
            mesh cannot split a batch evenly. From ``next``: for token ids outside the vocabulary, a mask of another
            shape, or a mask without any token in the rows of a whole chunk.
        StopIteration: from ``next``, when ``rows`` ends. The tokens of an incomplete chunk are not served.

    Example:
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> from bilinear_jax.training.batches import batches
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> rows = batches(np.arange(600) % 10, n_ctx=6, batch_size=4)
        >>> sites = [("mlp_in", 0), ("mlp_out", 1)]
        >>> harvest = Harvest(lm, sites, rows, batch_size=16, buffer_tokens=50)
        >>> batch = next(harvest)
        >>> batch["mlp_out", 1].shape, harvest.size, harvest.nbytes
        ((16, 8), 48, 3072)
    """

    def __init__(
        self,
        lm: LanguageModel,
        sites: Iterable[Any],
        rows: BatchIterator,
        batch_size: int,
        buffer_tokens: int,
        seed: int = 0,
        *,
        mask: Callable[[Array], Array] | None = None,
        mesh: Mesh | None = None,
        tokens: bool = False,
    ):
        self._sites = _checked_sites(lm, sites)
        token_bytes = 4 * (lm.config.d_model * len(self._sites) + tokens)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if buffer_tokens < batch_size:
            raise ValueError(
                f"a buffer of {buffer_tokens} tokens cannot hold one batch of {batch_size}: raise buffer_tokens "
                f"(a token takes {token_bytes} bytes), or lower batch_size"
            )
        if mesh is not None and batch_size % mesh.shape["data"]:
            raise ValueError(
                f"a batch of {batch_size} tokens cannot be split evenly over {mesh.shape['data']} devices: "
                f"make batch_size a multiple of {mesh.shape['data']}"
            )
        self.size = buffer_tokens // batch_size * batch_size  # tokens per chunk
        self.nbytes = token_bytes * self.size  # of the buffer
        self._lm, self._rows, self._batch_size, self._seed = lm, rows, batch_size, seed
        self._mask, self._mesh, self._with_tokens = mask, mesh, tokens
        self._sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec("data"))
        # The current chunk: where its rows begin, how many of their first tokens the previous chunk served, its number,
        # and how many of its batches are served.
        self._at: dict[str, Any] = {"rows": rows.get_state(), "skip": 0, "chunk": 0, "served": 0}
        self._next: dict[str, Any] | None = None  # where the next chunk begins; None: this one is not in the buffer
        self._buffers: dict[LayerSite, Array] = {}
        self._order = np.empty(0, np.int32)  # [size], the permutation; on the host

    def __next__(self) -> dict[LayerSite, Shaped[Array, "batch_size ..."]]:
        if self._next is None:
            self._next = self._fill()
        start = self._at["served"] * self._batch_size
        batch = _serve(self._buffers, self._order[start : start + self._batch_size], self._sharding)
        self._at = self._at | {"served": self._at["served"] + 1}
        if self._at["served"] == self.size // self._batch_size:
            self._at, self._next = self._next, None
        return batch

    def get_state(self) -> dict:
        return dict(self._at)

    def set_state(self, state: dict) -> None:
        self._at, self._next = dict(state), None

    def _fill(self) -> dict[str, Any]:
        """Harvest the chunk that ``self._at`` describes. Returns where the next one begins."""
        if not self._buffers:
            try:
                self._buffers = _empty(
                    self._sites, (self.size, self._lm.config.d_model), self._with_tokens, self._sharding
                )
            except jax.errors.JaxRuntimeError as error:
                raise RuntimeError(
                    f"no room for a buffer of {self.nbytes:,} bytes: {error} Lower buffer_tokens"
                ) from error
        self._rows.set_state(self._at["rows"])
        start, before = self._at["rows"], 0
        filled: Any = np.int32(-self._at["skip"])
        most = int(filled)  # an upper bound of filled, known without waiting for the device
        while most < self.size:
            start, before = self._rows.get_state(), filled
            tokens = self._lm.check_tokens(next(self._rows))
            self._buffers, filled = _write(
                self._lm, self._buffers, before, place_rows(tokens, self._mesh), self._mask, self._sharding
            )
            most += tokens.size
            if most >= self.size:
                most = int(filled)
                if most == -self._at["skip"]:
                    raise ValueError(
                        f"the mask leaves none of {self.size} tokens or more: pass a mask that leaves some, or rows "
                        "that are not all padding"
                    )
        random = np.random.default_rng([self._seed, self._at["chunk"]])
        self._order = random.permutation(self.size).astype(np.int32)
        chunk = {"chunk": self._at["chunk"] + 1, "served": 0}
        if most == self.size:
            return {"rows": self._rows.get_state(), "skip": 0} | chunk
        return {"rows": start, "skip": self.size - int(before)} | chunk


def _checked_sites(lm: LanguageModel, sites: Iterable[Any]) -> tuple[LayerSite, ...]:
    """The sites without repetition, in the library's spelling. Raises an error for an unknown site."""
    sites = tuple(sites)
    if any(isinstance(site, str) or len(site) != 2 for site in sites):
        raise ValueError(f"sites must be pairs of a name and a layer, such as ('mlp_in', 2), got {sites}")
    wanted = tuple(dict.fromkeys((site_name(name), int(layer)) for name, layer in sites))
    one = jnp.zeros((1, 1), jnp.int32)
    jax.eval_shape(lambda params: dict(nn_sites.capture(lm.config, params, one, wanted)), lm.params)  # checks
    return wanted


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _empty(sites: tuple[LayerSite, ...], shape: tuple[int, int], tokens: bool, sharding) -> dict[LayerSite, Array]:
    made = {site: jnp.zeros(shape) for site in sites} | ({TOKENS: jnp.zeros(shape[:1], jnp.int32)} if tokens else {})
    return {key: _laid_out(buffer, sharding) for key, buffer in made.items()}


@functools.partial(jax.jit, static_argnums=(4, 5), donate_argnums=1)
def _write(
    lm: LanguageModel,
    buffers: dict[LayerSite, Array],
    filled: Any,
    tokens: Int[Array, "rows seq"],
    mask: Callable[[Array], Array] | None,
    sharding,
) -> tuple[dict[LayerSite, Array], Int[Array, ""]]:
    """The buffers with the activations of the tokens that count, written from place ``filled`` on, and the new fill.

    Tokens at places below 0 or beyond the end of the buffers are left out.
    """
    counted = lm.token_mask(tokens) if mask is None else mask(tokens)
    nn_sites.check_token_mask(tokens, counted)
    counted = counted.reshape(-1).astype(bool)
    place = filled + jnp.cumsum(counted.astype(jnp.int32)) - 1
    wanted = tuple(key for key in buffers if key != TOKENS)
    values = dict(nn_sites.capture(lm.config, lm.params, tokens, wanted, compute_dtype=lm.compute_dtype))
    values[TOKENS] = tokens

    def put(buffer: Array, value: Array) -> Array:
        nowhere = buffer.shape[0] + jnp.arange(len(place))
        found = value.reshape(-1, *buffer.shape[1:]).astype(buffer.dtype)
        at = jnp.where(counted & (place >= 0) & (place < buffer.shape[0]), place, nowhere)
        return _laid_out(buffer.at[at].set(found, mode="drop", unique_indices=True), sharding)

    return {key: put(buffer, values[key]) for key, buffer in buffers.items()}, filled + jnp.sum(counted)


@functools.partial(jax.jit, static_argnums=2)
def _serve(buffers: dict[LayerSite, Array], chosen: Int[Array, " batch_size"], sharding) -> dict[LayerSite, Array]:
    return {key: _laid_out(buffer[chosen], sharding) for key, buffer in buffers.items()}


def _laid_out(array: Array, sharding) -> Array:
    return array if sharding is None else jax.lax.with_sharding_constraint(array, sharding)
