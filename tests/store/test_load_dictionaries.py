"""Dictionaries from wherever they are: one of many is found by what it is, and what is unclear is said."""

import dataclasses
import os
import shutil
from pathlib import Path

import dictionaries
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from hub import ask_hub
from published import same
from safetensors.numpy import load_file

import bilinear_jax as bj
from bilinear_jax.errors import UnknownNameError
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.store.dictionaries import find_dictionaries
from weights_convert import describe_dictionary, read_dictionary, write_dictionary

GOLDEN = Path(__file__).parents[1] / "data" / "dictionaries"  # what the peers wrote and computed
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
PLACE = {"site": "resid-post", "layer": 2}
KINDS = {
    "topk": {"k": 3},
    "bilinear": {"k": 3, "bilinear_encoder": True, "encoder_bias": True, "product_bias": True, "linear_term": True},
    "passthrough": {"k": 3, "passthrough": (1,), "normalize": 2.0, "apply_normalize": True, "tag": "v0"},
    "topk_relu": {"k": 3, "activation": "topk_relu", "expansion": 1.5, "centred": False},
    "batchtopk": {"k": 3, "activation": "batchtopk", "max_active": 7},
    "jumprelu": {"activation": "jumprelu", "encoder_bias": True, "centred": False},
    "relu": {"activation": "relu", "expansion": 2.25},
    "transcoder": {"k": 3, "target": "mlp_out", "skip": True, "encoder_bias": True},
    "lookup": {"k": 3, "token_lookup": 5},
    "readable": {"k": 3, "bilinear_encoder": True, "target": "mlp_out", "inputs": 5, "inputs_k": 2, "reads": 1},
    "jumprelu transcoder": {"activation": "jumprelu", "k": 5, "target": "resid_post", "tag": "a-b"},
}


