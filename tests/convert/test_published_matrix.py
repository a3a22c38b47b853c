"""Architectures x ages x formats of the published models: each is loaded, run, and compared with NumPy in float64.

The reference reads the state dict that the test wrote, by the published layout, and nothing of this library.
"""

import itertools
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import published
import pytest

import bilinear_jax as bj

TOKENS = np.random.default_rng(5).integers(0, 11, (2, 7))

ARCHITECTURES = {
    "bilinear": {},
    "ReGLU": {"gate": "relu"},
    "SwiGLU with biases": {"gate": "silu", "bias": True},
    "GeGLU": {"gate": "gelu", "normalization": [False, True, True]},
    "bilinear with all biases": {"bias": True, "qkv_bias": True, "normalization": [True, False, True]},
    "plain": {"bilinear": False, "gate": "relu", "bias": True, "normalization": False},
}


def today(config, weights):
    return config, weights


def before_scale_attn(config, weights):
    """Until November 2024 nothing said how the attention is scaled: the name does."""
    return {key: value for key, value in config.items() if key != "scale_attn"} | {"repo": "tdooms/fw-new"}, weights


def with_buffers(config, weights):
    """Rotary frequencies and the norms' unused weights were saved along."""
    half = config["d_model"] // config["n_head"] // 2
    frequencies = (10_000.0 ** -(np.arange(half) / half)).astype(weights["lm_head.weight"].dtype)
    extra = {f"transformer.h.{i}.attn.rotary.inv_freq": frequencies for i in range(config["n_layer"])}
    extra["transformer.n_f.norm.linear.weight"] = np.ones((4, 4), frequencies.dtype)
    extra["transformer.h.0.n1.norm.linear.weight"] = np.ones((4, 4), frequencies.dtype)
    return config, weights | extra


def of_mid_2024(config, weights):
    """``gate`` false for none, ``rms`` for normalization, ``n_vocab``, and keys that change nothing."""
    older = config | {"gate": config["gate"] or False, "n_vocab": 11, "modifier": "-v2", "noise": None}
    if isinstance(config["normalization"], bool):
        older["rms"] = older.pop("normalization")
    if config["bilinear"]:
        del older["bilinear"]
        older["mlp"] = "blp"
    return older, weights


def with_gains(config, weights):
    """The oldest norms had gains; those of norms that are off were not there."""
    gains, on = {}, norms(config)
    for i in range(config["n_layer"]):
        gains |= {f"transformer.h.{i}.n{1 + n}.weight": np.linspace(0.5, 2, 8) + i + n for n in (0, 1) if on[n]}
    if on[2]:
        gains["transformer.n_f.weight"] = np.linspace(2, 0.5, 8)
    return config, weights | {key: value.astype(weights["lm_head.weight"].dtype) for key, value in gains.items()}


AGES = (today, before_scale_attn, with_buffers, of_mid_2024, with_gains)
FORMATS = list(itertools.product((published.write, published.write_sharded), (False, True)))
DTYPES = {np.float32: 2e-5, np.float16: 5e-3, ml_dtypes.bfloat16: 5e-2}
"""How files are stored, and the error of gains folded in at that precision; all else is computed in float32."""


def norms(config) -> list[bool]:
    given = config["normalization"]
    return [given] * 3 if isinstance(given, bool) else given


GATES = {
    None: lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2,
}


