"""``python -m weights_convert SOURCE OUT``: published torch files to Orbax checkpoints."""

import argparse
import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

import weights_convert
from weights_convert.files import weight_files


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m weights_convert", description=__doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="a published model: a folder, or a hub name such as owner/name"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument(
        "--scope",
        nargs="?",
        const=True,
        metavar="SCOPE_SOURCE",
        help="convert SAEs too, into OUT/scope: all those of SCOPE_SOURCE (default: the model's own)",
    )
    parser.add_argument("--attn-scale", type=float, metavar="X", help="factor on the attention's output")
    parser.add_argument("--force", action="store_true", help="replace OUT, if it is a checkpoint")
    options = parser.parse_args(arguments)
    scope = options.source if options.scope is True else options.scope
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        try:
            names = convert(options.source, options.out, scope, attn_scale=options.attn_scale, force=options.force)
        except (ValueError, OSError) as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
    print(f"{options.out}: the model" + (f" and {len(names)} SAEs: {', '.join(names)}" if names else ""))
    return 0


def convert(
    source: str | Path,
    out: str | Path,
    scope: str | Path | None = None,
    *,
    attn_scale: float | None = None,
    force: bool = False,
) -> list[str]:
    """Write the Orbax checkpoint of a published model, with the SAEs of ``scope``; returns their names.

    ``out`` appears when it is whole: see ``bilinear_jax.checkpoint.atomic_folder``.
    """
    import jax
    import jax.numpy as jnp

    from bilinear_jax import checkpoint, sources
    from bilinear_jax.nn.sae import SAE, SAEConfig
    from bilinear_jax.nn.transformer import TransformerConfig

    if force and scope is None and (Path(out) / "scope").is_dir():
        raise ValueError(f"{out} holds SAEs, which would be lost: convert them again with --scope, or delete it")
    folder = sources.folder_of(source)
    if (folder / "params").is_dir():
        raise ValueError(f"{source} is no published checkpoint but one of this library: load it as it is")
    name = None if Path(source).expanduser().is_dir() else str(source)
    values, params = weights_convert.read_transformer(folder, attn_scale=attn_scale, name=name)
    config = TransformerConfig(**values)
    names = [] if scope is None else sources.sae_names(scope)
    if scope is not None and not names:
        raise FileNotFoundError(f"{scope} holds no SAEs: give --scope the folder or the hub name that does")
    tokenizer = folder if (folder / "tokenizer.json").is_file() else None
    with checkpoint.atomic_folder(out, force=force) as partial:
        origin = _origin(source, folder)
        checkpoint.save_model(partial, config, params, tokenizer=tokenizer, origin=origin)
        for sae_name in names:
            sae_folder = sources.sae_folder(str(scope), sae_name)
            sae_values, sae_params = weights_convert.read_sae(sae_folder)
            sae = SAE(jax.tree.map(jnp.asarray, sae_params), SAEConfig(**sae_values))
            _check_fits(sae, config, sae_folder)
            checkpoint.save_sae(partial / "scope" / sae.name, sae, origin=_origin(scope, sae_folder))
    return names


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
    from importlib.metadata import PackageNotFoundError, version

    files = [folder / "config.json", *weight_files(folder)]
    try:
        library = version("bilinear-jax")
    except PackageNotFoundError:
        library = "not installed"
    return {
        "source": str(source),
        "files": {path.name: _sha256(path) for path in files},
        "written_by": f"weights_convert of bilinear-jax {library}",
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
