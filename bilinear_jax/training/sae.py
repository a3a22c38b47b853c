"""Train dictionaries: one stream of activations trains all of them.

The loss is in ``training.sae_loss``. The optimiser is that of the bilinear-MLP paper (appendix on SAE training): Adam
on the gradient without its part along each decoder column, which would only change the column's length. Afterwards
columns are scaled back to unit length.

Dictionaries that are alike are stacked in the training state (``training.sae_state``). The gradients are computed for
one after another (``lax.map``); the optimiser updates the whole stack. Measured on a 2-core CPU with 2, 4 and 8 SAEs
of d_model 512 and 256, in one compiled step: this takes .92 to .96 of the time of SAEs that are not stacked, and .79 to
.86 of that of ``vmap``. It also needs the least memory besides the state (with 4 SAEs .6 and .55 of theirs), because it
keeps the gradients of all SAEs but not their pre-activations. This was not measured on a GPU.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE, SAEModule
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.nn.sites import capture
from bilinear_jax.nn.sparse import FORMS, check_form, fastest_form
from bilinear_jax.nn.transformer import run_module
from bilinear_jax.store.checksums import of_arrays
from bilinear_jax.training import folder
from bilinear_jax.training.batches import batches
from bilinear_jax.training.fit import BatchIterator, FitOptions, TrainState, apply_optimizer, fingerprint, fit
from bilinear_jax.training.harvest import TOKENS, Harvest
from bilinear_jax.training.mesh import one_copy, place
from bilinear_jax.training.sae_loss import reconstruction_loss
from bilinear_jax.training.sae_reads import after_update, check_inputs
from bilinear_jax.training.sae_recipe import FASTEST, SAERecipe, window
from bilinear_jax.training.sae_start import NONE, Samples, Start, start_from
from bilinear_jax.training.sae_state import as_published, initial_state, sae_optimizer, saes_of, stacks
from weights_convert.files import expanded

HELD_OUT = ("nmse", "explained_variance", "l0", "dead", "loss_added", "loss_recovered")
"""The metrics on held-out text that are logged."""

MEMORY = 0.99
"""How much of BatchTopK's running threshold each step keeps."""

CONTROL = 0.02
"""How fast the weight of ReLU's sparsity loss follows l0: its logarithm rises by this times l0 / k - 1, at most 1."""


def sae_update(configs: Sequence[SAEConfig], recipe: SAERecipe, form: str = "scan") -> Callable:
    """One training step of all SAEs: a pure function ``update(state, activations) -> (state, metrics)``.

    ``activations[site, layer]`` is ``[batch, d_model]`` in any float dtype; every token counts. For dictionaries with a
    token lookup, ``activations[training.harvest.TOKENS]`` has the token ids, ``[batch]``. The result for one SAE does
    not depend on the others.

    The metrics of every SAE are ``nmse.<name>`` of the batch; ``dead.<name>``, the fraction of features that have not
    fired for ``recipe.dead_after`` tokens; with ``k_aux > 0`` ``aux.<name>``, the auxiliary loss; and of thresholded
    activations ``l0.<name>``, the mean number of active features.

    Memory: the params, two moments, the gradient, and for one SAE at a time its pre-activations ``[batch, features]``
    and a few arrays of ``[batch, d_model]``.
    """
    groups = stacks(configs)
    optimizer = sae_optimizer(recipe)

    def update(state: TrainState, activations):
        gradients, extra, metrics = {}, {}, {}
        for label, group in groups.items():
            read = [(config.site, config.layer) for config in group]
            wanted = [read] if group[0].target is None else [read, [(c.reconstructs, c.layer) for c in group]]
            values = [
                jnp.stack([jnp.asarray(activations[site]).astype(jnp.float32) for site in sites]) for sites in wanted
            ]

            tokens = None if group[0].token_lookup is None else _token_ids(activations, group[0])

            def one(args, config=group[0], tokens=tokens):
                return _gradient(config, recipe, form, state.step, tokens, *args)

            stack = state.params[label], state.extra[label], *values
            gradients[label], extra[label], measured = jax.lax.map(one, stack)
            for i, config in enumerate(group):
                metrics |= {f"{name}.{config.name}": values[i] for name, values in measured.items()}
        params, opt_state = apply_optimizer(optimizer, gradients, state)
        for label, group in groups.items():
            if group[0].inputs is not None:
                weights = state.params[label]["w_enc"], params[label]["w_enc"], extra[label]["power"]
                params[label] |= {"w_enc": after_update(group[0], recipe, state.step, *weights)}
        return TrainState(state.step + 1, params, opt_state, extra), metrics

    return update