def reference(config, weights, tokens):
    weights = {key: value.astype(np.float64) for key, value in weights.items()}
    heads, seq = config["n_head"], tokens.shape[1]
    width = config["d_model"] // heads
    angles = np.arange(seq)[:, None] * 10_000.0 ** -(np.arange(width // 2) / (width // 2))

    def norm(x, index, gain):
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-8) if norms(config)[index] else x
        return x * weights.get(f"transformer.{gain}.weight", 1)

    def linear(x, key):
        return x @ weights[f"{key}.weight"].T + weights.get(f"{key}.bias", 0)

    def rotated(x):
        left, right = np.split(x, 2, axis=-1)
        return np.concatenate(
            [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], -1
        )

    x = weights["transformer.wte.weight"][tokens]
    for i in range(config["n_layer"]):
        layer = f"transformer.h.{i}"
        parts = np.split(linear(norm(x, 0, f"h.{i}.n1"), f"{layer}.attn.qkv"), 3, axis=-1)
        q, k, v = (part.reshape(*tokens.shape, heads, width).swapaxes(1, 2) for part in parts)
        scores = rotated(q) @ rotated(k).swapaxes(-1, -2) / math.sqrt(width)
        scores = np.where(np.tril(np.ones((seq, seq), bool)), scores, -np.inf)
        pattern = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (pattern / pattern.sum(-1, keepdims=True)) @ v
        x = x + linear(mixed.swapaxes(1, 2).reshape(x.shape), f"{layer}.attn.o") / math.sqrt(2 * config["n_layer"])
        hidden = linear(norm(x, 1, f"h.{i}.n2"), f"{layer}.mlp.w")
        left, right = np.split(hidden, 2, axis=-1) if config["bilinear"] else (hidden, 1)
        x = x + linear(GATES[config["gate"]](left) * right, f"{layer}.mlp.p")
    return linear(norm(x, 2, "n_f"), "lm_head")


@pytest.mark.filterwarnings("ignore:.*norms with gains", "ignore:.*scale of its attention's output")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_of_every_age_in_every_format(tmp_path, name):
    """Which catches: swapped halves or heads, a gain or bias lost, a scale misread, shards mixed up, bytes misread."""
    options = dict(ARCHITECTURES[name])
    qkv_bias = options.pop("qkv_bias", False)
    config = published.CONFIG | options
    state = {key: value / 3 for key, value in published.state(config, qkv_bias=qkv_bias).items()}
    number = 0
    for age, dtype in itertools.product(AGES, DTYPES):
        older, weights = age(config, {key: value.astype(dtype) for key, value in state.items()})
        expected = reference(config, weights, TOKENS)
        tolerance = (DTYPES[dtype] if age is with_gains else 2e-5) * np.abs(expected).max()
        for write, pickled in FORMATS:
            number += 1
            lm = bj.load(write(tmp_path / str(number), older, weights, pickled=pickled))
            error = np.abs(np.asarray(lm.logits(TOKENS)) - expected).max()
            assert error < tolerance, (age.__name__, dtype.__name__, write.__name__, pickled, error)
    assert number == len(AGES) * len(DTYPES) * len(FORMATS)


SAES = {
    "today": {"passthrough": None, "normalize_decoder": True},
    "passed through, as a number": {"passthrough": 7, "kwargs": {"kwargs": {}}},
    "passed through, as a list": {"passthrough": [3, 7], "tag": "v3"},
    "September 2024": {"point": ["mlp_out", 1], "n_buffers": 500, "n_batches": 1000},
    "saved again and again": {"kwargs": {"kwargs": {"kwargs": {"passthrough": 5}}}},
    "bilinear encoder": {"bilinear_encoder": True, "target": ["mlp-out", 1]},
    "bilinear encoder with a bias": {"bilinear_encoder": True, "encoder_bias": True, "normalize": 12.5},
}


@pytest.mark.parametrize("name", SAES)
def test_saes_of_every_age_in_every_format(tmp_path, name):
    """Codes and reconstruction by the published formula, written out in NumPy."""
    config, weights = published.sae()
    config |= SAES[name]
    if name == "September 2024":
        del config["normalize_decoder"]
    rng = np.random.default_rng(1)
    if config["bilinear_encoder"]:
        weights["w_enc.weight"] = rng.normal(size=(256, 32)).astype(np.float32)
    if config["encoder_bias"]:
        weights["w_enc.bias"] = rng.normal(size=len(weights["w_enc.weight"])).astype(np.float32)
    x = rng.normal(size=(3, 32)).astype(np.float32)

    hidden = (x - weights["b_dec"]) @ weights["w_enc.weight"].T + weights.get("w_enc.bias", 0)
    hidden = hidden[:, :128] * hidden[:, 128:] if config["bilinear_encoder"] else hidden
    codes = np.where(hidden >= np.sort(hidden)[:, -config["k"], None], hidden, 0)
    expected = codes @ weights["w_dec.weight"].T + weights["b_dec"]
    passed = {"saved again and again": 5}.get(name, config.get("passthrough") or [])
    expected[:, passed] += x[:, passed]

    tag = f"-{config['tag']}" if config["tag"] else ""
    for number, (write, pickled) in enumerate(FORMATS):
        write(tmp_path / f"{number}-scope" / f"1-mlp-out-x4-k6{tag}", config, weights, pickled=pickled)
        sae = bj.load_sae(tmp_path / f"{number}-scope", "mlp-out", layer=1)
        np.testing.assert_allclose(np.asarray(sae.encode(jnp.asarray(x))), codes, atol=2e-5)
        np.testing.assert_allclose(np.asarray(sae(jnp.asarray(x))[0]), expected, atol=2e-5)
