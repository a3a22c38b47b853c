"""Weight views: the matrices of a transformer in the orientation of the papers, as pure functions of its params.

Each view takes ``(config, params)``. Axes: ``n_layer``, ``n_head``, ``n_kv_head``, ``d_head``,
``d_model``, ``d_hidden``, ``n_vocab``. Gains of norms and factors are not part of them: see ``fold_norms`` of a
``LanguageModel``.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bilinear_jax.nn.transformer import TransformerConfig, unembedding


def w_e(config: TransformerConfig, params: PyTree) -> Float[Array, "d_model n_vocab"]:
    """Embedding: column t is what token t writes into the residual stream."""
    return params["w_e"].T


def w_u(config: TransformerConfig, params: PyTree) -> Float[Array, "n_vocab d_model"]:
    """Unembedding: row t reads the logit of token t from the residual stream."""
    return unembedding(params)


def w_l(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer d_hidden d_model"]:
    """Left side of the MLP, to which a gate is applied."""
    return params["layers"]["mlp"]["w_l"]


def w_r(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer d_hidden d_model"]:
    """Right side of the MLP."""
    if not config.bilinear:
        raise ValueError("this model has a plain MLP (bilinear=False): it has no right side")
    return params["layers"]["mlp"]["w_r"]


def w_p(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer d_model d_hidden"]:
    """Projection of the MLP, from hidden units to the residual stream."""
    return params["layers"]["mlp"]["w_p"]


def _heads(config: TransformerConfig, weight: Float[Array, "n_layer rows d_model"]):
    return weight.reshape(config.n_layer, -1, config.d_head, config.d_model)


def _for_each_query(config: TransformerConfig, weight: Float[Array, "n_layer n_kv_head d_head d_model"]):
    return jnp.repeat(weight, config.n_head // config.n_kv_head, axis=1)


def w_q(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_head d_head d_model"]:
    """Queries."""
    return _heads(config, params["layers"]["attention"]["w_q"])


def w_k(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_kv_head d_head d_model"]:
    """Keys. With grouped queries, query head h reads head ``h // (n_head / n_kv_head)``."""
    return _heads(config, params["layers"]["attention"]["w_k"])


def w_v(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_kv_head d_head d_model"]:
    """Values, of the heads of the keys."""
    return _heads(config, params["layers"]["attention"]["w_v"])


def w_o(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_head d_model d_head"]:
    """Output of attention, per head."""
    weight = params["layers"]["attention"]["w_o"]
    return weight.reshape(config.n_layer, config.d_model, config.n_head, config.d_head).transpose(0, 2, 1, 3)


def qk(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_head d_model d_model"]:
    """``w_q^T w_k`` of each head, without the rotation: what a query attends to, before positions."""
    return jnp.einsum("lhkq,lhkd->lhqd", w_q(config, params), _for_each_query(config, w_k(config, params)))


def ov(config: TransformerConfig, params: PyTree) -> Float[Array, "n_layer n_head d_model d_model"]:
    """``w_o w_v`` of each head: what it writes for a given input."""
    return jnp.einsum("lhok,lhkd->lhod", w_o(config, params), _for_each_query(config, w_v(config, params)))
