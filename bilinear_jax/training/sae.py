"""The recipe for SAEs: one stream of activations trains all SAEs.

The loss of an SAE on a batch of tokens is the fraction of its input that it misses:

    loss  = sum |x - x_hat|^2 / sum |x|^2
          + aux_coefficient sum |e - e_hat|^2 / sum |e|^2        only with k_aux > 0 and dead features

where e = x - x_hat is taken as a constant, and ``e_hat = W_dec TopK_aux(z)`` reconstructs it from the ``k_aux`` largest
pre-activations among the dead features: those that fired on none of the last ``dead_after`` tokens. The auxiliary loss
gives dead features a gradient, from what the other features miss (Gao et al. 2024, section 2.4 and appendix A.2).

The optimiser is that of the bilinear-MLP paper (appendix on SAE training): Adam on the gradient without its part along
each decoder column, which would only change the column's length. Afterwards columns are scaled back to unit length.

SAEs of equal shape are stacked in the training state, with decoder columns as rows:

    params[stack]   w_enc, w_dec_rows [n, features, d_model]   b_dec [n, d_model]   b_enc [n, features], if there is one
    extra[stack]    quiet [n, features]: tokens since each feature last fired, counted up to dead_after

The gradients are computed for one SAE after another (``lax.map``); the optimiser updates the whole stack. Measured on a
2-core CPU with 2, 4 and 8 SAEs of d_model 512 and 256, in one compiled step: this takes .92 to .96 of the time of
SAEs that are not stacked, and .79 to .86 of that of ``vmap``. It also needs the least memory besides the state (with 4
SAEs .6 and .55 of theirs), because it keeps the gradients of all SAEs but not their pre-activations. This was not
measured on a GPU.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.sae import SAE, SAEConfig, SAEModule
from bilinear_jax.nn.sites import capture
from bilinear_jax.nn.sparse import FORMS, check_form, fastest_form
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.store.checksums import of_arrays
from bilinear_jax.store.fields import COUNT, NOT_NEGATIVE, SEED, Rule, check_fields
from bilinear_jax.training import folder
from bilinear_jax.training.batches import batches
from bilinear_jax.training.fit import (
    BatchIterator,
    FitOptions,
    TrainState,
    apply_optimizer,
    cosine_with_warmup,
    fingerprint,
    fit,
)
from bilinear_jax.training.harvest import Harvest
from bilinear_jax.training.mesh import one_copy, place
from bilinear_jax.training.unit_decoder import unit_decoder
from weights_convert.files import expanded

FASTEST = "fastest"
"""The value of ``SAERecipe.form`` for which the forms are timed. Two runs may then differ in their last digits."""

HELD_OUT = ("nmse", "explained_variance", "l0", "dead", "loss_added", "loss_recovered")
"""The metrics on held-out text that are logged."""


@dataclasses.dataclass(frozen=True)
class SAERecipe:
    """How to train SAEs. The learning rate rises over ``warmup`` steps, then follows a cosine to ``final_lr``."""

    steps: int  # updates in all
    batch_size: int = 4096  # tokens per update
    lr: float = 1e-4  # largest learning rate of Adam
    final_lr: float = 2e-5  # learning rate at the end
    warmup: int = 0  # steps in which the learning rate rises linearly from 0
    buffer_tokens: int = 65_536  # activations of this many tokens are shuffled together
    rows: int = 32  # windows of n_ctx tokens per forward pass of the language model
    n_ctx: int | None = None  # tokens per window; None: the context of the model
    compute_dtype: str | None = None  # of the model's activations: "float32", "bfloat16"; None: the model's own
    k_aux: int = 0  # dead features that reconstruct the error in the auxiliary loss; 0: no auxiliary loss
    aux_coefficient: float = 1 / 32  # weight of the auxiliary loss
    dead_after: int = 1_000_000  # tokens without firing after which a feature counts as dead
    seed: int = 0  # seed of the parameters and of the order of the data
    form: str = "scan"  # of the sparse products: scan, gather, dense, or fastest: timed once, when the run begins

    def __post_init__(self):
        check_types(self)
        check_fields(self, COUNT, "steps", "batch_size", "rows")
        check_fields(self, COUNT._replace(most=10**15), "buffer_tokens", "dead_after")  # memory and int32 allow less
        check_fields(self, NOT_NEGATIVE, "lr", "k_aux", "warmup", "aux_coefficient")
        check_fields(self, SEED, "seed")
        if self.n_ctx is not None:
            check_fields(self, Rule("must be at least 2: position 0 is not trained on", lambda n: n >= 2), "n_ctx")
        if self.compute_dtype not in (None, "float32", "bfloat16"):
            raise ValueError(f"compute_dtype must be float32, bfloat16 or none; got {self.compute_dtype!r}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr must lie in 0 ... lr ({self.lr}), got {self.final_lr}")
        if self.dead_after + self.batch_size >= 2**31:
            raise ValueError(f"dead_after must be below 2^31 tokens, got {self.dead_after}")
        if self.form not in (*FORMS, FASTEST):
            raise ValueError(f"form is {self.form!r}, but it must be one of {', '.join((*FORMS, FASTEST))}")


def window(recipe: SAERecipe, lm: LanguageModel) -> int:
    """The tokens of a window. Raises ``ValueError`` if the model's context is shorter."""
    if recipe.n_ctx is not None and recipe.n_ctx > lm.config.n_ctx:
        raise ValueError(f"n_ctx is {recipe.n_ctx}, but the context of the model is {lm.config.n_ctx}: lower it")
    return recipe.n_ctx or lm.config.n_ctx


