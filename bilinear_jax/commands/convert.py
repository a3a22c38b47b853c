"""``bilinear-jax convert``: published torch files to Orbax checkpoints."""

import argparse
import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bilinear_jax.commands import common
from bilinear_jax.version import library_version

HELP = "write a published model, and its SAEs, as checkpoints of this library"
EXAMPLES = """examples:
  bilinear-jax convert tdooms/fw-medium fw-medium --scope
      a model and its SAEs from the hub, bit for bit; then bilinear_jax.load("fw-medium")
  bilinear-jax convert path/to/a/folder converted --scope path/to/a/folder-scope --attn-scale 1
      from folders; OUT appears only when it is whole
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_conversion(
        parser,
        source="a published model: a folder, or a hub name such as owner/name",
        out="the folder to write",
        scope="convert SAEs too, into OUT/scope",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a checkpoint")
    common.add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    scope = common.scope_source(options)
    names = convert(options.source, options.out, scope, attn_scale=options.attn_scale, force=options.force)
    return {"out": str(options.out), "saes": names}


def text(result: dict[str, Any]) -> str:
    names = result["saes"]
    return f"{result['out']}: the model" + (f" and {len(names)} SAEs: {', '.join(names)}" if names else "")


def convert(
    source: str | Path,
    out: str | Path,
    scope: str | Path | None = None,
    *,
    attn_scale: float | None = None,
    force: bool = False,
) -> list[str]:
    """Write the Orbax checkpoint of a published model, with the SAEs of ``scope``; returns their names.

    ``out`` appears when it is whole: see ``bilinear_jax.folders.atomic_folder``.
    """
    import jax
    import jax.numpy as jnp

    import weights_convert
    from bilinear_jax import checkpoint, folders, sources
    from bilinear_jax.nn.sae import SAE, SAEConfig

    if force and scope is None and (Path(out) / "scope").is_dir():
        raise ValueError(f"{out} holds SAEs, which would be lost: convert them again with --scope, or delete it")
    names = [] if scope is None else sources.sae_names(scope)
    if scope is not None and not names:
        raise FileNotFoundError(f"{scope} holds no SAEs: give --scope the folder or the hub name that does")
    with folders.atomic_folder(out, force=force) as partial:
        config = _convert_model(source, partial, attn_scale)
        for sae_name in names:
            sae_folder = sources.sae_folder(str(scope), sae_name)
            sae_values, sae_params = weights_convert.read_sae(sae_folder)
            sae = SAE(jax.tree.map(jnp.asarray, sae_params), SAEConfig(**sae_values))
            _check_fits(sae, config, sae_folder)
            checkpoint.save_sae(partial / "scope" / sae.name, sae, origin=_origin(scope, sae_folder))
    return names


def _convert_model(source: str | Path, out: Path, attn_scale: float | None) -> Any:
    """Writes the model alone; returns its config. Its params are in memory once, and not for longer than this takes."""
    import weights_convert
    from bilinear_jax import checkpoint, sources
    from bilinear_jax.nn.transformer import TransformerConfig
    from bilinear_jax.training.data import tokenizer_hash
    from weights_convert.files import inside

    folder = sources.folder_of(source)
    if (folder / "params").is_dir():
        raise ValueError(f"{source} is no published checkpoint but one of this library: load it as it is")
    name = None if Path(source).expanduser().is_dir() else str(source)
    tokenizer_files = [inside(folder, file) for file in checkpoint.TOKENIZER_FILES]
    tokenizer = folder if tokenizer_files[0].is_file() else None
    with ThreadPoolExecutor(1) as meanwhile:
        hashed = meanwhile.submit(_origin, source, folder)

        def origin() -> dict[str, Any]:
            if tokenizer is None:
                return hashed.result()
            loaded = checkpoint.load_tokenizer(str(folder), config.tokenizer)
            return hashed.result() | {"tokenizer_hash": tokenizer_hash(loaded)}

        values, params = weights_convert.read_transformer(folder, attn_scale=attn_scale, name=name)
        config = TransformerConfig(**values)
        checkpoint.save_model(out, config, params, tokenizer=tokenizer, origin=origin)
    return config


def _check_fits(sae: Any, config: Any, folder: Path) -> None:
    if sae.config.d_model != config.d_model:
        raise ValueError(
            f"{folder} reads {sae.config.d_model} coordinates, the model has {config.d_model}: name this model's SAEs"
        )
    if sae.config.layer >= config.n_layer:
        raise ValueError(
            f"{folder} is of layer {sae.config.layer}, the model has layers 0 ... {config.n_layer - 1}: "
            "name this model's SAEs"
        )


def _origin(source: Any, folder: Path) -> dict[str, Any]:
    """Where a checkpoint comes from: source, files with their SHA-256, and what wrote it."""
    from weights_convert.files import weight_files

    files = [folder / "config.json", *weight_files(folder)]
    return {
        "source": str(source),
        "files": {path.name: _sha256(path) for path in files},
        "written_by": f"weights_convert of bilinear-jax {library_version()}",
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
