"""Save and load models and SAEs. It writes Orbax checkpoints, and it reads those and the published files.

The folder of a model (it appears when it is complete):

    config.json             {"format": "bilinear_jax.transformer", "version": 1, "config": {...}, "origin": {...},
                             "files": {"params/...": bytes}, "crc32": {"layers.mlp.w_p": checksum},
                             "contents": {"tokenizer.json": SHA-256}, "sha256": of all that is before}
    params/                 the params, an Orbax checkpoint, in the dtype in which they were saved
    tokenizer.json          and tokenizer_config.json; optional
    scope/<name>/           its SAEs: config.json ("bilinear_jax.sae") and params/; optional
    corpus.npy              [rows, n_ctx] token ids, uint16; optional
    top-activations.safetensors    optional

In memory, params are float32 whatever the dtype on disk, unless another is asked for. Whatever is loaded is compared
with its checksum: values that changed are an error, and so are another config, corpus or top activations. Another
tokenizer is a warning. Folders of earlier versions lack some checksums. They load, with a warning; ``add_checksums``
adds what they lack.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

import weights_convert
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.configs import typed
from bilinear_jax.nn.sae import SAE
from bilinear_jax.nn.sae_config import SAEConfig, site_name
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.store import checksums
from bilinear_jax.store.files import Kind, Place, atomic_folder, check_place, read_json, replace_file
from bilinear_jax.store.params import restore_params, stored_params, write_params
from bilinear_jax.store.published import as_dtype, config_file, dtype_name, read_published, taken
from bilinear_jax.store.sources import find_sae, folder_of, model_place, sae_configs, sae_folder
from bilinear_jax.store.tokenizers import TOKENIZER_FILES, copy_tokenizer
from weights_convert.files import check_kinds, expanded, inside

MODEL_FORMAT, SAE_FORMAT = "bilinear_jax.transformer", "bilinear_jax.sae"
VERSION = 1
MODEL, SAE_FOLDER = Kind("config.json", MODEL_FORMAT), Kind("config.json", SAE_FORMAT)
BESIDE = (*TOKENIZER_FILES, "corpus.npy", "top-activations.safetensors")
"""The files beside the params whose SHA-256 is recorded, if they are there."""
Origin = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class ModelFiles(NamedTuple):
    """What the folder of a model holds."""

    config: TransformerConfig
    params: PyTree  # in the dtype asked for
    source: str  # as given
    tokenizer_source: str | None  # a folder with a tokenizer.json, or a GGUF file; None: that which config names


def load_model(source: str | Path, *, attn_scale: float | int | None = None, dtype: Any = jnp.float32) -> ModelFiles:
    """Load the config and the params of a model.

    Args:
        source: the name of a built-in model, a folder, a GGUF file, or a hub name "owner/name". The folder is one that
            ``save_model`` wrote, one in the layout of the published checkpoints, one of a family that
            ``weights_convert.families`` reads, or one with a single GGUF file.
        attn_scale: the factor on the attention's output. It replaces the value in the files. None: use the files.
        dtype: the dtype of the params in memory: float32, bfloat16 or float16.

    Raises:
        FileNotFoundError: if the source or a file does not exist. The message lists what can be loaded.
        ConnectionError: if the hub cannot be reached and its cache does not hold the model.
        ImportError: for a GGUF file, if the package gguf is not installed.
        ValueError: if the checkpoint is damaged, has a newer format, does not match its config, or is of a model that
            cannot be computed here; or if there are several GGUF files.
    """
    kind, place = dtype_name(dtype), model_place(source)
    path = config_file(place)
    raw = None if place.is_file() else read_json(path)
    if raw is None or "format" not in raw:
        if raw is None and weights_convert.sae_folders(place):
            raise FileNotFoundError(f"{source} holds SAEs but no model: load their model, or one SAE with load_sae")
        values, arrays = read_published(source, place, attn_scale)
        config = config_of(TransformerConfig, values, path)
        params = taken(arrays, kind)
    else:
        config = _own_config(path, raw, MODEL_FORMAT, TransformerConfig)
        if attn_scale is not None:
            config = dataclasses.replace(config, attn_scale=float(attn_scale))
        params = restore_params(place, raw, _abstract_transformer(config))
        params = jax.tree.map(lambda leaf: as_dtype(leaf, kind), params) if kind != "float32" else params
    folder = place.parent if place.is_file() else place
    has_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer = folder if has_tokenizer else place if place.is_file() else None
    return ModelFiles(config, params, str(source), None if tokenizer is None else str(tokenizer))


def load_sae(
    source: str | Path,
    site: str = "mlp-out",
    layer: int | None = None,
    expansion: int | float | None = None,
    k: int | None = None,
    tag: str | None = None,
    activation: str | None = None,
    target: str | None = None,
) -> SAE:
    """Load the one SAE of a source that has the given properties. None means any value.

    Args:
        source: as for ``load_model``, or a ``-scope`` folder or hub name. The SAEs of a model are in its folder
            ``scope``, or in ``<name>-scope`` beside it.
        site: where the SAE reads, with hyphens or underscores.
        layer: the layer of that site, from 0.
        expansion: features / d_model.
        k: active features per token.
        tag: tells SAEs apart that are otherwise the same. None: the one without a tag, if there is one.
        activation: "topk", "topk_relu", "batchtopk", "jumprelu" or "relu".
        target: the site that a transcoder reconstructs. None: an SAE, if there is one, else a transcoder.

    Raises:
        UnknownNameError: if no SAE can read at this site, or if no SAE matches. The message lists the SAEs.
        FileNotFoundError: if the source does not exist.
        ValueError: if several SAEs match, or if the files are damaged or contradict each other.

    Example:
        >>> load_sae("ts-nano", site="mlp-in", layer=2).config.site
        'mlp_in'
    """
    return read_sae(sae_folder(source, find_sae(source, site_name(site), layer, expansion, k, tag, activation, target)))


def read_sae(folder: Path) -> SAE:
    """The SAE in a folder that this library wrote, or in the published layout. Raises the errors of ``load_sae``."""
    path = inside(folder, "config.json")
    raw = read_json(path)
    if raw is not None and "format" in raw:
        config = _own_config(path, raw, SAE_FORMAT, SAEConfig)
        if config.name != folder.name:
            raise ValueError(f"{path} is that of an SAE {config.name}: rename the folder, or correct it")
        return SAE(restore_params(folder, raw, _abstract_sae(config)), config)
    values, arrays = weights_convert.read_sae(folder)
    return SAE(taken(arrays, "float32"), config_of(SAEConfig, values, path))


def save_model(
    path: str | Path,
    config: TransformerConfig,
    params: PyTree,
    *,
    tokenizer: str | Path | None = None,
    origin: Origin,
    force: bool = False,
    dtype: Any = None,
) -> Path:
    """Write the folder of a model. ``load_model`` reads the same config and params from it.

    Args:
        path: the folder. It appears when it is complete.
        tokenizer: a ``tokenizer.json``, or a folder with one. It is copied.
        origin: where the params come from, as JSON, or a function that returns this after the params are written.
            It is kept in ``config.json``.
        force: replace an older model. The old one stays until the new one is complete.
        dtype: the dtype on disk, float32, float16 or bfloat16. None: as the params are, if they are one of these.

    Raises:
        FileExistsError: if the folder is not empty and ``force`` is False, if it is not a model, or if it changed
            meanwhile, as ``atomic_folder``.
        OSError: if nothing can be written there.
        ValueError: if the params do not match the config, have another dtype, or are not finite in ``dtype``; or if
            ``force`` would delete SAEs in the folder. Nothing is written then.
    """
    place = check_place(path, replace=MODEL if force else None)
    check_keeps_saes(place, f"move {place.path / 'scope'} away first, or name another folder")
    arrays = stored_params(Path(path), params, _abstract_transformer(config), dtype)
    with atomic_folder(place) as folder:
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), folder)
        _write(folder, MODEL_FORMAT, config, arrays, origin)
    return expanded(path)


def check_keeps_saes(place: Place, fix: str) -> None:
    """Raise ``ValueError`` if a new model at this place would delete the SAEs of the older one."""
    scope = place.path / "scope"
    if place.older is not None and scope.is_dir() and any(scope.iterdir()):
        raise ValueError(f"{place.path} holds SAEs, which would be deleted: {fix}")


def save_sae(path: str | Path, sae: SAE, *, origin: Mapping[str, Any], force: bool = False, dtype: Any = None) -> Path:
    """Write the folder of an SAE, ``<folder of the model>/scope/<sae.name>``. Its last part must be ``sae.name``.

    The other arguments and the errors are those of ``save_model``. ``force`` replaces an older SAE.
    """
    if Path(path).name != sae.name:
        raise ValueError(f"the folder of an SAE must have its name, but is {path}: save it to {Path(path) / sae.name}")
    place = check_place(path, replace=SAE_FOLDER if force else None)
    arrays = stored_params(Path(path), sae.params, _abstract_sae(sae.config), dtype)
    with atomic_folder(place) as folder:
        _write(folder, SAE_FORMAT, sae.config, arrays, origin)
    return expanded(path)


def training_of(source: str | Path, sae: str | None = None) -> str:
    """One line on the training data of a model or of one of its SAEs, from its ``config.json``.

    Args:
        source: as for ``load_model``.
        sae: the name of an SAE, such as "2-mlp-out-x4-k20". None: the model.

    Raises:
        UnknownNameError: if the source does not have this SAE.
        FileNotFoundError, ConnectionError: as ``load_model``.

    Example:
        >>> training_of("ts-nano")
        'TinyStories, 12955 stories, 2669724 tokens'
    """
    if sae is None:
        return training_line(inside(folder_of(source), "config.json"))
    known = trainings_of_saes(source)
    if sae not in known:
        raise UnknownNameError("SAE", sae, known, of=str(source))
    return known[sae]


def trainings_of_saes(source: str | Path) -> dict[str, str]:
    """``training_of`` of every SAE of a source, by name."""
    return {name: training_line(path) for name, path in sae_configs(source).items()}


def training_line(path: Path) -> str:
    record = read_json(path) or {}
    check_kinds(path, record, _RECORD)
    checksums.check_seal(path, record)
    text = (record.get("origin") or {}).get("text")
    if isinstance(text, Mapping):
        sources, *counts = (text.get(key, "?") for key in ("sources", "n_documents", "n_tokens"))
        listed = sources if isinstance(sources, list) else [sources]
        names = [str(one.get("name", "?") if isinstance(one, Mapping) else one) for one in listed]
        return f"{', '.join(names)}: {counts[0]} documents, {counts[1]} tokens"
    dataset = (record.get("config") or record).get("dataset")
    if text is None:
        return dataset if isinstance(dataset, str) else "not known: its files do not say"
    return str(text)


def add_checksums(folder: str | Path) -> None:
    """Record the checksums of a folder that this library wrote, as the folder is now, and of the SAEs in its ``scope``.

    Use it for a folder of a version that recorded none, and after you changed the config or replaced a file beside the
    params. Only ``config.json`` is written. Make sure first that the folder is what it should be: what is wrong in it
    will not be noticed later.

    Raises:
        ValueError, FileNotFoundError: if the folder is not of this library, or if its params do not match its config
            or the checksums that it has.
    """
    folder = expanded(folder)
    path = folder / "config.json"
    raw = read_json(path) or {}
    if raw.get("format") == SAE_FORMAT:
        config = _own_config(path, raw, SAE_FORMAT, SAEConfig)
        params = restore_params(folder, raw, _abstract_sae(config), sealed=False)
    elif raw.get("format") == MODEL_FORMAT:
        config = _own_config(path, raw, MODEL_FORMAT, TransformerConfig)
        params = restore_params(folder, raw, _abstract_transformer(config), sealed=False)
    else:
        raise ValueError(f"{path} is not of a model or an SAE that this library saved: name such a folder")
    replace_file(path, _as_text(raw | {"crc32": checksums.of_params(params)} | _listed(folder)))
    for name in weights_convert.sae_folders(folder / "scope"):
        add_checksums(folder / "scope" / name)


def _write(folder: Path, kind: str, config: Any, arrays: PyTree, origin: Origin) -> None:
    crc32 = write_params(folder, arrays)
    record = {
        "format": kind,
        "version": VERSION,
        "config": dataclasses.asdict(config),
        "origin": dict(origin if isinstance(origin, Mapping) else origin()),
        "crc32": crc32,
    }
    (folder / "config.json").write_text(_as_text(record | _listed(folder)), encoding="utf-8")


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What a record says of the files of its folder: the sizes of those of the params, the SHA-256 of those beside."""
    files = [path for path in sorted((folder / "params").rglob("*")) if path.is_file()]
    return {
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "contents": {name: checksums.of_file(folder / name) for name in BESIDE if (folder / name).is_file()},
    }


