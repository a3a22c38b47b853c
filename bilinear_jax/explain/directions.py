"""What a ``Tracer`` lies between: an SAE on either side, or plain directions such as logits and embeddings of tokens.

A plain direction needs no SAE. It means another thing on each side of the MLP:

    out    u is read:       u . y of the MLP's output y, for the row of a token: its effect on that token's logit
    inp    d is written:    x + a d of the MLP's input x = r / rms(r), where r is the residual stream

The entry ``d_i^T Q_u d_j`` is what two written directions do together, at every input x and for all factors a and b:

    2 a b d_i^T Q_u d_j  =  F(x + a d_i + b d_j) - F(x + a d_i) - F(x + b d_j) + F(x)          F(x) = u . y

The directions need not be orthogonal, and nothing says how much of one an input holds: for that, use an SAE.
"""

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer as JaxTracer
from jaxtyping import Array, Float

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.linalg.scale import as_floats
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import site_name
from bilinear_jax.nn.transformer import unembedding

SITES = {"inp": ("mlp_in", "resid_mid"), "out": ("mlp_out",)}
"""What an SAE on either side of the MLP may read."""


@dataclasses.dataclass(frozen=True)
class Directions:
    """Some directions of the residual stream, one a row, each with a label.

    Raises:
        ValueError: if the vectors are no matrix, hold NaN or infinite values, or the labels are not one a row.

    Example:
        >>> import bilinear_jax as bj
        >>> lm = bj.load("ts-nano")
        >>> girl, boy = (Directions.tokens(lm, word) for word in (" girl", " boy"))
        >>> (girl - boy).labels, (girl - boy).vectors.shape
        ((' girl - boy',), (1, 256))
        >>> bj.Tracer(lm, layer=2, out=girl - boy).top_eigh(k=2).values.shape
        (1, 2)
    """

    vectors: Any  # [n, d_model]; any array of real numbers is made a JAX array of floats
    labels: tuple[str, ...] = ()  # one for each row; by default "0", "1", ...

    def __post_init__(self):
        vectors = as_floats("vectors", self.vectors)
        if vectors.ndim != 2 or not min(vectors.shape):
            raise ValueError(
                f"directions have shape {vectors.shape}, but they must be rows [n, d_model]: for one, write u[None]"
            )
        if not isinstance(vectors, JaxTracer) and not bool(jnp.isfinite(vectors).all()):
            raise ValueError("the directions hold NaN or infinite values: give finite numbers")
        labels = tuple(map(str, self.labels)) or tuple(map(str, range(len(vectors))))
        if len(labels) != len(vectors):
            raise ValueError(f"there are {len(labels)} labels for {len(vectors)} directions: give one for each")
        object.__setattr__(self, "vectors", vectors)
        object.__setattr__(self, "labels", labels)

    @staticmethod
    def tokens(lm: LanguageModel, tokens: str | int | np.integer | Iterable[Any], of: str = "w_u") -> "Directions":
        """Directions of tokens, in the units of the residual stream.

        Args:
            tokens: a token or several: texts that are one token each, with their space (" dog"), or token ids.
            of: "w_u": the rows of the unembedding, times the gain of the final norm. Row t reads the logit of token t,
                ``row . r / rms(r)``, from the last residual stream r. "w_e": the embeddings, times ``embed_scale``,
                which tokens write into the first one.

        All logits may have a part in common, which changes no probability. A difference of two rows is without it.

        Raises:
            ValueError: if a text is not one token, or ``of`` is another name.
            UnknownNameError: if the model does not have a token.

        Example:
            >>> import bilinear_jax as bj
            >>> lm = bj.load("ts-nano")
            >>> Directions.tokens(lm, [" dog", 409], of="w_e").labels
            (' dog', '409')
        """
        if of not in ("w_u", "w_e"):
            raise ValueError(f"of is {of!r}, but it must be 'w_u', the unembedding, or 'w_e', the embeddings")
        given = [tokens] if isinstance(tokens, str | int | np.integer) else list(tokens)
        ids = np.array([_token(lm, one) for one in given], np.int32)
        if of == "w_e":
            vectors = as_floats("w_e", lm.params["w_e"][ids]) * lm.config.embed_scale
        else:
            vectors = as_floats("w_u", unembedding(lm.params)[ids])
            if "final_gain" in lm.params:
                vectors = vectors * as_floats("final_gain", lm.params["final_gain"])[None]
        return Directions(vectors, tuple(map(str, given)))

    @staticmethod
    def coordinates(d_model: int) -> "Directions":
        """The coordinates of the residual stream themselves. The matrices ``D^T Q D`` are then the matrices Q."""
        return Directions(jnp.eye(d_model))

    def __sub__(self, other: "Directions") -> "Directions":
        """The difference of each two rows, or of each row and the only one of the other side."""
        if self.vectors.shape[1] != other.vectors.shape[1] or (
            len(self) != len(other) and 1 not in (len(self), len(other))
        ):
            raise ValueError(
                f"directions of shapes {self.vectors.shape} and {other.vectors.shape} have no difference: give equal "
                "numbers of rows, or one row on either side"
            )
        size = max(len(self), len(other))
        left, right = (jnp.broadcast_to(side.vectors, (size, side.vectors.shape[1])) for side in (self, other))
        names = (side.labels * (size // len(side)) for side in (self, other))
        return Directions(
            left - right,
            tuple(f"{one} -{two if two[:1] == ' ' else ' ' + two}" for one, two in zip(*names, strict=True)),
        )

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def name(self) -> str:
        """What messages call them."""
        return f"{len(self)} direction{'s' * (len(self) > 1)}"

    def check_feature(self, feature) -> int:
        """The place of a direction as an int.

        Raises:
            UnknownNameError: if there is no such direction.
            ValueError: if ``feature`` is not an integer.
        """
        try:
            number = operator.index(feature)
        except TypeError:
            raise ValueError(f"feature is {feature!r}, but one of {self.name} must be an int") from None
        if not 0 <= number < len(self):
            raise UnknownNameError("feature", number, range(len(self)), of=self.name)
        return number


def _token(lm: LanguageModel, given) -> int:
    """The id of one token, given as a text or as an id."""
    if isinstance(given, str):
        ids = lm.tokenizer.encode(given, add_special_tokens=False)
        if len(ids) != 1:
            pieces = ", ".join(repr(lm.tokenizer.decode([one])) for one in ids[:8])
            raise ValueError(
                f"{given!r} is {len(ids)} tokens of this model ({pieces or 'none'}), but it must be one: give a text "
                "that is one token, or a token id"
            )
        return ids[0]
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise ValueError(f"{given!r} is no token: give a text that is one token, such as ' dog', or a token id")
    if not 0 <= given < lm.config.n_vocab:
        raise UnknownNameError("token", given, range(lm.config.n_vocab), of="this model")
    return int(given)


@runtime_checkable
class CertifiedForm(Protocol):
    """A bilinear form of a gated model, with its certificate: what ``bj.bilinear_form`` returns."""

    @property
    def lm(self) -> LanguageModel:
        """The model with bilinear MLPs."""
        ...

    @property
    def certificate(self) -> Any:
        """``certificate.of(directions)`` is the R2 of the form along directions ``[U, d_model]``, ``[n_layer, U]``."""
        ...


def resolve(argument: str, given, lm: LanguageModel, layer: int, source) -> SAE | Directions:
    """The SAE that is given or that a dict describes, or the directions, checked against the model and the layer.

    Raises:
        ValueError: if the SAE reads another site, layer or width, or the directions have another width.
        UnknownNameError: if the SAE does not exist.
    """
    sites = SITES[argument]
    if isinstance(given, Directions) or (hasattr(given, "ndim") and hasattr(given, "dtype")):
        found = given if isinstance(given, Directions) else Directions(given)
        if found.vectors.shape[1] != lm.config.d_model:
            raise ValueError(
                f"{argument} is directions of width {found.vectors.shape[1]}, but the model has d_model "
                f"{lm.config.d_model}: give rows [n, {lm.config.d_model}]"
            )
        return found
    if isinstance(given, SAE):
        sae = given
        _check_site(argument, sae.config.site, sites)
    else:
        if given is not None and not isinstance(given, Mapping):
            raise ValueError(
                f"{argument} is {given!r}, but it must be an SAE, directions [n, d_model], or a dict such as "
                f"{{'site': {sites[-1]!r}, 'k': 20}}"
            )
        wanted = {"site": sites[0], **(given or {})}
        unknown = sorted(set(wanted) - {"site", "expansion", "k", "tag"})
        if unknown:
            raise ValueError(f"{argument} has unknown keys {', '.join(unknown)}: use site, expansion, k and tag")
        _check_site(argument, site_name(wanted["site"]), sites)
        if source is None:
            raise ValueError(
                "this model was not loaded from a folder or the hub, so it has no SAEs: pass scope=, or an SAE as "
                f"{argument}, or plain directions as out"
            )
        from bilinear_jax.store.checkpoint import load_sae

        sae = load_sae(source, layer=layer, **wanted)
    _check_reconstructs(argument, sae)
    if sae.config.layer != layer:
        raise ValueError(f"{argument} is the SAE {sae.name} of layer {sae.config.layer}, but layer {layer} is traced")
    if sae.config.d_model != lm.config.d_model:
        raise ValueError(
            f"{argument} is the SAE {sae.name} with d_model {sae.config.d_model}, but the model has {lm.config.d_model}"
        )
    return sae


def _check_reconstructs(argument: str, sae: SAE) -> None:
    """Raise ``ValueError`` for what does not reconstruct its own site from its features alone."""
    if sae.config.target is not None or sae.config.skip:
        kind = "a transcoder" if sae.config.target else "an SAE with a skip"
        raise ValueError(
            f"{argument} is {sae.name}, {kind}, but a tracer needs an SAE that reconstructs what it reads, or a "
            "bilinear transcoder as out"
        )


def _check_site(argument: str, site: str, sites: tuple[str, ...]) -> None:
    if site not in sites:
        raise ValueError(f"{argument} is an SAE of {site}, but it must be an SAE of {' or '.join(sites)}")


def encoder_rows(sae: SAE) -> Float[Array, "features d_model"]:
    """``sae.encoder``. If the encoder is bilinear, the error says how to trace without it."""
    if sae.config.bilinear_encoder:
        raise ValueError(
            f"SAE {sae.name} has a bilinear encoder, so a feature does not have one encoder row: trace its decoder "
            "columns with use_encoder=False"
        )
    return sae.encoder


def rows_read(outputs: SAE | Directions, use_encoder: bool) -> Float[Array, "features d_model"]:
    """The directions that are read from the MLP's output: encoder rows, decoder columns, or plain ones."""
    if isinstance(outputs, Directions):
        return outputs.vectors
    return encoder_rows(outputs) if use_encoder else outputs.decoder.T


def encoder_constant(out: SAE | Directions, features) -> Float[Array, "*U"]:
    """``b_enc - u . b_dec`` of some features: their pre-activations at a zero input. 0 for plain directions."""
    if isinstance(out, Directions):
        return jnp.zeros_like(out.vectors[features, 0])
    with jax.default_matmul_precision("highest"):
        constant = -(out.encoder[features] @ out.decoder_bias)
    constant = constant if out.config.centred else jnp.zeros_like(constant)
    return constant + out.params["b_enc"][features] if out.config.encoder_bias else constant


def the_sae(argument: str, side: str, found: SAE | Directions) -> SAE:
    """The SAE of a side. ``ValueError`` if there are plain directions in its place."""
    if isinstance(found, Directions):
        raise ValueError(
            f"this tracer has plain directions as {argument}, but this needs the codes of an {side} SAE: make the "
            f"tracer with an SAE as {argument}"
        )
    return found
