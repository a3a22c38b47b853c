"""What commands print of tokens, names and files that hold escape sequences: to a terminal, to a pipe, and as JSON."""

import json
import sys

import jax
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import bilinear_jax as bj
from bilinear_jax.commands.main import main

NASTY = "\x1b[2J"
VOCABULARY = [NASTY, "\x7f", "\u202e", "\x9b1m", "once"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A model whose tokens, and the name of its tokenizer, would clear a terminal."""
    folder = tmp_path_factory.mktemp("nasty")
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token="once"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = bj.TransformerConfig(
        n_layer=1, n_head=1, d_model=8, d_hidden=8, n_ctx=16, n_vocab=5, tokenizer=f"mine{NASTY}"
    )
    lm = bj.LanguageModel.init(config, jax.random.key(0))
    origin = {"text": f"stories{NASTY}"}
    return str(bj.save_model(folder / "model", config, lm.params, tokenizer=folder, origin=origin))


def on_a_terminal(monkeypatch, capsys, *words: str) -> str:
    """What a command prints to a standard output that says that it is a terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(list(words)) == 0
    return capsys.readouterr().out


def words(model: str, *more: str) -> list[str]:
    return ["generate", "--model", model, "--prompt", f"once {NASTY}", "--max-length", "8", *more]


def obeyed(text: str) -> set[str]:
    """The characters in a text that a terminal would obey."""
    return {one for one in text if one != "\n" and (not one.isprintable())}


def test_a_terminal_is_shown_symbols(model, monkeypatch, capsys):
    shown = on_a_terminal(monkeypatch, capsys, *words(model, "--seed", "1"))
    raw = bj.load(model).generate(f"once {NASTY}", 8, seed=1)
    assert isinstance(raw, str) and raw.startswith(f"once {NASTY}") and len(obeyed(raw)) > 1
    assert shown.startswith("once ␛[2J") and not obeyed(shown)
    assert shown.rstrip("\n") == raw.translate({0x1B: "␛", 0x7F: "␡", 0x202E: "<U+202E>", 0x9B: "<U+009B>"})


def test_a_pipe_gets_the_text_exactly(model, capsys):
    assert main(words(model, "--seed", "1")) == 0
    assert capsys.readouterr().out == f"{bj.load(model).generate(f'once {NASTY}', 8, seed=1)}\n"


def test_json_is_exact_and_escaped(model, monkeypatch, capsys):
    printed = on_a_terminal(monkeypatch, capsys, *words(model, "--seed", "1", "--json"))
    assert not obeyed(printed)
    assert json.loads(printed)["texts"][0]["text"] == bj.load(model).generate(f"once {NASTY}", 8, seed=1)


def test_tables_errors_and_verbose_lines_are_always_safe(model, capsys, tmp_path):
    """Also in a pipe: they may be read later, in a log."""
    (tmp_path / f"data{NASTY}.txt").write_text("once once once once\n" * 30)
    data = ["--data", str(tmp_path / f"data{NASTY}.txt")]
    assert main(["eval", "--model", model, *data, "--saes", "none", "--verbose"]) == 0
    done = capsys.readouterr()
    assert "data␛[2J.txt" in done.out and "mine␛[2J" in done.err
    assert main(["eval", "--model", f"no{NASTY}model", "--debug"]) == 1
    failed = capsys.readouterr()
    assert "no␛[2Jmodel" in failed.err
    with pytest.raises(SystemExit):
        main(["eval", f"--no{NASTY}"])
    wrong = capsys.readouterr()
    assert "--no␛[2J" in wrong.err
    assert not obeyed("".join([*done, *failed, *wrong]))


def test_a_summary_is_safe_to_print(model):
    summary = bj.load(model).summary()
    assert "mine␛[2J" in summary and "stories␛[2J" in summary and not obeyed(summary)
