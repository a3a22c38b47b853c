"""Make tiny random models of each family with what transformers computes from them.

Run it in an environment with torch 2.13 and transformers 5.24:

    python tests/data/families/make.py OUT [NAME ...]

It writes OUT/NAME/model (config.json and the weights) and OUT/NAME/expected.safetensors: token ids, logits, the inputs
and outputs of each MLP, and the greedy continuation of the first 8 ids of the first row. It made ``biases`` beside this
file; another script made the other folders, with the same contents.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 100_000.0},
    "llama3-rope": {
        "model_type": "llama",
        "rope_parameters": {**LLAMA3, "rope_theta": 500_000.0, "original_max_position_embeddings": 32},
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "gemma": {"model_type": "gemma", "head_dim": 16},
    "biases": {"model_type": "llama", "mlp_bias": True, "num_key_value_heads": 1, "dtype": "bfloat16"},
}
SHARDED = ("biases",)
"""The cases whose weights are in several files."""


def model_of(case: dict, seed: int):
    """A random model. Its weights are numbers of the dtype in which they are stored, and it computes in float32."""
    torch.manual_seed(seed)
    stored = getattr(torch, case.get("dtype", "float32"))
    config = AutoConfig.for_model(**{**SIZES, **case, "attn_implementation": "eager", "dtype": "float32"})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            center = float("norm" in name and case["model_type"] != "gemma")
            weight.copy_((center + torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.3)).to(stored))
    return model, stored


def expected_of(model, seed: int) -> dict[str, torch.Tensor]:
    """Token ids, and what the model computes from them."""
    torch.manual_seed(seed + 1)
    ids = torch.randint(3, SIZES["vocab_size"], (3, 40))
    found = {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(
            lambda _, inputs, output, i=i: found.update({f"mlp_in.{i}": inputs[0], f"mlp_out.{i}": output})
        )
    with torch.no_grad():
        row = ids[:1, :8]
        for _ in range(12):  # without a cache
            row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], dim=1)
        logits = model(ids).logits  # last: this is what the hooks keep
    return {"input_ids": ids.int(), "logits": logits, "greedy": row.int(), **found}


def main(out: str, *names: str) -> None:
    for name in names or CASES:
        folder = Path(out) / name
        model, stored = model_of(CASES[name], seed := list(CASES).index(name))
        expected = expected_of(model, seed)
        model.to(stored).save_pretrained(folder / "model", max_shard_size="15KB" if name in SHARDED else "1GB")
        (folder / "model" / "generation_config.json").unlink(missing_ok=True)
        save_file({key: value.contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
        config = json.loads((folder / "model" / "config.json").read_text())
        print(name, config["model_type"], sorted(path.name for path in (folder / "model").iterdir()))
        print(expected["greedy"][0].tolist(), float(expected["logits"].abs().max()))


if __name__ == "__main__":
    main(*sys.argv[1:])