def made(seed=0, **options):
    """A dictionary of random params, thresholds too."""
    config = SAEConfig(**({"site": "mlp_in", "layer": 1, "d_model": 8, "expansion": 2} | options))
    rng = np.random.default_rng(seed)
    init = SAE.init(config, jax.random.key(0)).params
    return SAE({key: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32) for key, leaf in init.items()}, config)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder for each format, with dictionaries of layers 2 and 3 in folders as the peers name them."""
    root = tmp_path_factory.mktemp("sets")
    wide = {"site": "resid_post", "centred": False}
    sets = {
        "saelens": {f"blocks.{layer}.hook_resid_post": {"layer": layer} | wide for layer in (2, 3)},
        "gemma-scope-2b-pt-res": {
            f"layer_{layer}/width_16k/average_l0_{l0}": {"layer": layer, "activation": "jumprelu"} | wide
            for layer, l0 in ((2, 71), (3, 8), (3, 90))
        },
        "sparsify": {
            f"layers.{layer}.mlp": {"layer": layer, "activation": "topk_relu"} | dictionaries.TRANSCODER
            for layer in (2, 3)
        },
        "dictionary_learning": {
            f"resid_post_layer_{layer}/trainer_0": {"layer": layer} | wide | {"centred": True} for layer in (2, 3)
        },
    }
    for form, members in sets.items():
        for number, (name, options) in enumerate(members.items()):
            (root / form / name).mkdir(parents=True)
            config, params = dictionaries.made(number, **options)
            write_dictionary(root / form / name, form.removesuffix("-2b-pt-res"), config, params)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_files_of_peers_give_their_codes_and_reconstructions(name):
    given = {
        "gemma-scope": PLACE,
        "sparsify": PLACE,
        "saelens-transcoder": {"target": "resid-post"},
        "saelens-skip-transcoder": {"target": "resid-post"},
    }.get(name, {})
    sae = bj.load_dictionary(GOLDEN / name, **given)
    expected = {key: jnp.asarray(value) for key, value in load_file(GOLDEN / name / "expected.safetensors").items()}
    codes = sae.encode(expected["x"])
    np.testing.assert_allclose(codes, expected["codes"], atol=1e-5)
    np.testing.assert_allclose(sae.decode(codes), expected["recon"], atol=1e-5)
    if "forward" in expected:
        np.testing.assert_allclose(sae.decode(codes, expected["x"]), expected["forward"], atol=1e-5)
    assert sae.summary().splitlines()[0].startswith("transcoder" if "transcoder" in name else "SAE")
    assert bj.load_dictionaries(GOLDEN / name, **given).keys() == {(sae.config.site, 2)}


@pytest.mark.parametrize("name", NAMES)
def test_a_description_is_the_config_without_the_weights(tmp_path, name):
    form = find_dictionaries(GOLDEN / name).formats[""]
    given = {"site": "resid_post", "layer": 2} if name in ("gemma-scope", "sparsify") else {}
    given |= {"target": "resid_post"} if "transcoder" in name else {}
    config, _ = read_dictionary(GOLDEN / name, **given)
    for path in GOLDEN.glob(f"{name}/*.json"):
        shutil.copy(path, tmp_path)
    found = describe_dictionary(tmp_path, form, **given)
    assert found.items() <= config.items() and {"site", "layer", "target", "k", "activation"} <= found.keys()
    assert (found == config) == (name != "gemma-scope")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back_from_where_it_was_saved(tmp_path, monkeypatch, kind):
    sae = made(**KINDS[kind])
    bj.save_sae(tmp_path / sae.name, sae, origin={})
    for folder in (tmp_path / sae.name, tmp_path):
        found = bj.load_dictionary(folder)
        assert found.config == sae.config and same(found.params, sae.params)
    monkeypatch.chdir(tmp_path / sae.name)
    assert bj.load_dictionary(".").name == sae.name
    assert bj.load_dictionaries("..").keys() == {("mlp_in", 1)}
    assert bj.load_dictionary(tmp_path, activation=sae.config.activation, expansion=sae.config.expansion)
    with pytest.raises(UnknownNameError, match=rf"no SAE 1-\*-x9.* in .*: choose one of {sae.name}"):
        bj.load_dictionary(tmp_path, expansion=9, layer=1)
    with pytest.raises(UnknownNameError, match=rf"no SAE 2-\*-x.* in \.: choose one of {sae.name}"):
        bj.load_dictionary(".", layer=2)


def test_files_of_before_there_were_other_kinds_load(tmp_path):
    """Their configs lack the keys that came later."""
    import json

    from bilinear_jax.store import checkpoint

    sae = made(k=3)
    folder = bj.save_sae(tmp_path / sae.name, sae, origin={})
    record = json.loads((folder / "config.json").read_text())
    later = checkpoint._LATER[SAEConfig]
    assert later <= record["config"].keys()
    record["config"] = {key: value for key, value in record["config"].items() if key not in later}
    record.pop("sha256")
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="recorded no checksums"):
        found = bj.load_dictionary(folder)
    assert found.config == sae.config and same(found.params, sae.params)


@pytest.mark.parametrize(
    ("form", "site"),
    [("saelens", "resid_post"), ("sparsify", "mlp_in"), ("dictionary_learning", "resid_post")],
)
def test_one_of_a_folder_of_a_peer(sets, form, site):
    for layer in (2, 3):
        sae = bj.load_dictionary(sets / form, layer=layer)
        assert (sae.config.site, sae.config.layer) == (site, layer)
        folder = next(path for path in (sets / form).iterdir() if str(layer) in path.name)
        assert same(sae.params, bj.load_dictionary(folder).params)
    found = bj.load_dictionaries(sets / form)
    assert list(found) == [(site, 2), (site, 3)]
    assert not same(found[site, 2].params, found[site, 3].params)
    with pytest.raises(ValueError, match=r"matches several SAEs in .*Give layer \(2 or 3\)$"):
        bj.load_dictionary(sets / form)
    with pytest.raises(UnknownNameError, match=r"no SAE 4-\*-x\*-k\* in"):
        bj.load_dictionaries(sets / form, layer=4)


def test_gemma_scope_is_placed_by_its_path(sets):
    folder = sets / "gemma-scope-2b-pt-res"
    sae = bj.load_dictionary(folder, layer=2)
    assert (sae.config.site, sae.config.layer, sae.config.tag) == ("resid_post", 2, "average_l0_71")
    with pytest.raises(ValueError, match=r"Give tag \('average_l0_8' or 'average_l0_90'\)"):
        bj.load_dictionary(folder, layer=3)
    with pytest.raises(ValueError, match=r"^2 dictionaries of .* read resid_post of layer 3: layer_3/.*Give tag"):
        bj.load_dictionaries(folder)
    assert list(bj.load_dictionaries(folder, layer=3, tag="average_l0_8")) == [("resid_post", 3)]
    assert bj.load_dictionary(folder / "layer_3" / "width_16k", tag="average_l0_90").config.layer == 3
    with pytest.raises(UnknownNameError, match=r"with expansion 2\.5"):
        bj.load_dictionary(folder, layer=2, expansion=4)
    shutil.copytree(folder / "layer_3", folder / "layer_2", dirs_exist_ok=True)
    shutil.move(folder / "layer_2" / "width_16k" / "average_l0_8", folder / "layer_2" / "width_65k" / "average_l0_71")
    with pytest.raises(ValueError, match=r"Name one of these folders, as in .*res/layer_2/width_16k/average_l0_71$"):
        bj.load_dictionaries(folder, layer=2, tag="average_l0_71")


def test_two_of_one_site_and_layer_are_told_apart(tmp_path):
    saes = [made(k=3), made(k=4), made(k=3, tag="v1"), made(k=3, target="mlp_out"), made(k=3, layer=2)]
    for sae in saes:
        bj.save_sae(tmp_path / sae.name, sae, origin={})
    with pytest.raises(
        ValueError, match=r"^4 dictionaries of .* read mlp_in of layer 1: 1-mlp-in-to-mlp-out"
    ) as raised:
        bj.load_dictionaries(tmp_path)
    assert all(sae.name in str(raised.value) for sae in saes[:4]) and saes[4].name not in str(raised.value)
    told = "Give k (3 or 4) or target ('mlp_out' or 'mlp_in') or tag ('' or 'v1')"
    assert str(raised.value).endswith(told)
    one = {"transcoder": {"target": "mlp-out"}, "tagged": {"tag": "v1"}, "four": {"k": 4}}
    found = {name: bj.load_dictionaries(tmp_path, **given)["mlp_in", 1].name for name, given in one.items()}
    assert found == {"transcoder": saes[3].name, "tagged": saes[2].name, "four": saes[1].name}
    both = bj.load_dictionaries(tmp_path, target="mlp-in", k=3, tag="")
    assert {place: sae.name for place, sae in both.items()} == {
        ("mlp_in", 1): saes[0].name,
        ("mlp_in", 2): saes[4].name,
    }
    assert bj.load_dictionary(tmp_path, layer=1, k=3).name == saes[0].name  # as load_sae: the SAE without a tag
    assert bj.load_sae(tmp_path, site="mlp-in", layer=1, target="mlp-out").name == saes[3].name


def test_a_published_scope_and_the_scope_beside_a_model(tmp_path):
    shutil.copytree(published.MODEL, tmp_path / "model")
    shutil.copytree(published.SCOPE, tmp_path / "model-scope")
    assert bj.load_dictionary(tmp_path / "model", site="mlp-out", layer=2).name == "2-mlp-out-x4-k6"
    assert bj.load_dictionary(published.SCOPE / "2-mlp-out-x4-k6").config.k == 6
    assert ("mlp_out", 2) in bj.load_dictionaries(tmp_path / "model", site="mlp-out", target="mlp-out", tag="")


def test_what_does_not_fit_the_model_is_named(sets):
    lm = bj.load("ts-nano")
    narrow = dataclasses.replace(lm.config, d_model=8)
    assert bj.load_dictionary(sets / "saelens", layer=3, model=narrow).config.layer == 3
    reads = r"it reads resid_post of layer 3 \(blocks\.3\.hook_resid_post\) of another model than ts-nano"
    with pytest.raises(ValueError, match=rf"hook_resid_post has d_model 8, but the model has 256: {reads}"):
        bj.load_dictionaries(sets / "saelens", model=lm, layer=3)
    shallow = dataclasses.replace(narrow, n_layer=3)
    with pytest.raises(ValueError, match=r"blocks\.3\..* belongs to layer 3, but the model has layers 0 \.\.\. 2"):
        bj.load_dictionary(sets / "saelens", layer=3, model=shallow)
    assert len(bj.load_dictionaries("ts-nano", layer=2, model=lm)) == 3


@pytest.mark.parametrize("rows", [4095, 4096])
def test_a_lookup_must_be_of_the_models_tokens(tmp_path, rows):
    lm = bj.load("ts-nano")
    sae = SAE.init(SAEConfig("mlp_in", 1, 256, 1, 3, token_lookup=rows), jax.random.key(0))
    bj.save_sae(tmp_path / sae.name, sae, origin={})
    if rows == lm.config.n_vocab:
        assert bj.load_dictionary(tmp_path, model=lm).config == sae.config
        return
    with pytest.raises(ValueError, match=r"has rows for 4095 tokens, but the model has 4096: .*Name SAEs of this"):
        bj.load_dictionary(tmp_path, model=lm)


def test_what_is_no_dictionary(tmp_path, sets):
    with pytest.raises(FileNotFoundError, match=r"holds no dictionary: neither one of this library .* saelens, gemma"):
        bj.load_dictionary(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        bj.load_dictionary("nowhere")
    with pytest.raises(FileNotFoundError, match=r"no folder \.\./nowhere/a"):
        bj.load_dictionaries("../nowhere/a")
    with pytest.raises(UnknownNameError, match="no site 'nowhere'"):
        bj.load_dictionary(sets, site="nowhere")
    shutil.copytree(sets / "saelens", tmp_path / "damaged")
    (tmp_path / "damaged" / "blocks.2.hook_resid_post" / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=r"blocks\.2\.hook_resid_post/cfg\.json is not JSON"):
        bj.load_dictionary(tmp_path / "damaged", layer=2)
    os.symlink(sets / "saelens" / "blocks.3.hook_resid_post" / "cfg.json", tmp_path / "cfg.json")
    shutil.copy(sets / "saelens" / "blocks.3.hook_resid_post" / "sae_weights.safetensors", tmp_path)
    with pytest.raises(ValueError, match="is a link to something outside its folder"):
        bj.load_dictionary(tmp_path)


CLIENT = """
import os, urllib.request
import bilinear_jax as bj

