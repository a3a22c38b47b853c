"""Small folders in the published layout, for tests to write and to break, and small models to save."""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bilinear_jax.explain.tracer import Tracer
from bilinear_jax.language import LanguageModel
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import Transformer, TransformerConfig

TS_MICRO = Path(__file__).parent / "data" / "ts-micro"
MODEL, SCOPE = TS_MICRO / "model", TS_MICRO / "scope"
SCALE = 1 / np.sqrt(6)  # with which the golden outputs were made

CONFIG = {
    "architectures": ["Transformer"],
    "n_head": 2,
    "n_layer": 2,
    "n_ctx": 16,
    "d_model": 8,
    "d_hidden": 12,
    "bilinear": True,
    "gate": None,
    "bias": False,
    "normalization": True,
    "tokenizer": "ts-4096",
    "repo": "someone/small",
    "scale_attn": True,
}


def state(config: dict, n_vocab: int = 11, qkv_bias: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    """A random state dict with the keys and shapes of a published model."""
    rng = np.random.default_rng(seed)
    d, h = config["d_model"], config["d_hidden"]
    rows = 2 * h if config["bilinear"] else h
    shapes = {"transformer.wte.weight": (n_vocab, d), "lm_head.weight": (n_vocab, d)}
    for i in range(config["n_layer"]):
        layer = {
            "attn.qkv.weight": (3 * d, d),
            "attn.o.weight": (d, d),
            "mlp.w.weight": (rows, d),
            "mlp.p.weight": (d, h),
        }
        if config["bias"]:
            layer |= {"mlp.w.bias": (rows,), "mlp.p.bias": (d,)}
        if qkv_bias:
            layer |= {"attn.qkv.bias": (3 * d,)}
        shapes |= {f"transformer.h.{i}.{key}": shape for key, shape in layer.items()}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def write(folder: Path, config: dict, weights: dict[str, np.ndarray], *, pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _save(folder / ("pytorch_model.bin" if pickled else "model.safetensors"), weights)
    return folder


def write_sharded(folder: Path, config: dict, weights: dict[str, np.ndarray], *, pickled: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = {key: f"{stem}-0000{1 + i % 2}-of-00002.{suffix}" for i, key in enumerate(sorted(weights))}
    for name in set(names.values()):
        _save(folder / name, {key: weights[key] for key in weights if names[key] == name})
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def _save(path: Path, weights: dict[str, np.ndarray]) -> None:
    if path.suffix == ".bin":
        torch_file(path, weights)
    else:
        save_file({key: np.ascontiguousarray(value) for key, value in weights.items()}, path, metadata={"format": "pt"})


# Files of torch.save, written by hand


def archive(path: Path, data: bytes, **entries: bytes) -> Path:
    """A file with this pickle and these storages."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"model/data/{name}", content)
    return path


def ints(*values: int) -> str:
    """A pickled tuple of them."""
    return "(" + "".join(f"I{value}\n" for value in values) + "t"


def tensor(
    size: str, stride: str, offset: int = 0, count: int = 4, key: str = "0", kind: str = "FloatStorage"
) -> bytes:
    """A pickled tensor, its sizes as ``ints`` writes them."""
    storage = f"(S'storage'\nctorch\n{kind}\nS'{key}'\nS'cpu'\nI{count}\ntQ"
    return f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{size}{stride}I00\nNtR.".encode()


_STORAGES = {"float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int32": "Int"}


def torch_file(path: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A state dict of these arrays."""
    data = b"("
    for number, (name, value) in enumerate(arrays.items()):
        strides = [step // value.itemsize for step in np.empty(value.shape, value.dtype).strides]
        sizes = ints(*value.shape), ints(*strides)
        kind = f"{_STORAGES[value.dtype.name]}Storage"
        data += f"S'{name}'\n".encode() + tensor(*sizes, count=value.size, key=str(number), kind=kind)[:-1]
    return archive(path, data + b"d.", **{str(number): value.tobytes() for number, value in enumerate(arrays.values())})


def sae(name: str = "1-mlp-out-x4-k6") -> tuple[dict, dict[str, np.ndarray]]:
    """The config and the weights of a golden SAE."""
    folder = SCOPE / name
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


ORIGIN = {"made_by": "a test"}


SMALL = TransformerConfig(n_layer=2, n_head=2, d_model=8, d_hidden=12, n_ctx=16, n_vocab=11, bias=True, gate="silu")


def make_params(config, seed: int = 0):
    """Random params of the structure and shapes that a ``TransformerConfig`` asks for."""
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape).astype(np.float32)), shapes)


def biased_tracer() -> tuple[Tracer, np.ndarray]:
    """A tracer of a random model with biases, and tokens. Its input SAE reads before the norm, and passes two
    coordinates through.
    """
    config = TransformerConfig(1, 1, 8, 12, 16, 11, bias=True)
    lm = LanguageModel(make_params(config), config)
    saes = []
    for seed, site in enumerate(("resid_mid", "mlp_out")):
        passed = (2, 5) if site == "resid_mid" else ()
        sae = SAE.init(SAEConfig(site, 0, 8, 3, 4, encoder_bias=True, passthrough=passed), jax.random.key(seed))
        rng = np.random.default_rng(seed)
        biases = {
            name: jnp.asarray(rng.normal(size=sae.params[name].shape), jnp.float32) for name in ("b_dec", "b_enc")
        }
        saes.append(SAE(sae.params | biases, sae.config))
    return Tracer(lm, 0, *saes), np.random.default_rng(9).integers(0, 11, (6, 9))


def same(left, right) -> bool:
    """Whether two trees of arrays agree bit for bit."""
    equal = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes(), left, right)
    return all(jax.tree.leaves(equal))


def other_memory(draw, array: np.ndarray):
    """The numbers of an array as a view with another memory layout or byte order, or as an array of JAX."""
    reordered = draw(st.permutations(range(array.ndim)))
    back = np.argsort(reordered)
    stored = np.ascontiguousarray(array.transpose(reordered))
    steps = [draw(st.sampled_from([1, 2, -1, -3])) for _ in stored.shape]
    buffer = np.full([size * abs(step) for size, step in zip(stored.shape, steps, strict=True)], 7, array.dtype)
    view = buffer[tuple(slice(None, None, step) for step in steps)]
    view[...] = stored
    kind = draw(st.sampled_from(["view", "Fortran", "jax", "other bytes"]))
    if kind == "jax":
        return jnp.asarray(array)
    if kind == "Fortran":
        return np.asfortranarray(array)
    if kind == "other bytes" and array.dtype.kind == "f":
        return array.astype(array.dtype.newbyteorder(">"))
    return view.transpose(back)


def repeated(draw, array: np.ndarray):
    """A view of the array's first part along an axis, repeated with stride 0."""
    axis = draw(st.integers(0, array.ndim - 1))
    return np.broadcast_to(array.take([0], axis), array.shape)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "hello": 3, "world": 4}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": {"content": "[BOS]"}, "eos_token": "[EOS]", "pad_token": "[EOS]", "unk_token": "[UNK]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
