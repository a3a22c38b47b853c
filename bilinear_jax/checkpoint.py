"""Saving and loading of models and SAEs: Orbax checkpoints, and the published files as they are.

A model's folder, whole or not there at all:

    config.json             {"format": "bilinear_jax.transformer", "version": 1, "config": {...}, "origin": {...},
                             "files": {"params/...": bytes}, "crc32": {"layers.mlp.w_p": checksum}}
    params/                 the params, an Orbax checkpoint, in the dtype in which they were saved
    tokenizer.json          and tokenizer_config.json; optional
    scope/<name>/           its SAEs: config.json ("bilinear_jax.sae") and params/; optional
    corpus.npy              [rows, n_ctx] tokens, uint16; optional

Params are float32 in memory, whatever the dtype on disk.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import weights_convert
from bilinear_jax.folders import atomic_folder, read_json
from bilinear_jax.nn.sae import SAE, SAEConfig, TopKSAE, site_name
from bilinear_jax.nn.transformer import Transformer, TransformerConfig
from bilinear_jax.sources import builtin_names, find_sae, folder_of, list_saes, load_tokenizer, sae_folder, sae_names

__all__ = [
    "ModelFiles",
    "builtin_names",
    "copy_tokenizer",
    "corpus",
    "folder_of",
    "list_saes",
    "load_model",
    "load_sae",
    "load_tokenizer",
    "sae_names",
    "save_model",
    "save_sae",
]

MODEL_FORMAT, SAE_FORMAT = "bilinear_jax.transformer", "bilinear_jax.sae"
VERSION = 1
Origin = Mapping[str, Any] | Callable[[], Mapping[str, Any]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class ModelFiles(NamedTuple):
    """What a model's folder holds."""

    config: TransformerConfig
    params: PyTree  # float32
    source: str  # as given
    tokenizer_source: str | None  # the folder, if it has a tokenizer.json; None: look the config's tokenizer up


def load_model(source: str | Path, *, attn_scale: float | int | None = None) -> ModelFiles:
    """The config and params of a model.

    Args:
        source: the name of a built-in model; a folder, written by ``save_model`` or laid out as the published
            checkpoints are; or a hub name, "owner/name".
        attn_scale: the factor on the attention's output, over whatever the files say or leave open.

    Raises:
        FileNotFoundError: for a source or a file that isn't there; it lists what can be loaded.
        ConnectionError: where the hub can't be reached and its cache doesn't hold the model.
        ValueError: for a checkpoint that is damaged, of a newer format, or in disagreement with its config.
    """
    folder = folder_of(source)
    raw = read_json(folder / "config.json")
    if raw is None or "format" not in raw:
        if raw is None and weights_convert.sae_folders(folder):
            raise FileNotFoundError(f"{source} holds SAEs and no model: load the model that they belong to, or one SAE")
        name = None if Path(source).expanduser().is_dir() else str(source)
        values, arrays = weights_convert.read_transformer(folder, attn_scale=attn_scale, name=name)
        config = TransformerConfig(**values)
        params = jax.tree.map(_float32, arrays)
    else:
        config = TransformerConfig(**_own_config(folder, raw, MODEL_FORMAT, TransformerConfig))
        if attn_scale is not None:
            config = dataclasses.replace(config, attn_scale=float(attn_scale))
        params = _restore(folder, raw, _abstract_transformer(config))
    has_tokenizer = (folder / "tokenizer.json").is_file()
    return ModelFiles(config, params, str(source), str(folder) if has_tokenizer else None)


