"""Our SAEs for SAEBench, a suite of benchmarks for torch: ``saebench_adapter``.

SAEBench calls an SAE as its class ``BaseSAE`` (package sae-bench, version 0.6): ``W_enc [d_in, d_sae]``,
``W_dec [d_sae, d_in]``, ``b_enc``, ``b_dec``, ``cfg``, ``device``, ``dtype``, ``encode``, ``decode``, ``forward`` and
``to``. The adapter has these, and computes with ``SAE.encode`` and ``SAE.decode`` themselves, so no activation is
written a second time. Tensors become NumPy arrays on the way, in float32.

SAEBench wants decoder rows of unit length. With n_f the length of decoder column f, in the units of the site:

    W_dec[f] = decoder[:, f] / n_f        W_enc[:, f] = n_f encoder[f]        b_enc[f] = n_f b_enc[f]
    codes'_f = n_f codes_f                which are active, and the reconstruction, stay the same

Source: Karvonen et al. 2025, "SAEBench: A comprehensive benchmark for sparse autoencoders in language model
interpretability".
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilinear_jax.linalg.scale import lengths
from bilinear_jax.nn.sae import SAE
from weights_convert.dictionaries.hooks import hook_name as its_hook

ARCHITECTURES = {
    "topk": "topk",
    "topk_relu": "topk",
    "batchtopk": "batch_topk",
    "jumprelu": "jumprelu",
    "relu": "standard",
}
"""The names of SAEBench for activations."""


@dataclasses.dataclass
class SAEBenchConfig:
    """What SAEBench reads of an SAE's config: the fields of its ``CustomSAEConfig``. It adds attributes of its own."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = ""
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = True
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, for SAEBench's result files."""
        return dataclasses.asdict(self)


class SAEBenchAdapter:
    """An SAE with the interface of SAEBench's ``BaseSAE``. Make it with ``saebench_adapter``."""

    def __init__(self, sae: SAE, cfg: SAEBenchConfig, device, dtype, to_numpy: Callable, from_numpy: Callable):
        sizes = lengths(sae.decoder, axis=0)
        self._sae, self._to_numpy, self._from_numpy = sae, to_numpy, from_numpy
        self._sizes = jnp.where(sizes > 0, sizes, 1)
        self.cfg = cfg
        self.to(device=device, dtype=dtype)

    def to(self, device=None, dtype=None) -> "SAEBenchAdapter":
        """Move the arrays to a device and a dtype; None: as it is. It changes and returns the adapter itself."""
        self.device: Any = self.device if device is None else device
        self.dtype: Any = self.dtype if dtype is None else dtype
        self.cfg.device, self.cfg.dtype = str(self.device), str(self.dtype).removeprefix("torch.")
        sae, by_feature = self._sae, self._sizes[:, None]
        bias = sae.params["b_enc"] if sae.config.encoder_bias else jnp.zeros_like(self._sizes)
        self.W_enc = self._given((sae.encoder * jnp.broadcast_to(by_feature, sae.encoder.shape)).T)
        self.W_dec = self._given(sae.decoder.T / jnp.broadcast_to(by_feature, sae.encoder.shape))
        self.b_enc, self.b_dec = self._given(bias * self._sizes), self._given(sae.decoder_bias)
        return self

    def encode(self, x):
        """The codes of ``x [..., d_in]``, dense ``[..., d_sae]``."""
        return self._given(_encode(self._sae, self._sizes, self._taken(x)))

    def decode(self, feature_acts):
        """The reconstruction ``[..., d_in]`` from codes ``[..., d_sae]``."""
        return self._given(_decode(self._sae, self._sizes, self._taken(feature_acts)))

    def forward(self, x):
        """The reconstruction of ``x``."""
        return self.decode(self.encode(x))

    __call__ = forward

    def _given(self, array):
        return self._from_numpy(np.array(array), self.device, self.dtype)  # a copy: torch writes into its arrays

    def _taken(self, tensor):
        return jnp.asarray(self._to_numpy(tensor), jnp.float32)


@jax.jit
def _encode(sae: SAE, sizes, x):
    codes = sae.encode(x)
    return codes * jnp.broadcast_to(sizes, codes.shape)


