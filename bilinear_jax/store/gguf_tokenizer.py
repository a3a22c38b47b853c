"""The tokenizer in a GGUF file, as a ``tokenizers.Tokenizer``: byte-level BPE ("gpt2"), or sentencepiece's ("llama").

The metadata hold the tokens, their kinds, and either merges or scores. ``tokenizer.ggml.pre`` names the rules that cut
a text into the pieces within which tokens are merged; ``_RULES`` has them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from weights_convert.files import check_kinds
from weights_convert.gguf_file import GGUFFile

_UNKNOWN, _CONTROL, _USER = 2, 3, 4
"""The kinds of tokens that stand for themselves in a text, whatever is around them."""


class _Rule(NamedTuple):
    """How a text is cut, and what else goes with it."""

    cuts: tuple[str, ...]  # patterns; each cuts further what the earlier ones left
    whole: bool = False  # a piece that is a token is not split, even if no merges lead to it
    composed: bool = False  # the text becomes Unicode's normal form C first
    begins: bool = False  # unless the file says otherwise, every text begins with the bos token


def _words(digits: str) -> str:
    """The pattern of Llama 3 and Qwen 2, which differ in how many digits a piece has."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SMOLLM = _Rule((r"\p{N}", _GPT2))
_LLAMA3 = _Rule((_words(r"\p{N}{1,3}"),), whole=True, begins=True)
_QWEN2 = _Rule((_words(r"\p{N}"),), composed=True)

_RULES = {
    "default": _Rule((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Rule((_GPT2,)),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""The rules by ``tokenizer.ggml.pre``."""

_BEGIN = "tokenizer.ggml."
_KINDS = {
    **dict.fromkeys(("tokens", "merges", "scores", "token_type"), list),
    **dict.fromkeys(("model", "pre"), str),
    **dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), bool),
}
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}


def gguf_tokenizer(path: Path) -> tuple[Any, dict[str, str]]:
    """The tokenizer in a GGUF file, and its special tokens, as ``{"bos_token": ...}``. A chat template is left out.

    Raises:
        FileNotFoundError, ImportError: as ``GGUFFile``.
        ValueError: if the file is damaged, holds no tokenizer or another kind, or has lists that do not fit each other.
    """
    from tokenizers import AddedToken, processors

    metadata = GGUFFile(path).metadata
    raw = {key.removeprefix(_BEGIN): value for key, value in metadata.items() if key.startswith(_BEGIN)}
    check_kinds(path, raw, _KINDS)
    model, tokens = raw.get("model"), raw.get("tokens") or []
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if model not in makers or not tokens or not all(isinstance(token, str) for token in tokens):
        raise _other(
            path, f"a tokenizer of the kind {model!r:.100} with {len(tokens)} tokens, but must be gpt2 or llama"
        )
    kinds = raw.get("token_type") or [1] * len(tokens)
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens) or len(kinds) != len(tokens):
        raise _other(path, f"{len(tokens)} tokens, of which {len(vocab)} differ, and {len(kinds)} kinds of tokens")
    special = {}
    for key, name in _SPECIAL.items():
        index = raw.get(f"{key}_token_id")
        if type(index) is int and 0 <= index < len(tokens):
            special[name] = tokens[index]
    tokenizer, begins = makers[model](path, raw, vocab, special)
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER):
            # Only in a text whose spaces were already replaced can a token with such a sign be found.
            added = AddedToken(token, special=kind != _USER, normalized=kind == _USER and "▁" in token)
            (tokenizer.add_tokens if kind == _USER else tokenizer.add_special_tokens)([added])
    first = special.get("bos_token") if raw.get("add_bos_token", begins) else None
    last = special.get("eos_token") if raw.get("add_eos_token") else None
    if first or last:
        named = [(token, vocab[token]) for token in dict.fromkeys((first, last)) if token]
        single = " ".join(part for part in (first, "$A", last) if part)
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=named)
    return tokenizer, special


def _other(path: Path, has: str) -> ValueError:
    return ValueError(
        f"the tokenizer in {path} cannot be read: it has {has}. Put the model's tokenizer.json beside the file, or use "
        "token ids"
    )


def _byte_level(path: Path, raw: Mapping[str, Any], vocab: dict[str, int], special: Mapping[str, str]):
    """BPE on the bytes of a text, from merges. Also whether a text begins with the bos token."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = raw.get("pre", "default")
    if pre not in _RULES:
        raise _other(path, f"the rule {pre!r:.100} to cut a text, but must have one of {', '.join(_RULES)}")
    rule = _RULES[pre]
    merges: list[tuple[str, str]] = []
    for merge in raw.get("merges") or []:
        match str(merge).split(" "):
            case [left, right]:
                merges.append((left, right))
            case _:
                raise _other(path, f"the merge {merge!r:.100}, which is not of two tokens")
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=rule.whole))
    if rule.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in rule.cuts]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, rule.begins


def _sentencepiece(path: Path, raw: Mapping[str, Any], vocab: dict[str, int], special: Mapping[str, str]):
    """BPE of sentencepiece: two tokens are merged if the whole is a token, the one with the highest score first.

    A space is "▁", and what is no token becomes its bytes, "<0x41>". Also that a text begins with the bos token.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = raw.get("scores") or []
    if len(scores) != len(vocab):
        raise _other(path, f"{len(vocab)} tokens and {len(scores)} scores")
    merges = []
    for token, index in vocab.items():
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut]), vocab.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right, token[:cut], token[cut:]))
    merges.sort()
    unknown = special.get("unk_token", "<unk>")
    tokenizer = Tokenizer(
        models.BPE(
            vocab,
            [(left, right) for *_, left, right in merges],
            unk_token=unknown if unknown in vocab else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = raw.get("add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    decoding = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*decoding, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return tokenizer, True