def load_sae(
    source: str | Path,
    site: str = "mlp-out",
    layer: int | None = None,
    expansion: int | None = None,
    k: int | None = None,
    tag: str | None = None,
) -> SAE:
    """The one SAE of a source that has the given properties; None stands for any.

    Args:
        source: as for ``load_model``, or a ``-scope`` folder or hub name. A model's SAEs are in its folder
            ``scope``, or in ``<name>-scope`` beside it.
        site: where the SAE reads, with hyphens or underscores.
        layer: the layer of that site, from 0.
        expansion: features / d_model.
        k: active features a token.
        tag: what tells apart SAEs that are alike in all else. None: the one without a tag, if there is one.

    Raises:
        FileNotFoundError: if no SAE fits; it lists those that there are.
        ValueError: for an unknown site, if several SAEs fit, or if the files are damaged or contradict each other.

    Example:
        >>> load_sae("ts-nano", site="mlp-in", layer=2).config.site
        'mlp_in'
    """
    folder = sae_folder(source, find_sae(source, site_name(site), layer, expansion, k, tag))
    raw = read_json(folder / "config.json")
    if raw is not None and "format" in raw:
        config = SAEConfig(**_own_config(folder, raw, SAE_FORMAT, SAEConfig))
        return SAE(_restore(folder, raw, _abstract_sae(config)), config, str(source))
    values, arrays = weights_convert.read_sae(folder)
    return SAE(jax.tree.map(_float32, arrays), SAEConfig(**values), str(source))


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
    """Write a model's folder, from which ``load_model`` gives the same config and params.

    Args:
        path: the folder; it appears when it is whole.
        tokenizer: a ``tokenizer.json``, or a folder with one, that is copied in.
        origin: where the params come from, as JSON, or a function that says so once they are written; it is kept in
            ``config.json``.
        force: replace an older checkpoint, which stays until the new one is whole.
        dtype: on disk, for instance ``jnp.bfloat16``; None: as the params are.

    Raises:
        FileExistsError: if the folder isn't empty and ``force`` is off, or if it isn't a checkpoint.
        ValueError: if the params aren't finite or aren't those that the config describes.
    """
    _check_params(Path(path), params, _abstract_transformer(config))
    with atomic_folder(path, force=force) as folder:
        _write(folder, MODEL_FORMAT, config, params, origin, dtype)
        if tokenizer is not None:
            copy_tokenizer(Path(tokenizer), folder)
    return Path(path)


def save_sae(path: str | Path, sae: SAE, *, origin: Mapping[str, Any], force: bool = False, dtype: Any = None) -> Path:
    """Write an SAE's folder, ``<model's folder>/scope/<sae.name>``; its last part must be ``sae.name``.

    The other arguments, and what is raised, are as for ``save_model``.
    """
    if Path(path).name != sae.name:
        raise ValueError(f"an SAE's folder bears its name, by which it is found: {Path(path) / sae.name}, not {path}")
    _check_params(Path(path), sae.params, _abstract_sae(sae.config))
    with atomic_folder(path, force=force) as folder:
        _write(folder, SAE_FORMAT, sae.config, sae.params, origin, dtype)
    return Path(path)


def corpus(source: str | Path) -> np.ndarray:
    """The tokens that ship with a model, uint16 ``[rows, n_ctx]``, read from disk as they are used."""
    path = folder_of(source, ["corpus.npy"]) / "corpus.npy"
    if not path.is_file():
        raise FileNotFoundError(f"{source} has no corpus.npy: give tokens of your own, [rows, n_ctx]")
    tokens = np.load(path, mmap_mode="r")
    if tokens.ndim != 2 or tokens.dtype != np.uint16:
        raise ValueError(f"{path} holds {tokens.dtype} of shape {tokens.shape}, expected uint16 [rows, n_ctx]")
    return tokens


def _write(folder: Path, kind: str, config: Any, params: PyTree, origin: Origin, dtype: Any) -> None:
    from orbax.checkpoint import v1 as ocp

    arrays = jax.tree.map(lambda a: np.asarray(a) if dtype is None else np.asarray(a).astype(dtype), params)
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights become 7 % smaller, in three times the time
    context.array.saving.use_ocdbt = False  # one process writes, and needn't merge what several have written
    context.memory.deepcopy_host_arrays = False  # nobody changes them: saving is waited for
    with ThreadPoolExecutor(1) as meanwhile, context, _without_warnings():
        checksums = meanwhile.submit(_checksums, arrays)
        ocp.save(str(folder.resolve() / "params"), arrays)
    (folder / "params" / "commit_success.txt").unlink(missing_ok=True)  # it names a path of this machine
    files = [path for path in sorted((folder / "params").rglob("*")) if path.is_file()]
    record = {
        "format": kind,
        "version": VERSION,
        "config": dataclasses.asdict(config),
        "origin": dict(origin if isinstance(origin, Mapping) else origin()),
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in files},
        "crc32": checksums.result(),
    }
    (folder / "config.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that there is nothing to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _restore(folder: Path, raw: Mapping[str, Any], abstract: PyTree) -> PyTree:
    """The params of a folder in float32, if they have the structure and the shapes of ``abstract``."""
    from orbax.checkpoint import v1 as ocp

    path = folder.resolve() / "params"
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} has no params: the checkpoint isn't whole. Convert or download it again")
    for name, size in raw.get("files", {}).items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            raise _damaged(
                path, f"{name} should have {size} bytes, but {'is gone' if there is None else f'has {there}'}"
            )
    try:
        stored = ocp.metadata(str(path)).metadata
    except Exception as error:
        raise _damaged(path, error) from error
    if stored is None:  # Orbax logs why
        raise _damaged(path, "its metadata can't be read")
    _check_shapes(folder, stored, abstract)
    target = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), abstract)
    try:
        arrays = ocp.load(str(path), target)
    except Exception as error:
        raise _damaged(path, error) from error
    _check_finite(folder, arrays)
    found = _checksums(arrays)
    if changed := sorted(key for key, checksum in raw.get("crc32", {}).items() if found.get(key) != checksum):
        raise _damaged(path, f"these are not the values that were written: {', '.join(changed)}")
    return jax.tree.map(jnp.asarray, arrays)


