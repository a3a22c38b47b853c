"""What ``bilinear-jax train`` does: a recipe and a text become a model, or SAEs for a model, in one folder.

OUT/tokenizer.json, tokenizer_config.json
OUT/tokens, tokens.json       the text, see training.data
OUT/language/, OUT/saes/      the runs: checkpoints, metrics.jsonl
OUT/model/                    what ``bilinear_jax.load`` reads
OUT/model/scope/              its SAEs; OUT/scope/ if they are those of a model elsewhere
OUT/model.json, saes.json     scores on the documents that were held out, of what was saved
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

from bilinear_jax import evaluation
from bilinear_jax.checkpoint import load_sae, load_tokenizer, save_model, save_sae
from bilinear_jax.language import LanguageModel, load
from bilinear_jax.training.data import (
    TokenFile,
    held_out_rows,
    open_tokens,
    tokenize,
    tokenizer_hash,
    vocabulary_size,
)
from bilinear_jax.training.documents import as_sources, read_documents, save_tokenizer, train_tokenizer, without_last
from bilinear_jax.training.fit import FitOptions
from bilinear_jax.training.folder import replace_file
from bilinear_jax.training.language import check_language_run, train_language
from bilinear_jax.training.mesh import make_mesh, on_first_process, one_copy
from bilinear_jax.training.recipes import DataOptions, Recipe, RunOptions, read_recipe
from bilinear_jax.training.sae import train_saes


def train_lm(
    recipe: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    wandb: str | None = None,
) -> Path:
    """Train a language model by a recipe; the same call again goes on where it was interrupted.

    Args:
        recipe: a name, or a TOML file; see ``read_recipe``.
        data: text; see ``read_documents``.
        out: the run's folder.
        model: a model to go on from, as for ``bilinear_jax.load``: with its config and its tokenizer. None: a new one.
        overrides: of fields of the recipe, by dotted name.
        wandb: a project of Weights & Biases that gets the metrics as well (needs the package wandb).

    Returns:
        The model's folder, ``out/model``; its scores are in ``out/model.json``. Several processes only train: the
        same call in one process alone then saves and scores.

    Raises:
        ValueError: for another tokenizer, text or recipe than the folder is of, or a model in it that isn't this run's.
        ValueError, OSError, ImportError, FloatingPointError: see ``read_recipe``, ``tokenize`` and ``train_language``.
    """
    plan, data, out = read_recipe("lm", recipe, overrides), as_sources(data), _run_folder(out)
    if plan.model is not None:
        if model is not None:
            raise ValueError(f"the recipe {plan.name} has its own [model]: leave out --model, or take one without")
        config, params, tokenizer = plan.model, None, None
    else:
        if model is None:
            raise ValueError(f"the recipe {plan.name} has no [model], it goes on from one that there is: name --model")
        start = _model(model, plan.data)
        config, params, tokenizer = start.config, start.params, start.tokenizer
    check_language_run(config, plan.recipe)
    mesh, package = _mesh(plan.run), _wandb(wandb)
    if tokenizer is None:
        tokenizer = _tokenizer(plan.data, config.n_vocab, data, out)
    text = _tokens(plan.data, data, tokenizer, out, config.n_vocab)
    config, params = train_language(
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
    params = one_copy(params, mesh)  # process 0, which writes them, may hold a part of them only
    folder = out / "model"

    def finish():
        if _is_free(folder):
            origin = _origin(plan, text) | ({} if model is None else {"start": str(model)})
            save_model(folder, config, params, tokenizer=out, origin=origin, dtype=jnp.dtype(plan.run.weights))
        saved = _read_back(folder, lambda: load(folder), params, plan.run)
        rows = _held_out(text, config.n_ctx, plan.run)
        scores = {
            "recipe": plan.name,
            "held_out_loss": held_out_loss(saved, rows),  # nats a token
            "held_out_tokens": rows.shape[0] * (rows.shape[1] - 1),
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
            "trained_tokens": plan.recipe.steps * plan.recipe.batch_size * config.n_ctx,
        }
        replace_file(out / "model.json", json.dumps(evaluation.finite_or_null(scores), indent=2) + "\n")
        print("{0}: {held_out_loss:.4f} nats a token on {held_out_tokens:,} held-out tokens".format(folder, **scores))

    _alone(finish, out)
    return folder


def train_sae(
    recipe: str | Path,
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    model: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    wandb: str | None = None,
) -> Path:
    """Train SAEs for a language model, all in one pass of it; called again, it goes on as ``train_lm`` does.

    Args:
        model: as for ``bilinear_jax.load``. None: ``out/model``, where ``train_lm`` leaves it.
        recipe, data, out, overrides, wandb: as for ``train_lm``. The text becomes tokens by the model's tokenizer.

    Returns:
        The folder that holds the SAEs' folders: ``scope`` in ``out/model``, or in ``out`` if the model is another one.
        Their scores are in ``out/saes.json``.

    Raises:
        FileNotFoundError: if there is no model.
        ValueError: for another text, recipe or model than the folder is of, or SAEs in it that aren't this run's.
        ValueError, OSError, ImportError, FloatingPointError: see ``read_recipe``, ``tokenize`` and ``train_saes``.
    """
    plan, data, out = read_recipe("sae", recipe, overrides), as_sources(data), _run_folder(out)
    home = out / "model"
    if model is None and not home.is_dir():
        raise FileNotFoundError(f"{home} isn't there: train it with `bilinear-jax train lm`, or name one with --model")
    lm = _model(home if model is None else model, plan.data)
    its_own = model is None or Path(model).resolve() == home.resolve()
    scope = (home if its_own else out) / "scope"
    assert plan.saes is not None  # else there is no such recipe
    configs = plan.saes.configs(lm.config)
    mesh, package = _mesh(plan.run), _wandb(wandb)
    text = _tokens(plan.data, data, lm.tokenizer, out, lm.config.n_vocab)
    rows = _held_out(text, lm.config.n_ctx, plan.run)
    saes = train_saes(
        lm,
        configs,
        plan.recipe,
        text.tokens,
        out / "saes",
        held_out=rows,
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
            c = sae.config
            read = functools.partial(load_sae, scope, c.site, c.layer, c.expansion, c.k, c.tag)
            saved.append(_read_back(scope / sae.name, read, sae.params, plan.run))
        scores = evaluation.evaluate_saes(lm, saved, rows)
        replace_file(out / "saes.json", evaluation.to_json(scores) + "\n")
        print(f"{scope}, on {rows.size:,} held-out tokens:\n\n{evaluation.table(scores)}")

    _alone(finish, out)
    return scope


def held_out_loss(lm: LanguageModel, rows: np.ndarray, batch_size: int = 16) -> float:
    """Mean cross entropy in nats a token over full rows ``[rows, n_ctx]``, all tokens but those at position 0."""
    parts = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    losses = [float(lm.loss(part, np.ones_like(part))) for part in parts]
    return float(np.average(losses, weights=[len(part) for part in parts]))


def _run_folder(out: str | Path) -> Path:
    """The run's folder; raises ``OSError`` or ``ValueError`` for a place where it can't be, or would do harm."""
    path = Path(out).absolute()
    lineage = [path, *path.parents]
    there = next(folder for folder in lineage if folder.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file: name a folder of the run's own as --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} can't be written to: name another --out")
    for folder in lineage:
        checkpoint = any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", "params/_CHECKPOINT_METADATA"))
        if checkpoint or ((folder / "lock").exists() and (folder / "checkpoints").exists()):
            raise ValueError(f"{out} is, or lies in, a part of another run, {folder}: name a folder outside as --out")
    return Path(out)


def _model(source: str | Path, options: DataOptions) -> LanguageModel:
    """A model that there is; it has its own tokenizer."""
    if options.tokenizer != "new":
        raise ValueError(f"data.tokenizer is {options.tokenizer!r}, but the model has its own tokenizer: leave it out")
    return load(source)


def _tokenizer(options: DataOptions, n_vocab: int, data: list[str | Path], out: Path):
    """The run's tokenizer; a new one is in its folder once the text is tokenised."""
    name = options.tokenizer
    if name == "new" and (out / "tokens").exists() and (out / "tokenizer.json").exists():
        tokenizer = load_tokenizer(str(out), None)
        if len(tokenizer) != n_vocab:
            raise ValueError(
                f"{out} has a tokenizer of {len(tokenizer)} pieces, the model {n_vocab}: name another --out"
            )
        return tokenizer
    if name == "new":
        return train_tokenizer(without_last(read_documents(data, options.field), options.held_out), n_vocab)
    if "/" not in name and not Path(name).exists():
        with contextlib.suppress(FileNotFoundError):  # it isn't the name of a known tokenizer, but perhaps of a model
            return load_tokenizer(None, name)
    return load_tokenizer(name, None)


