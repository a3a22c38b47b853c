"""Dictionaries: sparse autoencoders (SAEs) and transcoders as a Flax module, their codes, and ``SAE`` with its params.

    y     = W_enc (x - b_dec) + b_enc        x without - b_dec unless ``centred``; + b_enc with ``encoder_bias``
    z     = y                                of a bilinear encoder: y_left * y_right  (+ y_linear)  (+ b_z)
    codes = activation(z)                    sparse, see ``nn.activations``
    x_hat = W_dec codes + b_dec              + W_skip x with ``skip``; and x_hat[passthrough] += x[passthrough]
                                             + W_lookup[token] with ``token_lookup``: a row for each token id

A readable transcoder has, in place of x in the first line, the codes of an SAE of its site, ``f = TopK(W_in (x -
b_in))``, and a bilinear encoder whose rows have at most ``reads`` weights other than 0. So each z is a product of two
short sums of named input features: see ``explain.products``.

A transcoder reconstructs another site of its layer from x: with ``site = "mlp_in"`` and ``target = "mlp_out"`` it goes
through the MLP. As elsewhere in the field, ``SAE`` is also the name of the class of transcoders.

Sources: Gao et al. 2024 ("Scaling and evaluating sparse autoencoders") for top-k SAEs; Dunefsky et al. 2024
("Transcoders find interpretable LLM feature circuits"); Paulo et al. 2025 ("Transcoders beat sparse autoencoders for
interpretability") for the skip; Dooms and Wilhelm 2024 ("Tokenized SAEs: disentangling SAE reconstructions") for the
lookup: codes do not depend on tokens, only reconstructions do. The options of top-k SAEs are those of the checkpoints
published with "Bilinear MLPs enable weight-based mechanistic interpretability".
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
from bilinear_jax.linalg.scale import unit_columns
from bilinear_jax.nn.activations import SparseCodes, damage, first_slots, is_active, largest
from bilinear_jax.nn.attention import as_floating, linear
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.nn.sae_summary import summary_of
from bilinear_jax.nn.sparse import decode_at, linear_at
from bilinear_jax.nn.token_lookup import rows_of
from bilinear_jax.nn.transformer import run_module


class SAEModule(nn.Module):
    """A dictionary as a Flax module. Params: ``w_enc [features, d_model]``, ``w_dec [d_model, features]``, ``b_dec``.

    A bilinear encoder has ``w_enc [2 features, d_model]``, left rows first, or ``[3 features, d_model]`` with the rows
    of its linear term last. ``encoder_bias`` adds ``b_enc``, one number for each row of ``w_enc``; ``product_bias``
    adds ``b_z [features]``; ``inputs`` adds ``w_in [inputs, d_model]`` and ``b_in [d_model]``, which are not trained,
    and ``w_enc`` has ``inputs`` columns then; ``skip`` adds ``w_skip [d_model, d_model]``; ``token_lookup`` adds
    ``w_lookup [token_lookup, d_model]``. ``threshold`` is ``[]`` for BatchTopK and ``[features]`` for JumpReLU.

    The derivatives of ``encode_sparse``, and of ``decode`` of its codes, use only the active features (``nn.sparse``).
    They equal those of the same function written densely.
    """

    config: SAEConfig
    form: str = "scan"  # how the sparse products are computed: one of ``nn.sparse.FORMS``

    def setup(self):
        c = self.config
        rows, init = c.n_features * c.encoder_blocks, nn.initializers.normal(1 / math.sqrt(c.d_model))
        self.w_enc = self.param("w_enc", init, (rows, c.width))
        if c.inputs is not None:
            self.w_in = self.param("w_in", init, (c.inputs, c.d_model))
            self.b_in = self.param("b_in", nn.initializers.zeros, (c.d_model,))
        self.w_dec = self.param("w_dec", init, (c.d_model, c.n_features))
        self.b_dec = self.param("b_dec", nn.initializers.zeros, (c.d_model,))
        if c.encoder_bias:
            self.b_enc = self.param("b_enc", nn.initializers.zeros, (rows,))
        if c.product_bias:
            self.b_z = self.param("b_z", nn.initializers.zeros, (c.n_features,))
        if c.skip:
            self.w_skip = self.param("w_skip", nn.initializers.zeros, (c.d_model, c.d_model))
        if c.token_lookup is not None:
            self.w_lookup = self.param("w_lookup", nn.initializers.zeros, (c.token_lookup, c.d_model))
        if c.activation in ("batchtopk", "jumprelu"):
            shape = (c.n_features,) if c.activation == "jumprelu" else ()
            self.threshold = self.param("threshold", nn.initializers.zeros, shape)

    def preactivations(self, x: Shaped[Array, "... d_model"]) -> Float[Array, "... features"]:
        """The pre-activations z, from which the activation selects."""
        return self.product(self.linear_part(x))

    def linear_part(self, x: Shaped[Array, "... d_model"]) -> Float[Array, "... rows"]:
        """y: ``W_enc`` times the input, with ``b_enc``. The pre-activations are ``product(y)``."""
        return linear(self.read(x), self.w_enc, self.b_enc if self.config.encoder_bias else None)

    def product(
        self, y: Float[Array, "... rows"], indices: Int[Array, "... k"] | None = None
    ) -> Float[Array, "... features"]:
        """The pre-activations z from y. With ``indices``, y has only the rows of these features."""
        c = self.config
        if not c.bilinear_encoder:
            return y
        left, right, *rest = jnp.split(y, c.encoder_blocks, axis=-1)
        z = left * right
        if rest:
            z = z + rest[0]
        if c.product_bias:
            bias = self.b_z.astype(z.dtype)
            z = z + (jnp.broadcast_to(bias, z.shape) if indices is None else bias[indices])
        return z

    def at(
        self, x: Shaped[Array, "... d_model"], y: Float[Array, "... rows"], indices: Int[Array, "... k"], counts=None
    ) -> Float[Array, "... k"]:
        """The pre-activations of some features, looked up in y, with derivatives that use these features only.

        Derivatives count in the first ``counts`` of the k features of each token; None: in all.
        """
        c = self.config
        rows = jnp.stack([indices + block * c.n_features for block in range(c.encoder_blocks)], axis=-1)
        rows = rows.reshape(*indices.shape[:-1], indices.shape[-1] * c.encoder_blocks)  # a feature's side by side
        counts = None if counts is None else counts * c.encoder_blocks
        bias = self.b_enc if c.encoder_bias else None
        found = linear_at(self.read(x), self.w_enc, y, rows, bias, self.form, counts)
        found = found.reshape(*indices.shape, c.encoder_blocks)
        return self.product(jnp.concatenate(list(jnp.moveaxis(found, -1, 0)), axis=-1), indices)

    def encode_sparse(
        self,
        x: Shaped[Array, "... d_model"],
        k: int | None = None,
        among: Bool[Array, " features"] | None = None,
    ) -> "SparseCodes":
        """The codes of the active features of each token.

        Of a top-k activation they are the ``k`` largest pre-activations (default: the k of the config); with ``among``,
        only those features can be chosen, and if they are fewer than ``k``, the rest are codes of 0. Of a thresholded
        activation, at most ``config.slots`` features of a token can be active: the codes of a token with more are NaN.

        If any pre-activation of a token is not finite, also one that was not chosen, all codes of this token are NaN.
        """
        y = jax.lax.stop_gradient(self.linear_part(x))
        return self._codes(self.product(y), lambda indices: self.at(x, y, indices), k, among)

    def codes_of(self, z: Float[Array, "... features"]) -> "SparseCodes":
        """The codes that the activation makes of pre-activations, as ``encode_sparse`` of their input."""
        return self._codes(z, lambda indices: jnp.take_along_axis(z, indices, axis=-1))

    def _codes(self, z, values_at, k=None, among=None) -> "SparseCodes":
        c = self.config
        unsound = damage(z)
        if c.thresholded and k is None:
            active = self.active(z)
            indices, counts = first_slots(z, active, c.slots)
            values = values_at(indices)
            used = jnp.take_along_axis(active, indices, axis=-1)
            values = jnp.where(used, values, jnp.zeros_like(values))
            too_many = jnp.where(counts > c.slots, jnp.nan, 0)[..., None].astype(values.dtype)
            return SparseCodes(values + jnp.broadcast_to(unsound + too_many, values.shape), indices, c.n_features)
        if among is not None:
            z = jnp.where(jnp.broadcast_to(among, z.shape), z, -jnp.inf)
        indices = largest(z, k or c.slots)
        values = values_at(indices)
        if c.activation == "topk_relu":
            values = jnp.maximum(values, 0)
        if among is not None:
            values = jnp.where(among[indices], values, jnp.zeros_like(values))
        return SparseCodes(values + jnp.broadcast_to(unsound, values.shape), indices, c.n_features)

    def active(self, z: Float[Array, "... features"]) -> Bool[Array, "... features"]:
        """Whether each feature is active under a thresholded activation."""
        return is_active(z, None if self.config.activation == "relu" else self.threshold)

    def encode_dense(self, x: Shaped[Array, "... d_model"]) -> Float[Array, "... features"]:
        """The codes of all features. Of a thresholded activation there is no limit of active ones."""
        if not self.config.thresholded:
            return self.encode_sparse(x).dense()
        z = self.preactivations(x)
        codes = jnp.where(self.active(z), z, jnp.zeros_like(z))
        return codes + jnp.broadcast_to(damage(z), z.shape)

    def read(self, x: Shaped[Array, "... d_model"]) -> Float[Array, "... width"]:
        """What the rows of ``w_enc`` are multiplied with: x, centred if it is to be, or the codes of the inputs."""
        c = self.config
        x = as_floating(x, self.b_dec) / c.scale
        if c.inputs is None or c.inputs_k is None:
            return x - jnp.broadcast_to(self.b_dec.astype(x.dtype), x.shape) if c.centred else x
        rows, bias = jax.lax.stop_gradient((self.w_in, self.b_in))
        z = linear(x - jnp.broadcast_to(bias.astype(x.dtype), x.shape), rows)
        indices = largest(z, c.inputs_k)
        values = jnp.take_along_axis(z, indices, axis=-1)
        return SparseCodes(values, indices, c.inputs).dense() + jnp.broadcast_to(damage(z), z.shape)

    def decode_directions(
        self, codes: Any, counts: Int[Array, "..."] | None = None, reached: Int[Array, "..."] | None = None
    ) -> Float[Array, "... d_model"]:
        """``W_dec codes``: the reconstruction without bias, skip, passthrough and lookup.

        ``counts`` says how many of the sparse codes of each token, the first ones, count; None: all. ``reached`` says
        how many have derivatives, if more.
        """
        if isinstance(codes, SparseCodes):
            y = decode_at(codes.values, codes.indices, self.w_dec.T, self.form, counts, reached)
        else:
            y = linear(codes, self.w_dec)
        return y * self.config.scale

    def decode(
        self, codes: Any, x: Float[Array, "... d_model"] | None = None, tokens: Any = None
    ) -> Float[Array, "... d_model"]:
        """``W_dec codes + b_dec``. With ``passthrough`` and ``skip`` it also needs ``x``, with a lookup ``tokens``.

        Without ``x``, the skip is left out, and passthrough is an error. Without ``tokens``, a lookup is an error.
        """
        y = self.decode_directions(codes)
        return y + self.beside(y, x, tokens)

    def beside(
        self, y: Float[Array, "... d_model"], x: Float[Array, "... d_model"] | None, tokens: Any = None
    ) -> Array:
        """What a reconstruction, of the shape and dtype of y, has beside ``W_dec codes``."""
        c = self.config
        rest = jnp.broadcast_to((self.b_dec * c.scale).astype(y.dtype), y.shape)
        if c.token_lookup is not None:
            rest = rest + (rows_of(self.w_lookup, tokens, y.shape[:-1], c.name) * c.scale).astype(y.dtype)
        if c.skip and x is not None:
            rest = rest + linear(as_floating(x, self.w_skip), self.w_skip).astype(y.dtype)
        if not c.passthrough:
            return rest
        if x is None:
            raise ValueError(
                f"SAE {c.name} passes coordinates {list(c.passthrough)} of its input through: call decode(codes, x)"
            )
        dims = jnp.asarray(c.passthrough)
        return rest.at[..., dims].add(x[..., dims])

    def __call__(
        self, x: Float[Array, "... d_model"], tokens: Any = None
    ) -> "tuple[Float[Array, '... d_model'], SparseCodes]":
        codes = self.encode_sparse(x)
        return self.decode(codes, x, tokens), codes


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

    params: dict[str, Array]  # as in SAEModule
    config: SAEConfig

    @staticmethod
    def init(config: SAEConfig, key: Array) -> "SAE":
        """A new SAE with random unit decoder columns. The encoder rows equal them, unless the encoder is bilinear.

        Thresholds are 0, so the first codes of BatchTopK and JumpReLU are those of ReLU.
        """
        params: Any = SAEModule(config).init(key, method=lambda module: module.b_dec)["params"]  # does not run the SAE
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
            raise ValueError(f"SAE {self.name} has a bilinear encoder: use all rows of a feature, in params['w_enc']")
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
        return run_module(SAEModule(self.config), self.params, *args, method=method)

    @overload
    def encode(self, x: Float[Array, "... d_model"]) -> Float[Array, "... features"]: ...
    @overload
    def encode(self, x: Float[Array, "... d_model"], *, sparse: bool) -> Any: ...
    def encode(self, x, *, sparse: bool = False):
        """The codes of ``x``: dense ``[..., features]``, or ``SparseCodes`` with ``sparse=True``.

        Sparse codes of a thresholded activation hold at most ``config.slots`` active features of a token. The codes of
        a token with more are NaN there, never cut off in silence; raise ``config.max_active`` if you meet them.
        """
        x = jnp.asarray(x)
        self._check(x)
        return self._apply("encode_sparse" if sparse else "encode_dense", x)

    def codes_of(self, z: Float[Array, "... features"]) -> SparseCodes:
        """The codes that the activation makes of pre-activations."""
        return self._apply("codes_of", z)

    def preactivations(self, x: Float[Array, "... d_model"]) -> Float[Array, "... features"]:
        """The pre-activations of ``x``."""
        return self._apply("preactivations", x)

    def decode(
        self, codes, x: Float[Array, "... d_model"] | None = None, tokens: Any = None
    ) -> Float[Array, "... d_model"]:
        """The reconstruction from dense or sparse codes.

        With passthrough or a skip it needs the input ``x``. Without it, passthrough is an error, and the skip is left
        out: the result is then what the features and the bias write. With a lookup it needs the token id of each
        vector.

        Raises:
            ValueError: without what it needs, or for tokens of another shape or without a row.
        """
        return self._apply("decode", codes, x, tokens)

    def decode_directions(self, codes) -> Float[Array, "... d_model"]:
        """What the features write: ``decode`` without bias, skip, passthrough and lookup."""
        return self._apply("decode_directions", codes)

    def beside(self, x: Float[Array, "... d_model"], tokens: Any = None) -> Float[Array, "... d_model"]:
        """What the reconstruction has beside its features: the bias, the skip, what passes through, and the lookup."""
        return self._apply("beside", x, x, tokens)

    def __call__(self, x: Float[Array, "... d_model"], tokens: Any = None):
        """``(reconstruction [..., d_model], codes [..., features])`` of ``x``. ``tokens`` as for ``decode``."""
        codes = self.encode(x)
        return self.decode(codes, x, tokens), codes

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
        return summary_of(self.config, sum(leaf.size for leaf in self.params.values()))

    def _check(self, x) -> None:
        if x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x has shape {x.shape}, but SAE {self.name} reads vectors of {self.config.d_model} coordinates"
            )
