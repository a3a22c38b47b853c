"""Top-k sparse autoencoders with the published options: config, Flax module, sparse codes, the bound object.

    z     = TopK(W_enc (x - b_dec) + b_enc)      the k largest by value, no ReLU: negative codes can survive
    x_hat = W_dec z + b_dec                       and x_hat[passthrough] += x[passthrough]

Source: Gao et al. 2024 ("Scaling and evaluating sparse autoencoders") for top-k SAEs; the options are those of
the checkpoints published with "Bilinear MLPs enable weight-based mechanistic interpretability".
"""

import dataclasses
import functools
import math
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.nn.sparse import decode_at, largest, linear_at
from bilinear_jax.nn.transformer import SITES, linear, run_module

SAE_SITES = tuple(site for site in SITES if site not in ("scores", "pattern"))
"""The sites that an SAE can read: those with ``d_model`` coordinates."""


def site_name(name: str) -> str:
    """A site spelled with hyphens or underscores, as this library spells it; raises ``ValueError`` if unknown."""
    site = name.replace("-", "_")
    if site not in SAE_SITES:
        raise ValueError(f"unknown SAE site {name!r}; choose one of {', '.join(SAE_SITES)}")
    return site


def unit_columns(columns: Float[Array, "d_model features"]) -> Float[Array, "d_model features"]:
    """Every column scaled to unit length; a zero column stays zero."""
    norms = jnp.maximum(jnp.linalg.norm(columns, axis=0, keepdims=True), jnp.finfo(columns.dtype).tiny)
    return columns / jnp.broadcast_to(norms, columns.shape)


@dataclasses.dataclass(frozen=True)
class SAEConfig:
    """What an SAE reads and how it encodes; hashable, so it can be a static argument of ``jit``."""

    site: str  # where it reads: "mlp_in", "mlp_out", "resid_mid", ...
    layer: int  # the layer of that site, from 0
    d_model: int  # width of its input
    expansion: int  # features / d_model
    k: int  # active features a token
    bilinear_encoder: bool = False  # codes from (W_l x) * (W_r x) instead of W_enc x
    encoder_bias: bool = False  # add b_enc before the top-k
    passthrough: tuple[int, ...] = ()  # coordinates of x that are added to the reconstruction
    normalize: float | None = None  # the published files record this divisor and never apply it
    apply_normalize: bool = False  # True: encode x / normalize, and multiply the reconstruction back
    tag: str | None = None  # tells apart SAEs that are alike in all else

    def __post_init__(self):
        object.__setattr__(self, "site", site_name(self.site))
        object.__setattr__(self, "passthrough", tuple(self.passthrough))
        if self.layer < 0:
            raise ValueError(f"layer counts from 0, got {self.layer}")
        if min(self.d_model, self.expansion) < 1:
            raise ValueError(f"d_model and expansion must be at least 1, got {self.d_model} and {self.expansion}")
        if not 1 <= self.k <= self.n_features:
            raise ValueError(f"k must lie in 1 ... {self.n_features} (the number of features), got {self.k}")
        outside = [dim for dim in self.passthrough if not 0 <= dim < self.d_model]
        if outside:
            raise ValueError(f"passthrough coordinates {outside} lie outside 0 ... {self.d_model - 1}")
        if self.tag is not None and (not self.tag or "/" in self.tag):
            raise ValueError(f"a tag is a part of a folder's name, without '/', or None; got {self.tag!r}")
        if self.apply_normalize and not self.normalize:
            raise ValueError("apply_normalize needs a normalize other than None and 0")

    @property
    def n_features(self) -> int:
        return self.d_model * self.expansion

    @property
    def name(self) -> str:
        """The published folder name: ``<layer>-<site>-x<expansion>-k<k>[-<tag>]``, the site with hyphens."""
        name = f"{self.layer}-{self.site.replace('_', '-')}-x{self.expansion}-k{self.k}"
        return f"{name}-{self.tag}" if self.tag else name


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["n_features"])
@dataclasses.dataclass(frozen=True)
class SparseCodes:
    """The k active features of each token; every other feature is exactly 0."""

    values: Float[Array, "... k"]  # the codes, largest first
    indices: Int[Array, "... k"]  # the features that they belong to
    n_features: int  # number of features in all

    def dense(self) -> Float[Array, "... features"]:
        """The same codes with every feature written out."""
        flat_values, flat_indices = (part.reshape(-1, part.shape[-1]) for part in (self.values, self.indices))
        rows = jnp.broadcast_to(jnp.arange(flat_values.shape[0])[:, None], flat_values.shape)
        dense = jnp.zeros((flat_values.shape[0], self.n_features), self.values.dtype)
        dense = dense.at[rows, flat_indices].set(flat_values)
        return dense.reshape(*self.values.shape[:-1], self.n_features)