def fit_saes(
    lm: LanguageModel,
    configs: Sequence[SAEConfig],
    recipe: SAERecipe,
    tokens: np.ndarray,
    directory: str | Path,
    *,
    held_out: np.ndarray | None = None,
    inputs: Mapping[int, SAE] = NONE,
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
        inputs: the SAEs whose codes readable transcoders read, by layer.
        mesh: from ``training.mesh.make_mesh``. Tokens and features are sharded over its devices.
        evaluate_every: steps between evaluations. There is also one at the end.
        options: ``save_every``, ``keep``, ``keep_every``, ``log_every`` and ``log``, as for ``fit``.

    Returns:
        The SAEs, in the order of ``configs``.

    Raises:
        ValueError: if there are no SAEs, two have the same name, one has another width than the model, a
            ``token_lookup`` other than its ``n_vocab``, a site that the model does not have, or no SAE to read from,
            the buffer or the text is too small, or the directory holds a run with another config, recipe, model or
            text.
        FloatingPointError: if a loss is not finite. The last good checkpoint stays.
    """
    from bilinear_jax.measure.evaluation import evaluate_saes

    directory = expanded(directory)
    stacks(configs)  # checks the names
    if other := [config.name for config in configs if config.d_model != lm.config.d_model]:
        raise ValueError(f"the model has d_model {lm.config.d_model}, but these SAEs another: {', '.join(other)}")
    n_vocab = lm.config.n_vocab
    if wrong := [config for config in configs if config.token_lookup not in (None, n_vocab)]:
        raise ValueError(
            f"token_lookup of {wrong[0].name} is {wrong[0].token_lookup}, but the model has {n_vocab} token ids: set "
            f"token_lookup to {n_vocab}, or to None for no lookup"
        )
    check_inputs(configs, inputs)
    sites = list(dict.fromkeys((site, c.layer) for c in configs for site in (c.site, c.reconstructs)))
    placed = place(lm, mesh)
    if recipe.compute_dtype is not None:
        placed = dataclasses.replace(placed, compute_dtype=jnp.dtype(recipe.compute_dtype))
    rows = batches(tokens, window(recipe, lm), recipe.rows, recipe.seed)
    start = rows.get_state()
    samples = _samples(placed, sites, next(rows), mesh)
    rows.set_state(start)

    def evaluate(saes: list[SAE]) -> dict[str, float]:
        found = evaluate_saes(lm, saes, held_out)
        return {f"held_out_{key}.{name}": getattr(m, key) for name, m in found.items() for key in HELD_OUT}

    return train_on_activations(
        Harvest(
            *(placed, sites, rows, recipe.batch_size, recipe.buffer_tokens, recipe.seed),
            mesh=mesh,
            tokens=any(config.token_lookup is not None for config in configs),
        ),
        configs,
        recipe,
        directory,
        {site: values.mean(axis=0) for site, values in samples.items()},
        start=start_from(lm, samples, inputs),
        identity={
            "model": dataclasses.asdict(lm.config),
            "params": fingerprint(lm.params),
            "tokens": len(tokens),
            folder.DATA: of_arrays(tokens),
        }
        | ({"inputs": {str(layer): fingerprint(sae.params) for layer, sae in inputs.items()}} if inputs else {}),
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
    start: Start | None = None,
    identity: dict | None = None,
    mesh: Mesh | None = None,
    evaluate: Callable[[list[SAE]], dict[str, float]] | None = None,
    evaluate_every: int | None = None,
    **options: Unpack[FitOptions],
) -> list[SAE]:
    """Train SAEs on batches of activations ``{(site, layer): [batch, d_model]}`` from any source, as ``fit_saes`` does.

    With a token lookup, batches have ``training.harvest.TOKENS`` too. An id without a row makes the loss NaN.

    The same recipe and data give the same bits, on one kind of machine. With ``recipe.form = "fastest"`` the form of
    the sparse products is timed instead (``nn.sparse.fastest_form``), and forms round differently. ``config.json``
    records the form, so that a resumed run uses the same and ends with the same bits.

    Args:
        data: the batches.
        configs, recipe, directory: as for ``fit_saes``.
        means: the mean activation of each site, which is the initial decoder bias of what reconstructs it.
        start: makes better params than random ones, see ``training.sae_start``. None: the start is random.
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
        place(initial_state(configs, recipe, means, start), mesh),
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


def _token_ids(activations, config: SAEConfig):
    if TOKENS not in activations:
        raise ValueError(
            f"{config.name} has a token lookup, but the batches have no token ids: give them as batch[TOKENS], from "
            "bilinear_jax.training.harvest (Harvest does with tokens=True)"
        )
    return activations[TOKENS]


def _gradient(
    config: SAEConfig, recipe: SAERecipe, form: str, step, tokens, params, extra: dict[str, Array], x, y=None
):
    """The gradient of one dictionary, its new counters and its metrics."""
    weight = jnp.exp(extra["log_weight"]) if "log_weight" in extra else recipe.sparsity

    def loss(rows):
        dead = extra["quiet"] >= recipe.dead_after
        published = as_published(rows)
        if "running_threshold" in extra:
            published["threshold"] = extra["running_threshold"]
        options = {"tokens": tokens, "dead": dead, "loss": recipe.loss, "weight": weight, "form": form}
        return reconstruction_loss(config, published, x, y, **options)

    (_, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    if recipe.frozen_decoder:
        gradient |= {"w_dec_rows": jnp.zeros_like(gradient["w_dec_rows"])}
    silent = jnp.minimum(extra["quiet"] + x.shape[0], recipe.dead_after)
    new = {"quiet": jnp.where(parts.pop("fired"), jnp.zeros_like(silent), silent)}
    if "running_threshold" in extra:
        kept = jnp.where(step == 0, 0.0, MEMORY)
        new["running_threshold"] = kept * extra["running_threshold"] + (1 - kept) * parts.pop("threshold")
    if "power" in extra:
        codes = run_module(SAEModule(config), as_published(params), x, method="read")
        new["power"] = extra["power"] + jnp.mean(codes**2, axis=0)
    if "log_weight" in extra:
        new["log_weight"] = extra["log_weight"] + CONTROL * jnp.clip(parts["l0"] / config.k - 1, -1.0, 1.0)
    return gradient, new, parts | {"dead": jnp.mean((new["quiet"] >= recipe.dead_after).astype(jnp.float32))}


def _samples(lm: LanguageModel, sites: Sequence[tuple[str, int]], rows, mesh: Mesh | None) -> Samples:
    """The activations of each site at the tokens that count in some rows, on the host."""

    @jax.jit
    def values(lm, rows):
        found = capture(lm.config, lm.params, rows, sites, compute_dtype=lm.compute_dtype)
        return {site: found[site].astype(jnp.float32) for site in sites}, lm.token_mask(rows)

    found, counted = jax.device_get(one_copy(values(lm, jnp.asarray(rows)), mesh))
    counted = counted if counted.any() else np.ones_like(counted)  # the harvest says that there are no tokens
    return {site: value[counted] for site, value in found.items()}


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
