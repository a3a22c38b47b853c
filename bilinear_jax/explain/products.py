"""The features of a readable transcoder, as the products that they are: two short sums of named input features.

    z_f  =  (a_0 + sum_i a_i f_i) (b_0 + sum_j b_j f_j)  +  c

f are the codes of the input SAE that the transcoder reads (``SAEConfig.inputs``), and each sum has at most
``SAEConfig.reads`` terms. Nothing is left out: on any token, this is the pre-activation of the feature. What the
transcoder as a whole misses of the MLP is another matter: see its scores, ``measure.evaluation``.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bilinear_jax.nn.sae import SAE, SAEModule
from bilinear_jax.nn.transformer import run_module


@dataclasses.dataclass(frozen=True)
class Sum:
    """``constant + sum_i weights_i f_i`` over a few input features, those with the largest |weight| first."""

    features: Int[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"]
    constant: float

    def of(self, codes: Float[np.ndarray, "... inputs"]) -> Float[np.ndarray, "..."]:
        """The sum for the codes of all input features."""
        return codes[..., self.features] @ self.weights + self.constant

    def text(self, names: Mapping[int, str] | None = None) -> str:
        """The sum in one line. ``names`` are those of input features; others are called by their number.

        Example:
            >>> Sum(np.array([3, 1]), np.array([2.0, -0.5]), 0.25).text({3: "dog"})
            '2 dog - 0.5 f1 + 0.25'
        """
        named = [(names or {}).get(int(feature), f"f{feature}") for feature in self.features]
        terms = [*zip(self.weights.tolist(), [f" {name}" for name in named], strict=True), (self.constant, "")]
        signed = [(" - " if value < 0 else " + ") + f"{abs(value):.3g}{name}" for value, name in terms]
        first = signed[0]
        return ("-" if first.startswith(" - ") else "") + first[3:] + "".join(signed[1:])


@dataclasses.dataclass(frozen=True)
class Product:
    """A feature of a readable transcoder: ``left * right + constant``."""

    left: Sum
    right: Sum
    constant: float

    @property
    def inputs_read(self) -> int:
        """The number of different input features in the two sums: what a person must read."""
        return len(np.union1d(self.left.features, self.right.features))

    def of(self, codes: Float[np.ndarray, "... inputs"]) -> Float[np.ndarray, "..."]:
        """The feature's pre-activation, for the codes of all input features (``input_codes``)."""
        return self.left.of(codes) * self.right.of(codes) + self.constant

    def text(self, names: Mapping[int, str] | None = None) -> str:
        """The product in one line: see ``Sum.text``."""
        end = f"{' - ' if self.constant < 0 else ' + '}{abs(self.constant):.3g}"
        return f"({self.left.text(names)}) * ({self.right.text(names)}){end}"


def product(transcoder: SAE, feature: int) -> Product:
    """A feature of a readable transcoder.

    Raises:
        ValueError: if the dictionary is not a readable transcoder.
        UnknownNameError: if it does not have this feature.

    Example:
        >>> import jax
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> parts = dict(bilinear_encoder=True, target="mlp_out", inputs=6, inputs_k=3, reads=6)
        >>> sae = SAE.init(SAEConfig("mlp_in", 0, 4, 2, 1, **parts), jax.random.key(0))
        >>> x = jnp.ones((5, 4))
        >>> bool(np.allclose(product(sae, 2).of(input_codes(sae, x)), sae.preactivations(x)[:, 2], atol=1e-5))
        True
    """
    c = _check(transcoder).config
    feature = transcoder.check_feature(feature)
    rows = [feature, feature + c.n_features]
    weights = np.asarray(transcoder.params["w_enc"], np.float32)[rows]
    constants = np.asarray(transcoder.params["b_enc"])[rows] if c.encoder_bias else np.zeros(2)
    left, right = (_sum(row, float(constant)) for row, constant in zip(weights, constants, strict=True))
    return Product(left, right, float(transcoder.params["b_z"][feature]) if c.product_bias else 0.0)


def input_codes(transcoder: SAE, x: Float[Array | np.ndarray, "... d_model"]) -> Float[np.ndarray, "... inputs"]:
    """The codes that a readable transcoder reads: those of its input SAE, of the MLP's input x. On the host."""
    found = run_module(SAEModule(_check(transcoder).config), transcoder.params, jnp.asarray(x), method="read")
    return np.asarray(found)


def _check(transcoder: SAE) -> SAE:
    if transcoder.config.inputs is None:
        raise ValueError(
            f"{transcoder.name} is no readable transcoder, whose features are products of short sums: train one with "
            "the kind readable-transcoder"
        )
    return transcoder


def _sum(row: Float[np.ndarray, " inputs"], constant: float) -> Sum:
    order = np.argsort(-np.abs(row), kind="stable")[: np.count_nonzero(row)]
    return Sum(order, row[order], constant)
