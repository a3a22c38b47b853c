"""A small GGUF file."""

import made_gguf
import pytest
from gguf import GGMLQuantizationType
from made_gguf import CONFIG, random_params


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> bytes:
    config = CONFIG | {"d_model": 32, "d_hidden": 32, "d_head": 8}
    folder = tmp_path_factory.mktemp("small")
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    path = made_gguf.write(
        folder / "m.gguf",
        config,
        random_params(config),
        kind=GGMLQuantizationType.Q4_0,
        metadata=tokenizer,
    )
    return path.read_bytes()
