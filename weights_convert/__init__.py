"""The published torch checkpoints from and to plain dicts of numpy arrays, bit for bit; needs neither torch nor JAX.

    read_transformer(folder) -> (config, params)      a model's folder: config.json and the weights
    read_sae(folder)         -> (config, params)      one SAE's folder of a ``-scope`` repository
    write_transformer(folder, config, params)         and back
    write_sae(folder, config, params)
    sae_folders(folder)      -> {name: SAEName}       the SAEs that a ``-scope`` folder holds

``config`` holds the keyword arguments of ``bilinear_jax.nn.transformer.TransformerConfig`` or
``bilinear_jax.nn.sae.SAEConfig``; ``params`` is laid out as those modules want it. ``python -m weights_convert``
writes them as Orbax checkpoints, ``python -m weights_convert export`` goes back.
"""

from weights_convert.export import write_sae, write_transformer
from weights_convert.names import SAEName, parse_sae_name, sae_folders
from weights_convert.sae import read_sae
from weights_convert.transformer import read_transformer

__all__ = ["SAEName", "parse_sae_name", "read_sae", "read_transformer", "sae_folders", "write_sae", "write_transformer"]
