"""Dictionaries that cannot be read or written: an error that names what is wrong, and nothing of a file is run."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import published
import pytest
from dictionaries import PLACE, TRANSCODER, made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from weights_convert import dictionary_format, read_dictionary, write_dictionary
from weights_convert.pickled import read_torch
from weights_convert.torch_file import write_torch

GOLDEN = Path(__file__).parents[1] / "data" / "dictionaries"
GIVEN = {
    "saelens-transcoder": {"target": "resid_post"},
    "saelens-skip-transcoder": {"target": "resid_post"},
    "gemma-scope": PLACE,
    "sparsify": PLACE,
}


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def config_of(folder: Path) -> tuple[Path, dict]:
    """The config file and what it holds."""
    path = folder / ("config.json" if (folder / "config.json").exists() else "cfg.json")
    return path, json.loads(path.read_text())


def with_config(folder: Path, changes: dict) -> Path:
    """The folder with other values in its config. A dotted key is one of an object; a value of ... removes the key."""
    path, raw = config_of(folder)
    for dotted, value in changes.items():
        *outer, key = dotted.split(".")
        place = raw
        for part in outer:
            place = place[part]
        place[key] = value
        if value is ...:
            del place[key]
    path.write_text(json.dumps(raw))
    return folder


def with_tensors(folder: Path, **tensors) -> Path:
    """The folder with other tensors. None removes one."""
    path = next(path for path in folder.iterdir() if path.suffix in (".npz", ".pt") or path.name.startswith("sae"))
    reader = {".npz": lambda: dict(np.load(path)), ".pt": lambda: read_torch(path)}
    state = {key: np.array(value) for key, value in reader.get(path.suffix, lambda: load_file(path))().items()}
    state = {key: value for key, value in (state | tensors).items() if value is not None}
    if path.suffix == ".npz":
        np.savez(path, **state)
    else:
        (write_torch(path, state) if path.suffix == ".pt" else save_file(state, path))
    return folder


REFUSED = [
    ("saelens-standard", {"architecture": "gated"}, "architecture 'gated' cannot be read"),
    ("saelens-standard", {"architecture": "temporal"}, "architecture 'temporal' cannot be read"),
    ("saelens-standard", {"normalize_activations": "layer_norm"}, "normalize_activations is 'layer_norm'"),
    ("saelens-standard", {"normalize_activations": "expected_average_only_in"}, "normalize_activations is 'expected"),
    ("saelens-standard", {"reshape_activations": "hook_z"}, "reshape_activations is 'hook_z'"),
    ("saelens-standard", {"metadata.hook_head_index": 3}, "hook_head_index"),
    ("saelens-standard", {"metadata.hook_name": "blocks.2.attn.hook_z"}, "'blocks.2.attn.hook_z', which does not say"),
    ("saelens-standard", {"metadata.hook_name": ...}, "names no hook: pass site= and layer="),
    ("saelens-standard", {"metadata.hook_name": 3}, "hook_name is 3, but must be str"),
    ("saelens-standard", {"metadata.hook_name_out": "blocks.2.hook_resid_post"}, "but its architecture is one of SAEs"),
    ("saelens-standard", {"d_sae": 63}, r"W_enc has \[16, 64\], expected \[16, 63\]"),
    ("saelens-standard", {"d_in": 10**400}, "has a size beyond"),
    ("saelens-standard", {"d_out": 8}, "d_out is 8"),
    ("saelens-standard", {"d_in": ...}, r"lacks \['d_in'\]"),
    ("saelens-standard", {"gate": True}, r"unknown keys \['gate'\]"),
    ("saelens-standard", {"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input is 'yes'"),
    ("saelens-standard", {"metadata.sae_lens_version": "new"}, "sae_lens_version is 'new'"),
    ("saelens-standard", {"metadata": {}, "activation_fn": "tanh-relu"}, "activation_fn is 'tanh-relu'"),
    ("saelens-standard", {"metadata": {}, "finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    ("saelens-standard", {"metadata": {}, "normalize_activations": True}, "is 'expected_average_only_in'"),
    ("saelens-topk", {"k": 65}, r"k is 65, but must be a whole number in 1 \.\.\. 64"),
    ("saelens-topk", {"k": ...}, "k is None"),
    ("saelens-topk", {"k": 6.0}, "k is 6.0"),
    ("saelens-topk", {"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm is 1"),
    ("saelens-transcoder", {"d_out": 8}, "d_out is 8 and d_in is 16"),
    ("saelens-transcoder", {"apply_b_dec_to_input": True}, "a transcoder cannot subtract b_dec"),
    ("saelens-transcoder", {"metadata.hook_name_out": "blocks.3.hook_mlp_out"}, "is in layer 3"),
    ("saelens-transcoder", {"metadata.hook_name_out": "blocks.2.hook_mlp_out"}, "target='resid_post' was given"),
    ("saelens-transcoder", {"architecture": "skip_transcoder"}, "checkpoint: W_skip"),
    ("saelens-transcoder", {"architecture": "jumprelu_transcoder"}, "checkpoint: threshold"),
    ("saelens-skip-transcoder", {"architecture": "transcoder"}, "not in the model: W_skip"),
    ("sparsify", {"activation": "groupmax"}, "activation is 'groupmax'"),
    ("sparsify", {"signed": True}, "signed"),
    ("sparsify", {"num_latents": ..., "expansion_factor": ...}, "lacks num_latents and expansion_factor"),
    ("sparsify", {"num_latents": 2.5}, "num_latents"),
    ("sparsify", {"skip_connection": True}, "checkpoint: W_skip"),
    ("sparsify", {"transcode": True}, "is a transcoder and names no target: pass target="),
    ("sparsify", {"hook_name": "blocks.2.hook_mlp_out"}, "site 'mlp_out', but site='resid_post' was given"),
    ("sparsify", {"k": 0}, "k is 0"),
    ("sparsify", {"sparsity": 2}, r"unknown keys \['sparsity'\]"),
    ("dl-batchtopk", {"trainer.dict_class": "GatedAutoEncoder"}, "dict_class 'GatedAutoEncoder' cannot be read"),
    ("dl-batchtopk", {"trainer.k": 7}, "k is 7, but ae.pt has 6"),
    ("dl-batchtopk", {"trainer.layer": 3}, "layer is 3, but submodule_name is 'resid_post_layer_2'"),
    ("dl-batchtopk", {"trainer.layer": -1, "trainer.submodule_name": "mlp_out"}, "layer=-1 must be"),
    ("dl-batchtopk", {"trainer.submodule_name": "attn_z"}, "'attn_z', which does not say both"),
    ("dl-batchtopk", {"trainer.submodule_name": None, "trainer.layer": None}, "names no hook"),
    ("dl-batchtopk", {"buffer.io": "in"}, "pass site= and layer="),
    ("dl-batchtopk", {"buffer.io": "in_and_out"}, "io of the buffer is 'in_and_out'"),
    ("dl-batchtopk", {"trainer.gate": 1}, r"unknown keys \['gate'\]"),
    ("dl-batchtopk", {"evaluation": {}}, r"unknown keys \['evaluation'\]"),
    ("dl-batchtopk", {"trainer": None}, r"lacks \['activation_dim'"),
    ("dl-batchtopk", {"trainer.dict_class": "JumpReluAutoEncoder"}, "checkpoint: W_dec, W_enc, b_enc"),
    ("dl-batchtopk", {"trainer.dict_size": 32}, r"encoder.weight has \[64, 16\], expected \[32, 16\]"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_cannot_be_read_is_named(name, changes, message, tmp_path):
    folder = with_config(copied(tmp_path, name), changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_dictionary(folder, **GIVEN.get(name, {}))
    assert str(folder) in str(caught.value) or "layer=-1" in message


@pytest.mark.parametrize(
    ("name", "tensor", "shape"),
    [
        ("saelens-jumprelu", "threshold", ()),
        ("saelens-jumprelu", "threshold", (63,)),
        ("saelens-standard", "W_enc", (64, 16)),
        ("saelens-skip-transcoder", "W_skip", (16,)),
        ("gemma-scope", "threshold", (1,)),
        ("gemma-scope", "W_dec", (16, 64)),
        ("sparsify", "W_dec", (16, 64)),
        ("dl-batchtopk", "threshold", (1,)),
        ("dl-batchtopk", "b_dec", (64,)),
    ],
)
def test_tensors_of_a_wrong_shape_are_named(name, tensor, shape, tmp_path):
    folder = with_tensors(copied(tmp_path, name), **{tensor: np.zeros(shape, np.float32)})
    with pytest.raises(ValueError, match=rf"{tensor} has \[{', '.join(map(str, shape))}\], expected"):
        read_dictionary(folder, **GIVEN.get(name, {}))


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(name, value, tmp_path):
    key = "threshold" if name in ("saelens-jumprelu", "gemma-scope", "dl-batchtopk") else "b_dec"
    shape = () if name == "dl-batchtopk" else (16,) if key == "b_dec" else (64,)
    folder = with_tensors(copied(tmp_path, name), **{key: np.full(shape, value, np.float32)})
    with pytest.raises(ValueError, match=rf"{key} in .* not finite"):
        read_dictionary(folder, **GIVEN.get(name, {}))


@pytest.mark.parametrize("name", ["saelens-standard", "gemma-scope", "sparsify", "dl-batchtopk"])
def test_other_tensors_and_dtypes_are_refused(name, tmp_path):
    more = with_tensors(copied(tmp_path / "a", name), scaling_factor=np.full(64, 2, np.float32))
    with pytest.raises(ValueError, match="scaling_factor"):
        read_dictionary(more, **GIVEN.get(name, {}))
    double = with_tensors(copied(tmp_path / "b", name), b_dec=np.zeros(16))
    with pytest.raises(ValueError, match=r"b_dec.*float64"):
        read_dictionary(double, **GIVEN.get(name, {}))
    if name == "dl-batchtopk":
        whole = with_tensors(copied(tmp_path / "c", name), b_dec=np.zeros(16, np.int32))
        with pytest.raises(ValueError, match=r"whole numbers in \['b_dec'\]"):
            read_dictionary(whole)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("saelens-standard", {"site": "mlp_in"}, "'blocks.2.hook_mlp_out', which is site 'mlp_out', but site='mlp_in'"),
        ("saelens-standard", {"layer": 3}, "which is layer 2, but layer=3"),
        ("saelens-standard", {"target": "resid_post"}, "its own site 'mlp_out', but target='resid_post'"),
        ("saelens-transcoder", {}, "names no target: pass target="),
        ("gemma-scope", {"site": "mlp_out"}, "names no hook: pass site= and layer="),
        ("gemma-scope", PLACE | {"site": "mlp"}, "site='mlp' is not a site: give one of resid_pre"),
        ("gemma-scope", PLACE | {"layer": -1}, "layer=-1 must be a whole number"),
        ("gemma-scope", PLACE | {"target": "out"}, "target='out' is not a site"),
        ("sparsify", PLACE | {"target": "mlp_out"}, "its own site 'resid_post', but target='mlp_out'"),
        ("sparsify", {}, "names no hook"),
        ("dl-batchtopk", {"site": "mlp_out"}, "'resid_post_layer_2', which is site 'resid_post'"),
        ("dl-batchtopk", {"target": "mlp_out"}, "its own site"),
    ],
)
def test_what_is_given_and_what_the_file_says(name, given, message):
    with pytest.raises(ValueError, match=message):
        read_dictionary(GOLDEN / name, **given)


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("gemma-scope-2b-pt-att/layer_3/width_16k", {}, "the heads of the attention"),
        ("gemma-scope-2b-pt-res/layer_3", {"layer": 4}, "which is layer 3, but layer=4"),
        ("gemma-scope-2b-pt-mlp/layer_3", {"site": "resid_post"}, "which is site 'mlp_out'"),
        ("gemma-scope-2b-pt-mlp/layer_3", {"target": "resid_post"}, "its own site"),
        ("gemma-scope-2b-pt-transcoders/layer_3", {"target": "resid_post"}, "is of transcoders to 'mlp_out'"),
        ("gemma-scope-2b-pt-res/embedding", {}, "does not say both site and layer"),
    ],
)
def test_gemma_scope_paths(path, given, message, tmp_path):
    shutil.copytree(GOLDEN / "gemma-scope", tmp_path / path)
    with pytest.raises(ValueError, match=message):
        read_dictionary(tmp_path / path, **given)


def test_folders_without_a_dictionary_or_with_two(tmp_path):
    assert dictionary_format(tmp_path) is None and dictionary_format(tmp_path / "no") is None
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"params.npz \(gemma-scope\).*notes.txt"):
        read_dictionary(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_dictionary(tmp_path / "no")
    shutil.copytree(GOLDEN / "sparsify", tmp_path, dirs_exist_ok=True)
    shutil.copytree(GOLDEN / "gemma-scope", tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="the files of gemma-scope and sparsify"):
        read_dictionary(tmp_path)


def test_links_to_other_places_are_not_followed(tmp_path):
    folder = copied(tmp_path, "gemma-scope")
    (folder / "params.npz").rename(tmp_path / "elsewhere.npz")
    (folder / "params.npz").symlink_to(tmp_path / "elsewhere.npz")
    with pytest.raises(ValueError, match="link to something outside its folder"):
        read_dictionary(folder, **PLACE)


# Writing


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        ("saelens", {"passthrough": (1,)}, "cannot say passthrough"),
        ("sparsify", {"bilinear_encoder": True}, "cannot say bilinear_encoder"),
        *[
            (form, {option: 7}, f"cannot say {option} 7: keep it as a checkpoint of this library")
            for option in ("token_lookup", "inputs")
            for form in ("saelens", "gemma-scope", "sparsify", "dictionary_learning")
        ],
        ("dictionary_learning", {"apply_normalize": True, "normalize": 2.0}, "divide w_enc by normalize"),
        ("gemma-scope", {}, "no activation 'relu' for an SAE, only jumprelu"),
        ("gemma-scope", {"activation": "topk"}, "no activation 'topk'"),
        ("sparsify", {}, "no activation 'relu'"),
        ("saelens", TRANSCODER | {"activation": "topk_relu"}, "no activation 'topk_relu' for a transcoder"),
        ("saelens", {"skip": True}, "no skip for an SAE that is centred: subtract w_enc @ b_dec"),
        ("saelens", TRANSCODER | {"centred": True}, "a transcoder that is centred"),
        ("gemma-scope", {"activation": "jumprelu"}, "set centred to False"),
        ("gemma-scope", {"activation": "jumprelu", "centred": False, "skip": True}, "cannot say skip"),
        ("gemma-scope", {"activation": "jumprelu", "centred": False, "tag": "a"}, "cannot say tag 'a'"),
        ("dictionary_learning", TRANSCODER, "it has no transcoders"),
        ("dictionary_learning", {"skip": True}, "cannot say skip"),
        ("dictionary_learning", {"activation": "topk_relu", "centred": False}, "add w_enc @ b_dec"),
        ("dictionary_learning", {"activation": "jumprelu"}, "subtract w_enc @ b_dec"),
        ("saelens", {"site": "mlp"}, "cannot say site 'mlp'"),
        ("saelens", {"layer": -1}, "cannot say layer -1"),
        ("saelens", {"gate": 1}, r"unknown options \['gate'\]"),
        ("saelens", {"d_model": 0}, "d_model and expansion"),
        ("npz", {}, "unknown format 'npz': give one of saelens, gemma-scope"),
    ],
)
def test_what_cannot_be_written_is_named_and_nothing_is_written(form, options, message, tmp_path):
    config, params = made(**options)
    with pytest.raises(ValueError, match=message):
        write_dictionary(tmp_path, form, config, params)
    assert not list(tmp_path.iterdir())


def test_params_that_do_not_match_are_not_written(tmp_path):
    config, params = made(activation="jumprelu")
    for wrong, message in (
        (params | {"threshold": np.float32(0)}, r"threshold has \[\], expected \[20\]"),
        (params | {"w_skip": params["w_dec"]}, "extra: w_skip"),
        ({key: value for key, value in params.items() if key != "b_enc"}, "Missing: b_enc"),
        (params | {"b_dec": params["b_dec"].astype(np.float64)}, "b_dec is float64"),
        (params | {"b_dec": params["b_dec"] * np.nan}, "b_dec has NaN"),
        (params | {"b_dec": params["b_dec"].astype(np.float16)}, "these have float16, float32"),
    ):
        with pytest.raises(ValueError, match=message):
            write_dictionary(tmp_path, "saelens", config, wrong)
    with pytest.raises(ValueError, match=r"lacks \['site'\]"):
        write_dictionary(tmp_path, "saelens", {key: config[key] for key in config if key != "site"}, params)
    with pytest.raises(ValueError, match="needs k for topk_relu, but k is None"):
        write_dictionary(tmp_path, "saelens", made(activation="relu")[0] | {"activation": "topk_relu"}, params)
    with pytest.raises(ValueError, match=r"k is 21, but must be in 1 \.\.\. 20"):
        write_dictionary(tmp_path, "saelens", config | {"k": 21}, params)
    with pytest.raises(FileNotFoundError, match="make it first"):
        write_dictionary(tmp_path / "no", "saelens", config, params)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_the_name_of_another_place(tmp_path):
    config, params = made(activation="topk_relu")
    other = tmp_path / "layers.2.mlp"
    other.mkdir()
    with pytest.raises(ValueError, match="another module than site 'resid_post' of layer 2"):
        write_dictionary(other, "sparsify", config, params)
    config, params = made(activation="jumprelu", centred=False)
    other = tmp_path / "layer_3"
    other.mkdir()
    with pytest.raises(ValueError, match="which is layer 3, but layer=2"):
        write_dictionary(other, "gemma-scope", config, params)
    config["layer"] = 3
    transcoders = tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_3"
    transcoders.mkdir(parents=True)
    with pytest.raises(ValueError, match="of transcoders to 'mlp_out', but this is an SAE"):
        write_dictionary(transcoders, "gemma-scope", config | {"site": "mlp_in"}, params)
    write_dictionary(transcoders, "gemma-scope", config | {"site": "mlp_in", "target": "mlp_out"}, params)
    got = read_dictionary(transcoders).config
    assert (got["site"], got["layer"], got["target"]) == ("mlp_in", 3, "mlp_out")
    assert not list(other.iterdir())


# Damaged and hostile files


class Trap:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_calls_is_read_as_data(tmp_path):
    folder, trap = copied(tmp_path, "dl-batchtopk"), tmp_path / "sprung"
    published.archive(folder / "ae.pt", pickle.dumps({"encoder.weight": Trap(trap)}, 2))
    with pytest.raises(ValueError, match="no state dict"):
        read_dictionary(folder)
    assert not trap.exists()
    (folder / "ae.pt").write_bytes(pickle.dumps(Trap(trap)))
    with pytest.raises(ValueError, match="bare pickle"):
        read_dictionary(folder)
    assert not trap.exists()


def npz(path: Path, **entries: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)


def npy(header: str, data: bytes = bytes(64), version: bytes = b"\x01\x00") -> bytes:
    text = header.encode()
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text + data


def objects(trap: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Trap(trap)]), allow_pickle=True)
    return file.getvalue()


HEADER = "{{'descr': '<f4', 'fortran_order': False, 'shape': {}}}\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(HEADER.format("(4, 5)")), "another size than its header says"),
        (npy(HEADER.format("(-4, -4)")), "another size"),
        (npy(HEADER.format("(2147483648, 2147483648)")), "another size"),
        (npy(HEADER.format("(0, 64)"), b""), "no matrix W_enc"),
        (npy(HEADER.format("()"), bytes(4)), "no matrix W_enc"),
        (npy("{'descr': " + "[" * 9000), "is not an array"),
        (npy(" " * 60_000 + HEADER.format("(4, 4)")), "is not an array"),
        (npy(HEADER.format("(4, 4)"), version=b"\x02\x00")[:20], "is not an array"),
        (b"text", "is not an array"),
        (npy(HEADER.format("(4096, 1024)"), bytes(2**24)), "unfolds from"),
        (npy(HEADER.format("(4, 4)").replace("<f4", "|O")), "has the dtype object"),
    ],
)
def test_hostile_arrays(data, message, tmp_path):
    npz(tmp_path / "params.npz", W_enc=data)
    with pytest.raises(ValueError, match=message):
        read_dictionary(tmp_path, **PLACE)


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    trap = tmp_path / "sprung"
    npz(tmp_path / "params.npz", W_enc=objects(trap))
    with pytest.raises(ValueError, match="has the dtype object"):
        read_dictionary(tmp_path, **PLACE)
    assert not trap.exists()


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_files_that_are_cut_short(name, tmp_path):
    folder = copied(tmp_path, name)
    for path in folder.iterdir():
        whole = path.read_bytes()
        if path.name == "expected.safetensors":
            continue
        for size in (0, 1, len(whole) // 3, len(whole) - 1):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=path.name):
                read_dictionary(folder, **GIVEN.get(name, {}))
        path.write_bytes(whole)
    read_dictionary(folder, **GIVEN.get(name, {}))  # it was no other damage


ODD = st.one_of(
    *(st.none(), st.booleans(), st.integers(-3, 70), st.just(10**400), st.floats(), st.text(max_size=3)),
    *(st.lists(st.integers(0, 3), max_size=2), st.dictionaries(st.text(max_size=2), st.integers(), max_size=1)),
)
"""What JSON can hold in place of a value."""


@pytest.mark.parametrize("name", ["saelens-topk", "saelens-jumprelu", "saelens-transcoder", "sparsify", "dl-batchtopk"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_a_config_is_read_or_refused(name, data, tmp_path):
    """Never another error than ``ValueError``."""
    folder = tmp_path / name
    if not folder.exists():
        copied(tmp_path, name)
    path, _ = config_of(folder)
    shutil.copy(GOLDEN / name / path.name, path)
    _, raw = config_of(folder)
    keys = [*raw, *(f"{outer}.{key}" for outer, value in raw.items() if isinstance(value, dict) for key in value)]
    more = ["metadata.hook_name_out", "metadata.training_architecture_details", "metadata.training_architecture"]
    keys += more if "metadata" in raw else ["trainer.tag", "buffer.io"] if "trainer" in raw else ["hook_name", "tag"]
    with_config(folder, {data.draw(st.sampled_from(keys)): data.draw(ODD)})
    try:
        config, params = read_dictionary(folder, **GIVEN.get(name, {}))
    except ValueError:
        return
    expected = read_dictionary(GOLDEN / name, **GIVEN.get(name, {}))
    assert config["d_model"] == 16 and params.keys() == expected.params.keys()
