"""``LanguageModel``: a config, params and a tokenizer, with the library's functions as methods."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bilinear_jax.errors import check_count
from bilinear_jax.nn import folding, generation, views
from bilinear_jax.nn import sites as sites_module
from bilinear_jax.nn.sites import NO_EDITS, Captured, check_token_mask, default_token_mask, token_array
from bilinear_jax.nn.transformer import SITES, Edit, Site, Transformer, TransformerConfig
from bilinear_jax.store.fields import SEED
from bilinear_jax.store.terminal import visible_lines

_forward = jax.jit(sites_module.forward, static_argnums=0, static_argnames="compute_dtype")
_loss = jax.jit(sites_module.loss, static_argnums=0, static_argnames="compute_dtype")
_capture = jax.jit(sites_module.capture, static_argnums=(0, 3), static_argnames="compute_dtype")


@functools.partial(jax.jit, static_argnums=0)
def _random_params(config: TransformerConfig, key: Key[Array, ""]) -> PyTree:
    return Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))["params"]


class Batch(NamedTuple):
    """Some rows of a token dataset, as ``LanguageModel.batches`` gives them. All batches of a pass have one shape."""

    first: int  # the number of its first row in the dataset
    rows: int  # how many rows of the dataset it holds; the rows after them only fill it up
    tokens: Int[Array, "batch seq"]
    mask: Bool[Array, "batch seq"]  # the tokens that count; none in a row that fills up

    def not_finite(self) -> ValueError:
        """The error for a model or an SAE that gives NaN or infinite values in these rows."""
        return not_finite(f"in rows {self.first} ... {self.first + self.rows - 1}")


class MeanLoss(NamedTuple):
    """The result of ``LanguageModel.mean_loss``."""

    loss: float  # mean cross entropy, in nats a token
    tokens: int  # how many tokens were predicted


def not_finite(where: str) -> ValueError:
    """The error for a model or an SAE that gives NaN or infinite values. ``where`` says in what."""
    return ValueError(
        f"the model or an SAE gives values that are not finite {where}: check their parameters, and the model's "
        "attn_scale and compute_dtype"
    )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params"],
    meta_fields=["config", "source", "tokenizer_source", "compute_dtype"],
)
@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A transformer with its parameters and its tokenizer.

    It is a pytree whose leaves are the parameters, so it can be an argument of your own ``jit``, ``vmap`` or ``grad``.
    The weight views (``w_e w_u w_q w_k w_v w_o w_l w_r w_p qk ov``, see ``nn.views``) are attributes.
    """

    params: PyTree  # nested dict; arrays under "layers" have n_layer as their first axis
    config: TransformerConfig
    source: str | None = None  # where it was loaded from, as given to ``load``
    tokenizer_source: str | None = None  # a folder, a tokenizer.json or a hub name
    compute_dtype: Any = jnp.float32  # of activations

    @staticmethod
    def init(config: TransformerConfig, key: Key[Array, ""]) -> "LanguageModel":
        """A model with fresh random weights and no tokenizer.

        Example:
            >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
            >>> LanguageModel.init(config, jax.random.key(0)).logits(jnp.zeros((1, 6), int)).shape
            (1, 6, 10)
        """
        return LanguageModel(_random_params(config, key), config)

    @property
    def tokenizer(self):
        """The tokenizer, a ``transformers.PreTrainedTokenizerFast``. It is loaded when it is first needed."""
        from bilinear_jax.store.tokenizers import load_tokenizer

        return load_tokenizer(self.tokenizer_source, self.config.tokenizer, self.config.n_vocab)

    def logits(self, tokens, edits: Mapping[Site, Edit] = NO_EDITS) -> Float[Array, "batch seq n_vocab"]:
        """Logits of the next token, in float32. ``edits`` are as in ``nn.sites.forward``."""
        tokens = self.check_tokens(tokens)
        run = sites_module.forward if edits else _forward
        return run(self.config, self.params, tokens, dict(edits), compute_dtype=self.compute_dtype)

    def loss(self, tokens, token_mask=None, edits: Mapping[Site, Edit] = NO_EDITS) -> Float[Array, ""]:
        """The mean cross entropy over the tokens in ``token_mask``, in nats.

        Args:
            tokens: token ids ``[batch, seq]``.
            token_mask: ``[batch, seq]``, the tokens that are predicted and counted; by default the tokens that count
                (see ``batches``). If there is none, the loss is nan.
            edits: as in ``nn.sites.forward``; compiled again at every call. For many batches, call this in your own
                ``jit``.
        """
        tokens = self.check_tokens(tokens)
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
            raise ValueError(f"sites is {sites!r}, but it must be a list of sites: write [{sites!r}]")
        tokens = self.check_tokens(tokens)
        run = sites_module.capture if edits else _capture
        return run(self.config, self.params, tokens, tuple(sites), dict(edits), compute_dtype=self.compute_dtype)

    def token_mask(self, tokens):
        """The mask of the tokens that count by default (see ``batches``)."""
        return default_token_mask(jnp.asarray(tokens, jnp.int32), self.config.pad_id)

    def encode(self, text: str, *, keep_end: bool | None = None) -> Int[Array, "1 seq"]:
        """The token ids of a text, exactly as the tokenizer gives them.

        ``keep_end``: whether to keep a token that the tokenizer itself puts after every text, such as its end-of-text
        token. None: keep it, with a warning.
        """
        from bilinear_jax.store.tokenizers import prompt_ids

        return jnp.asarray(prompt_ids(self.tokenizer, [text], keep_end), jnp.int32)

    def generate(
        self,
        prompt: str | list[str],
        max_length: int = 30,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        seed: int = 0,
        *,
        stop: bool = False,
        keep_end: bool | None = None,
        edits: Mapping[Site, Edit] = NO_EDITS,
    ) -> str | list[str]:
        """Continues a text, or each text of a list, by at most ``max_length`` sampled tokens.

        The result begins with the prompt, as the tokenizer decodes it and without special tokens. Nothing is added to
        what the tokenizer gives. To work with token ids instead of text, see ``nn.generation.generate``.

        Args:
            prompt: a text, or a list of texts.
            max_length: largest number of new tokens.
            temperature: logits are divided by it. 0 takes the most likely token each time.
            top_k: sample among the ``top_k`` most likely tokens; None: among all.
            seed: of the random numbers. The same seed gives the same text.
            stop: end a text where the model draws the tokenizer's end-of-text token.
            keep_end: as for ``encode``. A model goes on after an end-of-text token as if a new text began.
            edits: replace the values of sites, as in ``nn.sites.forward``; ``steer`` makes such edits.

        Raises:
            ValueError: if an argument is out of range; if a prompt and its new tokens do not fit the context; if a
                prompt is empty and the tokenizer adds nothing to it; if ``stop`` is set and the tokenizer has no
                end-of-text token; if logits are not finite.

        Example:
            >>> import bilinear_jax as bj
            >>> text = bj.load("ts-nano").generate("Once upon a time", max_length=5, temperature=0)
            >>> text.lower().startswith("once upon a time")
            True
        """
        from bilinear_jax.store.tokenizers import clear_errors, prompt_ids

        if not SEED.fits(seed):
            raise ValueError(f"seed {SEED.says}, got {seed}")
        tokenizer = self.tokenizer
        end: Any = tokenizer.eos_token_id if stop else None
        if stop and end is None:
            raise ValueError("this tokenizer has no end-of-text token to stop at: set stop=False")
        rows = prompt_ids(tokenizer, [prompt] if isinstance(prompt, str) else prompt, keep_end)
        if not rows:
            raise ValueError("the list of prompts is empty: give at least one prompt")
        if not all(rows):
            raise ValueError(
                f"prompt {rows.index([])} is empty, and the tokenizer adds no token to it: give it some text"
            )
        lengths = np.array([len(row) for row in rows], np.int32)
        prompts = np.zeros((len(rows), lengths.max()), np.int32)
        for padded, row in zip(prompts, rows, strict=True):
            padded[: len(row)] = row
        new = generation.generate(
            self.config,
            self.params,
            prompts,
            lengths,
            max_length=max_length,
            temperature=temperature,
            top_k=top_k,
            key=jax.random.key(seed),
            stop_token=end,
            edits=edits,
            compute_dtype=self.compute_dtype,
        )
        if np.any(np.asarray(new) == generation.NOT_FINITE):
            raise not_finite("as logits")
        texts = []
        for row, continuation in zip(rows, np.asarray(new).tolist(), strict=True):
            kept = continuation[: continuation.index(end)] if end in continuation else continuation
            with clear_errors("the tokenizer cannot decode its own tokens", "restore tokenizer.json"):
                texts.append(tokenizer.decode(row + kept, skip_special_tokens=True))
        return texts[0] if isinstance(prompt, str) else texts

    def fold_norms(self) -> "LanguageModel":
        """The same model, with the gains of its norms multiplied into the weights: see ``nn.folding.fold_norms``."""
        config, params = folding.fold_norms(self.config, self.params)
        return dataclasses.replace(self, config=config, params=params)

    @property
    def original(self) -> "LanguageModel":
        """The model whose gated MLPs a bilinear form replaces, from the form's own params. Other models: themselves."""
        if self.config.original_gate is None:
            return self
        layers = {name: value for name, value in self.params["layers"].items() if not name.startswith("original")}
        params = {**self.params, "layers": layers | {"mlp": self.params["layers"]["original"]}}
        return dataclasses.replace(self, config=self.config.original, params=params)

    def batches(
        self,
        tokens,
        token_mask=None,
        batch_size: int = 16,
        *,
        description: str | None = None,
        allow_no_token: bool = False,
    ) -> Iterator[Batch]:
        """One pass over a token dataset. Every measurement of this library uses it.

        *The tokens that count* are the tokens in ``token_mask``. By default these are all tokens but position 0 and the
        padding: the run of ``config.pad_id`` at the end of each row. The last batch is filled up with rows in which no
        token counts, so that all batches have one shape and are compiled once.

        Args:
            tokens: token ids ``[rows, seq]``; may be a memory-mapped array.
            token_mask: ``[rows, seq]``, True for the tokens that count; None: the default above.
            batch_size: rows in a batch. If the dataset has fewer, one batch holds them all.
            description: the label of a progress bar on a terminal; None: no bar.
            allow_no_token: do not raise an error if no token counts in the whole dataset.

        Raises:
            ValueError: if the model cannot read the tokens, the mask has another shape, or ``batch_size`` is below 1;
                after the last batch, if no token counted.

        Example:
            >>> config = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10)
            >>> lm = LanguageModel.init(config, jax.random.key(0))
            >>> [(one.first, one.rows, int(one.mask.sum())) for one in lm.batches(np.ones((5, 6), int), batch_size=4)]
            [(0, 4, 20), (4, 1, 5)]
        """
        tokens = token_array(tokens)
        if tokens.ndim != 2 or not min(tokens.shape):
            raise ValueError(f"tokens of shape {tokens.shape} are not [rows, seq] with at least one of each")
        if token_mask is not None:
            token_mask = token_mask if hasattr(token_mask, "ndim") else np.asarray(token_mask)
            check_token_mask(tokens, token_mask)
        check_count("batch_size", batch_size)
        return self._batches(tokens, token_mask, min(batch_size, len(tokens)), description, allow_no_token)

    def _batches(self, tokens, token_mask, size: int, description: str | None, allow_no_token: bool):
        from tqdm.auto import tqdm

        counted = 0
        with tqdm(total=len(tokens), desc=description, disable=None if description else True, unit="row") as bar:
            for first in range(0, len(tokens), size):
                batch = self.check_tokens(np.asarray(tokens[first : first + size]))
                mask = self.token_mask(batch) if token_mask is None else token_mask[first : first + size]
                fill = ((0, size - len(batch)), (0, 0))
                mask = jnp.pad(jnp.asarray(mask).astype(bool), fill)
                counted += int(mask.sum())
                yield Batch(first, len(batch), jnp.pad(batch, fill), mask)
                bar.update(len(batch))
        if not counted and not allow_no_token:
            raise ValueError(
                "no token counts: set token_mask to True for at least one token. By default, position 0 and padding do "
                "not count, so a row needs at least two tokens that are not padding"
            )

    def mean_loss(self, tokens, token_mask=None, batch_size: int = 16) -> MeanLoss:
        """The mean cross entropy over a token dataset, in nats a token.

        The arguments are those of ``batches``. Position 0 is never predicted. Losses are summed and divided once at the
        end, so ``batch_size`` changes only the last digits.

        Raises:
            ValueError: as ``batches``, and if a loss is not finite.

        Example:
            >>> import bilinear_jax as bj
            >>> found = bj.load("ts-nano").mean_loss(bj.load_corpus("ts-nano")[:2])
            >>> 1 < found.loss < 3, found.tokens <= 2 * 255
            (True, True)
        """
        total, count = 0.0, 0
        for batch in self.batches(tokens, token_mask, batch_size, description="loss"):
            loss, number = _loss(
                self.config, self.params, batch.tokens, batch.mask, dict(NO_EDITS), compute_dtype=self.compute_dtype
            )
            total, count = total + float(loss), count + int(number)
            if not math.isfinite(total):
                raise batch.not_finite()
        if not count:
            raise ValueError("no token is predicted: set token_mask to True for at least one token after position 0")
        return MeanLoss(total / count, count)

    def summary(self) -> str:
        """The model in a few lines: its parameters, its sites, what it was trained on, and its SAEs.

        Example:
            >>> import bilinear_jax as bj
            >>> print(bj.load("ts-nano").summary().splitlines()[0])
            ts-nano: 4 bilinear layers, 6,291,456 parameters
        """
        from bilinear_jax.store.checkpoint import training_of, trainings_of_saes
        from bilinear_jax.store.published import weights_of

        config = self.config
        kind = "bilinear" if config.bilinear and config.gate is None else config.gate or "plain"
        size = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        lines = [
            f"{self.source or 'a model in memory'}: {config.n_layer} {kind} layers, {size:,} parameters",
            f"d_model {config.d_model}, d_hidden {config.d_hidden}, {config.n_head} heads, context {config.n_ctx}, "
            f"vocabulary {config.n_vocab}{f' ({config.tokenizer})' if config.tokenizer else ''}",
            f"sites at layers 0 ... {config.n_layer - 1}: {', '.join(SITES)}",
        ]
        if self.source is None:
            return visible_lines("\n".join(lines))
        if config.family is not None:
            lines.append(f"family {config.family}; {weights_of(self.source)}")
        lines.append(f"trained on: {training_of(self.source)}")
        try:
            saes = trainings_of_saes(self.source)
        except (ConnectionError, FileNotFoundError):
            saes = {}
        lines += [f"SAE {name}, trained on: {training}" for name, training in saes.items()]
        return visible_lines("\n".join(lines))

    def __getattr__(self, name: str):
        if name in _VIEWS:
            return getattr(views, name)(self.config, self.params)
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def check_tokens(self, tokens) -> Int[Array, "batch seq"]:
        """The tokens as an int32 array ``[batch, seq]``.

        Raises:
            ValueError: if the shape or the type is another, or a row is longer than the context; and, unless the tokens
                are traced, if a token lies outside the vocabulary.
        """
        traced = isinstance(tokens, Tracer)
        tokens = tokens if traced else np.asarray(token_array(tokens))  # JAX would first cut them to 32 bits
        if tokens.ndim == 1:
            raise ValueError(f"tokens of shape {tokens.shape} are not [batch, seq]: for one row, write tokens[None]")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens of type {tokens.dtype} and shape {tokens.shape} are not integers [batch, seq]")
        if not tokens.shape[1]:
            raise ValueError(f"tokens of shape {tokens.shape} have no token in a row: give at least one")
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