def sae_optimizer(recipe: SAERecipe) -> optax.GradientTransformation:
    """Adam with the recipe's learning rate, on the params of the training state. Decoder rows stay at unit length."""
    rate = cosine_with_warmup(recipe.lr, recipe.steps, recipe.warmup, recipe.final_lr)
    return unit_decoder(optax.adam(rate), "w_dec_rows", axis=-1)


def stacks(configs: Sequence[SAEConfig]) -> dict[str, tuple[SAEConfig, ...]]:
    """The stacks of SAEs that are trained together: those that differ only in site, layer and tag.

    Raises:
        ValueError: if there are no SAEs, or if two have the same name.
    """
    names = [config.name for config in configs]
    if not names:
        raise ValueError("configs is empty: give at least one SAE to train")
    if len(set(names)) < len(names):
        raise ValueError(f"two SAEs have the same name: give them different tags, {sorted(names)}")
    alike: dict[SAEConfig, list[SAEConfig]] = {}
    for config in configs:
        shape = dataclasses.replace(config, site="mlp_in", layer=0, tag=None)
        alike.setdefault(shape, []).append(config)
    return {f"stack_{i}": tuple(stack) for i, stack in enumerate(alike.values())}


def initial_state(
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    means: Mapping[tuple[str, int], Float[Array | np.ndarray, " d_model"]],
) -> TrainState:
    """New tied SAEs. Their decoder bias is ``means[site, layer]``, the mean input, so that codes start centred.

    The parameters of an SAE depend only on ``recipe.seed``, its name and its mean, not on the other SAEs.
    """

    def fresh(config: SAEConfig) -> dict[str, Array]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), zlib.crc32(config.name.encode()))
        params = dict(SAE.init(config, key).params)
        mean = jnp.asarray(means[config.site, config.layer], jnp.float32)
        return params | {"b_dec": mean / config.scale}

    groups = stacks(configs)
    params = {
        label: jax.tree.map(lambda *leaves: jnp.stack(leaves), *(_as_rows(fresh(config)) for config in group))
        for label, group in groups.items()
    }
    extra = {
        label: {"quiet": jnp.zeros((len(group), group[0].n_features), jnp.int32)} for label, group in groups.items()
    }
    return TrainState(jnp.zeros((), jnp.int32), params, sae_optimizer(recipe).init(params), extra)


