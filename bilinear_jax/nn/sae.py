"""Top-k sparse autoencoders with the published options: config, Flax module, sparse codes, and ``SAE`` with its params.

    z     = TopK(W_enc (x - b_dec) + b_enc)      the k largest by value, no ReLU: codes can be negative
    x_hat = W_dec z + b_dec                       and x_hat[passthrough] += x[passthrough]

Source: Gao et al. 2024 ("Scaling and evaluating sparse autoencoders") for top-k SAEs. The options are those of the
checkpoints published with "Bilinear MLPs enable weight-based mechanistic interpretability".
"""

import dataclasses
import functools
import math
import operator
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Shaped

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.attention import as_floating, linear
from bilinear_jax.nn.configs import LARGEST_SIZE, check_sizes, check_types
from bilinear_jax.nn.sparse import damage, decode_at, largest, linear_at
from bilinear_jax.nn.transformer import SITES, run_module

SAE_SITES = tuple(site for site in SITES if site not in ("scores", "pattern"))
"""The sites that an SAE can read: those with ``d_model`` coordinates."""


def site_name(name: str) -> str:
    """The name of a site in this library's spelling. The given name may have hyphens or underscores.

    Raises:
        UnknownNameError: if no SAE can read the site.
    """
    site = name.replace("-", "_")
    if site not in SAE_SITES:
        raise UnknownNameError("site", repr(name), SAE_SITES, of="what an SAE can read")
    return site


def unit_columns(columns: Float[Array, "d_model features"]) -> Float[Array, "d_model features"]:
    """Every column scaled to unit length. A zero column stays zero."""

    def divided(columns, sizes):
        return columns / jnp.broadcast_to(jnp.where(sizes > 0, sizes, 1), columns.shape)

    columns = divided(columns, jnp.max(jnp.abs(columns), axis=0))  # so that no square underflows
    return divided(columns, jnp.linalg.norm(columns, axis=0))


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
    normalize: float | None = None  # a divisor; the published files record it but never apply it
    apply_normalize: bool = False  # True: encode x / normalize, and multiply the reconstruction by normalize
    tag: str | None = None  # distinguishes SAEs that agree in all else

    def __post_init__(self):
        check_types(self)
        object.__setattr__(self, "site", site_name(self.site))
        if not 0 <= self.layer <= LARGEST_SIZE:
            raise ValueError(f"layer is {self.layer}, but layers are numbered from 0, up to {LARGEST_SIZE}")
        check_sizes(self, "d_model", "expansion", "n_features")
        if not 1 <= self.k <= self.n_features:
            raise ValueError(f"k is {self.k}, but it must be between 1 and {self.n_features} (the number of features)")
        if len(set(self.passthrough)) < len(self.passthrough):
            raise ValueError(f"passthrough is {list(self.passthrough)}, but each coordinate can be named only once")
        outside = [dim for dim in self.passthrough if not 0 <= dim < self.d_model]
        if outside:
            raise ValueError(f"passthrough coordinates {outside} lie outside 0 ... {self.d_model - 1}")
        if self.tag is not None and (not self.tag or {*"/\\"} & {*self.tag} or not self.tag.isprintable()):
            raise ValueError(
                f"tag is {self.tag!r}, but it must be None or a part of a folder's name, without '/', a backslash and "
                "characters that cannot be printed"
            )
        single = jnp.finfo(jnp.float32)
        if self.normalize is not None and not abs(self.normalize) <= float(single.max):
            raise ValueError(f"normalize must be a finite number in float32, got {self.normalize}")
        if self.apply_normalize and not abs(self.normalize or 0) >= float(single.tiny):
            raise ValueError(
                f"normalize is {self.normalize}, but apply_normalize needs a number other than 0: give normalize"
            )

    @property
    def n_features(self) -> int:
        return self.d_model * self.expansion

    @property
    def scale(self) -> float:
        """``normalize`` if it is applied, else 1: the unit of the SAE's own space, in that of its site."""
        return self.normalize if self.apply_normalize and self.normalize else 1.0

    @property
    def name(self) -> str:
        """The published folder name: ``<layer>-<site>-x<expansion>-k<k>[-<tag>]``, the site with hyphens."""
        name = f"{self.layer}-{self.site.replace('_', '-')}-x{self.expansion}-k{self.k}"
        return f"{name}-{self.tag}" if self.tag else name


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "indices"], meta_fields=["n_features"])
@dataclasses.dataclass(frozen=True)
class SparseCodes:
    """The k active features of each token. Every other feature is exactly 0."""

    values: Float[Array, "... k"]  # the codes, largest first
    indices: Int[Array, "... k"]  # the feature of each code
    n_features: int  # number of all features

    def dense(self) -> Float[Array, "... features"]:
        """The same codes as a dense array over all features."""
        flat_values, flat_indices = (part.reshape(-1, part.shape[-1]) for part in (self.values, self.indices))
        rows = jnp.broadcast_to(jnp.arange(flat_values.shape[0])[:, None], flat_values.shape)
        dense = jnp.zeros((flat_values.shape[0], self.n_features), self.values.dtype)
        dense = dense.at[rows, flat_indices].set(flat_values)
        return dense.reshape(*self.values.shape[:-1], self.n_features)


