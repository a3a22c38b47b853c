"""``bilinear-jax`` as it is installed: each command once on the model that ships, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pytest

import bilinear_jax as bj
from bilinear_jax.commands import eval as evaluate
from bilinear_jax.commands import generate, spectra, trace
from bilinear_jax.commands.common import Tokens
from bilinear_jax.commands.main import main
from bilinear_jax.store.sources import sae_names

INSTALLED = Path(sys.executable).with_name("bilinear-jax")
COMMAND = [str(INSTALLED)] if INSTALLED.is_file() else [sys.executable, "-m", "bilinear_jax"]
ROOT = Path(bj.__file__).parents[1]
PROMPT = "Once upon a time, there was a little girl."
TRAINING = """--model.n_layer 1 --model.n_head 2 --model.d_model 8 --model.d_hidden 16 --model.n_ctx 16
--model.n_vocab 270 --recipe.steps 2 --recipe.batch_size 4 --data.held_out 10 --data.max_tokens none --run.prompts []"""


def environment() -> dict[str, str]:
    """As a user's: one device, and an output that is buffered."""
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONUNBUFFERED")}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}


def command(*words, cwd: Path) -> subprocess.CompletedProcess:
    words = [*COMMAND, *map(str, words)]
    return subprocess.run(words, cwd=cwd, env=environment(), capture_output=True, text=True, encoding="utf-8")