def _damaged(path: Path, error: Exception | str) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ValueError(f"{path} can't be read ({reason}): the checkpoint is damaged. Convert or download it again")


def _own_config(folder: Path, raw: Mapping[str, Any], kind: str, cls: type) -> dict[str, Any]:
    """The keyword arguments for a config that this library wrote."""
    path = folder / "config.json"
    if raw["format"] != kind:
        raise ValueError(f"{path} is of format {raw['format']!r}, expected {kind!r}: name the folder of such a one")
    version = raw.get("version")
    if type(version) is not int or version > VERSION:
        raise ValueError(f"{path} has format version {version}, this bilinear_jax reads up to {VERSION}: upgrade it")
    config = raw.get("config", {})
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(config.keys() - known)
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    lacking = sorted(required - config.keys())
    if unknown or lacking:
        raise ValueError(f"{path}: unknown config keys {unknown}, missing ones {lacking}: convert or download it again")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}


def _abstract_transformer(config: TransformerConfig) -> PyTree:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(Transformer(config).init, jax.random.key(0), tokens)["params"]


def _abstract_sae(config: SAEConfig) -> PyTree:
    x = jax.ShapeDtypeStruct((1, config.d_model), jnp.float32)
    return jax.eval_shape(TopKSAE(config).init, jax.random.key(0), x)["params"]


def _check_params(folder: Path, params: PyTree, abstract: PyTree) -> None:
    _check_shapes(folder, params, abstract)
    _check_finite(folder, params)


def _check_shapes(folder: Path, params: PyTree, abstract: PyTree) -> None:
    """Raises ``ValueError`` listing both sides unless names and shapes are the same."""
    have, want = (
        {jax.tree_util.keystr(key, simple=True, separator="."): tuple(leaf.shape) for key, leaf in _leaves(tree)}
        for tree in (params, abstract)
    )
    missing, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
    wrong = [f"{key} {have[key]}, expected {want[key]}" for key in sorted(have.keys() & want) if have[key] != want[key]]
    if missing or extra or wrong:
        raise ValueError(
            f"params and config of {folder} disagree. In the model but not in the checkpoint: "
            f"{', '.join(missing) or 'nothing'}; in the checkpoint but not in the model: "
            f"{', '.join(extra) or 'nothing'}; shapes: {'; '.join(wrong) or 'as expected'}. "
            "Check that they belong together"
        )


def _check_finite(folder: Path, params: PyTree) -> None:
    bad = [
        jax.tree_util.keystr(key, simple=True, separator=".")
        for key, leaf in _leaves(params)
        if not all(np.isfinite(part).all() for part in _parts(np.asarray(leaf)))
    ]
    if bad:
        raise ValueError(
            f"params of {folder} hold NaN or infinite values: {', '.join(bad)}. Take an earlier checkpoint"
        )


def _parts(array: np.ndarray) -> list[np.ndarray]:
    """The numbers of an array, some millions at once: what is computed of each takes little memory."""
    return np.array_split(array.reshape(-1), 1 + array.size // 2**22)


def _checksums(params: PyTree) -> dict[str, int]:
    """The CRC-32 of every array, of its bytes in float32, little-endian: as it is in memory, whatever the disk has."""
    found = {}
    for key, leaf in _leaves(params):
        checksum = 0
        for part in _parts(np.asarray(leaf)):
            checksum = zlib.crc32(part.astype("<f4", copy=False).data, checksum)
        found[jax.tree_util.keystr(key, simple=True, separator=".")] = checksum
    return found


def _leaves(tree: PyTree):
    return jax.tree_util.tree_leaves_with_path(tree)


def _float32(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array.astype(np.float32, copy=False))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a ``tokenizer.json``, or that of a folder, and the ``tokenizer_config.json`` beside it."""
    source = source.parent if source.is_file() else source
    if not (source / TOKENIZER_FILES[0]).is_file():
        raise FileNotFoundError(f"{source} has no {TOKENIZER_FILES[0]}")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
