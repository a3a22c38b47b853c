"""A bilinear transcoder as a tensor: each of its features is one product of two directions, so nothing is left out.

The pre-activation of feature f, with the rows a_f and b_f of its encoder, is

    z_f  =  (a_f . x)(b_f . x)  +  b_z          with options (w_f . x), and biases beside each dot product

so its interaction matrix ``Q_f = (a b^T + b a^T) / 2`` has the eigenvalues ``(a . b +- |a| |b|) / 2`` and no others. It
needs no MLP that is a tensor: what the MLP does, the transcoder has learned. How well, its own scores say.
"""

from typing import TypeGuard

import jax.numpy as jnp
from jaxtyping import Array, Float

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE
from bilinear_jax.tensor import BilinearTensor


def is_transcoder(given) -> TypeGuard[SAE]:
    """Whether this is a dictionary that reconstructs another site than it reads."""
    return isinstance(given, SAE) and given.config.target is not None


def check_transcoder(transcoder: SAE, lm: LanguageModel, layer: int) -> SAE:
    """The transcoder, if a tracer can have it in place of an output SAE.

    Raises:
        ValueError: if it is not bilinear, does not read mlp_in, or is of another layer or width.
    """
    c = transcoder.config
    wrong = None
    if not c.bilinear_encoder:
        wrong = "its encoder is linear, so that its features are not products of two inputs: train a bilinear one"
    elif c.site != "mlp_in":
        wrong = f"it reads {c.site}, and must read mlp_in"
    elif c.layer != layer:
        wrong = f"it is of layer {c.layer}, but layer {layer} is traced"
    elif c.d_model != lm.config.d_model:
        wrong = f"it has d_model {c.d_model}, but the model has {lm.config.d_model}"
    if wrong:
        raise ValueError(f"out is the transcoder {transcoder.name}, but {wrong}")
    return transcoder


def check_reads(transcoder: SAE, inp) -> None:
    """Raise ``ValueError`` unless this is the input SAE whose codes a readable transcoder reads."""

    def alike(one, other) -> bool:
        return one.shape == other.shape and bool(jnp.allclose(one, other, rtol=1e-2, atol=1e-2))

    p, c = transcoder.params, transcoder.config
    same = isinstance(inp, SAE) and alike(p["w_in"], inp.encoder) and alike(p["b_in"], inp.decoder_bias)
    if not same or inp.config.k != c.inputs_k:
        raise ValueError(
            f"out is the readable transcoder {transcoder.name}, which reads the codes of another SAE than inp "
            f"({getattr(inp, 'name', inp)}): give the SAE of {c.site} with {c.inputs} features and k {c.inputs_k} that "
            "it was trained on"
        )


def transcoder_tensor(transcoder: SAE, gain: Float[Array, " d_model"] | None = None) -> BilinearTensor:
    """The pre-activations of a bilinear transcoder as a ``BilinearTensor``, without ``b_z``: output f is z_f - b_z.

    With biases or a linear term, the tensor has one more input, the last, which is always 1 (see
    ``tensor.with_constant``): a term ``w . x`` is the product of w and that input.

    Args:
        transcoder: with a bilinear encoder.
        gain: of the norm before the MLP, if the tensor is to read ``r / rms(r)``. None: the tensor reads mlp_in; that
            of a readable transcoder reads the codes of its inputs.

    Memory: ``features^2`` numbers, for the outputs.

    Example:
        >>> import jax
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> config = SAEConfig("mlp_in", 0, 4, 2, 1, bilinear_encoder=True, target="mlp_out")
        >>> sae, x = SAE.init(config, jax.random.key(0)), jnp.ones((1, 4))
        >>> bool(jnp.allclose(transcoder_tensor(sae).apply(x), sae.preactivations(x), rtol=1e-5))
        True
    """
    c, rows = transcoder.config, transcoder.params["w_enc"]
    rows = rows if gain is None else rows * gain[None]
    biases = jnp.split(transcoder.params["b_enc"], c.encoder_blocks) if c.encoder_bias else None
    blocks = jnp.split(rows, c.encoder_blocks)
    if c.encoder_bias or c.linear_term:
        ends = biases or [jnp.zeros(c.n_features, rows.dtype)] * c.encoder_blocks
        blocks = [jnp.concatenate([block, end[:, None]], axis=1) for block, end in zip(blocks, ends, strict=True)]
    left, right, *linear = blocks
    down = jnp.eye(c.n_features, dtype=rows.dtype)
    if linear:
        constant = jnp.zeros_like(right).at[:, -1].set(1)
        left, right = jnp.concatenate([left, linear[0]]), jnp.concatenate([right, constant])
        down = jnp.concatenate([down, down], axis=1)
    return BilinearTensor(left, right, down)