class TopKSAE(nn.Module):
    """The SAE as a Flax module: params ``w_enc [features, d_model]``, ``w_dec [d_model, features]``, ``b_dec``.

    A bilinear encoder has ``w_enc [2 features, d_model]``, left rows first; ``encoder_bias`` adds ``b_enc``.

    Derivatives of ``encode_sparse`` and of ``decode`` of its codes touch the k active features only (``nn.sparse``);
    they equal those of the same function written densely.
    """

    config: SAEConfig
    form: str = "scan"  # how the sparse products are computed: one of ``nn.sparse.FORMS``

    def setup(self):
        c = self.config
        rows = c.n_features * (2 if c.bilinear_encoder else 1)
        self.w_enc = self.param("w_enc", nn.initializers.normal(1 / math.sqrt(c.d_model)), (rows, c.d_model))
        self.w_dec = self.param("w_dec", nn.initializers.normal(1 / math.sqrt(c.d_model)), (c.d_model, c.n_features))
        self.b_dec = self.param("b_dec", nn.initializers.zeros, (c.d_model,))
        if c.encoder_bias:
            self.b_enc = self.param("b_enc", nn.initializers.zeros, (rows,))

    def preactivations(self, x: Float[Array, "... d_model"]) -> Float[Array, "... features"]:
        """What the top-k selects from."""
        return self._product(self._linear(self._centred(x)))

    def encode_sparse(
        self,
        x: Float[Array, "... d_model"],
        k: int | None = None,
        among: Bool[Array, " features"] | None = None,
    ) -> SparseCodes:
        """The ``k`` largest pre-activations of each token (by default as many as the config says).

        With ``among``, only those features are chosen from; where they are fewer than ``k``, the rest are codes of 0.
        """
        c = self.config
        x = self._centred(x)
        y = jax.lax.stop_gradient(self._linear(x))
        z = self._product(y)
        if among is not None:
            z = jnp.where(jnp.broadcast_to(among, z.shape), z, -jnp.inf)
        indices = largest(z, k or c.k)
        rows = jnp.concatenate([indices, indices + c.n_features], axis=-1) if c.bilinear_encoder else indices
        values = linear_at(x, self.w_enc, y, rows, self.b_enc if c.encoder_bias else None, self.form)
        values = self._product(values)
        if among is not None:
            values = jnp.where(among[indices], values, jnp.zeros_like(values))
        return SparseCodes(values, indices, c.n_features)

    def _centred(self, x):
        c = self.config
        x = x / c.normalize if c.apply_normalize and c.normalize else x
        return x - jnp.broadcast_to(self.b_dec.astype(x.dtype), x.shape)

    def _linear(self, x):
        return linear(x, self.w_enc, self.b_enc if self.config.encoder_bias else None)

    def _product(self, y):
        if not self.config.bilinear_encoder:
            return y
        left, right = jnp.split(y, 2, axis=-1)
        return left * right

    def decode_directions(self, codes: Any) -> Float[Array, "... d_model"]:
        """``W_dec z``, what the codes contribute to the reconstruction, without bias and passthrough."""
        c = self.config
        if isinstance(codes, SparseCodes):
            y = decode_at(codes.values, codes.indices, self.w_dec.T, self.form)
        else:
            y = linear(codes, self.w_dec)
        return y * c.normalize if c.apply_normalize and c.normalize else y

    def decode(self, codes: Any, x: Float[Array, "... d_model"] | None = None) -> Float[Array, "... d_model"]:
        """``W_dec z + b_dec``; with ``passthrough`` it also needs the input ``x`` whose coordinates pass."""
        c = self.config
        y = self.decode_directions(codes)
        bias = self.b_dec * c.normalize if c.apply_normalize and c.normalize else self.b_dec
        y = y + jnp.broadcast_to(bias.astype(y.dtype), y.shape)
        if not c.passthrough:
            return y
        if x is None:
            raise ValueError(
                f"SAE {c.name} passes coordinates {list(c.passthrough)} through from its input: call decode(codes, x)"
            )
        dims = jnp.asarray(c.passthrough)
        return y.at[..., dims].add(x[..., dims])

    def __call__(self, x: Float[Array, "... d_model"]) -> tuple[Float[Array, "... d_model"], SparseCodes]:
        codes = self.encode_sparse(x)
        return self.decode(codes, x), codes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config", "source"])
