"""Uploads to the hub, served from this machine: what was uploaded is loaded again, and what fails says what to do."""

import base64
import json
import shutil

import hub
import pytest
from dictionaries import made
from published import MODEL, SCOPE

import bilinear_jax as bj
from bilinear_jax.commands.main import main
from bilinear_jax.store.upload import card
from weights_convert import write_dictionary


class Writable(hub.Hub):
    """The hub, with what its client asks to write: a repository, the card's check, how to send files, and a commit."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0].strip("/")
        if self.headers.get("Authorization") != "Bearer hf_right":
            self.reply({"error": "this token may not write"}, 403)
            return
        if path == "api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            there = (self.repositories["root"] / name).is_dir()
            (self.repositories["root"] / name).mkdir(parents=True, exist_ok=True)
            self.repositories[name] = self.repositories["root"] / name
            self.requests.append(f"POST create {name} {asked.get('visibility')}")
            self.reply({"url": f"http://{self.headers['Host']}/{name}"}, 409 if there else 200)
        elif path == "api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif "/full/" in path:
            self.reply({"error": "no space left"}, 413)
        else:
            owner, name = path.removeprefix("api/models/").split("/")[:2]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    place = self.repositories[f"{owner}/{name}"] / line["value"]["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(line["value"]["content"]))
                    self.requests.append(f"POST {name}/{line['value']['path']}")
            self.reply({"commitUrl": f"http://{self.headers['Host']}/{owner}/{name}/commit/b", "commitOid": "b" * 40})

    def reply(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


CLIENT = """
import os, sys, urllib.request
os.environ |= {"HF_TOKEN": "hf_right", "HF_HUB_DISABLE_XET": "1"}
import bilinear_jax as bj
from bilinear_jax.commands.main import main

def attempt(function, *arguments, **given):
    try:
        print(function(*arguments, **given))
    except Exception as error:
        print(type(error).__name__, error)

