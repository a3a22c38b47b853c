"""Tokens per second of the forward pass, against a plain torch model of the same shape in the same process.

Random weights of fw-medium's shape (334M parameters, float32), 4 x 256 tokens, all cores. Without torch, only our own
speed is measured. The error is the largest difference of logits, divided by the largest logit.

    python benchmarks/forward.py
"""

import functools

import jax
import numpy as np
from measure import FW_MEDIUM, best_of, case, peak_bytes, random_params, report

from bilinear_jax.nn.sites import forward

BATCH, SEQ = 4, 256


def torch_model(config, params):
    """The same transformer as a torch module: nn.Linear and scaled_dot_product_attention, nothing else of note."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    def linear(*weights):
        weight = np.concatenate(weights)  # a copy, which torch may write to
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = torch.from_numpy(weight)
        return layer

    def norm(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8)

    half = config.d_head // 2
    angles = torch.outer(torch.arange(config.n_ctx).float(), 10_000.0 ** -(torch.arange(half).float() / half))
    cos, sin = angles.cos(), angles.sin()

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        c, s = cos[: x.shape[-2]], sin[: x.shape[-2]]
        return torch.cat([first * c - second * s, second * c + first * s], dim=-1)

    class Layer(nn.Module):
        def __init__(self, attention, mlp):
            super().__init__()
            self.qkv, self.o = linear(attention["w_q"], attention["w_k"], attention["w_v"]), linear(attention["w_o"])
            self.w, self.p = linear(mlp["w_l"], mlp["w_r"]), linear(mlp["w_p"])

        def forward(self, x):
            batch, seq, width = x.shape
            q, k, v = self.qkv(norm(x)).view(batch, seq, 3, config.n_head, -1).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
            x = x + config.attn_scale * self.o(mixed.transpose(1, 2).reshape(batch, seq, width))
            left, right = self.w(norm(x)).chunk(2, dim=-1)
            return x + self.p(left * right)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(config.n_layer)]
            self.layers = nn.Sequential(*(Layer(**layer) for layer in layers))
            self.w_e = nn.Embedding.from_pretrained(torch.from_numpy(np.array(params["w_e"])), freeze=False)
            self.w_u = linear(params["w_u"])

        def forward(self, tokens):
            return self.w_u(norm(self.layers(self.w_e(tokens))))

    return Model()


def torch_forward(config, params):
    import torch

    model = torch_model(config, params)

    def run(tokens):
        with torch.inference_mode():
            return model(torch.from_numpy(tokens)).numpy()

    return run


def main():
    config, params = FW_MEDIUM, random_params(FW_MEDIUM)
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, (BATCH, SEQ))
    ours = functools.partial(jax.jit(functools.partial(forward, config)), params, tokens)
    functions = {"ours": ours}
    try:
        functions["torch"] = functools.partial(torch_forward(config, params), tokens)
    except ImportError:
        print("torch is not installed: measuring ours alone")
    seconds = best_of(5, functions)
    for name, value in seconds.items():
        print(f"{name}: {BATCH * SEQ / value:.0f} tokens/s")
    cases = []
    if "torch" in functions:
        expected = functions["torch"]()
        error = float(np.max(np.abs(np.asarray(ours()) - expected)) / np.max(np.abs(expected)))
        peak = peak_bytes(functools.partial(forward, config), params, tokens)
        cases = [case(f"{BATCH} x {SEQ} tokens", "torch", seconds["torch"], seconds["ours"], error, peak)]
    report("forward", cases)


if __name__ == "__main__":
    main()