class TopKSAE(nn.Module):
    """The SAE as a Flax module: params ``w_enc [features, d_model]``, ``w_dec [d_model, features]``, ``b_dec``.

    A bilinear encoder has ``w_enc [2 features, d_model]``, left rows first. ``encoder_bias`` adds ``b_enc``.

    The derivatives of ``encode_sparse``, and of ``decode`` of its codes, use only the k active features
    (``nn.sparse``). They equal those of the same function written densely.
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

    def preactivations(self, x: Shaped[Array, "... d_model"]) -> Float[Array, "... features"]:
        """The pre-activations, from which the top-k selects."""
        return self._product(self._linear(self._centred(x)))

    def encode_sparse(
        self,
        x: Shaped[Array, "... d_model"],
        k: int | None = None,
        among: Bool[Array, " features"] | None = None,
    ) -> SparseCodes:
        """The ``k`` largest pre-activations of each token. The default k is that of the config.

        With ``among``, only those features can be chosen. If they are fewer than ``k``, the rest are codes of 0. If any
        pre-activation of a token is not finite, also one that was not chosen, all codes of this token are NaN.
        """
        c = self.config
        x = self._centred(x)
        y = jax.lax.stop_gradient(self._linear(x))
        z = self._product(y)
        unsound = damage(z)
        if among is not None:
            z = jnp.where(jnp.broadcast_to(among, z.shape), z, -jnp.inf)
        indices = largest(z, k or c.k)
        rows = jnp.concatenate([indices, indices + c.n_features], axis=-1) if c.bilinear_encoder else indices
        values = linear_at(x, self.w_enc, y, rows, self.b_enc if c.encoder_bias else None, self.form)
        values = self._product(values)
        if among is not None:
            values = jnp.where(among[indices], values, jnp.zeros_like(values))
        values = values + jnp.broadcast_to(unsound, values.shape)
        return SparseCodes(values, indices, c.n_features)

    def _centred(self, x):
        x = as_floating(x, self.b_dec) / self.config.scale
        return x - jnp.broadcast_to(self.b_dec.astype(x.dtype), x.shape)

    def _linear(self, x):
        return linear(x, self.w_enc, self.b_enc if self.config.encoder_bias else None)

    def _product(self, y):
        if not self.config.bilinear_encoder:
            return y
        left, right = jnp.split(y, 2, axis=-1)
        return left * right

    def decode_directions(self, codes: Any) -> Float[Array, "... d_model"]:
        """``W_dec z``: the reconstruction without bias and passthrough."""
        if isinstance(codes, SparseCodes):
            y = decode_at(codes.values, codes.indices, self.w_dec.T, self.form)
        else:
            y = linear(codes, self.w_dec)
        return y * self.config.scale

    def decode(self, codes: Any, x: Float[Array, "... d_model"] | None = None) -> Float[Array, "... d_model"]:
        """``W_dec z + b_dec``. With ``passthrough`` it also needs the input ``x``, whose coordinates are added."""
        c = self.config
        y = self.decode_directions(codes)
        y = y + jnp.broadcast_to((self.b_dec * c.scale).astype(y.dtype), y.shape)
        if not c.passthrough:
            return y
        if x is None:
            raise ValueError(
                f"SAE {c.name} passes coordinates {list(c.passthrough)} of its input through: call decode(codes, x)"
            )
        dims = jnp.asarray(c.passthrough)
        return y.at[..., dims].add(x[..., dims])

    def __call__(self, x: Float[Array, "... d_model"]) -> tuple[Float[Array, "... d_model"], SparseCodes]:
        codes = self.encode_sparse(x)
        return self.decode(codes, x), codes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["config"])
@dataclasses.dataclass(frozen=True)
class SAE:
    """A sparse autoencoder with its parameters; a pytree, so it can be an argument of ``jit``, ``vmap`` and ``grad``.

    ``w_enc``, ``w_dec`` and ``b_dec`` are the parameters as stored. ``encoder``, ``decoder`` and ``decoder_bias`` are
    in the units of the site: they differ by the factor of an applied ``normalize``. Use these to explain a feature.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(0))
        >>> reconstruction, codes = sae(jnp.ones((3, 8)))
        >>> reconstruction.shape, codes.shape, int((codes != 0).sum())
        ((3, 8), (3, 32), 6)
    """

    params: dict[str, Array]  # as in TopKSAE
    config: SAEConfig

    @staticmethod
    def init(config: SAEConfig, key: Array) -> "SAE":
        """A new SAE with random unit decoder columns. The encoder rows equal them, unless the encoder is bilinear."""
        params: Any = TopKSAE(config).init(key, method=lambda module: module.b_dec)["params"]  # does not run the SAE
        params["w_dec"] = unit_columns(params["w_dec"])
        if not config.bilinear_encoder:
            params["w_enc"] = params["w_dec"].T
        return SAE(params, config)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def w_enc(self) -> Float[Array, "features d_model"]:
        """Encoder rows, as stored.

        Raises:
            ValueError: if the encoder is bilinear.
        """
        if self.config.bilinear_encoder:
            raise ValueError(f"SAE {self.name} has a bilinear encoder: use both rows of a feature, in params['w_enc']")
        return self.params["w_enc"]

    @property
    def w_dec(self) -> Float[Array, "d_model features"]:
        """Decoder columns, as stored."""
        return self.params["w_dec"]

    @property
    def b_dec(self) -> Float[Array, " d_model"]:
        """The decoder bias, as stored."""
        return self.params["b_dec"]

    @property
    def encoder(self) -> Float[Array, "features d_model"]:
        """The gradient of each pre-activation with respect to the input: ``w_enc``, divided by an applied normalize.

        Raises:
            ValueError: if the encoder is bilinear.
        """
        return self.w_enc / self.config.scale

    @property
    def decoder(self) -> Float[Array, "d_model features"]:
        """What one unit of each code adds to the reconstruction: ``w_dec``, times an applied normalize."""
        return self.w_dec * self.config.scale

    @property
    def decoder_bias(self) -> Float[Array, " d_model"]:
        """The reconstruction from no features: ``b_dec``, times an applied normalize."""
        return self.b_dec * self.config.scale

    def _apply(self, method: str, *args):
        return run_module(TopKSAE(self.config), self.params, *args, method=method)

    @overload
    def encode(self, x: Float[Array, "... d_model"]) -> Float[Array, "... features"]: ...
    @overload
    def encode(self, x: Float[Array, "... d_model"], *, sparse: bool) -> Any: ...
    def encode(self, x, *, sparse: bool = False):
        """The codes of ``x``: dense ``[..., features]``, or ``SparseCodes`` with ``sparse=True``."""
        x = jnp.asarray(x)
        self._check(x)
        codes = self._apply("encode_sparse", x)
        return codes if sparse else codes.dense()

    def decode(self, codes, x: Float[Array, "... d_model"] | None = None) -> Float[Array, "... d_model"]:
        """The reconstruction from dense or sparse codes. An SAE with passthrough also needs its input ``x``."""
        return self._apply("decode", codes, x)

    def __call__(self, x: Float[Array, "... d_model"]):
        """``(reconstruction [..., d_model], codes [..., features])`` of ``x``."""
        codes = self.encode(x, sparse=True)
        return self.decode(codes, x), codes.dense()

    def check_feature(self, feature) -> int:
        """The feature as an int.

        Raises:
            UnknownNameError: if the SAE does not have this feature.
            ValueError: if ``feature`` is not an integer.
        """
        try:
            number = operator.index(feature)
        except TypeError:
            raise ValueError(f"feature is {feature!r}, but a feature of SAE {self.name} must be an int") from None
        if not 0 <= number < self.config.n_features:
            raise UnknownNameError("feature", number, range(self.config.n_features), of=f"SAE {self.name}")
        return number

    def summary(self) -> str:
        """The SAE in a few lines: its parameters, what it reads, and how it encodes.

        The text that it was trained on is in the summary of its model, ``LanguageModel.summary``.

        Example:
            >>> import jax
            >>> print(SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(0)).summary())
            SAE 0-mlp-out-x4-k2: 32 features, 2 active at a token, 520 parameters
            trained on: mlp_out of layer 0, d_model 8, and reconstructs it
            encoder: linear, no bias; input not normalised; no coordinate passes through
        """
        c = self.config
        size = sum(leaf.size for leaf in self.params.values())
        scaled = f"divided by {c.normalize:g}" if c.apply_normalize else "not normalised"
        passed = f"coordinates {', '.join(map(str, c.passthrough))} pass" if c.passthrough else "no coordinate passes"
        encoder = "bilinear" if c.bilinear_encoder else "linear"
        return (
            f"SAE {self.name}: {c.n_features} features, {c.k} active at a token, {size:,} parameters\n"
            f"trained on: {c.site} of layer {c.layer}, d_model {c.d_model}, and reconstructs it\n"
            f"encoder: {encoder}, {'a' if c.encoder_bias else 'no'} bias; input {scaled}; {passed} through"
        )

    def _check(self, x) -> None:
        if x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x has shape {x.shape}, but SAE {self.name} reads vectors of {self.config.d_model} coordinates"
            )
