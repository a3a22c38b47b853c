"""Names, folders, the hub, tokenizers: what is there is found, what is not is said with what there is."""

import hashlib
import os
import shutil
from pathlib import Path

import made_gguf
import numpy as np
import published
import pyarrow
import pyarrow.parquet
import pytest
from hub import ask_hub
from published import same

from bilinear_jax.errors import UnknownNameError
from bilinear_jax.language import LanguageModel
from bilinear_jax.measure.activations import load_top_activations
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checkpoint, sources
from bilinear_jax.store.datasets import load_corpus
from bilinear_jax.store.sources import PRETRAINED
from bilinear_jax.store.tokenizers import load_tokenizer
from weights_convert.families import read_gated


def test_unknown_names_list_what_there_is(tmp_path, monkeypatch):
    with pytest.raises(
        UnknownNameError, match=r"no SAE 7-mlp-out-x8-k30 in .*: choose one of 1-mlp-in-x4-k6, 1-mlp-out-x4-k6"
    ):
        checkpoint.load_sae(published.SCOPE, layer=7, expansion=8, k=30)
    with pytest.raises(ValueError, match=r"matches several SAEs in .*: 1-mlp-out-x4-k6, 2-mlp-out-x4-k6"):
        checkpoint.load_sae(published.SCOPE)
    with pytest.raises(UnknownNameError, match="no site 'mlp-mid' in what an SAE can read: choose one of"):
        checkpoint.load_sae(published.SCOPE, site="mlp-mid")
    with pytest.raises(UnknownNameError, match=r"no SAE 1-mlp-out-x\*-k\* in .*: there are none$"):
        checkpoint.load_sae(published.MODEL, layer=1)
    with pytest.raises(FileNotFoundError, match="holds SAEs but no model"):
        checkpoint.load_model(published.SCOPE)
    monkeypatch.setattr(sources, "PRETRAINED", tmp_path)
    shutil.copytree(published.MODEL, tmp_path / "ts-built-in")
    with pytest.raises(FileNotFoundError, match=r"no folder nano, and no model of that name.*built in: ts-built-in"):
        checkpoint.load_model("nano")
    assert checkpoint.load_model("ts-built-in", attn_scale=1.0).config.n_layer == 3


def test_without_a_tag_the_untagged_sae_wins(tmp_path):
    config, weights = published.sae()
    for tag in ("", "-v0", "-v1"):
        published.write(tmp_path / f"1-mlp-out-x4-k6{tag}", config | {"tag": tag[1:] or None}, weights)
    assert checkpoint.load_sae(tmp_path, layer=1).config.tag is None
    assert checkpoint.load_sae(tmp_path, layer=1, tag="v1").config.tag == "v1"
    shutil.rmtree(tmp_path / "1-mlp-out-x4-k6")
    with pytest.raises(ValueError, match="matches several"):
        checkpoint.load_sae(tmp_path, layer=1)


@pytest.mark.parametrize("place", ["model/scope", "model-scope", "model"])
def test_where_the_saes_of_a_folder_are(tmp_path, place):
    shutil.copytree(published.MODEL, tmp_path / "model")
    shutil.copytree(published.SCOPE, tmp_path / place, dirs_exist_ok=True)
    assert checkpoint.load_sae(tmp_path / "model", layer=2).name == "2-mlp-out-x4-k6"
    assert checkpoint.load_sae(tmp_path / place, layer=2).name == "2-mlp-out-x4-k6"


def test_known_tokenizers_pad_as_published_and_gain_no_token(tmp_path):
    published.write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[UNK]"}')
    tokenizer = load_tokenizer(str(tmp_path), "ts-4096")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    other = load_tokenizer(str(tmp_path), "mistral")  # whose tokens this one doesn't have
    assert (other.bos_token, other.pad_token, len(other)) == (None, "[UNK]", 5)


@pytest.mark.parametrize(("name", "mend"), [("tokenizer.json", "name another"), ("tokenizer_config.json", "delete it")])
def test_a_damaged_tokenizer_is_named(tmp_path, name, mend):
    published.write_tokenizer(tmp_path)
    (tmp_path / name).write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path}/{name} is .*: restore it, or {mend}"):
        load_tokenizer(str(tmp_path), None)


def test_a_model_without_a_tokenizer_says_so_when_it_is_needed():
    config = TransformerConfig(n_layer=1, n_head=2, d_model=8, d_hidden=8, n_ctx=8, n_vocab=5, tokenizer="mine")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer 'mine', which is not one of ts-4096, mistral, gpt2: put a tokenizer"
    ):
        _ = LanguageModel(published.make_params(config), config).tokenizer


