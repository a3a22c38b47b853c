"""Convert the published torch checkpoints to dicts of numpy arrays and back, bit for bit. Needs neither torch nor JAX.

    read_transformer(folder) -> (config, params)      the folder of a model: config.json and the weights
    read_gated(folder)       -> (config, params)      a Llama, Mistral, Qwen or Gemma, as Hugging Face stores it
    read_gguf(path)          -> (config, params)      the same models in a GGUF file; needs the package gguf
    read_sae(folder)         -> (config, params)      the folder of one SAE in a ``-scope`` repository
    read_dictionary(folder)  -> (config, params)      an SAE or a transcoder of SAELens, Gemma Scope, sparsify, ...
    write_transformer(folder, config, params)         the inverse of read_transformer
    write_sae(folder, config, params)                 the inverse of read_sae
    describe_dictionary(folder, format) -> config     the same without the weights
    write_dictionary(folder, format, config, params)  the inverse of read_dictionary
    dictionary_format(folder) -> str or None          whose dictionary a folder holds
    sae_folders(folder)      -> {name: SAEName}       the SAEs in a ``-scope`` folder

``config`` holds the keyword arguments of ``bilinear_jax.nn.transformer.TransformerConfig`` or
``bilinear_jax.nn.sae.SAEConfig``. ``params`` has the layout of those modules. ``python -m weights_convert`` converts
to Orbax checkpoints; ``python -m weights_convert export`` converts back.
"""

from weights_convert.dictionaries import describe_dictionary, dictionary_format, read_dictionary, write_dictionary
from weights_convert.export import write_sae, write_transformer
from weights_convert.families import read_gated
from weights_convert.gguf import read_gguf
from weights_convert.names import SAEName, parse_sae_name, sae_folders
from weights_convert.sae import read_sae
from weights_convert.transformer import read_transformer

__all__ = [
    "SAEName",
    "describe_dictionary",
    "dictionary_format",
    "parse_sae_name",
    "read_dictionary",
    "read_gated",
    "read_gguf",
    "read_sae",
    "read_transformer",
    "sae_folders",
    "write_dictionary",
    "write_sae",
    "write_transformer",
]
