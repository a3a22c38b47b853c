"""Load dictionaries (SAEs and transcoders) from wherever they are: of this library, published, or of four others.

A source is a folder, the name of a built-in model, or a hub name. It holds one dictionary, or several, each in a folder
of its own: the ``-scope`` of a model, a release of SAELens, Gemma Scope, or a run of sparsify or dictionary_learning.
The formats of the others are in ``weights_convert.dictionaries``.
"""

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig, site_name
from bilinear_jax.store.checkpoint import SAE_FORMAT, config_of, read_sae
from bilinear_jax.store.choice import Wanted, how_to_choose, listed, one_of
from bilinear_jax.store.files import read_json
from bilinear_jax.store.published import taken
from bilinear_jax.store.sources import (
    builtin_names,
    cached_files,
    fetch_below,
    local_folder,
    repository_files,
)
from weights_convert.dictionaries import FORMATS, describe_dictionary, read_dictionary
from weights_convert.dictionaries.hooks import hook_name
from weights_convert.files import expanded, inside
from weights_convert.names import SAEName, parse_sae_name

OURS = "bilinear_jax"
"""The format of what this library saves, and of the published checkpoints."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_DEPTH = 5
"""How deep below a folder its dictionaries may lie."""

_HUB_FOLDER = re.compile(r"[\w.-]+/[\w.-]+(?:/[^/\\]+)*/?")
_LAYER = re.compile(r"(?:layers?|blocks|h)[._](\d+)")


class Found(NamedTuple):
    """The dictionaries of a source."""

    source: str  # as given
    place: Path | str  # a folder, or one on the hub: "owner/name", "owner/name/folder"
    formats: dict[str, str]  # of each, by its folder in ``place``; "" if ``place`` itself is one


def load_dictionary(
    source: str | Path,
    *,
    site: str | None = None,
    layer: int | None = None,
    expansion: int | float | None = None,
    k: int | None = None,
    tag: str | None = None,
    activation: str | None = None,
    target: str | None = None,
    model: Any = None,
) -> SAE:
    """Load one dictionary: an SAE or a transcoder, in any format that can be read.

    Args:
        source: the folder of a dictionary, which ``save_sae`` or one of SAELens, Gemma Scope, sparsify and
            dictionary_learning wrote, or in the published layout. Or what holds several: a folder, a built-in model, or
            a hub name "owner/name" or "owner/name/folder". Only what is needed is downloaded.
        site: where it reads: "mlp-in" (after the norm), "mlp-out", "resid-post", ... It chooses one of several; and
            files that do not say where they were trained need it, and ``layer``.
        layer: the layer of that site, from 0.
        expansion: features / d_model.
        k: active features per token.
        tag: tells dictionaries apart that are otherwise the same. None: the one without a tag, if there is one.
        activation: "topk", "topk_relu", "batchtopk", "jumprelu" or "relu".
        target: the site that it reconstructs. None: its own, if there is such a one, else another.
        model: the ``LanguageModel``, or its config, that the dictionary must fit. None: it is not checked.

    Raises:
        UnknownNameError: if there is no such site, or no dictionary matches. The message lists those that there are.
        FileNotFoundError: if the source does not exist or holds no dictionary.
        ConnectionError: if the hub cannot be reached and its cache does not hold the files.
        ValueError: if several match; the message says which keyword tells them apart. Also if the files are damaged or
            cannot be read, if they contradict ``site``, ``layer`` or ``target``, or if it does not fit the model.

    Example:
        >>> load_dictionary("ts-nano", site="mlp-in", layer=2).name
        '2-mlp-in-x4-k20'
    """
    wanted = _wanted(layer, site, expansion, k, tag, activation, target)
    found = find_dictionaries(source)
    if "" in found.formats:
        sae = read_one(found, "", wanted, model)
        if not wanted.fits(_parts(sae.config)):
            raise UnknownNameError("SAE", wanted, [sae.name], of=str(source))
        return sae
    return read_one(found, one_of(described(found, wanted), wanted, source, found.formats), wanted, model)


def load_dictionaries(
    source: str | Path,
    *,
    site: str | None = None,
    layer: int | None = None,
    expansion: int | float | None = None,
    k: int | None = None,
    tag: str | None = None,
    activation: str | None = None,
    target: str | None = None,
    model: Any = None,
) -> dict[tuple[str, int], SAE]:
    """Load all dictionaries of a source that have the given properties, by site and layer.

    Args:
        source: as for ``load_dictionary``.
        site: as for ``load_dictionary``, and so are the other properties. A ``tag`` of "" is that of those without.
        target: the site that they reconstruct: that of transcoders, or of SAEs their own.
        model: the ``LanguageModel``, or its config, that they must fit.

    Raises:
        ValueError: if two of them have one site and layer: an SAE and a transcoder, for instance. The message lists
            them and says which keyword tells them apart. Nothing is downloaded then but configs.
        UnknownNameError, FileNotFoundError, ConnectionError: as ``load_dictionary``.

    Example:
        >>> sorted(load_dictionaries("ts-nano", layer=2))
        [('mlp_in', 2), ('mlp_out', 2), ('resid_mid', 2)]
    """
    wanted = _wanted(layer, site, expansion, k, tag, activation, target)
    found = find_dictionaries(source)
    if "" in found.formats:
        sae = load_dictionary(source, **vars(wanted), model=model)
        return {(sae.config.site, sae.config.layer): sae}
    names = described(found, wanted)
    chosen = {name: parts for name, parts in names.items() if wanted.fits(parts)}
    if not chosen:
        raise UnknownNameError("SAE", wanted, listed(found.formats), of=str(source))
    places: dict[tuple[str, int], list[str]] = {}
    for name, parts in chosen.items():
        places.setdefault((parts.site, parts.layer), []).append(name)
    for (where, of), same in places.items():
        if len(same) > 1:
            raise ValueError(
                f"{len(same)} dictionaries of {source} read {where} of layer {of}: {', '.join(listed(same))}. "
                f"{how_to_choose({name: chosen[name] for name in same}, source)}"
            )
    return {place: read_one(found, name, wanted, model) for place, (name,) in sorted(places.items(), key=_by_layer)}


def find_dictionaries(source: str | Path) -> Found:
    """Where the dictionaries of a source are, and the format of each. None is read, and none is downloaded.

    Raises the errors of ``load_dictionary`` for a source that does not exist or holds none.

    Example:
        >>> find_dictionaries("ts-nano").formats["scope/2-mlp-in-x4-k20"]
        'bilinear_jax'
    """
    place = _place(source)
    formats, failed = {}, None
    try:
        formats = _formats_in(place)
    except (FileNotFoundError, ConnectionError) as error:  # of a model, only the -scope may be there
        failed = error
    if not formats and (scope := _scope_beside(place)):
        with contextlib.suppress(FileNotFoundError, ConnectionError):
            formats, place = _formats_in(scope), scope
    if not formats and failed is not None:
        raise failed
    if not formats:
        raise FileNotFoundError(
            f"{source} holds no dictionary: neither one of this library (config.json and params) nor one of "
            f"{', '.join(FORMATS)}"
        )
    if "" in formats:
        formats = {"": formats[""]}
    return Found(str(source), place, dict(sorted(formats.items())))


def folder_with(found: Found, name: str) -> Path:
    """The folder of one dictionary. From the hub, only this one is downloaded."""
    form = found.formats[name]
    if isinstance(found.place, Path):
        return inside(found.place, name) if name else found.place
    files = ("*",) if form == OURS else FORMATS[form].files
    escaped = glob.escape(name)
    return inside(fetch_below(found.place, [f"{escaped}/{file}" if name else file for file in files]), name)


def check_fits(config: SAEConfig | SAEName, model: Any, named: str | Path) -> None:
    """Raise ``ValueError`` unless a dictionary fits a model, which is a ``LanguageModel`` or its config.

    Args:
        config: of the dictionary; or its name, which does not say the width.
        named: what the message calls it.
    """
    sizes, called = getattr(model, "config", model), getattr(model, "source", None) or "the model"
    hook = f"{config.site} of layer {config.layer} ({hook_name(config.site, config.layer)})"
    if config.layer >= sizes.n_layer:
        raise ValueError(
            f"{named} belongs to layer {config.layer}, but the model has layers 0 ... {sizes.n_layer - 1}: it reads "
            f"{hook}, which {called} does not have. Name SAEs of this model"
        )
    if isinstance(config, SAEConfig) and config.d_model != sizes.d_model:
        raise ValueError(
            f"{named} has d_model {config.d_model}, but the model has {sizes.d_model}: it reads {hook} of "
            f"another model than {called}. Name SAEs of this model"
        )
    if isinstance(config, SAEConfig) and config.token_lookup not in (None, sizes.n_vocab):
        raise ValueError(
            f"{named} has rows for {config.token_lookup} tokens, but the model has {sizes.n_vocab}: it is of another "
            f"model than {called}. Name SAEs of this model"
        )


# Where they are


def _place(source: str | Path) -> Path | str:
    """The folder of a source, or its name on the hub."""
    text = str(source)
    if text in builtin_names() or expanded(source).exists() or not _HUB_FOLDER.fullmatch(text):
        local = local_folder(source)
        return Path(os.path.abspath(local)) if local is not None else text
    if any(part.strip(".") == "" for part in text.rstrip("/").split("/")) or text.startswith("."):
        local_folder(source)  # raises
    return text.rstrip("/")


def _scope_beside(place: Path | str) -> Path | str | None:
    """The ``-scope`` of a model. None: it has none, or is no model."""
    if isinstance(place, Path):
        beside = place.resolve()
        beside = beside.with_name(f"{beside.name}-scope")
        return beside if beside.is_dir() else None
    return None if place.count("/") > 1 or place.endswith("-scope") else f"{place}-scope"


def _formats_in(place: Path | str) -> dict[str, str]:
    return _formats_below(place) if isinstance(place, Path) else _formats_on_hub(place)


def _formats_below(folder: Path) -> dict[str, str]:
    """The dictionaries in a folder, at most ``_DEPTH`` folders deep, and their formats."""
    files: list[str] = []
    for above, folders, names in os.walk(folder):
        below = Path(above).relative_to(folder)
        if "params" in folders:
            names.append("params/")
        deep = len(below.parts) >= _DEPTH
        folders[:] = [] if deep else [name for name in folders if name != "params" and not name.startswith(".")]
        files += [name if below == Path() else f"{below.as_posix()}/{name}" for name in names]
    formats = _formats_among(files, folder.name)
    raw = read_json(folder / "config.json") if "config.json" in files and "" not in formats else None
    return {"": OURS} if raw is not None and (raw.get("format") == SAE_FORMAT or "point" in raw) else formats


def _formats_on_hub(place: str) -> dict[str, str]:
    """The dictionaries of a repository, or of a folder of it. If the hub cannot be reached, those in the cache."""
    owner, repository, *folders = place.split("/")
    below = "".join(f"{folder}/" for folder in folders)
    try:
        files = repository_files(f"{owner}/{repository}")
    except ConnectionError:
        if not (files := cached_files(f"{owner}/{repository}")):
            raise
    inner = [file.removeprefix(below) for file in files if file.startswith(below)]
    if below and not inner:
        there = sorted({str(PurePosixPath(file).parent) for file in files} - {"."})
        raise FileNotFoundError(
            f"{owner}/{repository} has no folder {below[:-1]}: name one of {', '.join(listed(there)) or 'none'}"
        )
    return _formats_among(inner, folders[-1] if folders else "")


def _formats_among(files: Iterable[str], name: str) -> dict[str, str]:
    """The folders among these files that hold a dictionary, with its format. ``name`` is that of the whole folder."""
    folders: dict[str, set[str]] = {}
    for file in files:
        folder, params, _ = f"/{file}".partition("/params/")
        last = "params/"
        if not params:
            folder, _, last = folder.rpartition("/")
        folders.setdefault(folder[1:], set()).add(last)
    found = {}
    for folder, there in folders.items():
        if "embedding" in folder.split("/"):  # Gemma Scope has some before the first layer
            continue
        for form, (needed, *_) in FORMATS.items():
            if there.issuperset(needed):
                found[folder] = form
        named = parse_sae_name(folder.rpartition("/")[2] or name)
        if named and "config.json" in there and not there.isdisjoint(("params/", *_WEIGHTS)):
            found[folder] = OURS
    return found


# What they are


def _wanted(layer, site, expansion, k, tag, activation, target) -> Wanted:
    """The properties, checked: the sites must be sites that a dictionary can have."""
    return Wanted(layer, site and site_name(site), expansion, k, tag, activation, target and site_name(target))


def _by_layer(item: tuple[tuple[str, int], Any]) -> tuple[int, str]:
    return item[0][1], item[0][0]


def _parts(config: SAEConfig | Mapping[str, Any]) -> SAEName:
    values = vars(config) if isinstance(config, SAEConfig) else config
    return SAEName(
        **{key: values.get(key) for key in ("layer", "site", "expansion", "k", "tag", "target")},  # type: ignore
        activation=values["activation"],
    )


def described(found: Found, wanted: Wanted) -> dict[str, SAEName]:
    """The parts of each dictionary. Of those of others on the hub, the configs are downloaded together.

    Those that the name of their folder puts into another layer are left out.

    Raises:
        ValueError: if the config of one cannot be read, or does not say where it reads and the caller does not either.
    """
    ours = {name: parse_sae_name(PurePosixPath(name).name) for name, form in found.formats.items() if form == OURS}
    names = {name: parts for name, parts in ours.items() if parts}
    others = [name for name, form in found.formats.items() if form != OURS and _may_be_in(name, wanted.layer)]
    place = found.place
    if isinstance(place, str):
        configs = {name: [file for file in FORMATS[found.formats[name]].files if "json" in file] for name in others}
        if files := [f"{glob.escape(name)}/{file}" for name, its in configs.items() for file in its]:
            place = fetch_below(place, files)
    for name in others:
        folder = Path(place) / name
        if found.formats[name] == "gemma-scope" and isinstance(found.place, str):
            folder = Path(found.place) / name  # the name of the repository says the site
        names[name] = _description(folder, found.formats[name], wanted)
    return dict(sorted(names.items(), key=lambda item: (item[1].layer, item[0])))


def _may_be_in(name: str, layer: int | None) -> bool:
    """Whether a dictionary can be of a layer, as far as the names of its folders say."""
    said = {int(number) for number in _LAYER.findall(name)}
    return layer is None or len(said) != 1 or layer in said


def _description(folder: Path, form: str, wanted: Wanted) -> SAEName:
    try:
        config = describe_dictionary(folder, form, site=wanted.site, layer=wanted.layer, target=wanted.target)
    except ValueError:  # what is wanted contradicts the file, which is no error: it is another dictionary
        config = describe_dictionary(folder, form)
    return _parts(config)


def read_one(found: Found, name: str, wanted: Wanted, model: Any = None) -> SAE:
    """One dictionary of a source, which must fit the model."""
    shown = f"{found.source}: {name}" if name else found.source
    named = parse_sae_name(PurePosixPath(name).name)
    if model is not None and named is not None:
        check_fits(named, model, shown)
    folder, form = folder_with(found, name), found.formats[name]
    if form == OURS:
        sae = read_sae(folder)
    else:
        config, params = read_dictionary(folder, site=wanted.site, layer=wanted.layer, target=wanted.target)
        sae = SAE(taken(params, "float32"), config_of(SAEConfig, config, folder))
    if wanted.expansion not in (None, sae.config.expansion):
        raise UnknownNameError("SAE", wanted, [f"{name} with expansion {sae.config.expansion:g}"], of=found.source)
    if model is not None:
        check_fits(sae.config, model, shown)
    return sae