def _tokens(options: DataOptions, data: list[str | Path], tokenizer, out: Path, n_vocab: int) -> TokenFile:
    """The text as tokens that the model has, and the tokenizer beside it; made once, and never replaced."""
    if vocabulary_size(tokenizer) > n_vocab:
        raise ValueError(
            f"the tokenizer has a vocabulary of {vocabulary_size(tokenizer)} tokens and the model one of {n_vocab}: "
            "give the model as large a vocabulary, or name another tokenizer"
        )

    def make():
        path, limit, beside = out / "tokens", options.max_tokens, out / "tokenizer.json"
        if beside.exists() and tokenizer_hash(load_tokenizer(str(out), None)) != tokenizer_hash(tokenizer):
            raise ValueError(f"{beside} is another tokenizer than this run's: name another --out")
        out.mkdir(parents=True, exist_ok=True)
        tokenize(data, tokenizer, path, field=options.field, held_out=options.held_out, max_tokens=limit)
        if not beside.exists():
            save_tokenizer(tokenizer, out)

    on_first_process(make)
    return open_tokens(out / "tokens", tokenizer)


def _alone(action: Callable[[], None], out: Path) -> None:
    """Save and score, which one process does: Orbax would wait for the others, who have nothing to save."""
    if jax.process_count() == 1:
        action()
    elif jax.process_index() == 0:
        print(f"{out} is trained: give the same command to one process, without the others, to save and score it")


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _read_back(folder: Path, read: Callable[[], Any], params: Any, options: RunOptions) -> Any:
    """What is saved in a folder; raises ``ValueError`` unless it is what was trained."""
    anew = f"move {folder} away and give the same command again, which saves it anew"
    try:
        found = read()
    except (OSError, ValueError) as error:
        raise ValueError(f"what is saved can't be read ({error}): {anew}") from error
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(options.weights)), params)
    pairs = jax.tree.structure(rounded) == jax.tree.structure(found.params) and jax.tree.map(
        lambda one, other: np.array_equal(one.astype(np.float32), np.asarray(other, np.float32)), rounded, found.params
    )
    if not pairs or not all(jax.tree.leaves(pairs)):
        raise ValueError(f"{folder} isn't what was trained here, in {options.weights}: {anew}")
    return found


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
    """What is kept in a checkpoint of where it comes from."""
    return {
        "made by": f"bilinear-jax train, recipe {plan.name}",
        "recipe": dataclasses.asdict(plan.recipe),
        "text": {"n_documents": text.n_documents, "n_tokens": len(text.tokens)} | text.made_from,
    }


def _wandb(project: str | None) -> Any:
    """The package ``wandb``, in the process that logs, if a project is named; else None."""
    if project is None or jax.process_index():
        return None
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError("--wandb needs the package wandb: pip install 'bilinear-jax[wandb]'") from error


def _wandb_log(
    package: Any, project: str | None, plan: Recipe, directory: Path
) -> Callable[[int, dict[str, Any]], None] | None:
    """What passes a run's metrics on to Weights & Biases, to the same run there when it goes on; None without one."""
    if package is None:
        return None
    name = directory / "wandb.txt"
    directory.mkdir(parents=True, exist_ok=True)
    if not name.exists():
        name.write_text(secrets.token_hex(8))
    config = {"out": str(directory)} | dataclasses.asdict(plan)
    run = package.init(project=project, id=name.read_text(), resume="allow", name=plan.name, config=config)
    return lambda step, metrics: run.log(metrics, step=step)
