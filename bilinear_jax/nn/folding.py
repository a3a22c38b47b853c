"""Gains of norms moved into the weights that read them."""

import dataclasses

from jaxtyping import PyTree

from bilinear_jax.nn.architecture import TransformerConfig
from bilinear_jax.nn.transformer import unembedding

_READERS = {
    "attention_gain": {"attention": ("w_q", "w_k", "w_v")},
    "mlp_gain": {"mlp": ("w_l", "w_r", "w_s"), "original": ("w_l", "w_r")},
}


def fold_norms(config: TransformerConfig, params: PyTree) -> tuple[TransformerConfig, PyTree]:
    """The same model without gains: ``W (g * x) = (W g) x``, with g multiplied into the columns of W.

    The logits are the same, up to rounding. The sites mlp_in are then without the gain. A tied unembedding becomes a
    matrix of its own. The gains of ``qk_norm`` stay, because a rotation follows them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bilinear_jax.nn.transformer import Transformer
        >>> config = TransformerConfig(1, 2, 8, 12, 6, 10, gains=True, tied=True)
        >>> params = Transformer(config).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
        >>> folded, params = fold_norms(config, params)
        >>> folded.gains, folded.tied, sorted(params)
        (False, False, ['layers', 'w_e', 'w_u'])
    """
    if not config.gains:
        return config, params
    layers = {name: value for name, value in params["layers"].items() if name not in _READERS}
    for gain, parts in _READERS.items():
        if gain in params["layers"]:
            columns = params["layers"][gain][:, None]
            for part, readers in parts.items():
                if part in layers:
                    layers[part] = {k: w * columns if k in readers else w for k, w in layers[part].items()}
    new = {name: value for name, value in params.items() if name != "final_gain"} | {"layers": layers}
    if "final_gain" in params:
        new["w_u"] = unembedding(params) * params["final_gain"][None]
    return dataclasses.replace(config, gains=False, tied="w_u" not in new), new
