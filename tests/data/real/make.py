"""What wrote expected.safetensors beside it, in an environment with torch 2.13, transformers 5 and gguf:

    python tests/data/real/make.py SmolLM2-135M-Instruct.Q4_1.gguf

Float32 on a CPU. The weights are dequantised by ``gguf`` and put into transformers' own Llama here, so that a golden
number depends on transformers' arithmetic and not on its reader of GGUF files. Where that reader works, its logits and
its token ids must be the same.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SEQ, LARGEST, NEW = 128, 5, 24
PROMPT = "The capital of France is"

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""The modules of one layer, by their names in a GGUF file."""


def llama(path) -> LlamaForCausalLM:
    """The file as transformers' Llama with tied embeddings, in float32."""
    reader = GGUFReader(path)

    def field(name):
        return reader.fields[f"llama.{name}"].contents()

    heads, pairs = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    weights = {}
    for tensor in reader.tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)
        if tensor.name == "token_embd.weight":
            weights["model.embed_tokens.weight"] = weights["lm_head.weight"] = torch.from_numpy(value)
            continue
        if tensor.name == "output_norm.weight":
            weights["model.norm.weight"] = torch.from_numpy(value)
            continue
        _, layer, name, _ = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):  # stored with the two coordinates of a rotary pair side by side
            n = heads if name == "attn_q" else pairs
            value = value.reshape(n, -1, 2, value.shape[-1]).swapaxes(1, 2).reshape(value.shape)
        weights[f"model.layers.{layer}.{NAMES[name]}.weight"] = torch.from_numpy(value)
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="the .gguf file")
    path = parser.parse_args().path.resolve()
    torch.manual_seed(0)
    model = llama(path)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = (HERE / "texts.txt").read_text(encoding="utf-8").splitlines()
    rows = [tokenizer(text)["input_ids"] for text in texts]
    assert min(map(len, rows)) > SEQ, [len(row) for row in rows]
    tokens = torch.tensor([row[:SEQ] for row in rows])
    prompt = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(tokens).logits, dim=-1)
        greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=NEW)
        theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        error = (torch.log_softmax(theirs(tokens).logits, dim=-1) - logprobs).abs().max()
    print(f"transformers' reader of GGUF files: log-probabilities differ by at most {error:.2e}")
    largest, largest_ids = logprobs.topk(LARGEST, dim=-1)
    following = logprobs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    print(f"mean loss {-following.mean():.4f}; {tokenizer.decode(greedy[0])!r}")
    arrays = {
        "tokens": tokens.int(),
        "following": following,
        "largest": largest,
        "largest_ids": largest_ids.int(),
        "prompt": prompt.int(),
        "greedy": greedy[:, prompt.shape[1] :].int(),
    }
    save_file({name: array.contiguous().numpy() for name, array in arrays.items()}, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
