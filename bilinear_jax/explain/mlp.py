"""The MLP of a layer as a third-order tensor."""

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.tensor import BilinearTensor


def mlp_tensor(lm: LanguageModel, layer: int, site: str = "mlp_in") -> BilinearTensor:
    """The MLP of a layer as a ``BilinearTensor``, from ``mlp_in`` to ``mlp_out``.

    With biases or a linear map, the tensor has one more input, the last, which is always 1 (see
    ``tensor.with_constant``). If ``site`` is resid_mid, the tensor reads ``r / rms(r)`` of the residual stream r before
    the norm: the gain of the norm is in its weights.

    Raises:
        ValueError: if the MLP is gated or plain, because it is then not a tensor.
        UnknownNameError: if the model does not have this layer.
    """
    config = lm.config
    if not config.bilinear or config.gate is not None:
        kind = f"gated by {config.gate}" if config.bilinear else "plain (bilinear=False)"
        raise ValueError(
            f"the MLP of this model is {kind}, but only a bilinear MLP without a gate is a tensor: for a gated one, "
            "make its bilinear form with bj.bilinear_form"
        )
    if not hasattr(layer, "__index__") or not 0 <= layer < config.n_layer:
        raise UnknownNameError("layer", repr(layer), range(config.n_layer), of="this model")
    mlp = {name: weight[layer] for name, weight in lm.params["layers"]["mlp"].items()}
    if site == "resid_mid" and config.gains and config.norms[1]:
        gain = lm.params["layers"]["mlp_gain"][layer]
        mlp |= {name: mlp[name] * gain[None] for name in ("w_l", "w_r", "w_s") if name in mlp}
    others = (mlp.get(name) for name in ("b_l", "b_r", "b_p", "w_s"))
    return BilinearTensor.from_mlp(mlp["w_l"], mlp["w_r"], mlp["w_p"], *others)
