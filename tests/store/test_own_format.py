"""Every key of what this library saves, altered: it loads as it says, or one error names the file."""

import copy
import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import published
import pytest
from published import same

from bilinear_jax.nn.configs import check_types
from bilinear_jax.nn.sae import SAE, SAEConfig
from bilinear_jax.nn.transformer import TransformerConfig
from bilinear_jax.store import checkpoint

MODEL = TransformerConfig(
    n_layer=2,
    n_head=2,
    d_model=8,
    d_hidden=12,
    n_ctx=16,
    n_vocab=11,
    gate="silu",
    tokenizer="ts-4096",
    dataset="mine",
    pad_id=2,
)
SPARSE = SAEConfig("mlp_out", 0, d_model=8, expansion=2, k=3, passthrough=(1,), normalize=2.0, tag="v0")
ORIGIN = {"text": {"sources": [{"name": "a.txt", "bytes": 1}], "n_documents": 2, "n_tokens": 30}}

VALUES = {
    **{"null": None, "text": "false", "empty": "", "float": 1.5, "negative": -1, "zero": 0, "huge": 10**12},
    **{"beyond float": 10**400, "infinite": math.inf, "NaN": math.nan, "list": [1, "a"], "nested": [[[]]]},
    **{"dict": {"a": [None]}, "true": True, "false": False},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model and an SAE, with what loads them, what they are, and the file that is altered."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    params = published.make_params(MODEL)
    checkpoint.save_model(folder, MODEL, params, origin=ORIGIN)
    sae = SAE.init(SPARSE, jax.random.key(1))
    checkpoint.save_sae(folder / "scope" / SPARSE.name, sae, origin=ORIGIN)
    return {
        "model": (folder / "config.json", lambda: checkpoint.load_model(folder), MODEL, params),
        "sae": (folder / "scope" / SPARSE.name / "config.json", lambda: one_sae(folder), SPARSE, sae.params),
    }


def one_sae(folder):
    return checkpoint.load_sae(folder / "scope", layer=0, tag="v0")


def alterations(record, path=()):
    """Every key of a record, at any depth, deleted, renamed and with each of the values: the key and the record."""

    def altered(change):
        new = copy.deepcopy(record)
        parent = new
        for key in path[:-1]:
            parent = parent[key]
        change(parent)
        return new

    inner = record
    for key in path:
        inner = inner[key]
    if path:
        last = path[-1]
        yield path, "deleted", altered(lambda parent: parent.pop(last))
        yield path, "renamed", altered(lambda parent: parent.update({f"{last}_": parent.pop(last)}))
        for name, value in VALUES.items():
            yield path, name, altered(lambda parent, value=value: parent.update({last: value}))
    if isinstance(inner, dict):
        for key in list(inner) if path in ((), ("config",)) else list(inner)[:1]:
            yield from alterations(record, (*path, key))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["model", "sae"])
def test_every_key_altered(saved, kind):
    path, load, config, params = saved[kind]
    whole = path.read_text()
    record = json.loads(whole)
    for seal in ("sha256", "contents"):  # or every alteration would be one error, that the record was changed
        record.pop(seal, None)
    right = [field.name for field in dataclasses.fields(config)]
    assert set(right) == record["config"].keys()
    seen = 0
    for key, change, altered in alterations(record):
        path.write_text(json.dumps(altered))
        case = f"{key} {change}"
        try:
            found = load()
        except (ValueError, FileNotFoundError) as error:
            assert str(path.parent) in str(error), case
            assert len(str(error)) < 1500, case
        else:
            seen += 1
            assert same(found.params, params), case
            later = {key: getattr(config, key) for key in checkpoint._LATER[type(config)]}  # older files lack them
            said = later | {key: as_read(key, value) for key, value in altered["config"].items()}
            got = dataclasses.asdict(found.config)
            assert got == said, case
            assert {key: type(value) is bool for key, value in got.items()} == {
                key: type(value) is bool for key, value in said.items()
            }, case
        try:
            assert isinstance(checkpoint.training_line(path), str), case
        except ValueError as error:
            assert str(path) in str(error), case
    path.write_text(whole)
    assert seen > 50
    assert load().config == config