def load(
    source: str | Path,
    attn_scale: float | int | None = None,
    compute_dtype: Any = jnp.float32,
    *,
    dtype: Any = jnp.float32,
) -> LanguageModel:
    """Loads a language model. Its tokenizer is loaded when it is first needed.

    Args:
        source: the name of a model that ships with the package ("ts-nano"); a folder, written by this library or laid
            out as the published checkpoints are, or of a Llama, Mistral, Qwen 2, Qwen 3 or Gemma as Hugging Face stores
            it; a GGUF file of one of these, or a folder with one; or a hub name, "owner/name", or
            "owner/name/file.gguf" where there are several.
        attn_scale: the factor on the attention's output. It overrides the files. The published checkpoints do not state
            it: without this argument it is chosen by the model's name, with a warning.
        compute_dtype: the dtype of activations.
        dtype: the dtype of parameters in memory, float32, bfloat16 or float16. The last two take half of the memory.

    Raises:
        FileNotFoundError: if the source or one of its files does not exist. The message lists what can be loaded.
        ConnectionError: if the hub cannot be reached and its cache does not hold the model.
        ImportError: for a GGUF file, if the package gguf is not installed.
        ValueError: if the checkpoint is damaged, its config does not describe it, its family cannot be loaded, or
            compute_dtype or dtype is not such a type.

    Example:
        >>> import bilinear_jax as bj
        >>> bj.load("ts-nano").config.n_layer
        4
    """
    from bilinear_jax.store.checkpoint import load_model

    try:
        floats = jnp.issubdtype(compute_dtype, jnp.floating)
    except TypeError:
        floats = False
    if not floats:
        raise ValueError(f"compute_dtype is {compute_dtype!r}, but it must be a float type, such as jnp.bfloat16")
    files = load_model(source, attn_scale=attn_scale, dtype=dtype)
    return LanguageModel(files.params, files.config, files.source, files.tokenizer_source, compute_dtype)