def test_corpus_is_read_from_disk(tmp_path):
    copy = tmp_path
    with pytest.raises(FileNotFoundError, match=r"has no corpus\.npy: give your own token ids"):
        load_corpus(copy)
    tokens = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(copy / "corpus.npy", tokens)
    got = load_corpus(copy)
    assert isinstance(got, np.memmap)
    assert np.array_equal(got, tokens)
    np.save(copy / "corpus.npy", tokens.astype(np.int64))
    with pytest.raises(ValueError, match="must hold uint16"):
        load_corpus(copy)


@pytest.mark.parametrize("name", ["corpus.npy", "top-activations.safetensors"])
def test_a_changed_corpus_or_ranking_is_named(tmp_path, name):
    """By the config.json beside it; one of your own, which is not listed there, is taken as it is."""
    shutil.copyfile(PRETRAINED / "ts-nano" / "config.json", tmp_path / "config.json")
    content = bytearray((PRETRAINED / "ts-nano" / name).read_bytes())
    (tmp_path / name).write_bytes(content)
    read = {"corpus.npy": lambda: load_corpus(tmp_path)}.get(name, lambda: load_top_activations(tmp_path / name))
    assert len(read())
    content[-5] ^= 4
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is not the file that was saved with the model: restore it; or,"):
        read()
    (tmp_path / "config.json").unlink()
    assert len(read())


# The hub's cache, without the hub.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, which cannot be reached."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def download(cache: Path, repository: str, folder: Path, commit: str = "a", *, main: str | None = "a", blobs=None):
    """What the hub's client makes of a repository with these files: links from a snapshot to files named by hashes."""
    base = cache / f"models--{repository.replace('/', '--')}"
    snapshot = base / "snapshots" / (commit * 40)
    base.mkdir(parents=True, exist_ok=True)
    if blobs is None:
        (base / "blobs").mkdir(exist_ok=True)
    else:
        blobs.mkdir(parents=True)
        (base / "blobs").symlink_to(blobs)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link = snapshot / path.relative_to(folder)
            blob = base / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copyfile(path, blob)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    if main is not None:
        (base / "refs").mkdir(exist_ok=True)
        (base / "refs" / "main").write_text(main * 40)
    return snapshot


@pytest.mark.parametrize("layout", ["as downloaded", "no refs", "blobs elsewhere"])
def test_layouts_of_the_cache(tmp_path, cache, layout):
    for repository, folder in (("someone/ts-micro", published.MODEL), ("someone/ts-micro-scope", published.SCOPE)):
        elsewhere = tmp_path / "disk" / folder.name if layout == "blobs elsewhere" else None
        download(cache, repository, folder, main=None if layout == "no refs" else "a", blobs=elsewhere)
    found = checkpoint.load_model("someone/ts-micro", attn_scale=1.0)
    assert same(found.params, checkpoint.load_model(published.MODEL, attn_scale=1.0).params)
    assert sources.list_saes("someone/ts-micro") == sources.list_saes(published.SCOPE)
    assert checkpoint.load_sae("someone/ts-micro", layer=2).name == "2-mlp-out-x4-k6"


def test_the_branch_main_of_the_cache_or_else_the_newest_commit(tmp_path, cache):
    config = published.CONFIG | {"n_ctx": 8}
    older = published.write(tmp_path / "older", config, published.state(config))
    newer = published.write(tmp_path / "newer", published.CONFIG, published.state(published.CONFIG))
    os.utime(download(cache, "someone/small", older, "a", main="a"), (1, 1))
    os.utime(download(cache, "someone/small", newer, "b", main="a"), (2, 2))
    assert checkpoint.load_model("someone/small").config.n_ctx == 8
    (cache / "models--someone--small" / "refs" / "main").unlink()
    assert checkpoint.load_model("someone/small").config.n_ctx == 16


@pytest.mark.parametrize("main", ["a", None])
def test_what_is_no_snapshot_in_the_cache(tmp_path, cache, main):
    snapshot = download(cache, "someone/ts-micro", published.MODEL, main=main)
    (snapshot.parent / "gone").symlink_to(tmp_path / "nowhere")
    (snapshot.parent / ".DS_Store").write_text("of the system")
    os.utime(snapshot, (1, 1))
    assert checkpoint.load_model("someone/ts-micro", attn_scale=1.0).config.n_layer == 3
    with pytest.raises(ConnectionError, match=r"from the hub's cache: someone/ts-micro; and any"):
        checkpoint.load_model("someone/else")