def saes_of(state: TrainState, configs: Sequence[SAEConfig]) -> list[SAE]:
    """The SAEs of a training state, in the order of ``configs`` and in the published orientation."""
    found = {}
    for label, group in stacks(configs).items():
        for i, config in enumerate(group):
            params = jax.tree.map(lambda leaf, i=i: leaf[i], state.params[label])
            found[config.name] = SAE(_as_published(params), config)
    return [found[config.name] for config in configs]


def sae_update(configs: Sequence[SAEConfig], recipe: SAERecipe, form: str = "scan") -> Callable:
    """One training step of all SAEs: a pure function ``update(state, activations) -> (state, metrics)``.

    ``activations[site, layer]`` is ``[batch, d_model]`` in any float dtype; every token counts. The result for one SAE
    does not depend on the others.

    The metrics of every SAE are ``nmse.<name>`` of the batch; ``dead.<name>``, the fraction of features that have not
    fired for ``recipe.dead_after`` tokens; and with ``k_aux > 0`` ``aux.<name>``, the auxiliary loss.

    Memory: the params, two moments, the gradient, and for one SAE at a time its pre-activations ``[batch, features]``
    and a few arrays of ``[batch, d_model]``.
    """
    groups = stacks(configs)
    optimizer = sae_optimizer(recipe)

    def update(state: TrainState, activations):
        gradients, extra, metrics = {}, {}, {}
        for label, group in groups.items():
            inputs = [activations[config.site, config.layer] for config in group]
            x = jnp.stack([jnp.asarray(array).astype(jnp.float32) for array in inputs])

            def one(args, config=group[0]):
                return _gradient(config, recipe, form, *args)

            stack = state.params[label], state.extra[label]["quiet"], x
            gradients[label], quiet, measured = jax.lax.map(one, stack)
            extra[label] = {"quiet": quiet}
            for i, config in enumerate(group):
                metrics |= {f"{name}.{config.name}": values[i] for name, values in measured.items()}
        params, opt_state = apply_optimizer(optimizer, gradients, state)
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return update