def parsed(*words, cwd: Path) -> dict:
    """What the command prints with --json: one document, and nothing on the standard error, which is no terminal."""
    done = command(*words, "--json", cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def refused(*words, cwd: Path, status: int, message: str) -> None:
    done = command(*words, cwd=cwd)
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.startswith("bilinear-jax: error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


@pytest.fixture(scope="module")
def lm():
    return bj.load("ts-nano")


@pytest.fixture(scope="module")
def tracer(lm):
    return bj.Tracer(lm, layer=2)


class TestCommands:
    def test_generate(self, lm, tmp_path):
        words = ["--prompt", PROMPT, "--prompt", "Tom", "--max-length", 8, "--temperature", 0.7, "--top-k", 9]
        found = parsed("generate", *words, "--seed", 3, cwd=tmp_path)
        texts = lm.generate([PROMPT, "Tom"], max_length=8, temperature=0.7, top_k=9, seed=3)
        assert [entry["text"] for entry in found["texts"]] == texts
        assert generate.text(found) == "\n\n".join(texts)

    def test_spectra(self, tracer, tmp_path):
        words = ["--layer", 2, "--features", "3,17,20-30", "--k", 3, "--which", "negative", "--n", 4]
        found = parsed("spectra", *words, cwd=tmp_path)
        features = [3, 17, *range(20, 31)]
        expected = np.linalg.eigvalsh(np.asarray(tracer.q(features), np.float64))
        best = np.argsort(expected[:, :3].sum(axis=1))[:4]
        assert [row["feature"] for row in found["features"]] == [features[place] for place in best]
        for row, place in zip(found["features"], best, strict=True):
            np.testing.assert_allclose(row["values"], expected[place, :3], atol=1e-5)
            assert row["sum"] == pytest.approx(-sum(row["values"]))
            assert row["explained"] == pytest.approx(
                (expected[place, :3] ** 2).sum() / (expected[place] ** 2).sum(), rel=1e-3
            )
        table = spectra.text(found).split("\n\n")[1].splitlines()
        assert [int(line.split()[0]) for line in table[1:]] == [row["feature"] for row in found["features"]]
        assert len({len(line) for line in table}) == 1
        assert (found["n_features"], found["n_converged"]) == (13, 13)

    def test_a_scan_of_spectra(self, tracer):
        features, tokens = [3, 333, 314], bj.load_corpus("ts-nano")[:24]
        found = spectra.scanned(tracer, features, 2, Tokens(tokens, "some rows"))
        expected = bj.scan(tracer, tokens, features=features)
        for by in ("explained", "negation"):
            assert [row["feature"] for row in found[by]] == expected.best(2, by)
            for row in found[by]:
                place = features.index(row["feature"])
                assert row["gain"] == expected.gain[place] and row["firings"] == expected.firings[place]
                assert len(row["fires"]) == np.sum(expected.fires[place, :, 0] >= 0)
                assert all(text.count("[") >= 1 for text in row["fires"] + row["silent"])
        shown = "\n".join(spectra._scan_lines(found))
        assert "== Most like a negation" in shown and f"Chosen on {12 * 255} tokens of some rows" in shown
        assert json.loads(json.dumps(found, allow_nan=False)) == found

    def check_eigenpairs(self, account, lm, tracer):
        """The eigenpairs are those of other tokens, and what their vectors find is made of input features."""
        position, rows = account["position"], bj.load_corpus("ts-nano")[:64, :48]
        x = lm.capture(lm.encode(PROMPT), [("mlp_in", 2)])["mlp_in", 2][0]
        top = tracer.top_eigh(256, [5], metric=tracer.metric(rows[:32], firing=5), exact=True)
        along = np.asarray(x @ top.vectors[0].T, np.float64)
        terms = np.asarray(top.values[0], np.float64) * along**2  # [seq, 256]
        found = [one["contribution"] for one in account["eigenpairs"]]
        np.testing.assert_allclose(found, terms[position, :6], atol=1e-3)
        for here, its in zip(account["eigenpairs_at"], terms, strict=True):
            np.testing.assert_allclose(here["contributions"], its[:6], atol=1e-3)
            assert here["form"] == pytest.approx(its.sum(), abs=1e-2)
        assert account["form"]["total"] == pytest.approx(float(x[position] @ tracer.q(5) @ x[position]), abs=1e-3)
        assert account["form"]["listed"] == pytest.approx(sum(found), abs=1e-3)
        held = np.asarray(lm.capture(rows[32:], [("mlp_in", 2)])["mlp_in", 2][:, 1:] @ top.vectors[0, :6].T) ** 2
        codes = tracer.inp.encode(x[position])
        for place, one in enumerate(account["eigenpairs"]):
            vector = top.vectors[0, place]
            for feature, share in one["finds"]:
                part = codes[feature] * (vector @ tracer.inp.decoder[:, feature])
                assert share == pytest.approx(float(part / along[position, place]), rel=1e-2, abs=1e-3)
            row, token = np.unravel_index(held[..., place].argmax(), held.shape[:2])
            word = lm.tokenizer.decode(rows[32 + row, 1 + token : 2 + token]).strip()
            assert len(one["largest_at"]) == 2 and f"[{word}]" in one["largest_at"][0]

    def test_trace(self, lm, tracer, tmp_path):
        np.save(tmp_path / "rows.npy", bj.load_corpus("ts-nano")[:64, :48])
        words = ["--layer", 2, "--feature", 5, "--n", 12, "--text", PROMPT, "--data", "rows.npy"]
        found = parsed("trace", *words, cwd=tmp_path)
        self.check_weights(found, np.asarray(tracer.q(5, project=True), np.float64))
        expected = tracer.explained(bj.load_corpus("ts-nano")[:64, :48], features=[5], parts=[1, 2, 6], by="firing")
        random = expected.controls["random directions"]
        for name, scores, column in (("1 eigenpair", expected, 0), ("control: random directions, 6", random, 2)):
            assert found["scores"][name]["r2"] == pytest.approx(scores.r2[0, column], abs=1e-4)
        assert found["scored_on"]["scored"] == expected.tokens[1]
        assert found["scored_on"]["fires"] == expected.firings[0]
        account = found["account"]
        for row in account["tokens"]:
            assert sum(row["terms"].values()) == pytest.approx(row["preactivation"], abs=1e-4)
        expected = bj.account(tracer, lm.encode(PROMPT), 5)
        z = np.asarray(expected.preactivation[0])
        assert account["position"] == 1 + np.argmax(z[1:])  # position 0 doesn't count
        active = np.asarray(tracer.out.encode(lm.capture(lm.encode(PROMPT), [("mlp_out", 2)])["mlp_out", 2]))[0, :, 5]
        np.testing.assert_allclose([row["activation"] for row in account["tokens"]], active, atol=1e-5)
        block = np.asarray(expected.pairs[0, account["position"]], np.float64)
        both = np.tril(block) * (2 - np.eye(20))  # (i, j) and (j, i) are one pair
        largest = np.sort(np.abs(both[np.tril_indices(20)]))[::-1][:12]
        np.testing.assert_allclose([abs(pair["contribution"]) for pair in account["pairs"]], largest, atol=1e-5)
        assert account["tokens"][account["position"]]["terms"]["pairs"] == pytest.approx(both.sum(), abs=1e-4)
        whole = float(expected.magnitude[1][0, account["position"]])
        assert account["shares"]["pairs"] == pytest.approx(np.abs(both).sum() / whole, rel=1e-4)
        np.testing.assert_allclose([pair["share"] for pair in account["pairs"]], largest / whole, rtol=1e-3)
        assert sum(account["shares"].values()) == pytest.approx(1)
        self.check_eigenpairs(account, lm, tracer)
        text = trace.text(found)
        assert f"These 6 add up to {account['form']['listed']:+.4f}" in text
        assert f"At position {account['position']}, " in text
        for activation, says in ((0.0, True), (2.0, False)):
            rows = [row | {"activation": activation} for row in account["tokens"]]
            told = trace.text(found | {"account": account | {"tokens": rows}})
            assert ("does not fire in this text" in told) == says
        assert f"and are {largest.sum() / whole:.1%} of the |terms|" in text
        assert str(found["interactions"][0]["i"]) in found["inputs"]

    def check_weights(self, found, projected):
        pairs, square = found["interactions"], (projected**2).sum()
        for pair in pairs:
            assert pair["weight"] == pytest.approx(projected[pair["i"], pair["j"]], rel=1e-4)
            times = 1 if pair["i"] == pair["j"] else 2
            assert pair["share"] == pytest.approx(times * pair["weight"] ** 2 / square, rel=1e-3)
        assert found["interactions_share"] == pytest.approx(sum(pair["share"] for pair in pairs))

    def test_eval(self, lm, tmp_path):
        """Of a dataset whose rows are padded by different numbers of tokens: no mean of means."""
        tokens = np.array(bj.load_corpus("ts-nano")[:5, :32])
        tokens[4, 9:] = lm.config.pad_id
        np.save(tmp_path / "tokens.npy", tokens)
        words = ["--data", "tokens.npy", "--batch-size", 2]
        found = parsed("eval", *words, "--saes", "2-mlp-out-x4-k20", cwd=tmp_path)
        assert found["loss"] == pytest.approx(float(lm.loss(tokens)), rel=1e-5)
        assert found["tokens"] == int(lm.token_mask(tokens).sum())
        scores = found["saes"]["2-mlp-out-x4-k20"]
        assert (scores["l0"], scores["loss_clean"]) == (20, found["loss"])
        assert f"{scores['nmse']:.4g}" in evaluate.text(found).splitlines()[4].split()
        assert lm.mean_loss(tokens, batch_size=2) == (pytest.approx(found["loss"], rel=1e-5), found["tokens"])

    def test_eval_shows_a_random_dictionary_below_each(self, tmp_path):
        tokens = np.array(bj.load_corpus("ts-nano")[:2, :32])
        np.save(tmp_path / "tokens.npy", tokens)
        words = ["--data", "tokens.npy", "--saes", "2-mlp-out-x4-k20", "--controls"]
        found = parsed("eval", *words, cwd=tmp_path)
        trained, random = (found[key]["2-mlp-out-x4-k20"] for key in ("saes", "controls"))
        assert random["l0"] == trained["l0"] == 20 and random["nmse"] > trained["nmse"]
        said = evaluate.text(found)
        first, second = said.splitlines()[4:6]
        assert first.split()[0] == "2-mlp-out-x4-k20" and f"{trained['nmse']:.4g}" in first.split()
        assert second.startswith("  random ") and f"{random['nmse']:.4g}" in second.split()
        assert said.endswith(evaluate.CONTROLS)

    def test_eval_measures_the_attention_scale(self, lm, tmp_path, capsys):
        words = ["eval", "--saes", "none", "--rows", "4", "--attn-scale", "auto"]
        assert main(words) == 0
        losses, right = bj.evaluation.attn_scale_losses(lm, bj.load_corpus("ts-nano")[:4]), lm.config.attn_scale
        assert losses[1.0] - losses[right] > 1
        printed = capsys.readouterr().out
        assert f"{right:.6g} fits" in printed and f"loss: {losses[right]:.4f}" in printed

    def test_verbose_decodes_a_line(self, lm, capsys):
        """To the standard error, for the standard output is read by programs."""
        assert main(["spectra", "--layer", "2", "--features", "3", "--verbose", "--json"]) == 0
        captured = capsys.readouterr()
        json.loads(captured.out)
        about, line = captured.err.splitlines()
        ids = lm.tokenizer("Once upon a time, there was a cat.")["input_ids"]
        assert about.startswith(
            "ts-nano: 4 layers, d_model 256, 4096 tokens, context 256, bilinear, attn_scale 0.35355"
        )
        assert f"-> {ids} -> " in line and line.endswith("Once upon a time, there was a cat.'")

    def test_eval_says_where_the_attention_scale_cannot_be_told(self, tmp_path, capsys):
        """Weights next to nothing predict the same with either."""
        config = {key: value for key, value in published.CONFIG.items() if key not in ("scale_attn", "tokenizer")}
        state = {key: value / 100 for key, value in published.state(config).items()}
        published.write(tmp_path / "model", config, state)
        np.save(tmp_path / "tokens.npy", np.arange(20).reshape(2, 10) % 11)
        words = ["--model", tmp_path / "model", "--saes", "none", "--data", tmp_path / "tokens.npy"]
        assert main(["eval", *map(str, words), "--attn-scale", "auto"]) == 0
        captured = capsys.readouterr()
        assert "too close to decide" in captured.out and "warning" not in captured.err

    def test_convert(self, tmp_path):
        words = [published.MODEL, "out", "--scope", published.SCOPE, "--attn-scale", 1]
        found = parsed("convert", *words, cwd=tmp_path)
        assert found == {"out": "out", "saes": sae_names(published.SCOPE)}
        assert bj.load(tmp_path / "out").config.attn_scale == 1

    def test_train(self, tmp_path):
        random = np.random.default_rng(0)
        words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "who", "ran"]
        documents = (" ".join(random.choice(words, 30)) for _ in range(150))
        (tmp_path / "text.txt").write_text("<|endoftext|>".join(documents))
        words = ["lm", "ts-nano", "--data", "text.txt", "--out", "run", *TRAINING.split()]
        done = command("train", *words, cwd=tmp_path)
        assert (done.returncode, "nats per token on" in done.stdout) == (0, True)
        assert bj.load(tmp_path / "run" / "model").config.n_vocab == 270


class TestEnds:
    def test_help_and_version_are_quick_to_load(self):
        """Without JAX, that is."""
        code = "import sys; from bilinear_jax.commands.main import main\ntry: main([sys.argv[1]])\n"
        code += "finally: print('jax' in sys.modules)"
        for word, shown in (("--help", "bilinear-jax generate --prompt"), ("--version", "bilinear-jax ")):
            words = [sys.executable, "-c", code, word]
            done = subprocess.run(words, env=environment(), capture_output=True, text=True)
            assert (done.returncode, shown in done.stdout) == (0, True)
            assert done.stdout.endswith("False\n")

    def test_wrong_use_is_a_line_and_2(self, tmp_path):
        refused("spectra", "--layre", "2", cwd=tmp_path, status=2, message="--layer")

    def test_a_failure_is_a_line_and_1(self, tmp_path):
        refused("generate", "--model", "no-such-model", "--prompt", "a", cwd=tmp_path, status=1, message="ts-nano")

    def test_debug_shows_where(self, tmp_path):
        done = command("generate", "--prompt", "", "--model", "no-such-model", "--debug", cwd=tmp_path)
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")
        assert done.stderr.splitlines()[-1].startswith("bilinear-jax: error: there is no folder no-such-model")

    def test_a_reader_that_goes_away(self, tmp_path):
        """As `bilinear-jax --help | head -1` may; the pipe is closed before anything can be written."""
        reader, writer = os.pipe()
        os.close(reader)
        with open(writer, "wb") as pipe:
            process = subprocess.Popen([*COMMAND, "--help"], env=environment(), stdout=pipe, stderr=subprocess.PIPE)
        assert (process.communicate()[1], process.returncode) == (b"", 141)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
    def test_an_output_that_cannot_be_written(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run([*COMMAND, "--help"], env=environment(), stdout=full, stderr=subprocess.PIPE)
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1

    def test_an_interrupt_leaves_nothing_behind(self, tmp_path):
        """While the text is being tokenised, into a temporary folder."""
        (tmp_path / "text.txt").write_text("A dog and a cat sat in the sun. " * 200_000)
        (tmp_path / "temporary").mkdir()
        # However the tests themselves were started: in the background, a shell lets programs ignore the signal.
        code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        code += "from bilinear_jax.commands.main import run_and_exit; run_and_exit()"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "eval", "--data", "text.txt", "--json"],
            cwd=tmp_path,
            env=environment() | {"TMPDIR": str(tmp_path / "temporary")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        while process.poll() is None and not any((tmp_path / "temporary").glob("bilinear-jax-*/*")):
            pass
        process.send_signal(signal.SIGINT)
        assert process.communicate() == ("", "bilinear-jax: interrupted\n")
        assert process.returncode == 130
        assert list((tmp_path / "temporary").iterdir()) == []

    def test_sigterm_while_a_folder_is_written(self, tmp_path):
        """Twice, as some programs that stop others send it: the second does not disturb the removing."""
        (tmp_path / "out" / "site").mkdir(parents=True)
        code = "import sys, time; from pathlib import Path\n"
        code += "from bilinear_jax.store import convert; from bilinear_jax.commands.main import run_and_exit\n"
        code += "convert.save_sae = lambda *_, **__: (print('writing', flush=True), time.sleep(600))\n"
        code += "run_and_exit()"
        words = ["convert", str(published.MODEL), "out/site", "--scope", str(published.SCOPE), "--attn-scale", "1"]
        with subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "writing\n"
            assert len(list((tmp_path / "out").iterdir())) == 2
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            assert process.communicate() == ("", "bilinear-jax: terminated\n")
        assert process.returncode == 143
        assert [path.name for path in (tmp_path / "out").rglob("*")] == ["site"]
