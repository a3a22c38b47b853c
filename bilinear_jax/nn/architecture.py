"""``TransformerConfig``: the shape and the options of a transformer.

The defaults are the models of Dooms et al. 2025, "Bilinear MLPs enable weight-based mechanistic interpretability". The
other options describe published gated transformers: Llama, Mistral, Qwen 2 and 3, and Gemma.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bilinear_jax.nn.configs import LARGEST_SIZE, check_sizes, check_types

GATES: dict[str | None, Callable[[Array], Array]] = {
    None: lambda x: x,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """The shape and the options of a transformer; hashable, so it can be a static argument of ``jit``."""

    n_layer: int  # number of layers
    n_head: int  # attention heads a layer
    d_model: int  # width of the residual stream
    d_hidden: int  # hidden units of an MLP
    n_ctx: int  # longest sequence, in tokens
    n_vocab: int  # vocabulary size
    bilinear: bool = True  # False: the plain MLP w_p gate(w_l x)
    gate: str | None = None  # None, "relu", "silu", "gelu" or "gelu_tanh", applied to the left side
    bias: bool = False  # biases in the MLP
    attention_bias: bool = False  # biases on queries, keys and values
    normalization: bool | tuple[bool, ...] = (True, True, True)  # before attention, before MLP, final
    attn_scale: float | None = None  # factor on the attention's output; None becomes 1 / sqrt(2 n_layer)
    tokenizer: str | None = None  # name of the tokenizer
    dataset: str | None = None  # name of the training data
    pad_id: int | None = None  # the token that pads a row at its end; None: not known
    n_kv_head: int = 0  # heads of keys and values, each shared by n_head / n_kv_head queries; 0 becomes n_head
    d_head: int = 0  # width of a head; 0 becomes d_model / n_head
    gains: bool = False  # norms multiply by learned gains
    rms_eps: float = 1e-8  # added to the mean square in norms
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    rope_scaling: tuple[float, float, float, float] | None = None  # Llama 3's, see attention.rotary_frequencies
    qk_norm: bool = False  # a norm with a gain on every query and key, before the rotation
    embed_scale: float = 1.0  # factor on the embeddings
    tied: bool = False  # the unembedding is the embedding: params have no w_u
    linear: bool = False  # the MLP also adds a linear map of its input, w_s x
    original_gate: str | None = None  # of the gated MLP that serves position 0 in place of the bilinear one
    original_above: bool = False  # and where the length of its output reaches params["layers"]["original_above"]
    family: str | None = None  # the kind of model that the files state: "llama", "gemma", ...

    def __post_init__(self):
        check_types(self)
        check_sizes(self, "n_layer", "n_head", "d_model", "d_hidden", "n_ctx", "n_vocab")
        for name, default in (("n_kv_head", self.n_head), ("d_head", self.d_model // self.n_head)):
            if name == "d_head" and not self.d_head and self.d_model % (2 * self.n_head):
                raise ValueError(
                    f"d_model ({self.d_model}) must be a multiple of 2 n_head ({2 * self.n_head}): "
                    "all heads have the same width, and rotary positions pair the coordinates of a head"
                )
            object.__setattr__(self, name, getattr(self, name) or default)
        check_sizes(self, "n_kv_head", "d_head")
        if self.n_head % self.n_kv_head:
            raise ValueError(
                f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head}): each head of keys and "
                "values serves the same number of queries. If you replace n_head, also set n_kv_head and d_head, to 0 "
                "for their defaults"
            )
        if self.d_head % 2:
            raise ValueError(f"d_head must be even, got {self.d_head}: rotary positions pair the coordinates of a head")
        for gate in (self.gate, self.original_gate):
            if gate not in GATES:
                raise ValueError(f"unknown gate {gate!r}; choose one of {list(GATES)}")
        three = (self.normalization,) * 3 if isinstance(self.normalization, bool) else self.normalization
        if len(three) != 3:
            raise ValueError(f"normalization is {three}, but it must be one bool or three (attention, MLP, final)")
        object.__setattr__(self, "normalization", three)
        if self.attn_scale is None:
            object.__setattr__(self, "attn_scale", 1 / math.sqrt(2 * self.n_layer))
        largest = float(jnp.finfo(jnp.float32).max)
        for name in ("attn_scale", "embed_scale"):
            if not abs(getattr(self, name)) <= largest:
                raise ValueError(f"{name} must be a finite number in float32, got {getattr(self, name)}")
        positive = {"rms_eps": self.rms_eps, "rope_theta": self.rope_theta}
        positive |= dict(zip(("factor", "low", "high", "n_ctx"), self.rope_scaling or (), strict=False))
        for name, value in positive.items():
            if not 0 < value <= largest:
                where = name if name in ("rms_eps", "rope_theta") else f"{name} of rope_scaling"
                raise ValueError(f"{where} must be greater than 0 and finite in float32, got {value}")
        if self.rope_scaling and not self.rope_scaling[1] < self.rope_scaling[2]:
            raise ValueError(f"rope_scaling is {self.rope_scaling}, but its second number must be below its third")
        if self.pad_id is not None and not 0 <= self.pad_id <= LARGEST_SIZE:
            raise ValueError(f"pad_id must be a token id in 0 ... {LARGEST_SIZE}, got {self.pad_id}")

    @property
    def norms(self) -> tuple[bool, bool, bool]:
        """Whether there is a norm before attention, before the MLP, and at the end."""
        return cast(tuple[bool, bool, bool], self.normalization)

    @property
    def attention_factor(self) -> float:
        """``attn_scale``, never None: a config replaces None when it is made."""
        return cast(float, self.attn_scale)

    @property
    def original(self) -> "TransformerConfig":
        """The config of the gated MLPs that ``original_gate`` names: with biases, and without the linear map."""
        plain = {"linear": False, "original_gate": None, "original_above": False}
        return dataclasses.replace(self, gate=self.original_gate, bias=True, **plain)
