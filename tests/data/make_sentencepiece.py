"""Make sentencepiece.json: a small tokenizer of sentencepiece 0.2, and what it makes of texts. Run in the root.

python tests/data/make_sentencepiece.py
"""

import io
import json
from pathlib import Path

import sentencepiece as spm

TEXTS = [
    "The capital of France is Paris.",
    "  two  spaces, a\ttab\nand a line",
    "naïve cafés: 12345 🙂 Ж",
    "bilinear layers are read from their weights",
    "a",
    " ",
]
MODELS = {"prefix": True, "plain": False}


def main() -> None:
    text = Path("README.md").read_text() + Path("CONTRIBUTING.md").read_text()
    found = {}
    for name, prefix in MODELS.items():
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(text.splitlines()),
            model_writer=model,
            model_type="bpe",
            vocab_size=500,
            byte_fallback=True,
            add_dummy_prefix=prefix,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.99,
        )
        sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
        ids = range(sp.vocab_size())
        kinds = [
            2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 5 if sp.is_unused(i) else 1
            for i in ids
        ]
        found[name] = {
            "tokens": [sp.id_to_piece(i) for i in ids],
            "scores": [sp.get_score(i) for i in ids],
            "token_type": kinds,
            "add_space_prefix": prefix,
            "encoded": [[text, sp.encode(text)] for text in TEXTS],
        }
    Path("tests/data/sentencepiece.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
