"""The recipe for a language model: next-token cross entropy on windows of a token stream.

Published, in the original's training script and model cards: AdamW, learning rate 1e-3 with a warm-up of 50 steps and
then linearly to 0, betas 0.9 and 0.95, weight decay 0.1, batches of 128 sequences, gradients clipped to norm 1, compute
in bfloat16; one epoch of TinyStories (about 500M tokens) for ts-medium, 16 and 32 billion tokens of FineWeb-Edu for
fw-small and fw-medium. So are the defaults of ``LanguageRecipe``, but for float32. Our choices: documents are packed
into windows, where the original has one document a row, padded; and Muon, remat and accumulation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, PyTree

from bilinear_jax.checkpoint import load_tokenizer
from bilinear_jax.fields import COUNT, NOT_NEGATIVE, SEED, Rule, check_fields
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sites import loss as summed_loss
from bilinear_jax.nn.transformer import REMAT, Transformer, TransformerConfig
from bilinear_jax.training import folder
from bilinear_jax.training.data import batches
from bilinear_jax.training.fit import (
    FitOptions,
    TrainState,
    apply_optimizer,
    cosine_with_warmup,
    fingerprint,
    fit,
    sum_over_rows,
)
from bilinear_jax.training.mesh import OnMesh, on_first_process, one_copy, place, place_rows


@dataclasses.dataclass(frozen=True)
class LanguageRecipe:
    """How to train a language model; the defaults are the published recipe, in float32."""

    steps: int  # updates in all
    batch_size: int = 128  # windows of n_ctx tokens an update
    optimizer: str = "adamw"  # or "muon": orthogonalised momentum for the layers' matrices, Adam for all else
    lr: float = 1e-3  # largest learning rate
    embed_lr: float = 1e-2  # with Muon, the largest learning rate of Adam
    betas: tuple[float, float] = (0.9, 0.95)  # of Adam: how much of the two moments is kept at a step
    weight_decay: float = 0.1  # decoupled, times the learning rate; of matrices only (with Muon, of the layers' only)
    warmup: int = 50  # steps in which learning rates rise linearly from 0
    decay: str = "linear"  # or "cosine": how learning rates fall after that
    final: float = 0.0  # where they end, as a share of the largest
    clip: float = 1.0  # largest global gradient norm
    accumulation: int = 1  # parts of a batch, whose gradients are computed one after another: less memory
    remat: str | None = None  # what is kept for the gradient: None all, "products", or "layer" the least (nn.sites)
    compute_dtype: str = "float32"  # or "bfloat16": of activations; parameters, norms, loss, optimiser are float32
    anneal: float = 0.0  # of a SwiGLU model: share of the steps over which its gate becomes linear; 0: never
    seed: int = 0  # of the parameters and of the order of the data

    def __post_init__(self):
        for name, choices in {
            "optimizer": ("adamw", "muon"),
            "decay": ("linear", "cosine"),
            "compute_dtype": ("float32", "bfloat16"),
            "remat": (None, *REMAT),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is one of {', '.join(map(repr, choices))}; got {getattr(self, name)!r}")
        check_fields(self, COUNT, "steps", "batch_size", "accumulation")
        check_fields(self, NOT_NEGATIVE, "lr", "embed_lr", "weight_decay", "warmup")
        check_fields(self, Rule("must lie in 0 ... 1, and below 1", lambda b: all(0 <= x < 1 for x in b)), "betas")
        check_fields(self, Rule("must be a share, 0 ... 1", lambda x: 0 <= x <= 1), "final", "anneal")
        check_fields(self, Rule("must be greater than 0", lambda x: x > 0), "clip")
        check_fields(self, SEED, "seed")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation cuts a batch into equal parts: {self.accumulation} is no divisor of "
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
        """Swish's beta at a step: linearly from 1 to 0 over the first ``anneal * steps``; None without ``anneal``."""
        if not self.anneal:
            return None
        return jnp.maximum(0.0, 1.0 - step.astype(jnp.float32) / max(1, round(self.anneal * self.steps)))