def reconstruction_loss(
    config: SAEConfig,
    params: dict[str, Array],
    x: Float[Array, "tokens d_model"],
    dead: Bool[Array, " features"] | None = None,
    k_aux: int = 0,
    aux_coefficient: float = 0.0,
    form: str = "scan",
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of one SAE on a batch: the formula in the docstring of this module. Params in the published orientation.

    Returns:
        The loss and its parts: ``nmse``; ``fired`` ``[features]``, whether each feature's code was not 0 on some token;
        and with ``k_aux > 0`` ``aux``, the auxiliary loss before its coefficient, which is 0 while no feature is dead.
        A batch of zeros has loss 0.
    """
    module = SAEModule(config, form)

    def run(method, *args):
        return run_module(module, params, *args, method=method)

    codes = run("encode_sparse", x)
    error = x - run("decode", codes, x)
    nmse = _share(error, x)
    fired = jnp.zeros(config.n_features, bool).at[codes.indices].max(codes.values != 0)
    parts = {"nmse": nmse, "fired": fired}
    if not k_aux or dead is None:
        return nmse, parts
    missed = jax.lax.stop_gradient(error)

    def auxiliary():
        guess = run("decode_directions", run("encode_sparse", x, min(k_aux, config.n_features), dead))
        return _share(missed - guess, missed)

    parts["aux"] = jax.lax.cond(jnp.any(dead), auxiliary, lambda: jnp.zeros_like(nmse))
    return nmse + aux_coefficient * parts["aux"], parts


def fit_saes(
    lm: LanguageModel,
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    tokens: np.ndarray,
    directory: str | Path,
    *,
    held_out: np.ndarray | None = None,
    mesh: Mesh | None = None,
    evaluate_every: int | None = None,
    **options: Unpack[FitOptions],
) -> list[SAE]:
    """Train all SAEs in ``configs`` at once on a flat token stream. The same call resumes an interrupted run.

    One forward pass of the model feeds all SAEs. Position 0 and padding are left out (see ``training.harvest``).

    Args:
        lm: the language model.
        configs: any sites, layers and shapes, with different names.
        recipe: how to train them.
        tokens: ``[tokens]``, the training text.
        directory: the folder for checkpoints and ``metrics.jsonl``, see ``fit``. It logs the metrics of ``sae_update``.
        held_out: ``[rows, seq]``, the held-out text. With it, ``evaluate_saes`` is logged as
            ``held_out_<metric>.<name>``.
        mesh: from ``training.mesh.make_mesh``. Tokens and features are sharded over its devices.
        evaluate_every: steps between evaluations. There is also one at the end.
        options: ``save_every``, ``keep``, ``keep_every``, ``log_every`` and ``log``, as for ``fit``.

    Returns:
        The SAEs, in the order of ``configs``.

    Raises:
        ValueError: if there are no SAEs, two have the same name, one has another width than the model or a site that
            the model does not have, the buffer or the text is too small, or the directory holds a run with another
            config, recipe, model or text.
        FloatingPointError: if a loss is not finite. The last good checkpoint stays.
    """
    from bilinear_jax.measure.evaluation import evaluate_saes

    directory = expanded(directory)
    stacks(configs)  # checks the names
    if other := [config.name for config in configs if config.d_model != lm.config.d_model]:
        raise ValueError(f"the model has d_model {lm.config.d_model}, but these SAEs another: {', '.join(other)}")
    sites = list(dict.fromkeys((config.site, config.layer) for config in configs))
    placed = place(lm, mesh)
    if recipe.compute_dtype is not None:
        placed = dataclasses.replace(placed, compute_dtype=jnp.dtype(recipe.compute_dtype))
    rows = batches(tokens, window(recipe, lm), recipe.rows, recipe.seed)
    start = rows.get_state()
    means = _means(placed, sites, next(rows))
    rows.set_state(start)

    def evaluate(saes: list[SAE]) -> dict[str, float]:
        found = evaluate_saes(lm, saes, held_out)
        return {f"held_out_{key}.{name}": getattr(m, key) for name, m in found.items() for key in HELD_OUT}

    return train_on_activations(
        Harvest(placed, sites, rows, recipe.batch_size, recipe.buffer_tokens, recipe.seed, mesh=mesh),
        configs,
        recipe,
        directory,
        means,
        identity={
            "model": dataclasses.asdict(lm.config),
            "params": fingerprint(lm.params),
            "tokens": len(tokens),
            folder.DATA: of_arrays(tokens),
        },
        mesh=mesh,
        evaluate=None if held_out is None else evaluate,
        evaluate_every=evaluate_every,
        **options,
    )


def train_on_activations(
    data: BatchIterator,
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    directory: str | Path,
    means: Mapping[tuple[str, int], Float[Array | np.ndarray, " d_model"]],
    *,
    identity: dict | None = None,
    mesh: Mesh | None = None,
    evaluate: Callable[[list[SAE]], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    **options: Unpack[FitOptions],
) -> list[SAE]:
    """Train SAEs on batches of activations ``{(site, layer): [batch, d_model]}`` from any source, as ``fit_saes`` does.

    The same recipe and data give the same bits, on one kind of machine. With ``recipe.form = "fastest"`` the form of
    the sparse products is timed instead (``nn.sparse.fastest_form``), and forms round differently. ``config.json``
    records the form, so that a resumed run uses the same and ends with the same bits.

    Args:
        data: the batches.
        configs, recipe, directory: as for ``fit_saes``.
        means: the mean activation of each site, which is the initial decoder bias.
        identity: further values that identify the run. A resumed run must have the same.
        evaluate: called with the SAEs every ``evaluate_every`` steps and at the end. Its numbers are logged.
        mesh, options: as for ``fit_saes``. With a mesh, ``data`` must give batches that are sharded over it.
    """
    form, directory = recipe.form, expanded(directory)
    if form == FASTEST:
        form = _recorded_form(directory) or _measured_form(configs, recipe, mesh)

    def trained(state: TrainState) -> list[SAE]:
        return saes_of(one_copy(state, mesh), configs)

    state = fit(
        sae_update(configs, recipe, form),
        place(initial_state(configs, recipe, means), mesh),
        data,
        steps=recipe.steps,
        directory=directory,
        config={
            "saes": [dataclasses.asdict(config) for config in configs],
            "recipe": dataclasses.asdict(recipe) | {"form": None},  # what counts is the form itself
            "form": form,
        }
        | (identity or {}),
        evaluate=None if evaluate is None else lambda state: evaluate(trained(state)),
        evaluate_every=evaluate_every,
        name="SAEs",
        **options,
    )
    return trained(state)


def _gradient(config: SAEConfig, recipe: SAERecipe, form: str, params, quiet: Int[Array, " features"], x):
    """The gradient of one SAE, its new counters and its metrics."""

    def loss(rows):
        dead = quiet >= recipe.dead_after
        return reconstruction_loss(config, _as_published(rows), x, dead, recipe.k_aux, recipe.aux_coefficient, form)

    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    silent = jnp.minimum(quiet + x.shape[0], recipe.dead_after)
    quiet = jnp.where(parts.pop("fired"), jnp.zeros_like(silent), silent)
    return gradient, quiet, parts | {"dead": jnp.mean((quiet >= recipe.dead_after).astype(jnp.float32))}


def _share(part: Float[Array, "tokens d_model"], whole: Float[Array, "tokens d_model"]) -> Float[Array, ""]:
    """``sum |part|^2 / sum |whole|^2``, or 0 if the whole is 0. ``whole`` is a constant."""
    total = jnp.sum(whole**2)
    return jnp.sum(part**2) / jnp.where(total == 0, jnp.ones_like(total), total)


def _as_rows(params: dict[str, Array]) -> dict[str, Array]:
    """Published params as they are trained: with decoder columns as rows, for the sparse products."""
    return {name: leaf for name, leaf in params.items() if name != "w_dec"} | {"w_dec_rows": params["w_dec"].T}


def _as_published(params: dict[str, Array]) -> dict[str, Array]:
    return {name: leaf for name, leaf in params.items() if name != "w_dec_rows"} | {"w_dec": params["w_dec_rows"].T}


def _means(lm: LanguageModel, sites: Sequence[tuple[str, int]], rows) -> dict[tuple[str, int], Array]:
    """The mean of each site over the tokens that count in some rows."""

    @jax.jit
    def means(lm, rows):
        weight = lm.token_mask(rows).astype(jnp.float32)
        weight = weight / jnp.maximum(jnp.sum(weight), 1.0)
        found = capture(lm.config, lm.params, rows, sites, compute_dtype=lm.compute_dtype)
        return {site: jnp.einsum("bsd,bs->d", found[site].astype(jnp.float32), weight) for site in sites}

    return means(lm, jnp.asarray(rows))


def _recorded_form(directory: Path) -> str | None:
    form = (folder.read_config(directory) or {}).get("form")
    if form is not None:
        check_form(str(form))
    return form


def _measured_form(configs: Sequence[SAEConfig], recipe: SAERecipe, mesh: Mesh | None) -> str:
    """The fastest form for the largest SAE, at the shapes on one device. Process 0 decides."""
    largest = max(configs, key=lambda config: (config.n_features, config.slots))
    tokens, features = recipe.batch_size, largest.n_features
    if mesh is not None:
        tokens, features = max(1, tokens // mesh.shape["data"]), max(1, features // mesh.shape["model"])
    form = fastest_form(tokens, largest.slots, features, largest.d_model)
    if jax.process_count() == 1:
        return form
    from jax.experimental import multihost_utils

    return FORMS[int(multihost_utils.broadcast_one_to_all(np.int32(FORMS.index(form))))]
