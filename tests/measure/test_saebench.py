"""The adapter for SAEBench, on NumPy arrays in place of torch tensors: what it gives is what SAEBench would compute."""

import builtins
import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilinear_jax.measure.saebench import SAEBenchAdapter, saebench_adapter
from bilinear_jax.nn.sae import SAE, SAEConfig

X = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
PLAIN = {"to_numpy": np.asarray, "from_numpy": lambda array, device, dtype: array.astype(dtype), "dtype": np.float32}


def an_sae(**options) -> SAE:
    sae = SAE.init(
        SAEConfig(**({"site": "resid_post", "layer": 3, "d_model": 8, "expansion": 4, "k": 3} | options)),
        jax.random.key(0),
    )
    random = np.random.default_rng(1)
    params = {name: value + 0.2 * random.normal(size=value.shape).astype("f4") for name, value in sae.params.items()}
    return SAE(params, sae.config)


KINDS = {
    "topk": {},
    "topk_relu": {"activation": "topk_relu", "encoder_bias": True},
    "not centred": {"centred": False, "encoder_bias": True},
    "normalize": {"normalize": 4.0, "apply_normalize": True, "encoder_bias": True},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu", "k": None, "encoder_bias": True},
    "relu": {"activation": "relu", "k": None, "max_active": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_saebench_computes_from_its_weights(kind):
    """The formulas of SAEBench's own classes, with the activation applied where ours is active."""
    sae = an_sae(**KINDS[kind])
    adapter = saebench_adapter(sae, "gpt2", **PLAIN)
    assert (adapter.W_enc.shape, adapter.W_dec.shape, adapter.b_enc.shape, adapter.b_dec.shape) == (
        *((8, 32), (32, 8)),
        *((32,), (8,)),
    )
    np.testing.assert_allclose(np.linalg.norm(adapter.W_dec, axis=1), 1, rtol=1e-5)
    reconstruction, ours = map(np.asarray, sae(jnp.asarray(X)))
    read = X - adapter.b_dec if adapter.cfg.apply_b_dec_to_input else X
    z = read @ adapter.W_enc + adapter.b_enc
    codes = adapter.encode(X)
    np.testing.assert_allclose(codes, np.where(ours != 0, z, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter.decode(codes), codes @ adapter.W_dec + adapter.b_dec, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter(X), reconstruction, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(adapter.forward(X[0]), adapter(X)[0])


def test_a_column_of_zeros_stays_so():
    sae = an_sae()
    sae = SAE(sae.params | {"w_dec": sae.w_dec.at[:, 4].set(0)}, sae.config)
    adapter = saebench_adapter(sae, "gpt2", **PLAIN)
    assert not adapter.W_dec[4].any() and np.isfinite(adapter.encode(X)).all()


def test_the_config_has_what_saebench_reads():
    cfg = saebench_adapter(an_sae(site="mlp_in", layer=2), "gpt2", **PLAIN).cfg
    assert (cfg.model_name, cfg.d_in, cfg.d_sae, cfg.hook_layer) == ("gpt2", 8, 32, 2)
    assert cfg.hook_name == "blocks.2.ln2.hook_normalized" and cfg.architecture == "topk"
    assert cfg.to_dict() == {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    assert saebench_adapter(an_sae(), "gpt2", hook_name="here", **PLAIN).cfg.hook_name == "here"


def test_it_moves_to_a_dtype_in_place():
    adapter = saebench_adapter(an_sae(), "gpt2", **PLAIN)
    assert adapter.to(dtype=np.float64, device="there") is adapter
    assert {array.dtype for array in (adapter.W_enc, adapter.W_dec, adapter.encode(X), adapter(X))} == {np.dtype("f8")}
    assert (adapter.device, adapter.dtype, adapter.cfg.device) == ("there", np.float64, "there")
    adapter.to("elsewhere")
    assert (adapter.device, adapter.dtype) == ("elsewhere", np.float64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"target": "mlp_out"}, "is a transcoder"),
        ({"skip": True}, "is an SAE with a skip"),
        ({"passthrough": (1,)}, "is an SAE with passthrough"),
        ({"bilinear_encoder": True}, "is an SAE with a bilinear encoder"),
        ({"token_lookup": 5}, "is an SAE with a token lookup"),
    ],
)
def test_what_saebench_cannot_express_is_refused(options, says):
    with pytest.raises(ValueError, match=f"{says}, but SAEBench takes"):
        saebench_adapter(an_sae(**options), "gpt2", **PLAIN)


class Tensor:
    """As much of a torch tensor as the adapter uses."""

    def __init__(self, array, device="cpu"):
        self.array, self.device = array, device

    def detach(self):
        return self

    def to(self, device, dtype):
        return Tensor(self.array.astype(dtype), device)

    def numpy(self):
        assert self.device == "cpu"
        return self.array


def test_without_conversions_it_uses_those_of_torch(monkeypatch):
    torch = types.ModuleType("torch")
    torch.float32, torch.from_numpy = np.dtype("f4"), Tensor
    monkeypatch.setitem(sys.modules, "torch", torch)
    sae = an_sae()
    adapter = saebench_adapter(sae, "gpt2", device="gpu")
    assert isinstance(adapter, SAEBenchAdapter) and isinstance(adapter.W_enc, Tensor) and adapter.W_enc.device == "gpu"
    given = adapter(Tensor(X.astype(np.float64), "gpu"))
    assert given.device == "gpu" and given.array.flags.writeable
    np.testing.assert_allclose(given.array, sae(jnp.asarray(X))[0], rtol=1e-4, atol=1e-5)


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    usual = builtins.__import__

    def refuse(name, *args, **options):
        if name == "torch":
            raise ImportError(name)
        return usual(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="SAEBench needs torch, which is not installed: pip install sae-bench"):
        saebench_adapter(an_sae(), "gpt2")
