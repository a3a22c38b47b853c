"""``bilinear-jax pages``: the installed command once on the model that ships, and what it refuses."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
from published import snapshot
from test_cli import command

from bilinear_jax.commands.main import main
from bilinear_jax.pages import gather, render
from bilinear_jax.pages.facts import Provenance, Site

EMPTY = Site([], [], Provenance("", "", "", "", 2, "", "", "", "", "", "", "", 1, 255))


def test_a_site_of_two_features(tmp_path):
    words = ["pages", "--layer", "2", "--features", "3,5", "--rows", "8", "--pairs", "4", "--out", "a site", "--json"]
    words += ["--neuronpedia", "batches"]
    done = command(*words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    record = json.loads((tmp_path / "a site" / "site.json").read_text())
    assert found == {
        "index": str(tmp_path / "a site" / "index.html"),
        "outputs": 2,
        "inputs": len(record["inputs"]),
        "neuronpedia": str(tmp_path / "batches"),
    }
    assert record["outputs"] == [3, 5]
    assert shlex.split(record["provenance"]["command"]) == ["bilinear-jax", *words]
    assert (record["provenance"]["dataset"], record["provenance"]["rows"]) == ("corpus.npy of ts-nano", 8)
    page = json.loads((tmp_path / "a site" / "data" / "output-3.json").read_text())["output"]
    assert len(page["by_weight"]["pairs"]) == 4
    batch = json.loads((tmp_path / "batches" / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("ts-nano", 2, "mlp-out-x4-k20")
    features = [(one["feature_index"], one["n_prompts_total"], one["n_tokens_in_prompt"]) for one in batch["features"]]
    assert features == [(3, 8, 256), (5, 8, 256)]


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A command whose facts are none, and found at once."""
    monkeypatch.setattr(gather, "gather", lambda *_, **__: EMPTY)
    return ["pages", "--layer", "2", "--features", "3", "--out", str(tmp_path / "site")]


def test_what_is_there_is_replaced_only_by_force(words, tmp_path, capsys):
    assert main(words) == 0
    before = snapshot(tmp_path)
    assert main(words) == 1
    assert "exists: name another folder, or replace it with force (--force)" in capsys.readouterr().err
    assert snapshot(tmp_path) == before
    assert main([*words, "--force"]) == 0
    assert snapshot(tmp_path).keys() == before.keys()


def test_a_folder_of_another_kind_is_left_for_neuronpedias_files_too(words, tmp_path, capsys):
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "batch-0.json").write_text("the only copy")
    before = snapshot(tmp_path)
    assert main([*words, "--force", "--neuronpedia", str(tmp_path / "batches")]) == 1
    assert "a folder with a neuronpedia.json of format" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("folder", ["site", "site/batches", "."])
def test_neuronpedias_files_have_a_folder_of_their_own(folder, words, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--neuronpedia", str(tmp_path / folder)])
    assert "two folders, neither inside the other" in capsys.readouterr().err
    assert not snapshot(tmp_path)


def test_not_even_force_replaces_what_is_no_site(words, tmp_path, capsys):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.txt").write_text("the only copy")
    assert main([*words, "--force"]) == 1
    assert "a folder with a site.json of format" in capsys.readouterr().err
    assert (tmp_path / "site" / "thesis.txt").read_text() == "the only copy"


@pytest.mark.parametrize("above", ["file", "sealed"])
def test_a_place_that_cannot_be_written_is_seen_before_the_work(above, words, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise AssertionError("it was computed first")

    def forbidden(*_, **__):
        raise PermissionError("not here")

    monkeypatch.setattr(gather, "gather", fail)
    if above == "file":
        (tmp_path / above).write_text("")
    else:  # the tests may run as root, who may write anywhere
        (tmp_path / above).mkdir()
        monkeypatch.setattr(Path, "mkdir", forbidden)
    before = snapshot(tmp_path)
    assert main([*words[:-1], str(tmp_path / above / "new" / "site")]) == 1
    assert "not a folder with write permission" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_site_that_changed_while_the_facts_were_gathered(force, words, tmp_path, monkeypatch, capsys):
    """It stays, and the new pages are complete beside it."""
    if force:
        assert main(words) == 0
    found = gather.gather

    def meanwhile(*args, **options):
        (tmp_path / "site").mkdir(exist_ok=True)
        (tmp_path / "site" / "notes.txt").write_text("the only copy")
        return found(*args, **options)

    monkeypatch.setattr(gather, "gather", meanwhile)
    assert main([*words, "--force"] if force else words) == 1
    error = capsys.readouterr().err
    assert "no longer what it was when this began" in error
    assert (tmp_path / "site" / "notes.txt").read_text() == "the only copy"
    [left] = [path for path in tmp_path.iterdir() if path.name != "site"]
    assert f"complete in {left}: give that another name" in error
    assert (left / "index.html").exists()


@pytest.mark.parametrize(
    ("number", "handler", "status"),
    [(signal.SIGINT, signal.default_int_handler, 130), (signal.SIGTERM, signal.SIG_DFL, 143)],
)
@pytest.mark.parametrize("force", [False, True])
def test_a_signal_while_pages_are_written(force, number, handler, status, words, tmp_path, monkeypatch):
    if force:
        assert main(words) == 0
    before = snapshot(tmp_path)
    monkeypatch.setattr(render, "inputs_page", lambda *_: os.kill(os.getpid(), number))
    handler = signal.signal(number, handler)  # however the tests were started
    try:
        assert main([*words, "--force"] if force else words) == status
    finally:
        signal.signal(number, handler)
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["site"] if force else [])
