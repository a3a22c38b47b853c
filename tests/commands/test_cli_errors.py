"""Each way to use ``bilinear-jax`` wrongly, and each failure, by its exit status and its one line."""

import argparse
import dataclasses
import os
import signal
import threading

import numpy as np
import published
import pytest
from published import snapshot

from bilinear_jax.commands import common
from bilinear_jax.commands.main import COMMANDS, main


def wrong(words: str, capsys) -> str:
    """The line that a wrong use prints; its status is 2."""
    with pytest.raises(SystemExit) as stopped:
        main(words.split())
    captured = capsys.readouterr()
    assert (stopped.value.code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert captured.err.startswith("bilinear-jax: error: ")
    return captured.err


def failed(words: list, capsys) -> str:
    """The line that a failure prints; its status is 1."""
    assert main([str(word) for word in words]) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert captured.err.startswith("bilinear-jax: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "COMMAND (see bilinear-jax --help)"),
        ("tuor", "invalid choice: 'tuor'"),
        ("tour --modle ts-nano", "unrecognized arguments: --modle ts-nano (see bilinear-jax tour --help)"),
        ("tour --mod ts-nano", "unrecognized arguments: --mod ts-nano"),
        ("tour --out=", "--out: the name of a folder must not be empty"),
        ("pages --layer 2 --out=", "--out: the name of a folder must not be empty"),
        ("pages --layer 2 --out site --neuronpedia=", "--neuronpedia: the name of a folder must not be empty"),
        ("train lm ts --data a --out=", "--out: the name of a folder must not be empty"),
        ("generate", "the following arguments are required: --prompt (see bilinear-jax generate --help)"),
        ("generate --prompt a --temperature -1", "--temperature must be at least 0"),
        ("generate --prompt a --temperature nan", "--temperature: 'nan' is not a finite number"),
        ("generate --prompt a --max-length 0", "--max-length: '0' is not a whole number of at least 1"),
        ("spectra", "required: --layer"),
        ("spectra --layer -1", "--layer: '-1' is not a whole number of at least 0"),
        ("spectra --layer two", "--layer: 'two' is not a whole number"),
        ("spectra --layer 2 --which both", "choose from"),
        ("spectra --layer 2 --data text.txt", "--data is the text of the scan: give --scan too"),
        ("spectra --layer 2 --scan --no-use-encoder", "leave out --no-use-encoder"),
        ("spectra --layer 2 --rtol 1.5", "--rtol must be at least 4e-06 (for float32) and below 1"),
        ("spectra --layer 2 --rtol 1e-300", "--rtol must be at least 4e-06"),
        (
            "spectra --layer 2 --features top:many",
            "cannot read 'top:many': name features as 'top:200', '3,17,20-30' or 'all'",
        ),
        ("spectra --layer 2 --features top:0", "N is too small in 'top:0': it must be at least 1"),
        ("spectra --layer 2 --features 3,17,1-4", "output feature 3 is named twice"),
        ("spectra --layer 2 --features 30-20", "the range 30-20 is empty: write 20-30"),
        ("spectra --layer 2 --features 3,,4", "cannot read '3,,4': name features as"),
        ("trace --layer 2", "required: --feature"),
        ("trace --layer 2 --feature -3", "--feature: '-3' is not a whole number"),
        ("trace --layer 2 --feature 3 --position 1", "give --text too"),
        ("trace --layer 2 --feature 3 --inp-sae k=20,x=4", "'k=20,x=4' does not choose an SAE: write for instance"),
        ("trace --layer 2 --feature 3 --out-sae k=none", "'none' is not a whole number"),
        ("trace --layer 2 --feature 3 --inp-sae site=foo", "no site 'foo' in what an SAE can read: choose one of"),
        ("trace --layer 2 --feature 3 --inp-sae tag=", "'tag=' does not choose an SAE"),
        ("trace --layer 2 --feature 3 --text a --no-use-encoder", "leave out --no-use-encoder"),
        ("trace --layer 2 --feature 3 --text \udcff", "is not UTF-8"),
        ("generate --prompt \udcff", "is not UTF-8"),
        ("generate --prompt a --seed 4294967296", "a seed must lie in 0 ... 2^32 - 1, got 4294967296"),
        ("pages --layer 2", "required: --out"),
        ("pages --layer 2 --out o --bins 0", "bins must be at least 1, got 0"),
        ("eval --attn-scale inf", "--attn-scale: 'inf' is not a finite number"),
        ("generate --prompt a --attn-scale auto", "--attn-scale: 'auto' is not a finite number"),
        ("eval --saes mlp-in", "'mlp-in' is not the name of an SAE"),
        ("eval --data a.npy b.npy", "--data takes either one source of token ids, or texts"),
        ("train", "required: KIND"),
        ("train lm no-such --data x.txt --out y", "no recipe no-such: name one of fw-medium"),
        ("train lm ts-nano --data x.txt --out y --recipe.step 3", "no field recipe.step"),
        ("train lm ts-nano --data x.txt --out y --recipe.lr", "--recipe.lr needs a value"),
        ("convert source", "required: OUT"),
    ],
)
def test_wrong_use(words, message, capsys):
    assert message in wrong(words, capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "--prompt", "a", "--max-length", 900], "do not fit the context of 256"),
        (["spectra", "--layer", 9], "error: there is no layer 9 in this model: choose one of 0 ... 3"),
        (["spectra", "--layer", 1], "no SAE 1-mlp-in-x*-k* in ts-nano: choose one of 2-mlp-in-x4-k20"),
        (["spectra", "--layer", 2, "--inp-sae", "expansion=16"], "no SAE 2-mlp-in-x16-k* in ts-nano"),
        (["spectra", "--layer", 2, "--scope", "nowhere"], "no folder nowhere"),
        (
            ["spectra", "--layer", 2, "--features", "3,1024"],
            "no feature 1024 in SAE 2-mlp-out-x4-k20: choose one of 0 ... 1023",
        ),
        (
            ["trace", "--layer", 2, "--feature", 1024],
            "no feature 1024 in SAE 2-mlp-out-x4-k20: choose one of 0 ... 1023",
        ),
        (["trace", "--layer", 2, "--feature", 3, "--k", 257], "--k is 257, but each feature has 256 eigenvalues"),
        (
            ["trace", "--layer", 2, "--feature", 3, "--attn-scale", 1e38, "--text", "a cat"],
            "not finite at these tokens",
        ),
        (
            ["generate", "--prompt", "a cat", "--attn-scale", 1e38],
            "the model or an SAE gives values that are not finite as logits",
        ),
        (["eval", "--saes", "none", "--attn-scale", 1e38], "not finite in rows 0 ... 15"),
        (["eval", "--saes", "2-mlp-in-x4-k20", "--attn-scale", 1e38], "not finite in rows 0 ... 15"),
        (["eval", "--attn-scale", 1e300], "attn_scale must be a finite number in float32, got 1e+300"),
        (["eval", "--model", ""], "the name of the model is empty"),
        (["eval", "--saes", "3-mlp-in-x4-k20"], "no SAE 3-mlp-in-x4-k20 in ts-nano"),
        (["eval", "--data", "nowhere.txt"], "there is no file nowhere.txt"),
        (["eval", "--data", "nowhere.npy"], "there is no file nowhere.npy"),
        (["eval", "--model", "nowhere"], "no folder nowhere"),
        (["train", "lm", "nowhere.toml", "--data", "x.txt", "--out", "y"], "no recipe nowhere.toml"),
        (["train", "lm", "ts-nano", "--data", "nowhere.txt", "--out", "y"], "there is no file nowhere.txt"),
        (["convert", "nowhere", "out"], "no folder nowhere"),
        (["tour", "--layer", 9], "there is no layer 9 in this model: choose one of 0 ... 3"),
    ],
)
def test_failures(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in failed(words, capsys)
    assert list(tmp_path.iterdir()) == []


def test_data_that_is_none(capsys, tmp_path):
    (tmp_path / "tokens.npy").write_text("no array")
    assert "save token ids with numpy.save" in failed(["eval", "--data", tmp_path / "tokens.npy"], capsys)
    np.save(tmp_path / "tokens.npy", np.ones(5, int))
    assert "of shape (5,), but must hold integers [rows, seq]" in failed(
        ["eval", "--data", tmp_path / "tokens.npy"], capsys
    )
    np.save(tmp_path / "tokens.npy", np.full((2, 5), 9999))
    assert "token 9999 lies outside" in failed(["eval", "--saes", "none", "--data", tmp_path / "tokens.npy"], capsys)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_teaches_by_example(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    examples = [line for line in printed.split("examples:\n")[1].splitlines() if line.startswith("  bilinear-jax ")]
    assert len(examples) >= 2
    assert all(line.startswith(f"  bilinear-jax {command}") for line in examples)


def test_an_unexpected_error_is_a_line_too(capsys, monkeypatch):
    def fail(options):
        raise KeyError("oops")

    monkeypatch.setattr(common, "load_model", fail)
    assert "KeyError: 'oops' (--debug shows where)" in failed(["generate", "--prompt", "a"], capsys)


def test_warnings_are_lines_of_their_own(capsys, tmp_path):
    assert main(["convert", str(published.MODEL), str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("bilinear-jax: warning: the files of tdooms/ts-micro do not give the scale")
    assert captured.err.count("\n") == 1
    assert captured.out == f"{tmp_path / 'out'}: the model\n"


def test_text_that_fills_rows_and_text_that_does_not(tmp_path):
    from bilinear_jax.language import load

    lm = load("ts-nano")
    (tmp_path / "text.txt").write_text("A dog sat. " * 300)
    options = argparse.Namespace(data=[str(tmp_path / "text.txt")], field="text", model="ts-nano", max_characters=None)
    tokens, name = common.load_tokens(options, lm)
    ids = lm.tokenizer(("A dog sat. " * 300).strip())["input_ids"]
    assert name == "text.txt" and tokens.shape == (5, 256)
    assert tokens.reshape(-1).tolist() == ids + [lm.config.pad_id] * (5 * 256 - len(ids))
    assert int(lm.token_mask(tokens).sum()) == len(ids) - 5
    bare = dataclasses.replace(lm, config=dataclasses.replace(lm.config, pad_id=None))
    full, name = common.load_tokens(options, bare)
    assert full.tolist() == tokens[:4].tolist()
    assert name == f"text.txt (without its last {len(ids) - 4 * 256} tokens, which do not fill a row)"
    assert common.load_tokens(options, lm, rows=2)[0].shape == (2, 256)
    assert common.load_tokens(options, bare, rows=2)[1] == "text.txt"
    (tmp_path / "text.txt").write_text("A dog sat.")
    assert common.load_tokens(options, lm)[0].tolist() == lm.encode("A dog sat.").tolist()


def test_rows_longer_than_the_context(tmp_path):
    from bilinear_jax.language import load

    np.save(tmp_path / "tokens.npy", np.arange(600).reshape(2, 300))
    options = argparse.Namespace(data=[str(tmp_path / "tokens.npy")], field="text", model="ts-nano")
    tokens, name = common.load_tokens(options, load("ts-nano"))
    assert tokens[1].tolist() == list(range(300, 556))
    assert name == "tokens.npy (the first 256 of the 300 tokens of each row)"


@pytest.fixture
def interrupt(monkeypatch):
    """A function that stands for Ctrl-C at the place where it is called, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_convert_interrupted(interrupt, capsys, tmp_path, monkeypatch):
    words = [
        "convert",
        str(published.MODEL),
        str(tmp_path / "out"),
        "--scope",
        str(published.SCOPE),
        "--attn-scale",
        "1",
    ]
    assert main(words) == 0
    before = snapshot(tmp_path)
    monkeypatch.setattr("bilinear_jax.store.convert.save_sae", interrupt)  # after the model has been written
    assert main([*words, "--force"]) == 130
    assert snapshot(tmp_path) == before
    assert capsys.readouterr().err == "bilinear-jax: interrupted\n"


def test_tour_interrupted(interrupt, tmp_path, monkeypatch):
    class Figure:
        def savefig(self, path, **_):
            path.write_bytes(b"half")
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        common.save_figure(Figure(), tmp_path / "cosines.png")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def terminate():
    """A function that stands for SIGTERM at the place where it is called."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL, "the handler has stayed"


def test_terminated(terminate, capsys, tmp_path, monkeypatch):
    """In a conversion, and in the text of a run."""
    model = ["convert", str(published.MODEL), str(tmp_path / "new"), "--scope", str(published.SCOPE)]
    (tmp_path / "text.txt").write_text("a cat<|endoftext|>a dog" * 99)
    text = ["train", "lm", "ts-nano", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run")]
    text += ["--model.n_vocab", "260", "--data.held_out", "1"]
    before = snapshot(tmp_path)
    monkeypatch.setattr("bilinear_jax.store.convert.save_sae", terminate)
    monkeypatch.setattr("bilinear_jax.store.tokens.too_few_documents", lambda *_: terminate())
    monkeypatch.setattr("bilinear_jax.store.tokens.read_documents", lambda *_, **__: iter(["a cat"]))
    for words in ([*model, "--attn-scale", "1"], text):
        assert main(words) == 143
        assert capsys.readouterr().err.splitlines()[-1] == "bilinear-jax: terminated"
    assert snapshot(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "text.txt"]


def test_another_handler_of_sigterm_stays(capsys, monkeypatch):
    """Of a program that calls ``main``; and without handlers, in a thread."""
    received = []
    monkeypatch.setattr("bilinear_jax.commands.eval.run", lambda _: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    try:
        assert main(["eval"]) == 0
        thread = threading.Thread(target=lambda: received.append(main(["eval"])))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(received) == [0, 1, 1]


def test_odd_places_are_refused_before_anything_is_loaded(capsys, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("it was loaded first")

    for name in ("file", "file.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("bilinear_jax.language.load", loaded)
    monkeypatch.setattr("bilinear_jax.load", loaded)
    monkeypatch.setattr("bilinear_jax.store.convert.model_place", loaded)
    monkeypatch.setattr("bilinear_jax.store.convert.load_model", loaded)
    monkeypatch.setattr("bilinear_jax.store.convert.sae_names", loaded)
    commands = [
        ["convert", published.MODEL, "OUT", "--scope", published.SCOPE],
        ["export", published.MODEL, "OUT", "--scope", published.SCOPE],
        ["pages", "--layer", 2, "--out", "OUT"],
        ["pages", "--layer", 2, "--out", "new", "--neuronpedia", "OUT"],
        ["certify", published.MODEL, "--data", "../file.txt", "--out", "OUT"],
    ]
    for words in commands:
        for place, message in (
            (".", "here cannot be replaced, because it holds the working folder"),
            ("..", f"{tmp_path} already exists"),
            ("/", "/ already exists"),
            ("../file", "file already exists"),
            ("../file/new", "file is not a folder with write permission (Not a directory)"),
            ("a\\b", r"a folder's name may not have \ in it"),
            ("gs:/a", "nor be gs:"),
            ("n" * 300, "a name may have up to 255 bytes"),
            ("caf\udce9", r"caf\udce9 cannot be written (it has characters that are not UTF-8)"),
            ("../loop", "cannot be written ("),
        ):
            assert message in failed([place if word == "OUT" else word for word in words], capsys), (words, place)
    assert "name another folder with --out" in failed(["tour", "--out", "../file"], capsys)
    assert "name another folder with --out" in failed(["tour", "--out", "../file/new"], capsys)
    figure = ["certify", published.MODEL, "--data", "../file.txt", "--figure"]
    assert "is not a folder with write permission" in failed([*figure, "../file/a.png"], capsys)
    train = ["train", "sae", "ts-nano", "--data", "../file.txt", "--out", "../file"]
    assert "is a file: name a folder for this run as --out" in failed(train, capsys)
    for name in ("a\\b", "gs:/a", "n" * 300, "caf\udce9", "../loop"):
        assert "cannot be written (" in failed([*train[:-1], name], capsys), name
        assert "cannot be written (" in failed(["tour", "--out", name], capsys), name
    assert not list((tmp_path / "here").iterdir())
    assert snapshot(tmp_path) == {"file": b"", "file.txt": b""} and not list((tmp_path / "here").iterdir())


def test_the_parent_of_a_folder_by_two_points(capsys, tmp_path):
    """Its SAEs go to a folder beside it, which has its name and not "..-scope"."""
    place = tmp_path / "new" / "below" / ".."
    words = ["export", published.MODEL, place, "--scope", published.SCOPE, "--attn-scale", published.SCALE]
    assert main([str(word) for word in words]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new'}: the model; {tmp_path / 'new'}-scope: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new-scope"]


def test_folders_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    below = tmp_path / "file" / "out"
    assert str(tmp_path / "file") in failed(["convert", published.MODEL, below, "--attn-scale", 1], capsys)
    assert "name another folder with --out" in failed(["tour", "--out", below], capsys)