def as_read(key, value):
    """A value as the docstrings of the configs say that it is read."""
    if key == "attn_scale" and value is None:
        return 1 / math.sqrt(2 * MODEL.n_layer)
    if key in ("n_kv_head", "d_head") and value == 0:
        return getattr(MODEL, key)
    if key == "centred" and value is None:
        return True
    if key == "normalization" and isinstance(value, bool):
        return (value,) * 3
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("model", {"bilinear": "false"}, "bilinear must be true or false, got 'false'"),
        ("model", {"pad_id": 1.5}, 'pad_id must be a whole number or "none", got 1.5'),
        ("model", {"pad_id": -1}, r"pad_id must be a token id in 0 \.\.\. 2147483647, got -1"),
        ("model", {"n_ctx": math.inf}, "n_ctx must be a whole number, got inf"),
        ("model", {"n_head": True}, "n_head must be a whole number, got True"),
        ("model", {"n_layer": 10**9}, r"expected \(1000000000, 8, 8\)"),
        ("model", {"n_layer": 10**12}, "n_layer must be at most 2147483647, got 1000000000000"),
        ("model", {"d_model": [8]}, r"d_model must be a whole number, got \[8\]"),
        ("model", {"normalization": [True, 1, True]}, r"true or false or a list \[true or false, \.\.\.\], got"),
        ("model", {"attn_scale": "1"}, "attn_scale must be a number or \"none\", got '1'"),
        ("sae", {"passthrough": [True]}, r"passthrough must be a list \[a whole number, \.\.\.\], got \[True\]"),
        ("sae", {"site": "mlp_mid"}, "no site 'mlp_mid'"),
        ("sae", {"target": "mlp_mid"}, "no site 'mlp_mid'"),
        ("sae", {"activation": "gelu"}, "no activation 'gelu' in a dictionary: choose one of topk"),
        ("sae", {"skip": True}, r"In the model but not in the checkpoint: w_skip"),
        ("sae", {"token_lookup": 5}, r"In the model but not in the checkpoint: w_lookup"),
        ("sae", {"token_lookup": 0}, "token_lookup must be at least 1, got 0"),
        ("sae", {"max_active": 17}, "max_active is 17, but it must be between 1 and 16"),
        ("sae", {"linear_term": True}, "linear_term is true, but only a bilinear encoder has it"),
        ("sae", {"layer": 1}, "is that of an SAE 1-mlp-out-x2-k3-v0: rename the folder, or correct it"),
        ("sae", {"expansion": 10**9}, "n_features must be at most 2147483647, got 8000000000"),
        ("sae", {"normalize": math.nan}, "normalize must be a finite number in float32, got nan"),
        ("sae", {"apply_normalize": True, "normalize": 1e-300}, "needs a number other than 0"),
    ],
)
def test_what_is_wrong_is_named(saved, kind, changes, message):
    path, load, _, _ = saved[kind]
    whole = path.read_text()
    record = json.loads(whole)
    record.pop("sha256", None)
    path.write_text(json.dumps(record | {"config": record["config"] | changes}))
    with pytest.raises(ValueError, match=rf"{path.parent}.*{message}"):
        load()
    path.write_text(whole)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": [1]}, r"config\.json: config is \[1\], but must be dict"),
        ({"origin": "mine"}, r"config\.json: origin is 'mine', but must be dict"),
        ({"files": [["params", 1]]}, r"config\.json: files is .*, but must be dict"),
        ({"crc32": 7}, r"config\.json: crc32 is 7, but must be dict"),
        ({"version": True}, "format version True"),
        ({"version": 0}, "format version 0"),
    ],
)
def test_the_other_parts_of_a_record(saved, tmp_path, changes, message):
    folder = shutil.copytree(saved["model"][0].parent, tmp_path / "model")
    record = json.loads((folder / "config.json").read_text())
    record.pop("sha256", None)
    (folder / "config.json").write_text(json.dumps(record | changes))
    with pytest.raises(ValueError, match=message):
        checkpoint.load_model(folder)


@dataclasses.dataclass(frozen=True)
class Fields:
    """It is outside the package, whose types the tests check themselves."""

    count: int = 1
    share: float = 0.5
    switch: bool = False
    name: str | None = None
    pairs: tuple[tuple[str, float], ...] = ()

    def __post_init__(self):
        check_types(self)


def test_python_gets_the_same_errors_and_its_numbers_are_plain():
    made = Fields(np.int64(3), np.float32(0.5), np.bool_(True), np.str_("a"), [["and", 1]])
    assert made == Fields(3, 0.5, True, "a", (("and", 1.0),))
    assert [type(value) for value in dataclasses.astuple(made)] == [int, float, bool, str, tuple]
    assert type(made.pairs[0][1]) is float
    assert Fields(pairs=np.zeros((0, 2))).pairs == ()
    for changes, message in (
        ({"count": True}, "count must be a whole number, got True"),
        ({"count": 2.0}, r"count must be a whole number, got 2\.0"),
        ({"share": False}, "share must be a number, got False"),
        ({"share": 10**400}, "share must be a number, got 1000"),
        ({"switch": 1}, "switch must be true or false, got 1"),
        ({"name": b"a"}, "name must be text or \"none\", got b'a'"),
        ({"pairs": [["and", 1, 2]]}, r"pairs must be a list \[a list \[text, a number\], \.\.\.\], got"),
    ):
        with pytest.raises(ValueError, match=message):
            Fields(**changes)