@dataclasses.dataclass(frozen=True)
class SAE:
    """A sparse autoencoder with its parameters; a pytree, so it can be an argument of ``jit``, ``vmap`` and ``grad``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(0))
        >>> reconstruction, codes = sae(jnp.ones((3, 8)))
        >>> reconstruction.shape, codes.shape, int((codes != 0).sum())
        ((3, 8), (3, 32), 6)
    """

    params: dict[str, Array]  # as in TopKSAE
    config: SAEConfig
    source: str | None = None  # where it was loaded from

    @staticmethod
    def init(config: SAEConfig, key: Array) -> "SAE":
        """A fresh SAE with unit decoder columns and the encoder tied to them."""
        params: Any = TopKSAE(config).init(key, method=lambda module: module.b_dec)["params"]  # and computes nothing
        params["w_dec"] = unit_columns(params["w_dec"])
        if not config.bilinear_encoder:
            params["w_enc"] = params["w_dec"].T
        return SAE(params, config)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def w_enc(self) -> Float[Array, "features d_model"]:
        """Encoder rows."""
        if self.config.bilinear_encoder:
            raise ValueError(f"SAE {self.name} has a bilinear encoder: a feature has no one encoder row")
        return self.params["w_enc"]

    @property
    def w_dec(self) -> Float[Array, "d_model features"]:
        """Decoder columns."""
        return self.params["w_dec"]

    @property
    def b_dec(self) -> Float[Array, " d_model"]:
        return self.params["b_dec"]

    def _apply(self, method: str, *args):
        return run_module(TopKSAE(self.config), self.params, *args, method=method)

    @overload
    def encode(self, x: Float[Array, "... d_model"]) -> Float[Array, "... features"]: ...
    @overload
    def encode(self, x: Float[Array, "... d_model"], *, sparse: bool) -> Any: ...
    def encode(self, x, *, sparse: bool = False):
        """The codes of ``x``: dense ``[..., features]``, or ``SparseCodes`` with ``sparse=True``."""
        self._check(x)
        codes = self._apply("encode_sparse", x)
        return codes if sparse else codes.dense()

    def decode(self, codes, x: Float[Array, "... d_model"] | None = None) -> Float[Array, "... d_model"]:
        """The reconstruction from dense or sparse codes; an SAE with passthrough also needs its input ``x``."""
        return self._apply("decode", codes, x)

    def __call__(self, x: Float[Array, "... d_model"]):
        """``(reconstruction [..., d_model], codes [..., features])`` of ``x``."""
        codes = self.encode(x, sparse=True)
        return self.decode(codes, x), codes.dense()

    def _check(self, x) -> None:
        if x.shape[-1] != self.config.d_model:
            raise ValueError(f"SAE {self.name} reads vectors of {self.config.d_model} coordinates, got {x.shape}")
