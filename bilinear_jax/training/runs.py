"""Train a language model, or SAEs for one, from a recipe and a text, in one folder. This is ``bilinear-jax train``.

What is in the folder OUT:

    OUT/tokenizer.json, tokenizer_config.json
    OUT/tokens, tokens.json       the text, with checksums, see store.tokens
    OUT/language/, OUT/saes/      the runs: checkpoints, metrics.jsonl
    OUT/model/                    the model, for ``bilinear_jax.load``; scored only if it is as it was trained
    OUT/model/scope/              its SAEs; OUT/scope/ for SAEs of a model elsewhere
    OUT/model.json, saes.json     scores of the saved model or SAEs on the held-out documents
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.measure import evaluation
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig
from bilinear_jax.store.checkpoint import read_sae, save_model, save_sae
from bilinear_jax.store.dictionaries import load_dictionary
from bilinear_jax.store.documents import as_sources, read_documents, up_to, without_last
from bilinear_jax.store.files import check_name, finite_or_null, replace_file
from bilinear_jax.store.terminal import say
from bilinear_jax.store.tokenizers import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_hash,
    train_tokenizer,
    vocabulary_size,
)
from bilinear_jax.store.tokens import TokenFile, open_tokens, tokenize
from bilinear_jax.training.batches import held_out_rows
from bilinear_jax.training.fit import FitOptions
from bilinear_jax.training.language import check_language_run, fit_language
from bilinear_jax.training.mesh import make_mesh, on_first_process, one_copy
from bilinear_jax.training.recipes import DataOptions, Recipe, RunOptions, read_recipe
from bilinear_jax.training.sae import fit_saes
from bilinear_jax.training.sae_recipe import window
from weights_convert.files import expanded, read_text

_CHARACTERS = 1 << 26
"""With max_tokens, a new tokenizer is trained on this much text, or on 16 characters for each token if that is more."""


def train_language(
    recipe: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    wandb: str | None = None,
) -> Path:
    """Train a language model with a recipe. The same call resumes an interrupted run.

    Args:
        recipe: the name of a recipe, or a TOML file; see ``read_recipe``.
        data: the text; see ``read_documents``.
        out: the folder of the run.
        model: a model to fine-tune, as for ``bilinear_jax.load``, with its config and its tokenizer. None: a new one.
        overrides: values for fields of the recipe, by dotted name such as ``{"recipe.steps": 10}``.
        wandb: a project of Weights & Biases, which also gets the metrics (needs the package wandb).

    Returns:
        The folder of the model, ``out/model``. Its scores are in ``out/model.json``. Several processes only train:
        after that, make the same call in a single process, which saves and scores.

    Raises:
        ValueError: if the folder belongs to another tokenizer, text or recipe, or holds a model of another run.
        ValueError, OSError, ImportError, FloatingPointError: see ``read_recipe``, ``tokenize`` and ``fit_language``.
    """
    plan, data, out = read_recipe("lm", recipe, overrides), as_sources(data), _run_folder(out)
    if plan.model is not None:
        if model is not None:
            raise ValueError(f"the recipe {plan.name} has its own [model]: leave out --model, or take another recipe")
        config, params, tokenizer = plan.model, None, None
    else:
        if model is None:
            raise ValueError(f"the recipe {plan.name} has no [model]: name the model to fine-tune with --model")
        start = _model(model, plan.data)
        config, params, tokenizer = start.config, start.params, start.tokenizer
    check_language_run(config, plan.recipe)
    mesh, package = _mesh(plan.run), _wandb(wandb)
    if tokenizer is None:
        tokenizer = _tokenizer(plan.data, config.n_vocab, data, out)
    text = _tokens(plan.data, data, tokenizer, out, config.n_vocab)
    config, params = fit_language(
        config,
        plan.recipe,
        text.tokens,
        _held_out(text, config.n_ctx, plan.run),
        out / "language",
        params=params,
        tokenizer=out,
        prompts=plan.run.prompts,
        evaluate_every=plan.run.evaluate_every,
        mesh=mesh,
        **_fit_options(plan, _wandb_log(package, wandb, plan, out / "language")),
    )
    params = one_copy(params, mesh)  # process 0 writes them, but may hold only a part
    folder = out / "model"

    def finish():
        if _is_free(folder):
            origin = _origin(plan, text) | ({} if model is None else {"start": str(model)})
            save_model(folder, config, params, tokenizer=out, origin=origin, dtype=jnp.dtype(plan.run.weights))
        saved = _read_back(folder, lambda: load(folder), config, params, plan.run)
        if tokenizer_hash(saved.tokenizer) != text.tokenizer_hash:
            raise ValueError(f"{folder} has another tokenizer than this run: {_anew(folder)}")
        rows = _held_out(text, config.n_ctx, plan.run)
        scored = saved.mean_loss(rows, np.ones_like(rows))
        scores = {
            "recipe": plan.name,
            "held_out_loss": scored.loss,  # nats per token
            "held_out_tokens": scored.tokens,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "trained_tokens": plan.recipe.steps * plan.recipe.batch_size * config.n_ctx,
        }
        replace_file(out / "model.json", json.dumps(finite_or_null(scores), indent=2) + "\n")
        say("{0}: {held_out_loss:.4f} nats per token on {held_out_tokens:,} held-out tokens".format(folder, **scores))

    _alone(finish, out)
    return folder


def train_saes(
    recipe: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    wandb: str | None = None,
) -> Path:
    """Train SAEs for a language model, all in one pass over the text. The same call resumes an interrupted run.

    Args:
        recipe, data, out, overrides, wandb: as for ``train_language``. The model's tokenizer encodes the text.
        model: as for ``bilinear_jax.load``. None: ``out/model``, where ``train_language`` saves it.

    Returns:
        The folder that holds the SAEs' folders: ``out/model/scope``, or ``out/scope`` for a model elsewhere. Their
        scores are in ``out/saes.json``.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: if the folder belongs to another text, recipe or model, or holds SAEs of another run.
        ValueError, OSError, ImportError, FloatingPointError: see ``read_recipe``, ``tokenize`` and ``fit_saes``.
    """
    plan, data, out = read_recipe("sae", recipe, overrides), as_sources(data), _run_folder(out)
    home = out / "model"
    if model is None and not home.is_dir():
        raise FileNotFoundError(
            f"there is no model {home}: train it with `bilinear-jax train lm`, or name one with --model"
        )
    lm = _model(home if model is None else model, plan.data)
    its_own = model is None or Path(model).resolve() == home.resolve()
    scope = (home if its_own else out) / "scope"
    assert plan.saes is not None  # read_recipe requires it
    configs = plan.saes.configs(lm.config)
    mesh, package = _mesh(plan.run), _wandb(wandb)
    text = _tokens(plan.data, data, lm.tokenizer, out, lm.config.n_vocab)
    rows = _held_out(text, window(plan.recipe, lm), plan.run)
    saes = fit_saes(
        lm,
        configs,
        plan.recipe,
        text.tokens,
        out / "saes",
        held_out=rows,
        inputs=_inputs(configs, lm, scope),
        evaluate_every=plan.run.evaluate_every,
        mesh=mesh,
        **_fit_options(plan, _wandb_log(package, wandb, plan, out / "saes")),
    )

    def finish():
        origin = _origin(plan, text) | {"model": str(lm.source)}
        saved = []
        for sae in saes:
            if _is_free(scope / sae.name):
                save_sae(scope / sae.name, sae, origin=origin, dtype=jnp.dtype(plan.run.weights))
            read = functools.partial(read_sae, scope / sae.name)
            saved.append(_read_back(scope / sae.name, read, sae.config, sae.params, plan.run))
        scores = evaluation.evaluate_saes(lm, saved, rows)
        replace_file(out / "saes.json", evaluation.to_json(scores) + "\n")
        say(f"{scope}, on {rows.size:,} held-out tokens:\n\n{evaluation.table(scores)}")

    _alone(finish, out)
    return scope


def _inputs(configs: Sequence[SAEConfig], lm: LanguageModel, scope: Path) -> dict[int, SAE]:
    """The SAEs whose codes the readable transcoders among the configs read, by layer: of this run, or of the model."""

    def load_from(source: Any, c: SAEConfig) -> SAE:
        its = {"expansion": (c.inputs or 0) / c.d_model, "k": c.inputs_k, "target": c.site}
        return load_dictionary(source, site=c.site, layer=c.layer, model=lm, **its)

    found = {}
    for config in configs:
        if config.inputs is not None:
            try:
                found[config.layer] = load_from(scope, config)
            except (UnknownNameError, FileNotFoundError):  # there may be nothing but the transcoders
                found[config.layer] = load_from(lm.source, config)
    return found


def _run_folder(out: str | Path) -> Path:
    """The folder of the run. Raises ``OSError`` or ``ValueError`` if it cannot be there or would damage another run."""
    out = expanded(out)
    path = out.absolute()
    check_name(path)
    lineage = [path, *path.parents]
    there = next(folder for folder in lineage if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: name a folder for this run as --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written to: name another --out")
    for folder in lineage:
        checkpoint = any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", "params/_CHECKPOINT_METADATA"))
        if checkpoint or ((folder / "lock").exists() and (folder / "checkpoints").exists()):
            raise ValueError(f"{out} is inside a part of another run, {folder}: name a folder outside it as --out")
    return out


def _model(source: str | Path, options: DataOptions) -> LanguageModel:
    """An existing model, which has its own tokenizer."""
    if options.tokenizer != "new":
        raise ValueError(f"data.tokenizer is {options.tokenizer!r}, but the model has its own tokenizer: leave it out")
    return load(source)


def _tokenizer(options: DataOptions, n_vocab: int, data: list[str | Path], out: Path):
    """The tokenizer of the run. A new one is saved in its folder when the text is tokenised."""
    name = options.tokenizer
    if name == "new" and (out / "tokens").exists() and (out / "tokenizer.json").exists():
        tokenizer = load_tokenizer(str(out), None)
        if len(tokenizer) != n_vocab:
            raise ValueError(
                f"{out} has a tokenizer of {len(tokenizer)} token ids, but the model has {n_vocab}: name another --out"
            )
        return tokenizer
    if name == "new":
        documents = read_documents(data, options.field, max_characters=options.max_characters)
        if options.max_tokens is not None:
            documents = up_to(documents, max(_CHARACTERS, 16 * options.max_tokens))
        return train_tokenizer(without_last(documents, options.held_out), n_vocab)
    if "/" not in name and not Path(name).exists():
        with contextlib.suppress(FileNotFoundError):  # not a known tokenizer, but perhaps the name of a model
            return load_tokenizer(None, name)
    return load_tokenizer(name, None)


def _tokens(options: DataOptions, data: list[str | Path], tokenizer, out: Path, n_vocab: int) -> TokenFile:
    """The tokenised text, with its tokenizer beside it. Made once, never replaced; its vocabulary must fit."""
    if vocabulary_size(tokenizer) > n_vocab:
        raise ValueError(
            f"the tokenizer has a vocabulary of {vocabulary_size(tokenizer)} tokens, but the model only {n_vocab}: "
            "give the model a larger vocabulary, or name another tokenizer"
        )

    def make():
        path, limit, beside = out / "tokens", options.max_tokens, out / "tokenizer.json"
        if beside.exists() and tokenizer_hash(load_tokenizer(str(out), None)) != tokenizer_hash(tokenizer):
            raise ValueError(f"{beside} is not the tokenizer of this run: name another --out")
        out.mkdir(parents=True, exist_ok=True)
        tokenize(
            data,
            tokenizer,
            path,
            field=options.field,
            held_out=options.held_out,
            max_tokens=limit,
            max_characters=options.max_characters,
        )
        if not beside.exists():
            save_tokenizer(tokenizer, out)

    on_first_process(make)
    return open_tokens(out / "tokens", tokenizer)


def _alone(action: Callable[[], None], out: Path) -> None:
    """Save and score in a single process. With several, Orbax would wait for processes that have nothing to save."""
    if jax.process_count() == 1:
        action()
    elif jax.process_index() == 0:
        say(f"{out} is trained: run the same command in one process, without the others, to save and score it")


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _read_back(folder: Path, read: Callable[[], Any], config: Any, params: Any, options: RunOptions) -> Any:
    """What is saved in a folder. Raises ``ValueError`` unless it is what was trained."""
    try:
        found = read()
    except (OSError, ValueError, UnknownNameError) as error:
        raise ValueError(f"what was saved cannot be read ({error}): {_anew(folder)}") from error
    expected, there = dataclasses.asdict(config), dataclasses.asdict(found.config)
    if changed := [f"{key}: {expected[key]!r} -> {there[key]!r}" for key in expected if expected[key] != there[key]]:
        raise ValueError(f"{folder} has another config than this run ({', '.join(changed)}): {_anew(folder)}")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(options.weights)), params)
    pairs = jax.tree.structure(rounded) == jax.tree.structure(found.params) and jax.tree.map(
        lambda one, other: np.array_equal(one.astype(np.float32), np.asarray(other, np.float32)), rounded, found.params
    )
    if not pairs or not all(jax.tree.leaves(pairs)):
        raise ValueError(f"{folder} is not what was trained here, in {options.weights}: {_anew(folder)}")
    return found


def _anew(folder: Path) -> str:
    return f"move {folder} away and run the same command, which saves it again"


def _fit_options(plan: Recipe, log: Callable[[int, dict[str, Any]], None] | None) -> FitOptions:
    run = plan.run
    return FitOptions(
        save_every=run.save_every, keep=run.keep, keep_every=run.keep_every, log_every=run.log_every, log=log
    )


def _mesh(options: RunOptions) -> Mesh | None:
    if options.mesh is None:
        return make_mesh() if jax.process_count() > 1 else None
    return make_mesh(*options.mesh)


def _held_out(text: TokenFile, n_ctx: int, options: RunOptions) -> np.ndarray:
    rows = held_out_rows(text.held_out, n_ctx)
    return rows if options.held_out_rows is None else rows[: options.held_out_rows]


def _origin(plan: Recipe, text: TokenFile) -> dict[str, Any]:
    """The origin that a checkpoint records."""
    return {
        "made by": f"bilinear-jax train, recipe {plan.name}",
        "recipe": dataclasses.asdict(plan.recipe),
        "text": {"n_documents": text.n_documents, "n_tokens": len(text.tokens)} | text.made_from,
    }


def _wandb(project: str | None) -> Any:
    """The package ``wandb`` in the process that logs, if a project is given; otherwise None."""
    if project is None or jax.process_index():
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError("--wandb needs the package wandb: pip install 'bilinear-jax[wandb]'") from error


def _wandb_log(
    package: Any, project: str | None, plan: Recipe, directory: Path
) -> Callable[[int, dict[str, Any]], None] | None:
    """The function that logs metrics to Weights & Biases, or None. A resumed run continues the same run there."""
    if package is None:
        return None
    name = directory / "wandb.txt"
    directory.mkdir(parents=True, exist_ok=True)
    if not name.exists():
        replace_file(name, secrets.token_hex(8))
    config = {"out": str(directory)} | dataclasses.asdict(plan)
    run = package.init(
        project=project, id=read_text(name, limit=1000, fix="delete it"), resume="allow", name=plan.name, config=config
    )
    return lambda step, metrics: run.log(metrics, step=step)