def language_optimizer(recipe: LanguageRecipe) -> optax.GradientTransformation:
    """Clipping to a global norm, then AdamW, or Muon on the layers' stacked ``[n_layer, out, inp]`` matrices."""
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
    """Whether each parameter is a weight, ``w_...``, and not a bias, ``b_...``, which stacked has two axes as well."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key.startswith("w_"), params)


def language_update(
    config: TransformerConfig, recipe: LanguageRecipe
) -> Callable[[TrainState, Int[Any, "batch n_ctx"]], tuple[TrainState, dict[str, Array]]]:
    """The pure function ``update(state, batch) -> (state, metrics)`` of one step, to be jitted with its state donated.

    The loss is the mean cross entropy over all tokens of the batch but those at position 0. With
    ``recipe.accumulation`` of a, part i of the batch is rows i, i + a, i + 2 a, ..., so that rows which lie on
    different devices stay there; gradients of summed losses are added up, and divided once.
    """
    optimizer = language_optimizer(recipe)
    parts = recipe.accumulation

    def sums(params, tokens, beta):
        return summed_loss(
            config,
            params,
            tokens,
            jnp.ones(tokens.shape, bool),
            compute_dtype=jnp.dtype(recipe.compute_dtype),
            beta=beta,
            remat=recipe.remat,
            unroll=recipe.remat is None,
        )

    def update(state: TrainState, batch):
        beta = recipe.beta(state.step)
        gradient_of = jax.value_and_grad(sums, has_aux=True)

        def add(so_far, tokens):
            return jax.tree.map(jnp.add, so_far, gradient_of(state.params, tokens, beta)), None

        batch = jnp.asarray(batch)
        if parts == 1:
            (total, count), gradient = gradient_of(state.params, batch, beta)
        else:
            cut = jnp.swapaxes(batch.reshape(batch.shape[0] // parts, parts, -1), 0, 1)
            zeros = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
            ((total, count), gradient), _ = jax.lax.scan(add, zeros, cut)
        gradient = jax.tree.map(lambda leaf: leaf / count, gradient)
        params, opt_state = apply_optimizer(optimizer, gradient, state)
        metrics = {"loss": total / count, "gradient_norm": optax.tree.norm(gradient)}
        if beta is not None:
            metrics["beta"] = beta
        return TrainState(state.step + 1, params, opt_state), metrics

    return update


def initial_state(config: TransformerConfig, recipe: LanguageRecipe, params: PyTree | None = None) -> TrainState:
    """Step 0: fresh parameters drawn from ``recipe.seed``, or a copy of ``params`` to go on from."""
    if params is None:
        start = _fresh_params(config, jax.random.key(recipe.seed))
    else:
        start = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
    return TrainState(jnp.zeros((), jnp.int32), start, language_optimizer(recipe).init(start))


@functools.partial(jax.jit, static_argnums=0)
def _fresh_params(config: TransformerConfig, key: Key[Array, ""]) -> PyTree:
    return Transformer(config).init(key, jnp.zeros((1, 2), jnp.int32))["params"]


def without_gate(config: TransformerConfig, params: PyTree) -> tuple[TransformerConfig, PyTree]:
    """The bilinear model that a SwiGLU model is at beta 0, where ``swish(x, 0) = x / 2``: ``w_l`` and ``b_l`` halved.

    Halving is exact in floating point, so that both compute the same numbers.

    Raises:
        ValueError: for a model whose MLP isn't a SwiGLU.

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
    return dataclasses.replace(config, gate=None), params | {"layers": params["layers"] | {"mlp": halved}}


def _check_swiglu(config: TransformerConfig) -> None:
    if config.gate != "silu" or not config.bilinear:
        raise ValueError(
            "annealing Swish's beta to 0 makes a SwiGLU bilinear: it needs gate='silu' and bilinear=True, and this "
            f"model has gate={config.gate!r} and bilinear={config.bilinear}"
        )


