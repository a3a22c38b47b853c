"""Convert published torch files to checkpoints of this library, and back: ``convert`` and ``export``."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import weights_convert
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checksums
from bilinear_jax.store.checkpoint import MODEL, check_keeps_saes, config_of, load_model, load_sae, save_model, save_sae
from bilinear_jax.store.dictionaries import check_fits
from bilinear_jax.store.files import atomic_folder, check_name, check_place
from bilinear_jax.store.published import config_file, files_of, read_published
from bilinear_jax.store.sources import list_saes, model_place, sae_folder, sae_names
from bilinear_jax.store.tokenizers import TOKENIZER_FILES, copy_tokenizer, load_tokenizer, tokenizer_hash
from bilinear_jax.store.version import library_version
from weights_convert.files import inside


def convert(
    source: str | Path,
    out: str | Path,
    scope: str | Path | None = None,
    *,
    attn_scale: float | None = None,
    force: bool = False,
) -> list[str]:
    """Write the Orbax checkpoint of a published model, with the SAEs of ``scope``.

    Args:
        source: a folder or a hub name with the published files of a model, or a GGUF file.
        out: the folder to write. It appears when it is complete.
        scope: a folder or a hub name with SAEs of this model. None: no SAEs.
        attn_scale: the factor on the attention's output. It replaces the value in the files. None: use the files.
        force: replace an older model at ``out``.

    Returns:
        The names of the SAEs.

    Raises:
        FileNotFoundError: if the source does not exist, or if ``scope`` holds no SAEs.
        FileExistsError: if ``out`` is not empty and ``force`` is False, or if it is not a model of this
            library.
        ValueError: if the source is already a checkpoint of this library, if an SAE does not fit the model, if
            ``force`` would delete SAEs, or if a file is damaged.
    """
    place = check_place(out, replace=MODEL if force else None)
    if scope is None:
        check_keeps_saes(place, "convert them too with --scope, or delete it first")
    names = [] if scope is None else sae_names(scope)
    if scope is not None and not names:
        raise FileNotFoundError(f"{scope} has no SAEs: give --scope a folder or a hub name with SAEs")
    with atomic_folder(place) as partial:
        config = _convert_model(source, partial, attn_scale)
        for sae_name in names:
            folder = sae_folder(str(scope), sae_name)
            values, params = weights_convert.read_sae(folder)
            sae = SAE(jax.tree.map(jnp.asarray, params), config_of(SAEConfig, values, folder / "config.json"))
            check_fits(sae.config, config, folder)
            save_sae(partial / "scope" / sae.name, sae, origin=origin_of(scope, files_of(folder)))
    return names


def _convert_model(source: str | Path, out: Path, attn_scale: float | None) -> Any:
    """Write the model without SAEs and return its config. The params are in memory once, and only during this call."""

    place = model_place(source)
    if (place / "params").is_dir():
        raise ValueError(f"{source} is already a checkpoint of this library: load it as it is")
    folder = place.parent if place.is_file() else place
    tokenizer_files = [inside(folder, file) for file in TOKENIZER_FILES]
    tokenizer = folder if tokenizer_files[0].is_file() else place if place.is_file() else None
    with ThreadPoolExecutor(1) as meanwhile:
        hashed = meanwhile.submit(origin_of, source, files_of(place))

        def origin() -> dict[str, Any]:
            if tokenizer is None:
                return hashed.result()
            loaded = load_tokenizer(str(tokenizer), config.tokenizer)
            return hashed.result() | {"tokenizer_hash": tokenizer_hash(loaded)}

        values, params = read_published(source, place, attn_scale)
        config = config_of(TransformerConfig, values, config_file(place))
        save_model(out, config, params, tokenizer=tokenizer, origin=origin)
    return config


def origin_of(source: Any, files: list[Path]) -> dict[str, Any]:
    """Where a checkpoint comes from: the source, the SHA-256 of each file, and the version of the converter."""
    return {
        "source": str(source),
        "files": {path.name: checksums.of_file(path) for path in files},
        "written_by": f"weights_convert of bilinear-jax {library_version()}",
    }


def export(
    source: str | Path,
    out: str | Path,
    scope: str | Path | None = None,
    *,
    repo: str | None = None,
    attn_scale: float | None = None,
) -> list[str]:
    """Write a model, and the SAEs of ``scope``, in the published layout.

    The model and its tokenizer go to ``out``. The SAEs go to ``<out>-scope``, one folder each. Both folders must be new
    or empty, and each appears when it is complete.

    Args:
        source: as for ``load_model``.
        out: the folder to write.
        scope: a model, a folder or a hub name with SAEs. None: no SAEs.
        repo: the hub name "owner/name" under which the model will be published. None: leave it out.
        attn_scale: as for ``load_model``.

    Returns:
        The names of the SAEs.

    Raises:
        FileExistsError: if one of the two folders exists and is not empty.
        FileNotFoundError: if the source does not exist, or if ``scope`` holds no SAEs.
        ValueError: if the published layout cannot describe the model or an SAE: see
            ``weights_convert.write_transformer`` and ``write_sae``.
    """
    out = check_name(out)
    paths = [out] if scope is None else [out, out.parent / f"{out.name}-scope"]
    for path in map(check_name, paths):
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise FileExistsError(f"{path} already exists: name another OUT, or move it away")
    places = [check_place(path) for path in paths]
    files = load_model(source, attn_scale=attn_scale)
    named = [] if scope is None else list_saes(scope)
    if scope is not None and not named:
        raise FileNotFoundError(f"{scope} has no SAEs: give --scope a folder or a hub name with SAEs")
    names = []
    with atomic_folder(places[0]) as partial:
        config = dataclasses.asdict(files.config)
        weights_convert.write_transformer(partial, config, jax.tree.map(np.asarray, files.params), repo=repo)
        if files.tokenizer_source is not None:
            copy_tokenizer(Path(files.tokenizer_source), partial)
        if scope is not None:
            with atomic_folder(places[1]) as partial_scope:
                for name in named:
                    sae = load_sae(scope, **name._asdict())
                    (partial_scope / sae.name).mkdir()
                    values = dataclasses.asdict(sae.config)
                    weights_convert.write_sae(partial_scope / sae.name, values, jax.tree.map(np.asarray, sae.params))
                    names.append(sae.name)
    return names
