"""Convert dictionaries of other libraries to checkpoints of this one, and write them for those libraries."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.sae import SAE
from bilinear_jax.store.checkpoint import SAE_FOLDER, read_sae, save_sae
from bilinear_jax.store.choice import Wanted, listed
from bilinear_jax.store.convert import origin_of
from bilinear_jax.store.dictionaries import (
    OURS,
    Found,
    described,
    find_dictionaries,
    folder_with,
    load_dictionary,
    read_one,
)
from bilinear_jax.store.files import atomic_folder, check_place, read_json
from bilinear_jax.store.sources import sae_folder
from weights_convert.dictionaries import FORMATS, write_dictionary


def holds_dictionaries(source: str | Path) -> bool:
    """Whether a source holds dictionaries of another library. False if it does not exist.

    Example:
        >>> holds_dictionaries("ts-nano")
        False
    """
    try:
        return any(form != OURS for form in find_dictionaries(source).formats.values())
    except (FileNotFoundError, ConnectionError):
        return False


def convert_dictionaries(
    source: str | Path,
    out: str | Path,
    *,
    site: str | None = None,
    layer: int | None = None,
    target: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write dictionaries of another library as checkpoints, each in ``<out>/<its name>``, as ``save_sae`` does.

    Args:
        source: a folder or a hub name, as for ``load_dictionary``. All of its dictionaries are written that have the
            given site, layer and target.
        out: the folder to write: a new one, which appears when it is complete, or for a single dictionary also one
            that holds others.
        site: where they read, for files that do not say it.
        layer: the layer of that site.
        target: what transcoders reconstruct.
        force: replace an older checkpoint of the dictionary.

    Returns:
        The names of the dictionaries.

    Raises:
        FileExistsError: if something is there already.
        FileNotFoundError, ConnectionError, UnknownNameError: as ``load_dictionary``.
        ValueError: if one cannot be read, or if two have one name. Nothing is written then.
    """
    wanted = Wanted(layer, site, target=target)
    found = find_dictionaries(source)
    chosen = [""] if "" in found.formats else [name for name, of in described(found, wanted).items() if wanted.fits(of)]
    if not chosen:
        raise UnknownNameError("SAE", wanted, listed(found.formats), of=str(source))
    if done := [name for name in chosen if found.formats[name] == OURS]:
        raise ValueError(f"{source} has dictionaries that need not be converted: {', '.join(listed(done))}")
    if len(chosen) == 1:
        check_place(Path(out) / "any")
        sae = read_one(found, chosen[0], wanted)
        place = check_place(Path(out) / sae.name, replace=SAE_FOLDER if force else None)
        _save(place.path, sae, found, chosen[0], force)
        return [sae.name]
    written: dict[str, str] = {}
    with atomic_folder(check_place(out)) as partial:
        for name in chosen:
            sae = read_one(found, name, wanted)
            if sae.name in written:
                raise ValueError(
                    f"{name} and {written[sae.name]} of {source} have one name, {sae.name}: convert each to a folder "
                    "of its own"
                )
            written[sae.name] = name
            _save(partial / sae.name, sae, found, name)
    return list(written)


def export_dictionary(source: str | Path, out: str | Path, format: str, *, name: str | None = None) -> str:
    """Write one dictionary for another library.

    Args:
        source: the folder of a dictionary, or what holds a single one, as for ``load_dictionary``; or a model, with
            ``name``.
        out: the folder to write. It must be new or empty, and appears when it is complete.
        format: "saelens", "gemma-scope", "sparsify" or "dictionary_learning".
        name: the name of an SAE of the model, such as "2-mlp-out-x4-k20".

    Returns:
        The name of the dictionary.

    Raises:
        FileExistsError: if ``out`` exists and is not empty.
        UnknownNameError: if the model has no SAE of this name.
        ValueError: for a format that there is not, if several dictionaries match, and for what the format cannot say:
            see ``weights_convert.write_dictionary``. Nothing is written then.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: give one of {', '.join(FORMATS)}")
    place = check_place(out)
    sae = load_dictionary(source) if name is None else read_sae(sae_folder(source, name))
    with atomic_folder(place) as partial:
        inner = partial / place.path.name  # its name, and those above it, may say the site
        inner.mkdir()
        write_dictionary(inner, format, dataclasses.asdict(sae.config), jax.tree.map(np.asarray, sae.params))
        for path in inner.iterdir():
            path.rename(partial / path.name)
        inner.rmdir()
    return sae.name


def _save(folder: Path, sae: SAE, found: Found, name: str, force: bool = False) -> None:
    form = found.formats[name]
    here = folder_with(found, name)
    origin = origin_of(found.source, [here / file for file in FORMATS[form].files])
    where = {"folder": name} if name else {}
    save_sae(folder, sae, origin=origin | where | {"format": form} | _model_of(here), force=force)


def _model_of(folder: Path) -> dict[str, str]:
    """The model that the files of SAELens and dictionary_learning name."""
    for file, part, key in (("cfg.json", "metadata", "model_name"), ("config.json", "trainer", "lm_name")):
        raw = read_json(folder / file) or {}
        inner = raw.get(part)
        name = inner.get(key) if isinstance(inner, dict) else raw.get(key)
        if isinstance(name, str):
            return {"model": name}
    return {}