@pytest.mark.parametrize("commit", ["../../elsewhere", "..", ".", "", "b/c", "{absolute}"])
def test_the_branch_main_names_a_snapshot_and_nothing_else(tmp_path, cache, commit):
    download(cache, "someone/ts-micro", published.MODEL)
    for place in (tmp_path / "hub" / "elsewhere", cache / "models--someone--ts-micro" / "snapshots" / "b" / "c"):
        shutil.copytree(published.MODEL, place)
    commit = commit.format(absolute=tmp_path / "hub" / "elsewhere")
    (cache / "models--someone--ts-micro" / "refs" / "main").write_text(commit)
    assert sources._cached() == {}


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_to_a_file_that_is_gone(tmp_path, cache, name):
    snapshot = download(cache, "someone/ts-micro", published.MODEL)
    (snapshot / name).resolve().unlink()
    for source in ("someone/ts-micro", snapshot):
        with pytest.raises(FileNotFoundError, match=rf"{name} is a link to a file that is gone: download it again"):
            checkpoint.load_model(source, attn_scale=1.0)


def test_a_folder_of_links_into_the_cache(tmp_path, cache):
    """It was made with the older option --local-dir-use-symlinks. The cache may lie on another disk."""
    snapshot = download(cache, "someone/ts-micro", published.MODEL, blobs=tmp_path / "disk")
    (tmp_path / "local").mkdir()
    for path in snapshot.iterdir():
        (tmp_path / "local" / path.name).symlink_to(path.resolve())
    assert checkpoint.load_model(tmp_path / "local", attn_scale=1.0).config.n_layer == 3


def test_what_is_not_there_is_not_listed_as_there(tmp_path, cache):
    """Neither what was asked for, nor what has a config but no weights, or only some of its shards."""
    shards = published.write_sharded(tmp_path / "shards", published.CONFIG, published.state(published.CONFIG))
    download(cache, "someone/whole", published.MODEL)
    download(cache, "someone/shards", shards)
    download(cache, "someone/whole-scope", published.SCOPE)
    for name in ("config", "shard", "scope", "gone"):
        source = {"shard": shards, "scope": published.SCOPE}.get(name, published.MODEL)
        snapshot = download(cache, f"someone/only-{name}", source)
        for path in [*snapshot.glob("*.safetensors"), *snapshot.glob("*/*.safetensors")]:
            if name != "shard" or "00001" in path.name:
                path.resolve().unlink() if name == "gone" else path.unlink()
    with pytest.raises(ConnectionError) as raised:
        checkpoint.load_model("someone/else")
    assert "from the hub's cache: someone/shards, someone/whole, someone/whole-scope; and any" in str(raised.value)
    shutil.rmtree(cache / "models--someone--whole" / "snapshots")
    with pytest.raises(ConnectionError) as raised:
        checkpoint.load_model("someone/whole")
    assert "all files of someone/whole, " in str(raised.value)
    assert "from the hub's cache: someone/shards, someone/whole-scope; and any" in str(raised.value)
    shutil.rmtree(cache / "models--someone--shards")
    with pytest.raises(ConnectionError, match=r"not hold all files of someone/only-scope, .*cache: someone/whole-"):
        checkpoint.load_sae("someone/only-scope")


# The hub, served from this machine.


CLIENT = """
import sys, os, urllib.request
import bilinear_jax as bj
from bilinear_jax import load
from bilinear_jax.store import checkpoint

def attempt(function):
    try:
        return function()
    except Exception as error:
        print(type(error).__name__, error)

print([tuple(name) for name in bj.list_saes("someone/ts-micro")][:2])
print(load("someone/older").config.n_vocab, bj.load_token_rows("someone/rows-16k", 3).tolist())
lm = load("someone/ts-micro", attn_scale=0.5)
print(lm.source, lm.config.n_layer, lm.tokenizer("hello world")["input_ids"])
print(checkpoint.load_sae("someone/ts-micro", layer=2).name)
attempt(lambda: load("someone/nothing"))
attempt(lambda: checkpoint.load_sae("someone/ts-micro", layer=9))
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
again = load("someone/ts-micro", attn_scale=0.5)
print("cached", again.config == lm.config, checkpoint.load_sae("someone/ts-micro-scope", layer=2).name)
attempt(lambda: checkpoint.load_sae("someone/ts-micro", layer=1))
attempt(lambda: load("someone/else"))
"""