folder = sys.argv[1]
attempt(bj.upload, folder + "/model", "someone/mine", private=True)
print(bj.load("someone/mine").config.n_layer, bj.load_sae("someone/mine", layer=0).name)
main(["upload", folder + "/model/scope", "someone/mine-scope", "--license", "mit"])
print(sorted(bj.load_dictionaries("someone/mine-scope")))
attempt(bj.upload, folder + "/model/scope/0-mlp-out-x2-k3", "someone/single")
print(bj.load_dictionary("someone/single").name)
attempt(bj.upload, folder + "/lens", "someone/lens")
print(bj.load_dictionary("someone/lens").name)
attempt(bj.upload, folder + "/lens", "someone/lens")
attempt(bj.upload, folder + "/lens", "someone/full")
os.environ["HF_TOKEN"] = "hf_wrong"
attempt(bj.upload, folder + "/lens", "someone/other")
os.environ["HF_TOKEN"] = "hf_right"
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/stop").read()
attempt(bj.upload, folder + "/lens", "someone/other")
"""


@pytest.fixture
def folders(tmp_path):
    """A model with an SAE and its scores, and a dictionary of SAELens with a card of its own."""
    from bilinear_jax.store import checkpoint

    found = checkpoint.load_model(MODEL, attn_scale=1.0)
    config, params = found.config, found.params
    checkpoint.save_model(tmp_path / "model", config, params, origin={"text": "stories", "source": "/home/a/secret"})
    sae = bj.SAE.init(bj.SAEConfig("mlp_out", 0, config.d_model, 2, 3), bj_key())
    bj.save_sae(tmp_path / "model" / "scope" / sae.name, sae, origin={"text": "tales"})
    scores = {sae.name: {"nmse": 0.125, "l0": 3.0, "k": None}}
    (tmp_path / "model" / "saes.json").write_text(json.dumps(scores))
    (tmp_path / "model" / "scope" / "saes.json").write_text(json.dumps(scores))
    (tmp_path / "model.json").write_text(json.dumps({"loss": 2.0625}))
    (tmp_path / "model" / ".hidden").write_text("not for others")
    (tmp_path / "lens").mkdir()
    write_dictionary(tmp_path / "lens", "saelens", *made())
    (tmp_path / "lens" / "README.md").write_text("# My own words\n")
    return tmp_path


def bj_key():
    import jax

    return jax.random.key(0)


def test_what_is_uploaded_is_loaded_again(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "Hub", Writable)
    root = tmp_path / "hub"
    client = CLIENT.replace("sys.argv[1]", repr(str(folders)))
    printed, _ = hub.ask_hub(tmp_path, {"root": root}, client)
    address = printed[0].removesuffix("/someone/mine")
    assert address.startswith("http://127.0.0.1")
    assert printed[1:9] == [
        "3 0-mlp-out-x2-k3",
        f"{folders}/model/scope: {address}/someone/mine-scope",
        "[('mlp_out', 0)]",
        f"{address}/someone/single",
        "0-mlp-out-x2-k3",
        f"{address}/someone/lens",
        "2-resid-post-x2.5-relu",
        f"{address}/someone/lens",
    ]
    assert printed[9].startswith(f"OSError someone/full could not be uploaded to the hub ({address}): ")
    assert printed[10].startswith(f"PermissionError the hub ({address}) refuses to write someone/other: ")
    assert printed[10].endswith("Log in with `hf auth login`, with a token that may write to someone")
    assert printed[11].startswith(f"ConnectionError the hub ({address}) cannot be reached, so someone/other is not up")
    assert (root / "someone" / "lens" / "README.md").read_text() == "# My own words\n"
    assert (root / "someone" / "single" / "0-mlp-out-x2-k3" / "config.json").is_file()
    assert not (root / "someone" / "mine" / ".hidden").exists() and not (folders / "model" / "README.md").exists()
    written = (root / "someone" / "mine" / "README.md").read_text()
    assert written == card(folders / "model", "someone/mine")
    assert "license: mit\n" in (root / "someone" / "mine-scope" / "README.md").read_text()


def test_the_card_says_what_the_files_say(folders):
    text = card(folders / "model", "someone/mine")
    assert text.startswith("---\nlibrary_name: bilinear_jax\nlicense: unknown\n")
    for line in (
        "# mine",
        "A model for `bilinear_jax`. Trained on: stories.",
        "- `scope/0-mlp-out-x2-k3`: an SAE that reads mlp_out of layer 0, x2, topk; trained on tales",
        'lm = bj.load("someone/mine")',
        "- loss: 2.0625",
        "| 0-mlp-out-x2-k3 | 0.125 | 3 |",
        "License: unknown, as whoever uploaded this has not given one.",
    ):
        assert line in text.splitlines()
    assert "secret" not in text
    text = card(folders / "model" / "scope", "someone/mine-scope", license="mit")
    assert "license: mit" in text and "License: mit." in text and "| SAE | nmse | l0 |" in text
    assert "- `lens`: an SAE that reads resid_post of layer 2, x2.5, relu; of saelens" in card(folders / "lens", "a/b")


def test_what_cannot_be_uploaded(folders, tmp_path, monkeypatch, capsys):
    """Nothing is asked of the hub, which cannot be reached."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for repo in ("mine", "a/b/c", "-a/b", "", "a/", "a b/c"):
        with pytest.raises(ValueError, match=r"must be a name on the hub, owner/name"):
            bj.upload(folders / "lens", repo)
    with pytest.raises(ValueError, match="must be an identifier such as mit"):
        bj.upload(folders / "lens", "a/b", license="MIT\nother: x")
    with pytest.raises(FileNotFoundError, match="no folder nowhere"):
        bj.upload("nowhere", "a/b")
    with pytest.raises(FileNotFoundError, match="there is no folder some/where: name one that holds"):
        bj.upload("some/where", "a/b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds neither a whole model nor dictionaries"):
        bj.upload(tmp_path / "empty", "a/b")
    shutil.rmtree(folders / "model" / "params")
    with pytest.raises(ValueError, match="holds neither a whole model nor dictionaries"):
        bj.upload(folders / "model", "a/b")
    assert main(["upload", str(SCOPE), "a/b"]) == 1
    assert "error: no token to upload to a/b: log in with `hf auth login`" in capsys.readouterr().err
    (folders / "lens" / "notes").symlink_to(tmp_path / "model.json")
    with pytest.raises(ValueError, match="notes is a link to something outside its folder"):
        bj.upload(folders / "lens", "a/b")