def attempt(load, *arguments, **given):
    try:
        found = load(*arguments, **given)
        print(found.name if isinstance(found, bj.SAE) else [sae.name for sae in found.values()])
    except Exception as error:
        print(type(error).__name__, error)

def ask():
    attempt(bj.load_dictionary, "google/gemma-scope-2b-pt-res/layer_2/width_16k/average_l0_71")
    attempt(bj.load_dictionaries, "google/gemma-scope-2b-pt-res", layer=3, tag="average_l0_8")
    attempt(bj.load_dictionary, "someone/lens", layer=2)
    attempt(bj.load_dictionaries, "someone/sparse", layer=3)
    attempt(bj.load_dictionary, "someone/model", site="mlp-in")
    attempt(bj.load_sae, "someone/model", site="mlp-in")
    attempt(bj.load_dictionary, "someone/ts-micro", site="mlp-out", layer=2)

ask()
attempt(bj.load_dictionary, "someone/lens/blocks.7.hook_resid_post")
attempt(bj.load_dictionary, "someone/nothing")
attempt(bj.load_dictionary, "google/gemma-scope-2b-pt-res", layer=3)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
ask()
attempt(bj.load_dictionary, "someone/lens", layer=3)
attempt(bj.load_dictionary, "someone/other")
"""


def test_dictionaries_on_the_hub_are_fetched_alone_and_work_offline(tmp_path, sets):
    sae = made(k=3)
    shutil.copytree(published.MODEL, tmp_path / "model")
    for one in (sae, made(k=3, site="mlp_out")):
        bj.save_sae(tmp_path / "model" / "scope" / one.name, one, origin={})
    repositories = {
        "google/gemma-scope-2b-pt-res": sets / "gemma-scope-2b-pt-res",
        "someone/lens": sets / "saelens",
        "someone/sparse": sets / "sparsify",
        "someone/model": tmp_path / "model",
        "someone/ts-micro-scope": published.SCOPE,
    }
    printed, fetched = ask_hub(tmp_path, repositories, CLIENT)
    loaded = [
        "2-resid-post-x2.5-jumprelu-average_l0_71",
        "['3-resid-post-x2.5-jumprelu-average_l0_8']",
        "2-resid-post-x2.5-relu",
        "['3-mlp-in-to-mlp-out-x2.5-reluk3']",
        sae.name,
        sae.name,
        "2-mlp-out-x4-k6",
    ]
    assert printed[:7] == loaded and printed[10:17] == loaded
    assert printed[7].startswith(
        "FileNotFoundError someone/lens has no folder blocks.7.hook_resid_post: name one of bl"
    )
    assert printed[8].startswith("FileNotFoundError someone/nothing cannot be downloaded from the hub")
    assert printed[9].endswith("Give tag ('average_l0_8' or 'average_l0_90')")
    assert printed[17].startswith("UnknownNameError there is no SAE 3-*-x*-k* in someone/lens: choose one of blocks.2")
    assert printed[18].startswith("ConnectionError the hub (http://127.0.0.1")
    assert {name for name in fetched if not name.startswith("GET model/")} == {
        *(f"GET gemma-scope-2b-pt-res/layer_{place}/params.npz" for place in GEMMA),
        *(f"GET lens/blocks.2.hook_resid_post/{name}" for name in ("cfg.json", "sae_weights.safetensors")),
        *(f"GET sparse/layers.3.mlp/{name}" for name in ("cfg.json", "sae.safetensors")),
        *(f"GET ts-micro-scope/2-mlp-out-x4-k6/{name}" for name in ("config.json", "model.safetensors")),
    }
    assert all(name.startswith(f"GET model/scope/{sae.name}/") for name in fetched if name.startswith("GET model/"))


GEMMA = ("2/width_16k/average_l0_71", "3/width_16k/average_l0_8")