def _as_text(record: Mapping[str, Any]) -> str:
    return json.dumps(checksums.sealed(record), indent=2) + "\n"


_RECORD = {"config": dict, "origin": dict, "files": dict, "crc32": dict}
"""The parts of a config.json of this library, and their types."""


_LATER: dict[type, set[str]] = {
    TransformerConfig: {
        *("n_kv_head", "d_head", "gains", "rms_eps", "rope_theta", "rope_scaling", "qk_norm", "embed_scale"),
        *("tied", "linear", "original_gate", "original_above", "family"),
    },
    SAEConfig: {
        *("activation", "target", "skip", "centred", "product_bias", "linear_term", "max_active", "token_lookup"),
        *("inputs", "inputs_k", "reads"),
    },
}
"""The fields of a config that came after version 0.2. Older files lack them, and mean their defaults."""


def _own_config(path: Path, raw: Mapping[str, Any], kind: str, cls: type) -> Any:
    """The config in a file that this library wrote."""
    if raw["format"] != kind:
        raise ValueError(f"{path} has format {raw['format']!r:.100}, but must have {kind!r}: name another folder")
    version = raw.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path} has format version {version!r:.100}, but this bilinear_jax reads versions up to {VERSION}: "
            "upgrade it"
        )
    check_kinds(path, raw, _RECORD)
    config = raw.get("config") or {}
    known = {field.name for field in dataclasses.fields(cls)}
    later = _LATER[cls]
    unknown, lacking = sorted(config.keys() - known), sorted(known - later - config.keys())
    if unknown or lacking:
        raise ValueError(
            f"{path} has unknown config keys {unknown} and lacks the keys {lacking}: convert or download it again"
        )
    return config_of(cls, config, path)


def config_of(cls: type, values: Mapping[str, Any], path: Path) -> Any:
    """A config from the values in a file, which is named if they are wrong."""
    try:
        return cls(**typed(cls, values))
    except (ValueError, UnknownNameError) as error:
        raise ValueError(f"{path}: {error}: correct it, or convert or download it again") from error


def _abstract_transformer(config: TransformerConfig) -> PyTree:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]


def _abstract_sae(config: SAEConfig) -> PyTree:
    return jax.eval_shape(lambda key: SAE.init(config, key).params, jax.random.key(0))