def train_language(
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
) -> tuple[TransformerConfig, PyTree]:
    """Train a transformer on a flat token stream; the same call again goes on where it was interrupted, see ``fit``.

    Args:
        config: of the transformer; with ``recipe.anneal``, one whose gate is "silu".
        tokens: ``[tokens]``, the training text.
        held_out: ``[rows, n_ctx]``, whose mean loss in nats a token is logged as ``held_out_loss``.
        directory: of checkpoints, ``metrics.jsonl``, and ``samples.jsonl``.
        params: where to start, for fine-tuning; they are copied. By default fresh ones.
        tokenizer: folder, ``tokenizer.json`` or hub name. With it, every ``evaluate_every`` steps each of the
            ``prompts`` is continued by up to 60 tokens, and the text added to ``samples.jsonl``; not while a gate
            is being annealed.
        mesh: of ``training.mesh.make_mesh``: rows of the batch and weights are shared out over its devices.
        evaluate_every: steps from one evaluation to the next; there is one at the end as well.
        options: ``save_every``, ``keep``, ``keep_every``, ``log_every`` and ``log``, as for ``fit``.

    Returns:
        The config and the parameters; with ``recipe.anneal`` those of a bilinear model, ``gate=None``.

    Raises:
        ValueError: for ``recipe.anneal`` with another gate, rows of a single token, tokens that the model doesn't
            have, a prompt that leaves no room for another token, or a directory that holds a run with another config,
            recipe, text or start.
        FloatingPointError: for a loss that isn't finite; the last good checkpoint stays.
    """
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
            on_first_process(lambda: _add_samples(Path(directory) / "samples.jsonl", int(state.step), lm, prompts))
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
            "start": None if params is None else fingerprint(params),
        },
        evaluate=evaluate,
        evaluate_every=evaluate_every,
        name="language model",
        **options,
    )
    return without_gate(config, state.params) if recipe.anneal else (config, state.params)


def check_language_run(config: TransformerConfig, recipe: LanguageRecipe) -> None:
    """Raises ``ValueError`` for a model that can't be trained by the recipe."""
    if config.n_ctx < 2:
        raise ValueError("n_ctx must be at least 2: in a row of 1 token there is none to predict")
    if config.pad_id is not None and not 0 <= config.pad_id < config.n_vocab:
        raise ValueError(f"pad_id is a token, 0 ... {config.n_vocab - 1}, or none; got {config.pad_id}")
    if recipe.anneal:
        _check_swiglu(config)


def _check_rows(config: TransformerConfig, rows: np.ndarray) -> None:
    whole = rows.ndim == 2 and rows.size and np.issubdtype(rows.dtype, np.integer)
    if not whole or not 2 <= rows.shape[1] <= config.n_ctx or not 0 <= rows.min() <= rows.max() < config.n_vocab:
        found = f" from {rows.min()} to {rows.max()}" if rows.size else ""
        raise ValueError(
            f"held_out is tokens [rows, n_ctx] in 0 ... {config.n_vocab - 1}, of 2 ... {config.n_ctx} a row; got "
            f"{rows.dtype} of shape {rows.shape}{found}"
        )


def _check_prompts(config: TransformerConfig, tokenizer: str | Path, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        length = len(load_tokenizer(str(tokenizer), config.tokenizer)(prompt)["input_ids"])
        if not 1 <= length < config.n_ctx:
            raise ValueError(
                f"prompts of 1 ... {config.n_ctx - 1} tokens can be continued in a context of {config.n_ctx}, and "
                f"{prompt!r} has {length}: name another, or none"
            )


def _add_samples(path: Path, step: int, lm: LanguageModel, prompts: Sequence[str]) -> None:
    """Add the prompts' continuations to a file of one JSON object a line, in place of any of this step or later."""
    folder.forget_after(path, step - 1)
    for prompt in prompts:
        room = lm.config.n_ctx - lm.encode(prompt).shape[1]
        text = lm.generate(prompt, max_length=min(60, room), seed=step)
        folder.append(path, {"step": step, "text": text})
