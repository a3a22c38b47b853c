"""The recipe for language models: next-token cross entropy on windows of a token stream.

Published, in the original's training script and model cards: AdamW, learning rate 1e-3 with a warm-up of 50 steps and
then linearly to 0, betas 0.9 and 0.95, weight decay 0.1, batches of 128 sequences, gradients clipped to norm 1, compute
in bfloat16; one epoch of TinyStories (about 500M tokens) for ts-medium, 16 and 32 billion tokens of FineWeb-Edu for
fw-small and fw-medium. The defaults of ``LanguageRecipe`` are the same, but with float32.

Our choices: documents are packed into windows (the original has one padded document per row), and Muon, remat and
accumulation.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.sites import loss as summed_loss
from bilinear_jax.nn.transformer import REMAT, Edit, Site, TransformerConfig
from bilinear_jax.store.checksums import of_arrays
from bilinear_jax.store.fields import COUNT, NOT_NEGATIVE, SEED, Rule, check_fields
from bilinear_jax.store.tokenizers import end_tokens, load_tokenizer, prompt_ids
from bilinear_jax.training import folder
from bilinear_jax.training.batches import batches
from bilinear_jax.training.fit import (
    FitOptions,
    TrainState,
    apply_optimizer,
    cosine_with_warmup,
    fingerprint,
    fit,
    sum_over_rows,
)
from bilinear_jax.training.folder import DATA
from bilinear_jax.training.mesh import OnMesh, on_first_process, one_copy, place, place_rows
from weights_convert.files import expanded


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """How to train a language model. The defaults are the published recipe, in float32."""

    steps: int  # updates in all
    batch_size: int = 128  # windows of n_ctx tokens per update
    optimizer: str = "adamw"  # or "muon": orthogonalised momentum for the layers' matrices, Adam for all else
    lr: float = 1e-3  # largest learning rate
    embed_lr: float = 1e-2  # with Muon, the largest learning rate of Adam
    betas: tuple[float, float] = (0.9, 0.95)  # Adam's betas: how much of the two moments is kept at each step
    weight_decay: float = 0.1  # decoupled, times the learning rate; only on matrices (with Muon, of the layers)
    warmup: int = 50  # steps in which the learning rates rise linearly from 0
    decay: str = "linear"  # or "cosine": how the learning rates fall after the warm-up
    final: float = 0.0  # learning rate at the end, as a fraction of the largest
    clip: float = 1.0  # largest global gradient norm
    accumulation: int = 1  # parts of a batch whose gradients are computed one after another, to save memory
    remat: str | None = None  # activations kept for the gradient: None (all), "products", or "layer" (the fewest)
    compute_dtype: str = "float32"  # dtype of activations, or "bfloat16"; parameters, norms and loss stay float32
    dropout: float = 0.0  # share of the embedding and of each attn_out and mlp_out that a step sets to 0, in 256ths
    anneal: float = 0.0  # for a SwiGLU model: fraction of the steps over which its gate becomes linear; 0: never
    seed: int = 0  # seed of the parameters and of the order of the data

    def __post_init__(self):
        check_types(self)
        for name, choices in {
            "optimizer": ("adamw", "muon"),
            "decay": ("linear", "cosine"),
            "compute_dtype": ("float32", "bfloat16"),
            "remat": (None, *REMAT),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}")
        check_fields(self, COUNT, "steps", "batch_size", "accumulation")
        check_fields(self, NOT_NEGATIVE, "lr", "embed_lr", "weight_decay", "warmup")
        check_fields(self, Rule("must be at least 0 and below 1", lambda b: all(0 <= x < 1 for x in b)), "betas")
        check_fields(self, Rule("must lie in 0 ... 1", lambda x: 0 <= x <= 1), "final", "anneal")
        check_fields(self, Rule("must be at least 0 and below 1", lambda x: 0 <= x < 1), "dropout")
        check_fields(self, Rule("must be greater than 0", lambda x: x > 0), "clip")
        check_fields(self, SEED, "seed")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation cuts a batch into equal parts: {self.accumulation} does not divide "
                f"batch_size {self.batch_size}"
            )

    def rate(self, peak: float) -> optax.Schedule:
        """The learning rate by step: up to ``peak`` over ``warmup`` steps, then down to ``final * peak`` at the end."""
        if self.decay == "cosine":
            return cosine_with_warmup(peak, self.steps, self.warmup, self.final * peak)
        warmup = min(self.warmup, max(self.steps - 1, 1))
        fall = optax.linear_schedule(peak, self.final * peak, max(self.steps - warmup, 1))
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), fall], [warmup])

    def beta(self, step: Int[Array, ""]) -> Float[Array, ""] | None:
        """Swish's beta at a step: linear from 1 to 0 over the first ``anneal * steps``. None without ``anneal``."""
        if not self.anneal:
            return None
        return jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / max(1, round(self.anneal * self.steps)))