def test_hub_names_are_fetched_once_and_work_offline(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    published.write_tokenizer(tokenizer)
    older = published.write_sharded(tmp_path / "old", published.CONFIG, published.state(published.CONFIG), pickled=True)
    rows = pyarrow.table({"input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    (tmp_path / "rows" / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(rows, tmp_path / "rows" / "data" / "train.parquet")
    repositories = {
        "someone/rows-16k": tmp_path / "rows",
        "someone/older": older,
        "someone/ts-micro": published.MODEL,
        "someone/ts-micro-scope": published.SCOPE,
        "tdooms/ts-tokenizer-4096": tokenizer,
    }
    printed, fetched = ask_hub(tmp_path, repositories, CLIENT)
    listed, old, *lines = printed
    assert (listed, old) == (
        "[(1, 'mlp_in', 4, 6, None, 'topk', None), (1, 'mlp_out', 4, 6, None, 'topk', None)]",
        "11 [[1, 2, 3], [5, 6, 7]]",
    )
    assert lines[:2] == ["someone/ts-micro 3 [1, 3, 4]", "2-mlp-out-x4-k6"]
    assert lines[2].startswith("FileNotFoundError someone/nothing cannot be downloaded from the hub (http://127.0.0.1")
    unknown = "UnknownNameError there is no SAE 9-mlp-out-x*-k* in someone/ts-micro: choose one of 1-mlp-in-x4-k6,"
    assert lines[3].startswith(unknown)
    assert lines[4] == "cached True 2-mlp-out-x4-k6"
    assert lines[5].startswith("UnknownNameError") and lines[5].endswith("choose one of 2-mlp-out-x4-k6")
    assert lines[6].startswith("ConnectionError the hub (http://127.0.0.1")
    assert "cannot be reached" in lines[6]
    assert "from the hub's cache: someone/older, someone/ts-micro, someone/ts-micro-scope;" in lines[6]
    shards = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json"]
    assert fetched == {
        "GET rows-16k/data/train.parquet",
        *(f"GET older/{name}" for name in ["config.json", *shards]),
        *("GET ts-micro/config.json", "GET ts-micro/model.safetensors"),
        *("GET ts-micro-scope/2-mlp-out-x4-k6/config.json", "GET ts-micro-scope/2-mlp-out-x4-k6/model.safetensors"),
        *("GET ts-tokenizer-4096/tokenizer.json", "GET ts-tokenizer-4096/tokenizer_config.json"),
    }


def test_what_saes_on_the_hub_were_trained_on_takes_none_of_their_weights(tmp_path):
    client = """
import os, urllib.request
from bilinear_jax.store.checkpoint import training_of, trainings_of_saes
print(sorted(trainings_of_saes("someone/ts-micro")), training_of("someone/ts-micro", "2-mlp-out-x4-k6"))
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
"""
    names = sources.list_saes(published.SCOPE)
    folders = sorted(path.name for path in published.SCOPE.iterdir() if path.is_dir())
    printed, fetched = ask_hub(tmp_path, {"someone/ts-micro-scope": published.SCOPE}, client)
    assert len(folders) == len(names) > 1
    assert printed == [f"{folders} not known: its files do not say"]
    assert fetched == {f"GET ts-micro-scope/{name}/config.json" for name in folders}


def test_gguf_files_on_the_hub_are_fetched_alone_and_work_offline(tmp_path):
    config, params = read_gated(Path(__file__).parents[1] / "data" / "families" / "llama-tied" / "model")
    for name in ("one/deep/q.gguf", "many/a.gguf", "many/b.gguf"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        made_gguf.write(tmp_path / name, config, params)
    client = """
import os, urllib.request
import bilinear_jax as bj

def attempt(source):
    try:
        lm = bj.load(source)
        print(lm.source, lm.summary().splitlines()[3].split(",")[0])
    except Exception as error:
        print(type(error).__name__, error)

sources = ["someone/one", "someone/many/b.gguf", "someone/many", "someone/many/c.gguf"]
for source in sources:
    attempt(source)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
for source in sources[:2]:
    attempt(source)
"""
    repositories = {"someone/one": tmp_path / "one", "someone/many": tmp_path / "many"}
    printed, fetched = ask_hub(tmp_path, repositories, client)
    loaded = ["someone/one family llama; weights q.gguf", "someone/many/b.gguf family llama; weights b.gguf"]
    assert printed[:2] == loaded and printed[4:] == loaded
    several = "ValueError someone/many holds 2 GGUF files: a.gguf, b.gguf. Name the file, as in someone/many/a.gguf"
    assert printed[2] == several
    assert printed[3].startswith("FileNotFoundError") and "c.gguf" in printed[3]
    assert fetched == {"GET one/deep/q.gguf", "GET many/b.gguf"}
