"""The tokens whose logits a feature raises and lowers through the direct path, read from the weights."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from bilinear_jax.errors import check_count
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE

FEATURES_AT_ONCE = 64  # limits the logits held at once, [64, n_vocab]; does not change the result


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["raised", "raised_by", "lowered", "lowered_by"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class LogitEffects:
    """The tokens whose logits a feature changes most; ``by`` is in logits per unit of activation, before 1 / rms."""

    raised: Array | np.ndarray  # [k] int: token ids, the most raised first
    raised_by: Array | np.ndarray  # [k]
    lowered: Array | np.ndarray  # [k] int: token ids, the most lowered first
    lowered_by: Array | np.ndarray  # [k]


def logit_effects(lm: LanguageModel, sae: SAE, feature, k: int = 10) -> LogitEffects:
    """The tokens whose logits a feature raises and lowers through the direct path ``w_u @ decoder[:, feature]``.

    The effects are those of what the feature writes into the residual stream, per unit of activation. Later layers are
    ignored. So is the scale of the final norm, a positive factor ``1 / rms`` that all logits of a token share. Logits
    are not centred. At ``attn_out``, effects are multiplied by the model's ``attn_scale``. An SAE at ``mlp_in`` does
    not write: there, the effects are those of the feature's direction in the residual stream that the norm reads. A
    transcoder writes at its target.

    Args:
        feature: the number of the feature. It may be traced, and is then not checked.
        k: how many raised tokens, and how many lowered tokens.

    Raises:
        UnknownNameError: if the SAE does not have this feature.
        ValueError: if ``k`` is negative.

    Example:
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> from bilinear_jax.nn.transformer import TransformerConfig
        >>> config = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
        >>> lm = LanguageModel.init(config, jax.random.key(0))
        >>> sae = SAE.init(SAEConfig("mlp_out", 0, d_model=8, expansion=4, k=2), jax.random.key(1))
        >>> effects = logit_effects(lm, sae, 3, k=2)
        >>> bool(effects.raised_by[0] > effects.lowered_by[0]), effects.lowered.shape
        (True, (2,))

    Source: the "logit lens" of a decoder direction, as feature dashboards show it (Bricken et al. 2023).
    """
    check_count("k", k, least=0)
    if not isinstance(feature, Tracer):
        feature = sae.check_feature(feature)
    return _ranked(direct_effects(lm, sae, feature), k)


def _ranked(effects: Float[Array, " n_vocab"], k: int) -> LogitEffects:
    raised_by, raised = jax.lax.top_k(effects, min(k, len(effects)))
    lowered_by, lowered = jax.lax.top_k(-effects, min(k, len(effects)))
    return LogitEffects(raised, raised_by, lowered, -lowered_by)


def logit_effects_of(lm: LanguageModel, sae: SAE, features: Sequence[int], k: int) -> LogitEffects:
    """``logit_effects`` of many features, ``[U, k]`` on the host. Memory: ``64 n_vocab`` numbers."""
    if not k or not features:
        none = np.zeros((len(features), 0))
        return LogitEffects(none.astype(np.int32), none, none.astype(np.int32), none)
    padded = jnp.asarray(np.pad(features, (0, -len(features) % FEATURES_AT_ONCE), mode="edge"), jnp.int32)
    found = jax.device_get(_effects(lm, sae, padded.reshape(-1, FEATURES_AT_ONCE), k))
    return jax.tree.map(lambda part: part.reshape(-1, part.shape[-1])[: len(features)], found)


@functools.partial(jax.jit, static_argnames="k")
def _effects(lm: LanguageModel, sae: SAE, features, k: int) -> LogitEffects:
    def some(part):
        return jax.vmap(lambda feature: _ranked(direct_effects(lm, sae, feature), k))(part)

    with jax.default_matmul_precision("highest"):
        return jax.lax.map(some, features)


def direct_effects(lm: LanguageModel, sae: SAE, feature) -> Float[Array, " n_vocab"]:
    """How much a feature raises the logit of every token, see ``logit_effects``."""
    effects = jnp.einsum("vd,d->v", lm.w_u, sae.decoder[:, feature])
    return lm.config.attention_factor * effects if sae.config.reconstructs == "attn_out" else effects