@jax.jit
def _decode(sae: SAE, sizes, codes):
    return sae.decode(codes / jnp.broadcast_to(sizes, codes.shape))


def saebench_adapter(
    sae: SAE,
    model_name: str,
    *,
    hook_name: str | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    to_numpy: Callable | None = None,
    from_numpy: Callable | None = None,
) -> SAEBenchAdapter:
    """An SAE as SAEBench takes it: ``selected_saes=[(name, saebench_adapter(sae, "gpt2"))]`` in its ``run_eval``.

    SAEBench loads the model itself, by ``model_name``, and runs it in torch. That must be the model that the SAE was
    trained on, and the hook must have the values of the SAE's site. TransformerLens folds gains of norms into weights
    unless it is told not to; then the values at ``mlp_in`` are those of a model after ``lm.fold_norms()``.

    Codes of the activation "topk" can be negative, and some benchmarks count only positive ones. Thresholded
    activations are encoded densely, without a limit of active features.

    Args:
        model_name: the name of the model in TransformerLens.
        hook_name: where SAEBench reads; by default the hook of the SAE's site, such as ``blocks.2.hook_mlp_out``.
        device, dtype: of torch, for what it gives; ``to`` changes them. None: ``torch.float32``.
        to_numpy: ``f(tensor)``, a NumPy array of a tensor. None: that of torch.
        from_numpy: ``f(array, device, dtype)``, a tensor of a NumPy array. None: that of torch. With both, and a dtype,
            torch is not imported.

    Raises:
        ValueError: for a transcoder, a skip, a passthrough, a bilinear encoder or a token lookup, which SAEBench cannot
            express: it decodes codes without their tokens.
        ImportError: if torch is needed and is not installed.

    Example:
        >>> import jax
        >>> from bilinear_jax.nn.sae import SAEConfig
        >>> sae = SAE.init(SAEConfig("resid_post", 3, d_model=8, expansion=4, k=2), jax.random.key(0))
        >>> plain = {"to_numpy": np.asarray, "from_numpy": lambda array, device, dtype: array.astype(dtype)}
        >>> adapter = saebench_adapter(sae, "gpt2", dtype=np.float32, **plain)
        >>> adapter.cfg.hook_name, adapter.W_enc.shape, adapter.encode(np.ones((5, 8))).shape
        ('blocks.3.hook_resid_post', (8, 32), (5, 32))
    """
    c = sae.config
    kinds = {
        "a transcoder": c.target is not None,
        "an SAE with a skip": c.skip,
        "an SAE with passthrough": bool(c.passthrough),
        "an SAE with a bilinear encoder": c.bilinear_encoder,
        "an SAE with a token lookup": c.token_lookup is not None,
    }
    if wrong := [kind for kind, is_one in kinds.items() if is_one]:
        raise ValueError(
            f"{sae.name} is {wrong[0]}, but SAEBench takes SAEs with one encoder row for each feature that are decoded "
            "from their codes alone: give another SAE"
        )
    if to_numpy is None or from_numpy is None or dtype is None:
        usual_to, usual_from, usual_dtype = _of_torch()
        to_numpy, from_numpy, dtype = to_numpy or usual_to, from_numpy or usual_from, dtype or usual_dtype
    cfg = SAEBenchConfig(
        model_name,
        c.d_model,
        c.n_features,
        c.layer,
        hook_name or its_hook(c.site, c.layer),
        architecture=ARCHITECTURES[c.activation],
        apply_b_dec_to_input=bool(c.centred),
        activation_fn_str="topk" if c.activation.startswith("topk") else "relu",
        activation_fn_kwargs={"k": c.k} if c.activation.startswith("topk") else {},
    )
    return SAEBenchAdapter(sae, cfg, device, dtype, to_numpy, from_numpy)


def _of_torch() -> tuple[Callable, Callable, Any]:
    """The conversions of torch and its float32."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("SAEBench needs torch, which is not installed: pip install sae-bench") from error

    def to_numpy(tensor):
        return tensor.detach().to("cpu", torch.float32).numpy()

    def from_numpy(array, device, dtype):
        return torch.from_numpy(array).to(device=device, dtype=dtype)

    return to_numpy, from_numpy, torch.float32
