"""LanguageModel: a config, params and a tokenizer, with the library's functions as methods."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from bilinear_jax.nn import sites as sites_module
from bilinear_jax.nn import views
from bilinear_jax.nn.sites import NO_EDITS, Captured, check_token_mask, default_token_mask
from bilinear_jax.nn.transformer import Edit, Site, TransformerConfig

_forward = jax.jit(sites_module.forward, static_argnums=0, static_argnames="compute_dtype")
_loss = jax.jit(sites_module.loss, static_argnums=0, static_argnames="compute_dtype")
_capture = jax.jit(sites_module.capture, static_argnums=(0, 3), static_argnames="compute_dtype")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", "source", "tokenizer_source", "compute_dtype"],
)
@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A transformer with its parameters and its tokenizer.

    It is a pytree whose leaves are the parameters: pass it to your own ``jit``, ``vmap`` or ``grad`` as an
    argument. Weight views (``w_e w_u w_q w_k w_v w_o w_l w_r w_p qk ov``) are attributes.
    """

    params: PyTree  # nested dict; arrays under "layers" have n_layer as their first axis
    config: TransformerConfig
    source: str | None = None  # what it was loaded from, as given to ``load``
    tokenizer_source: str | None = None  # folder, tokenizer.json or hub name; looked up when first needed
    compute_dtype: Any = jnp.float32  # of activations

    @property
    def tokenizer(self):
        """The tokenizer, a ``transformers.PreTrainedTokenizerFast``; loaded when it is first needed."""
        from bilinear_jax.checkpoint import load_tokenizer

        return load_tokenizer(self.tokenizer_source, self.config.tokenizer)

    def logits(self, tokens, edits: Mapping[Site, Edit] = NO_EDITS) -> Float[Array, "batch seq n_vocab"]:
        """Logits of the next token, float32. ``edits``: as in ``nn.sites.forward``."""
        tokens = self._checked(tokens)
        run = sites_module.forward if edits else _forward
        return run(self.config, self.params, tokens, dict(edits), compute_dtype=self.compute_dtype)

    def loss(self, tokens, token_mask=None, edits: Mapping[Site, Edit] = NO_EDITS) -> Float[Array, ""]:
        """Mean cross entropy in nats over the tokens in ``token_mask``.

        ``token_mask [batch, seq]`` says which tokens are predicted and counted; by default all but position 0
        and the padding (the run of ``config.pad_id`` at the end of a row). The loss of no tokens is nan.
        ``edits`` are compiled anew at every call: for many batches, call this inside your own ``jit``.
        """
        tokens = self._checked(tokens)
        mask = self.token_mask(tokens) if token_mask is None else jnp.asarray(token_mask)
        check_token_mask(tokens, mask)
        run = sites_module.loss if edits else _loss
        total, count = run(
            self.config, self.params, tokens, mask.astype(bool), dict(edits), compute_dtype=self.compute_dtype
        )
        return total / count

    def capture(self, tokens, sites: Iterable[Any], edits: Mapping[Site, Edit] = NO_EDITS) -> Captured:
        """The values of the named sites: see ``nn.sites.capture``.

        Example:
            >>> import bilinear_jax as bj
            >>> lm = bj.load("ts-nano")
            >>> got = lm.capture(lm.encode("Once upon a time"), ["mlp_in", ("resid_mid", 2)])
            >>> got["mlp_in"].shape[0], got["resid_mid", 2].shape[-1]
            (4, 256)
        """
        if isinstance(sites, str) or (isinstance(sites, tuple) and any(isinstance(part, int) for part in sites)):
            raise ValueError(f"sites are a list, such as ['mlp_in', ('resid_mid', 2)]: put {sites!r} into one")
        tokens = self._checked(tokens)
        run = sites_module.capture if edits else _capture
        return run(self.config, self.params, tokens, tuple(sites), dict(edits), compute_dtype=self.compute_dtype)

    def token_mask(self, tokens):
        """Which tokens count by default: all but position 0 and the padding at the end of each row."""
        return default_token_mask(jnp.asarray(tokens, jnp.int32), self.config.pad_id)

    def encode(self, text: str):
        """The tokens of a text, ``[1, seq]``, exactly as the tokenizer gives them."""
        return jnp.asarray([self.tokenizer(text)["input_ids"]], jnp.int32)

    def generate(
        self,
        prompt,
        max_length: int = 30,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        edits: Mapping[Site, Edit] = NO_EDITS,
    ):
        """The prompt continued by at most ``max_length`` sampled tokens: see ``generation.generate_text``."""
        from bilinear_jax.generation import generate_text

        return generate_text(self, prompt, max_length, temperature=temperature, top_k=top_k, seed=seed, edits=edits)

    def __getattr__(self, name: str):
        if name in _VIEWS:
            return getattr(views, name)(self.config, self.params)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def _checked(self, tokens) -> Array:
        """Tokens as an int32 array [batch, seq]; concrete ones are checked against vocabulary and context."""
        traced = isinstance(tokens, Tracer)
        tokens = tokens if traced else np.asarray(tokens)  # checked before JAX cuts them to 32 bits
        if tokens.ndim == 1:
            raise ValueError(f"tokens are [batch, seq], got shape {tokens.shape}: add a batch axis, tokens[None]")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens are integers [batch, seq], got {tokens.dtype} of shape {tokens.shape}")
        if not tokens.shape[1]:
            raise ValueError(f"rows have at least one token, got tokens of shape {tokens.shape}")
        if tokens.shape[1] > self.config.n_ctx:
            raise ValueError(
                f"{tokens.shape[1]} tokens do not fit the context of {self.config.n_ctx}: shorten the text, or cut it "
                "into rows"
            )
        if not traced and tokens.size:
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= self.config.n_vocab:
                raise ValueError(
                    f"token {low if low < 0 else high} lies outside the vocabulary 0 ... {self.config.n_vocab - 1}: "
                    "tokenize with this model's own tokenizer"
                )
        return jnp.asarray(tokens.astype(np.int32))


_VIEWS = frozenset({"w_e", "w_u", "w_q", "w_k", "w_v", "w_o", "w_l", "w_r", "w_p", "qk", "ov"})


def load(source: str | Path, attn_scale: float | int | None = None, compute_dtype: Any = jnp.float32) -> LanguageModel:
    """A language model with its parameters, ready to run; its tokenizer is looked up when it is first needed.

    Args:
        source: the name of a model that ships with the package ("ts-nano"); a folder, written by this library or laid
            out as the published checkpoints are; or a hub name, "owner/name".
        attn_scale: the factor on the attention's output, over whatever the files say. The published checkpoints don't
            say: without this argument it goes by the model's name, with a warning.
        compute_dtype: of activations; parameters are float32.

    Raises:
        FileNotFoundError: for a source or a file that isn't there; it lists what can be loaded.
        ConnectionError: where the hub can't be reached and its cache doesn't hold the model.
        ValueError: for a damaged checkpoint, or one that its config doesn't describe; for another compute_dtype than of
            floats.

    Example:
        >>> import bilinear_jax as bj
        >>> bj.load("ts-nano").config.n_layer
        4
    """
    from bilinear_jax.checkpoint import load_model

    try:
        floats = jnp.issubdtype(compute_dtype, jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise ValueError(f"compute_dtype is a type of floats, such as jnp.bfloat16; got {compute_dtype!r}")
    files = load_model(source, attn_scale=attn_scale)
    return LanguageModel(files.params, files.config, files.source, files.tokenizer_source, compute_dtype)