def language_optimizer(recipe: LanguageRecipe) -> optax.GradientTransformation:
    """Clip to a global norm, then AdamW, or Muon on the layers' stacked ``[n_layer, out, inp]`` matrices."""
    first, second = recipe.betas
    if recipe.optimizer == "adamw":
        rule = optax.adamw(
            recipe.rate(recipe.lr), b1=first, b2=second, weight_decay=recipe.weight_decay, mask=_is_matrix
        )
    else:
        rule = optax.contrib.muon(
            recipe.rate(recipe.lr),
            weight_decay=recipe.weight_decay,
            adam_learning_rate=recipe.rate(recipe.embed_lr),
            adam_b1=first,
            adam_b2=second,
            muon_weight_dimension_numbers=lambda params: jax.tree.map(
                lambda leaf: optax.contrib.MuonDimensionNumbers(2, 1) if leaf.ndim == 3 else None, params
            ),
        )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), rule)


def _is_matrix(params: PyTree) -> PyTree:
    """Whether each parameter is a weight ``w_...``. A stacked bias ``b_...`` also has two axes, but is not a matrix."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)


def language_update(
    config: TransformerConfig, recipe: LanguageRecipe
) -> Callable[[TrainState, Int[Any, "batch n_ctx"]], tuple[TrainState, dict[str, Array]]]:
    """The pure function ``update(state, batch) -> (state, metrics)`` of one step. Jit it with its state donated.

    The loss is the mean cross entropy over all tokens of the batch except those at position 0. With
    ``a = recipe.accumulation``, part i of the batch is rows i, i + a, i + 2 a, ..., so that rows stay on their devices.
    The gradients of the summed losses are added, and divided once.

    What ``recipe.dropout`` sets to 0 depends on the seed, the step and the part. It is scaled so that means stay.
    """
    optimizer = language_optimizer(recipe)
    parts = recipe.accumulation

    def sums(params, tokens, beta, key):
        return summed_loss(
            config,
            params,
            tokens,
            jnp.ones(tokens.shape, bool),
            dropout(config.n_layer, recipe.dropout, key),
            compute_dtype=jnp.dtype(recipe.compute_dtype),
            beta=beta,
            remat=recipe.remat,
            unroll=recipe.remat is None,
        )

    def update(state: TrainState, batch):
        beta = recipe.beta(state.step)
        gradient_of = jax.value_and_grad(sums, has_aux=True)

        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)

        def add(so_far, part):
            tokens, number = part
            found = gradient_of(state.params, tokens, beta, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, so_far, found), None

        batch = jnp.asarray(batch)
        if parts == 1:
            (total, count), gradient = gradient_of(state.params, batch, beta, key)
        else:
            cut = jnp.swapaxes(batch.reshape(batch.shape[0] // parts, parts, -1), 0, 1)
            zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
            ((total, count), gradient), _ = jax.lax.scan(add, zeros, (cut, jnp.arange(parts)))
        gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        metrics = {"loss": total / count, "gradient_norm": optax.tree.norm(gradient)}
        if beta is not None:
            metrics["beta"] = beta
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def dropout(n_layer: int, share: float, key: Array) -> dict[Site, Edit]:
    """Edits of a model: each sets a random share of what is added to the residual stream to 0, and scales up the rest.

    The share is rounded to 256ths: then a number needs one random byte, which takes a quarter of the time.
    """
    dropped = min(round(256 * share), 255)
    if not dropped:
        return {}
    places = [("resid_pre", 0)] + [(site, layer) for layer in range(n_layer) for site in ("attn_out", "mlp_out")]

    def edit(number: int) -> Edit:
        def drop(value):
            kept = jax.random.bits(jax.random.fold_in(key, number), value.shape, jnp.uint8) >= dropped
            return jnp.where(kept, value * (256 / (256 - dropped)), 0)

        return drop

    return {place: edit(number) for number, place in enumerate(places)}


def initial_state(config: TransformerConfig, recipe: LanguageRecipe, params: PyTree | None = None) -> TrainState:
    """The state at step 0: new parameters drawn from ``recipe.seed``, or a copy of ``params``."""
    if params is None:
        start = LanguageModel.init(config, jax.random.key(recipe.seed)).params
    else:
        start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), start, language_optimizer(recipe).init(start))


class Trained(NamedTuple):
    """A transformer without a tokenizer. Run it with ``LanguageModel(trained.params, trained.config)``."""

    config: TransformerConfig
    params: PyTree


def without_gate(config: TransformerConfig, params: PyTree) -> Trained:
    """The bilinear model that equals a SwiGLU model at beta 0.

    There ``swish(x, 0) = x / 2``, so ``w_l`` and ``b_l`` are halved. Halving is exact in floating point, so both models
    compute the same numbers.

    Raises:
        ValueError: if the model's MLP is not a SwiGLU.

    Example:
        >>> config = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=16, n_ctx=6, n_vocab=10, gate="silu")
        >>> params = initial_state(config, LanguageRecipe(steps=1)).params
        >>> bilinear, halved = without_gate(config, params)
        >>> bilinear.gate is None, bool(jnp.all(2 * halved["layers"]["mlp"]["w_l"] == params["layers"]["mlp"]["w_l"]))
        (True, True)

    Source: the paper's fine-tuning of SwiGLU models by annealing Swish's beta.
    """
    _check_swiglu(config)
    mlp = params["layers"]["mlp"]
    halved = {name: value / 2 if name in ("w_l", "b_l") else value for name, value in mlp.items()}
    return Trained(dataclasses.replace(config, gate=None), params | {"layers": params["layers"] | {"mlp": halved}})


def _check_swiglu(config: TransformerConfig) -> None:
    if config.gate != "silu" or not config.bilinear:
        raise ValueError(
            "annealing Swish's beta to 0 needs a SwiGLU model, with gate='silu' and bilinear=True, but this "
            f"model has gate={config.gate!r} and bilinear={config.bilinear}"
        )


def fit_language(
    config: TransformerConfig,
    recipe: LanguageRecipe,
    tokens: np.ndarray,
    held_out: np.ndarray,
    directory: str | Path,
    *,
    params: PyTree | None = None,
    tokenizer: str | Path | None = None,
    prompts: Sequence[str] = ("Once upon a time",),
    mesh: jax.sharding.Mesh | None = None,
    evaluate_every: int = 200,
    **options: Unpack[FitOptions],
) -> Trained:
    """Train a transformer on a flat token stream. The same call resumes an interrupted run (see ``fit``).

    Args:
        config: the transformer's config. With ``recipe.anneal``, its gate must be "silu".
        recipe: how to train it.
        tokens: ``[tokens]``, the training text.
        held_out: ``[rows, n_ctx]``, the held-out text. Its mean loss in nats per token is logged as ``held_out_loss``.
        directory: the folder for checkpoints, ``metrics.jsonl`` and ``samples.jsonl``.
        params: initial params, for fine-tuning. They are copied. None: new ones.
        tokenizer: a folder, a ``tokenizer.json`` or a hub name. With it, every ``evaluate_every`` steps each of the
            ``prompts`` is continued by up to 60 tokens, and the text is added to ``samples.jsonl``. This does not
            happen while a gate is being annealed.
        prompts: the texts to continue. An end-of-text token that the tokenizer puts after every text is left out, with
            a warning.
        mesh: from ``training.mesh.make_mesh``. Rows of the batch and weights are sharded over its devices.
        evaluate_every: steps between evaluations. There is also one at the end.
        options: ``save_every``, ``keep``, ``keep_every``, ``log_every`` and ``log``, as for ``fit``.

    Returns:
        The config and the parameters; with ``recipe.anneal`` those of a bilinear model, ``gate=None``.

    Raises:
        ValueError: for ``recipe.anneal`` with another gate; for rows of a single token; for token ids that the model
            does not have; for a prompt that fills the context; or if the directory holds a run with another config,
            recipe, text or initial params.
        FloatingPointError: if a loss is not finite. The last good checkpoint stays.
    """
    directory = expanded(directory)
    check_language_run(config, recipe)
    _check_rows(config, held_out)
    if tokenizer is not None:
        _check_prompts(config, tokenizer, prompts)
    dtype = jnp.dtype(recipe.compute_dtype)

    @jax.jit
    def sums(state: TrainState, rows):
        mask = jnp.ones(rows.shape, bool)
        beta = recipe.beta(state.step)
        total, count = summed_loss(config, state.params, rows, mask, compute_dtype=dtype, beta=beta)
        return {"loss": total, "count": count}

    def evaluate(state: TrainState) -> dict[str, float]:
        size = recipe.batch_size // recipe.accumulation
        total = sum_over_rows(lambda rows: sums(state, place_rows(rows, mesh)), held_out, size)
        if tokenizer is not None and not recipe.beta(state.step):
            now = (config, one_copy(state.params, mesh))
            now, weights = without_gate(*now) if recipe.anneal else now
            lm = LanguageModel(weights, now, tokenizer_source=str(tokenizer), compute_dtype=dtype)
            on_first_process(lambda: _add_samples(directory / "samples.jsonl", int(state.step), lm, prompts))
        return {"held_out_loss": total["loss"] / total["count"]}

    state = fit(
        language_update(config, recipe),
        place(initial_state(config, recipe, params), mesh),
        OnMesh(batches(tokens, config.n_ctx, recipe.batch_size, recipe.seed, n_vocab=config.n_vocab), mesh),
        steps=recipe.steps,
        directory=directory,
        config={
            "model": dataclasses.asdict(config),
            "recipe": dataclasses.asdict(recipe),
            "tokens": len(tokens),
            DATA: of_arrays(tokens),
            "start": None if params is None else fingerprint(params),
        },
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        name="language model",
        **options,
    )
    return without_gate(config, state.params) if recipe.anneal else Trained(config, state.params)


def check_language_run(config: TransformerConfig, recipe: LanguageRecipe) -> None:
    """Raise ``ValueError`` if the recipe cannot train the model."""
    if config.n_ctx < 2:
        raise ValueError("n_ctx must be at least 2: a row of 1 token has none to predict")
    if config.pad_id is not None and not 0 <= config.pad_id < config.n_vocab:
        raise ValueError(f"pad_id must lie in 0 ... {config.n_vocab - 1}, or none; got {config.pad_id}")
    if recipe.anneal:
        _check_swiglu(config)


def _check_rows(config: TransformerConfig, rows: np.ndarray) -> None:
    whole = rows.ndim == 2 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not whole or not 2 <= rows.shape[1] <= config.n_ctx or not 0 <= rows.min() <= rows.max() < config.n_vocab:
        found = f" from {rows.min()} to {rows.max()}" if rows.size else ""
        raise ValueError(
            f"held_out must be token ids [rows, seq] in 0 ... {config.n_vocab - 1}, 2 ... {config.n_ctx} per row; got "
            f"{rows.dtype} of shape {rows.shape}{found}"
        )


def _check_prompts(config: TransformerConfig, source: str | Path, prompts: Sequence[str]) -> None:
    tokenizer = load_tokenizer(str(source), config.tokenizer)
    if prompts and (end := end_tokens(tokenizer)):
        names = " ".join(map(repr, tokenizer.convert_ids_to_tokens(end)))
        warnings.warn(f"the tokenizer puts {names} after every text: the samples go on without it", stacklevel=3)
    for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts, keep_end=False), strict=True):
        length = len(ids)
        if not 1 <= length < config.n_ctx:
            raise ValueError(
                f"the prompt {prompt!r} has {length} tokens, but must have 1 ... {config.n_ctx - 1} to be continued in "
                f"a context of {config.n_ctx}: give another prompt, or none"
            )


def _add_samples(path: Path, step: int, lm: LanguageModel, prompts: Sequence[str]) -> None:
    """Add the prompts' continuations to a JSON-lines file. Older lines from this step on are dropped."""
    folder.forget_after(path, step - 1)
    for prompt in prompts:
        room = lm.config.n_ctx - lm.encode(prompt, keep_end=False).shape[1]
        text = lm.generate(prompt, max_length=min(60, room), seed=step, keep_end=False)
        folder.append(path, {"step": step, "text": text})
