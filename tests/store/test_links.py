"""Links: those that a model's folder holds are followed within it, and into the hub's cache, but nowhere else."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import published
import pytest
from safetensors.numpy import save_file

import bilinear_jax as bj
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checkpoint
from bilinear_jax.store.convert import convert, export
from bilinear_jax.store.tokenizers import load_tokenizer

CONFIG = TransformerConfig(n_layer=1, n_head=1, d_model=4, d_hidden=6, n_ctx=8, n_vocab=5, tokenizer="ts-4096")
SAE_NAME = "0-mlp-out-x2-k2"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with all that its folder may hold; copy it before you break it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    published.write_tokenizer(tokenizer)
    (tokenizer / "tokenizer_config.json").write_text('{"pad_token": "[UNK]"}')
    checkpoint.save_model(folder, CONFIG, published.make_params(CONFIG), tokenizer=tokenizer, origin=published.ORIGIN)
    sae = SAE.init(SAEConfig("mlp_out", 0, d_model=4, expansion=2, k=2), jax.random.key(1))
    checkpoint.save_sae(folder / "scope" / SAE_NAME, sae, origin=published.ORIGIN)
    np.save(folder / "corpus.npy", np.zeros((2, 8), np.uint16))
    top = np.zeros((3, 8), np.int64)
    save_file({"0-mlp-out": top}, folder / "top-activations.safetensors")
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


def one_sae(folder):
    return checkpoint.load_sae(folder, layer=0)


READERS = {
    "config.json": checkpoint.load_model,
    "params": checkpoint.load_model,
    "params/_CHECKPOINT_METADATA": checkpoint.load_model,
    "params/state": checkpoint.load_model,
    "tokenizer.json": lambda folder: bj.load(folder).tokenizer,
    "tokenizer_config.json": lambda folder: bj.load(folder).tokenizer,
    "corpus.npy": bj.load_corpus,
    "top-activations.safetensors": lambda folder: bj.Visualizer(
        bj.load(folder), one_sae(folder), np.zeros((3, 8), int), top=folder
    ),
    "scope": one_sae,
    f"scope/{SAE_NAME}": one_sae,
    f"scope/{SAE_NAME}/config.json": one_sae,
    f"scope/{SAE_NAME}/params": one_sae,
}


def linked(folder: Path, name: str, elsewhere: Path) -> None:
    """Move a part of the folder elsewhere, and put a link in its place."""
    elsewhere.mkdir(parents=True)
    shutil.move(folder / name, elsewhere / "it")
    (folder / name).symlink_to(elsewhere / "it")


@pytest.mark.parametrize("name", READERS)
def test_a_link_out_of_the_folder_is_not_followed(copy, tmp_path, name):
    linked(copy, name, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=rf"{Path(name).name}.* is a link to something outside its folder"):
        READERS[name](copy)


def test_links_within_the_folder_are_followed(copy):
    """And so is a path that is a link itself: whoever gives it has chosen it."""
    for number, name in enumerate(("config.json", "params/state", "tokenizer.json", "corpus.npy", "scope")):
        linked(copy, name, copy / name.rpartition("/")[0] / f"there-{number}")
    (copy.parent / "link").symlink_to(copy)
    for read in dict.fromkeys(READERS.values()):
        read(copy.parent / "link")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("write", [export, convert])
def test_no_other_file_of_this_machine_is_copied(copy, tmp_path, write, name):
    """Neither through a link, nor a file that is not a tokenizer."""
    source = copy
    if write is convert:
        source = published.write(tmp_path / "published", published.CONFIG, published.state(published.CONFIG))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(copy / file, source / file)
    secret = tmp_path / "secret"
    secret.write_text(json.dumps({"key": "0123"}) if name == "tokenizer.json" else "123")
    (source / name).unlink()
    (source / name).symlink_to(secret)
    with pytest.raises(ValueError, match=rf"{name} is a link to something outside its folder"):
        write(source, tmp_path / "out")
    (source / name).unlink()
    shutil.copyfile(secret, source / name)
    with pytest.raises(ValueError, match=rf"{name} (is not a tokenizer that can be read|holds a int,)"):
        write(source, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_a_tokenizer_that_is_given_may_be_a_link(copy, tmp_path):
    (tmp_path / "any-name.json").symlink_to(copy / "tokenizer.json")
    params = published.make_params(CONFIG)
    folder = checkpoint.save_model(
        tmp_path / "new", CONFIG, params, tokenizer=tmp_path / "any-name.json", origin=published.ORIGIN
    )
    assert (folder / "tokenizer.json").read_bytes() == (copy / "tokenizer.json").read_bytes()
    assert load_tokenizer(str(tmp_path / "any-name.json"), None)("hello")["input_ids"] == [1, 3]
