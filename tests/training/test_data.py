"""Documents, the token file, and the batches that are cut from it."""

import gzip
import json
import os
import resource
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from tokenizers import Tokenizer

from bilinear_jax.store import tokens as token_files
from bilinear_jax.store.documents import read_documents, without_last
from bilinear_jax.store.tokenizers import load_tokenizer, save_tokenizer, tokenizer_hash, train_tokenizer
from bilinear_jax.store.tokens import open_tokens, tokenize
from bilinear_jax.training.batches import batches, held_out_rows
from bilinear_jax.training.fit import BatchIterator

TEXT = ["The cat sat.\n\nIt purred — loudly!", "A dog ran 12 miles; naïve dog.", "The end of the cat and the dog."] * 5


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXT, n_vocab=300)


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(TEXT))
    return path


def ids(tokenizer, documents) -> list[int]:
    return [token for document in documents for token in tokenizer.encode(document).ids]


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestTokenizer:
    def test_it_is_lossless_and_leads_with_end_of_text(self, tokenizer):
        for text in [*TEXT, "unseen 字 \t\r\n  spaces ", ""]:
            encoded = tokenizer.encode(text).ids
            assert encoded[0] == 0 == tokenizer.token_to_id("<|endoftext|>")
            assert tokenizer.decode(encoded[1:]) == text
        assert tokenizer.get_vocab_size() == 300

    def test_a_saved_one_knows_its_special_tokens(self, tokenizer, tmp_path):
        save_tokenizer(tokenizer, tmp_path)
        loaded = load_tokenizer(str(tmp_path), None)
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 0, 0)
        assert loaded(TEXT[0])["input_ids"] == tokenizer.encode(TEXT[0]).ids

    def test_a_vocabulary_that_the_text_cannot_fill_is_an_error(self):
        with pytest.raises(ValueError, match=r"n_vocab is 5000, but the text gives only \d+ token ids: lower n_vocab"):
            train_tokenizer(["ab"], n_vocab=5000)
        with pytest.raises(
            ValueError, match="n_vocab is 256, but a byte-level tokenizer has at least 257 token ids: raise it"
        ):
            train_tokenizer(["ab"], n_vocab=256)

    def test_a_full_disk_leaves_no_part_of_one(self, tokenizer, tmp_path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        try:
            with pytest.raises(OSError, match=r"could not write .*tokenizer.json \(File too large\): free disk space"):
                save_tokenizer(tokenizer, tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["tokenizer_config.json"]


class TestDocuments:
    def test_text_plain_and_gzipped(self, tmp_path):
        text = " one \r\n\n<|endoftext|>two\r\nlines<|endoftext|>\n  \n<|endoftext|>"
        (tmp_path / "a.txt").write_bytes(text.encode())
        (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
        assert list(read_documents(tmp_path / "a.txt")) == ["one", "two\r\nlines"]
        assert list(read_documents([tmp_path / "a.txt.gz", tmp_path / "a.txt"])) == ["one", "two\r\nlines"] * 2

    @pytest.mark.parametrize("size", [1, 2, 5, 13, 14, 1000])
    def test_a_separator_across_chunks(self, tmp_path, monkeypatch, size):
        """Whatever is read at once, the documents are those of the whole text; a piece of a separator is text."""
        monkeypatch.setattr("bilinear_jax.store.documents._CHARACTERS", size)
        text = "one<|endoftext|>two <|endoftext<|endoftext|><|endoftext|>three <|endof"
        (tmp_path / "a.txt").write_text(text)
        assert list(read_documents(tmp_path / "a.txt")) == ["one", "two <|endoftext", "three <|endof"]

    def test_jsonl_with_a_field_of_another_name(self, tmp_path):
        lines = [{"story": " kept as it is \n"}, {"story": "   "}, {"story": "naïve 字", "text": "not this"}]
        content = "\n".join(map(json.dumps, lines)) + "\n\n"
        (tmp_path / "a.jsonl").write_text(content)
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
        for name in ("a.jsonl", "a.jsonl.gz"):
            assert list(read_documents(tmp_path / name, field="story")) == [" kept as it is \n", "naïve 字"]

    def test_parquet(self, tmp_path):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        documents = [f"document {i}" for i in range(2500)]
        table = pyarrow.table({"id": list(range(2500)), "text": documents})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=700)
        assert list(read_documents(tmp_path / "a.parquet")) == documents
        with pytest.raises(ValueError, match=r"a.parquet has no field 'txt'; it has: id, text"):
            list(read_documents(tmp_path / "a.parquet", "txt"))
        parquet.write_table(pyarrow.table({"text": ["a", None]}), tmp_path / "null.parquet")
        with pytest.raises(ValueError, match=r"row 2 of .*null.parquet is not text, but NoneType"):
            list(read_documents(tmp_path / "null.parquet"))
        (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
        with pytest.raises(ValueError, match=r"cut.parquet cannot be read .*download it again"):
            list(read_documents(tmp_path / "cut.parquet"))

    @pytest.mark.parametrize(
        ("source", "asked"),
        [
            ("hub:owner/name", ("owner/name", None, "train")),
            ("hub:owner/name:small", ("owner/name", "small", "train")),
            ("hub:owner/name:small:test", ("owner/name", "small", "test")),
            ("hub:owner/name::test", ("owner/name", None, "test")),
        ],
    )
    def test_a_hub_dataset_is_streamed(self, monkeypatch, source, asked):
        """With a stub of the package ``datasets``: what it is asked for, and that no more is read than is used."""
        read = []

        def load_dataset(name, config, *, split, streaming):
            assert ((name, config, split), streaming) == (asked, True)
            return ({"text": read.append(i) or f"record {i}"} for i in range(10**9))

        stub = types.ModuleType("datasets")
        monkeypatch.setattr(stub, "load_dataset", load_dataset, raising=False)
        monkeypatch.setitem(sys.modules, "datasets", stub)
        documents = read_documents(source)
        assert [next(documents), next(documents)] == ["record 0", "record 1"]
        assert read == [0, 1]

    @pytest.mark.parametrize(("package", "source"), [("datasets", "hub:owner/name"), ("pyarrow", "a.parquet")])
    def test_a_missing_package_is_named(self, monkeypatch, tmp_path, package, source):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a.parquet").write_bytes(b"PAR1")
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'bilinear-jax\[data\]'"):
            next(read_documents(source))

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"\n", "a.txt has no documents: it must hold text, with .* between them"),
            ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 text"),
            ("a.txt.gz", gzip.compress(b"one story " * 99, mtime=0)[:-9], "a.txt.gz is cut short or damaged"),
            ("a.txt.gz", b"not gzipped", "a.txt.gz is cut short or damaged"),
            ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 of .*a.jsonl is not JSON"),
            ("a.jsonl", b'{"txt": "a", "id": 1}\n', "line 1 of .*a.jsonl has no field 'text'; it has: id, txt"),
            ("a.jsonl", b'"text"\n', "line 1 of .*a.jsonl is not an object"),
            ("a.jsonl", b'{"text": 3}\n', "'text' of line 1 of .*a.jsonl is not text, but int"),
            ("a.jsonl", b'{"text": "a"}\n' + b"[" * 99_999, "line 2 of .*a.jsonl is not JSON"),
            ("a.jsonl", b'{"text": "a \\ud800"}\n', "'text' of line 1 of .*a.jsonl is not Unicode text"),
            ("a.csv", b"text\n", r"a.csv has a file type that cannot be read: name a .txt, .*hub:OWNER/NAME"),
        ],
        ids=range(11),
    )
    def test_what_cannot_be_read_is_named(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(read_documents(tmp_path / name))

    def test_missing_files_are_told_before_anything_is_read(self, tmp_path, text_file):
        with pytest.raises(FileNotFoundError, match=r"there is no file .*other.txt: name a"):
            read_documents([text_file, tmp_path / "other.txt"])
        with pytest.raises(ValueError, match="name at least one file"):
            read_documents([])

    def test_all_but_the_last(self):
        assert list(without_last("abcde", 2)) == ["a", "b", "c"]
        assert list(without_last("ab", 0)) == ["a", "b"]
        with pytest.raises(ValueError, match=r"2 documents are too few to hold out 2: hold out fewer, give more text$"):
            list(without_last("ab", 2))

    def test_no_text_is_taken_twice(self, tmp_path, text_file):
        """Else its last documents would be held out, and trained on."""
        with pytest.raises(ValueError, match=r"text.txt is named twice"):
            read_documents([text_file, tmp_path / ".." / tmp_path.name / "text.txt"])


class TestTokenFile:
    def test_it_is_the_documents_as_the_tokenizer_gives_them(self, tokenizer, text_file, tmp_path, monkeypatch):
        monkeypatch.setattr(token_files, "_CHARACTERS", 70)  # several documents a chunk, several chunks
        file = tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=2)
        assert file.tokens.tolist() == ids(tokenizer, TEXT[:-2])
        assert file.held_out.tolist() == ids(tokenizer, TEXT[-2:])
        assert (file.n_documents, file.n_vocab, file.tokens.dtype) == (15, 300, np.uint16)
        assert isinstance(file.tokens, np.memmap)
        assert names(tmp_path) == ["text.txt", "tokens", "tokens.json"]
        record = json.loads((tmp_path / "tokens.json").read_text())
        assert record["made_from"]["sources"] == [{"name": "text.txt", "bytes": text_file.stat().st_size}]
        assert record["tokenizer_hash"] == tokenizer_hash(tokenizer)

    def test_a_tokenizer_set_to_pad_and_truncate_is_the_same_tokenizer(self, tokenizer, text_file, tmp_path):
        """Else a long document is cut, a short one padded, and the hash depends on what was last encoded."""
        other = Tokenizer.from_str(tokenizer.to_str())
        other.enable_truncation(5)
        other.enable_padding(length=40)
        assert tokenizer_hash(other) == tokenizer_hash(tokenizer)
        file = tokenize(text_file, other, tmp_path / "tokens")
        assert file.tokens.tolist() == ids(tokenizer, TEXT)
        assert len(other.encode(TEXT[0]).ids) == 40  # what was lent comes back as it was

    def test_a_transformers_tokenizer_is_the_tokenizer_within(self, tokenizer, text_file, tmp_path):
        save_tokenizer(tokenizer, tmp_path)
        tokenize(text_file, tokenizer, tmp_path / "tokens")
        loaded = load_tokenizer(str(tmp_path), None)
        assert open_tokens(tmp_path / "tokens", loaded).tokenizer_hash == tokenizer_hash(tokenizer)

    def test_a_large_vocabulary_takes_32_bits(self, text_file, tmp_path):
        from tokenizers import models, pre_tokenizers

        words = {"[UNK]": 0, "cat": 65_535, "dog": 65_536}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        file = tokenize(text_file, tokenizer, tmp_path / "tokens")
        assert (file.tokens.dtype, file.n_vocab) == (np.uint32, 65_537)
        assert set(file.tokens.tolist()) == set(words.values())

    def test_it_stops_after_the_document_that_reaches_the_limit(self, tokenizer, text_file, tmp_path):
        first, second = (len(tokenizer.encode(text).ids) for text in TEXT[:2])
        for limit, documents in [(1, 1), (first, 1), (first + 1, 2), (first + second, 2)]:
            file = tokenize(text_file, tokenizer, tmp_path / f"{limit}", max_tokens=limit)
            assert file.tokens.tolist() == ids(tokenizer, TEXT[:documents])
        assert tokenize(text_file, tokenizer, tmp_path / "all", max_tokens=10**9).n_documents == len(TEXT)

    def test_the_second_time_it_is_only_opened(self, tokenizer, text_file, tmp_path, monkeypatch):
        first = tokenize(text_file, tokenizer, tmp_path / "tokens").tokens
        monkeypatch.setattr(token_files, "_encode_into", None)
        assert tokenize(text_file, tokenizer, tmp_path / "tokens").tokens.tolist() == first.tolist()
        with pytest.raises(ValueError, match=r"made from another text \(held_out_documents: 0 there, 3 now\)"):
            tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=3)
        text_file.write_text("another text")
        with pytest.raises(ValueError, match=r"made from another text \(sources: .*text.txt.* there, .* now\): delete"):
            tokenize(text_file, tokenizer, tmp_path / "tokens")

    def test_another_tokenizer_is_refused_with_both_named(self, tokenizer, text_file, tmp_path):
        tokenize(text_file, tokenizer, tmp_path / "tokens")
        other = train_tokenizer(TEXT, n_vocab=290)
        message = rf"{tokenizer_hash(tokenizer)[:12]} with 300 .* {tokenizer_hash(other)[:12]} with 290"
        with pytest.raises(ValueError, match=message):
            open_tokens(tmp_path / "tokens", other)
        with pytest.raises(ValueError, match=message):
            tokenize(text_file, other, tmp_path / "tokens")
        with pytest.raises(ValueError, match="a vocabulary of 300 tokens, but the model only has 299"):
            open_tokens(tmp_path / "tokens", n_vocab=299)
        assert open_tokens(tmp_path / "tokens", n_vocab=300).n_vocab == 300

    def test_a_file_that_is_cut_short_is_refused(self, tokenizer, text_file, tmp_path):
        path = tokenize(text_file, tokenizer, tmp_path / "tokens").path
        whole = path.read_bytes()
        path.write_bytes(whole[:-2])
        with pytest.raises(ValueError, match=rf"has {len(whole) - 2} bytes, but should have {len(whole)}"):
            open_tokens(path)

    def test_no_other_file_is_taken_for_a_token_file(self, tokenizer, text_file, tmp_path):
        for call in (lambda: open_tokens(text_file), lambda: tokenize(text_file, tokenizer, text_file)):
            with pytest.raises(FileNotFoundError, match=r"text.txt.json beside it; found: .*text.txt"):
                call()
        assert text_file.read_text().startswith(TEXT[0])
        (tmp_path / "text.txt.json").write_text('{"format": "other"}')
        with pytest.raises(ValueError, match="does not describe a token file of this library"):
            open_tokens(text_file)

    @pytest.mark.parametrize("change", [{"dtype": None}, {"version": "1"}, {"made_from": []}, {"n_tokens": 2.5}])
    def test_a_damaged_side_car_is_named(self, tokenizer, text_file, tmp_path, change):
        tokenize(text_file, tokenizer, tmp_path / "tokens")
        side_car = tmp_path / "tokens.json"
        side_car.write_text(json.dumps(json.loads(side_car.read_text()) | change))
        with pytest.raises(ValueError, match=rf"tokens.json lacks {next(iter(change))}: delete .*tokens and tokenise"):
            open_tokens(tmp_path / "tokens")

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"n_documents": 16}, r"tokens.json is not what was written, so it is damaged: delete .*tokens and tok"),
            ({"made_from": {}}, "tokens.json is not what was written"),
            ({"tokens_sha256": None}, "tokens.json is not what was written"),
            ({"n_tokens": True}, "must be a whole number in 1"),
            ({"n_tokens": -3}, "must be a whole number in 1"),
            ({"n_tokens": 10**30}, "must be a whole number in 1"),
            ({"n_held_out": -1}, "must be a whole number that is not negative, but is -1"),
            ({"n_vocab": "x" * 10**6}, "lacks n_vocab"),
            ({"dtype": "float64"}, "must be uint16 or uint32, but is 'float64'"),
            ({"dtype": "nonsense"}, "must be uint16 or uint32"),
            ({"tokenizer_hash": 3}, "must be text, but is 3"),
            ({"sha256": [1]}, "tokens.json is not what was written"),
        ],
    )
    def test_a_side_car_of_nonsense_is_one_line(self, tokenizer, text_file, tmp_path, change, reason):
        tokenize(text_file, tokenizer, tmp_path / "tokens")
        side_car = tmp_path / "tokens.json"
        side_car.write_text(json.dumps(json.loads(side_car.read_text()) | change))
        with pytest.raises(ValueError, match=reason) as error:
            tokenize(text_file, tokenizer, tmp_path / "tokens")
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000

    def test_a_changed_token_is_found(self, tokenizer, text_file, tmp_path):
        path = tokenize(text_file, tokenizer, tmp_path / "tokens").path
        content = bytearray(path.read_bytes())
        content[40] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"tokens is damaged, for these are not the token ids that were written: del"
        ):
            open_tokens(path)

    def test_the_ids_are_hashed_once_a_process(self, tokenizer, text_file, tmp_path, monkeypatch):
        path = tokenize(text_file, tokenizer, tmp_path / "tokens").path
        monkeypatch.setattr("bilinear_jax.store.checksums.of_file", None)
        open_tokens(path)

    @pytest.mark.parametrize("limit", [None, 10**6])
    def test_another_text_of_the_same_name_and_size_is_another_text(self, tokenizer, text_file, tmp_path, limit):
        stat = text_file.stat()
        tokenize(text_file, tokenizer, tmp_path / "tokens", max_tokens=limit)
        assert tokenize(text_file, tokenizer, tmp_path / "tokens", max_tokens=limit).n_documents == 15
        text_file.write_text(text_file.read_text().replace("cat", "cow"))
        os.utime(text_file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert text_file.stat().st_size == stat.st_size
        with pytest.raises(
            ValueError, match=r"made from another text \(content: \['\w{64}'\] there, \['\w{64}'\] now\)"
        ):
            tokenize(text_file, tokenizer, tmp_path / "tokens", max_tokens=limit)

    def test_with_a_limit_no_more_is_read_to_know_a_text_again(self, tokenizer, tmp_path, monkeypatch):
        """Here the second line is not JSON, and is never reached."""
        monkeypatch.setattr(token_files, "_CHARACTERS", 1)
        (tmp_path / "a.jsonl").write_text('{"text": "one cat"}\n{')
        first = tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "tokens", max_tokens=1)
        again = tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "tokens", max_tokens=1)
        assert again.tokens.tolist() == first.tokens.tolist() == ids(tokenizer, ["one cat"])

    def test_a_token_file_of_an_earlier_version_is_opened_with_a_warning(self, tokenizer, text_file, tmp_path):
        tokens = tokenize(text_file, tokenizer, tmp_path / "tokens").tokens.tolist()
        record = json.loads((tmp_path / "tokens.json").read_text())
        del record["sha256"], record["tokens_sha256"], record["made_from"]["content"]
        (tmp_path / "tokens.json").write_text(json.dumps(record))
        message = (
            r"tokens was written by a version that recorded no checksums.* To have them checked, delete .*tokens and t"
        )
        with pytest.warns(UserWarning, match=message):
            assert tokenize(text_file, tokenizer, tmp_path / "tokens").tokens.tolist() == tokens
        with pytest.raises(ValueError, match="made from another text"):  # the warning comes once
            tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=1)

    def test_a_full_disk_leaves_nothing_and_says_so(self, tokenizer, text_file, tmp_path):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            with pytest.raises(OSError, match=r"the disk is full \(.*\), .*tokens was not written: free disk space"):
                tokenize(text_file, tokenizer, tmp_path / "tokens")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["text.txt"]

    def test_an_error_in_the_middle_leaves_nothing(self, tokenizer, tmp_path, monkeypatch):
        monkeypatch.setattr(token_files, "_CHARACTERS", 1)
        (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{')
        with pytest.raises(ValueError, match="line 3"):
            tokenize(tmp_path / "a.jsonl", tokenizer, tmp_path / "tokens")
        assert names(tmp_path) == ["a.jsonl"]

    def test_too_few_documents_to_hold_out(self, tokenizer, text_file, tmp_path):
        with pytest.raises(ValueError, match="15 documents are too few to hold out 15"):
            tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=15)
        with pytest.raises(ValueError, match=r"3 documents are too few .* or raise max_tokens, which is 30"):
            tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=3, max_tokens=30)
        with pytest.raises(ValueError, match="max_tokens at least 1, got -1 and 0"):
            tokenize(text_file, tokenizer, tmp_path / "tokens", held_out=-1, max_tokens=0)
        assert names(tmp_path) == ["text.txt"]

    def test_a_killed_process_leaves_nothing_that_looks_whole(self, tokenizer, tmp_path):
        """kill -9 in the middle: then the same call again ends with the whole file."""
        save_tokenizer(tokenizer, tmp_path)
        text = tmp_path / "a.txt"
        text.write_text("a story that ends")
        script = f"""
from tokenizers import Tokenizer
from bilinear_jax.store import tokens
tokens._CHARACTERS = 100
tokens.read_documents = lambda *_, **__: iter(lambda: "one more story", None)
tokenizer = Tokenizer.from_file({str(tmp_path / "tokenizer.json")!r})
tokens.tokenize({str(text)!r}, tokenizer, {str(tmp_path / "tokens")!r})
"""
        with subprocess.Popen([sys.executable, "-c", script]) as process:
            for _ in range(600):
                written = [path.stat().st_size for path in tmp_path.glob(".tokens.partial-*")]
                if any(written) or process.poll() is not None:
                    break
                time.sleep(0.1)
            process.kill()
        assert any(written), "the process never wrote a token"
        with pytest.raises(FileNotFoundError, match="neither"):
            open_tokens(tmp_path / "tokens")
        assert tokenize(text, tokenizer, tmp_path / "tokens").tokens.tolist() == ids(tokenizer, ["a story that ends"])


class TestBatches:
    def epoch(self, source, n_windows, batch_size) -> np.ndarray:
        """So many batches as one epoch has, [windows, n_ctx]."""
        return np.concatenate([next(source) for _ in range(n_windows // batch_size)])

    def test_an_epoch_shows_every_window_once_and_almost_all_tokens(self):
        """1003 tokens in windows of 10: 99 whole ones at any offset below 10, 33 batches of 3."""
        tokens = np.arange(1003, dtype=np.uint16)
        source = batches(tokens, n_ctx=10, batch_size=3, seed=3)
        assert isinstance(source, BatchIterator)
        offsets, orders = [], []
        for _ in range(4):
            rows = self.epoch(source, 99, 3)
            assert rows.dtype == np.int32
            assert np.all(np.diff(rows, axis=1) == 1)
            assert len(set(rows.ravel().tolist())) == 990
            offsets.append(rows.min())
            orders.append(((rows[:, 0] - rows.min()) // 10).tolist())
        assert len(set(offsets)) > 1
        assert len({tuple(order) for order in orders}) == 4
        assert all(order != sorted(order) for order in orders)

    def test_windows_of_two_epochs_may_share_a_batch_and_none_is_left_out(self):
        """10 windows in batches of 4: after 5 batches each has been seen twice."""
        source = batches(np.arange(110), n_ctx=10, batch_size=4)
        rows = np.concatenate([next(source) for _ in range(5)])
        first, second = rows[:10], rows[10:]
        for epoch in (first, second):
            assert sorted(epoch[:, 0] - epoch.min()) == list(range(0, 100, 10))

    def test_the_state_is_where_it_goes_on_from(self):
        tokens = np.arange(500)
        source = batches(tokens, n_ctx=10, batch_size=4, seed=1)
        for _ in range(30):
            next(source)
        state = json.loads(json.dumps(source.get_state()))
        expected = [next(source) for _ in range(30)]
        for other in (source, batches(tokens, n_ctx=10, batch_size=4, seed=1)):
            other.set_state(state)
            np.testing.assert_array_equal([next(other) for _ in range(30)], expected)
        assert np.any(next(batches(tokens, 10, 4, 1)) != next(batches(tokens, 10, 4, 2)))

    def test_a_program_ends_though_batches_are_still_being_cut(self):
        script = "import numpy as np; from bilinear_jax.training.batches import batches"
        script += "; s = batches(np.arange(99), 5, 2); next(s); print(s.get_state())"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "{'next_index': 1}\n", "")

    def test_tokens_that_the_model_lacks_are_an_error(self):
        """JAX would read another row of the embedding for one below 0, and NaN for one beyond the end."""
        for bad in (-1, 10):
            tokens = np.zeros(100, np.int32)
            tokens[[9, 19, 29]] = bad
            source = batches(tokens, n_ctx=10, batch_size=9, n_vocab=10)
            with pytest.raises(ValueError, match=r"lie outside the vocabulary 0 ... 9: tokenise the text again"):
                next(source)
        for bad in (np.zeros(100), np.zeros((50, 2), np.int32)):
            with pytest.raises(ValueError, match=r"one stream of integers \[tokens\], got"):
                batches(bad, n_ctx=2, batch_size=2)

    def test_too_little_text_is_an_error(self):
        with pytest.raises(ValueError, match="40 tokens are too few for one batch of 4 windows of 10"):
            batches(np.arange(40), n_ctx=10, batch_size=4)
        with pytest.raises(ValueError, match="do not fill one row of 10"):
            held_out_rows(np.arange(9), 10)
        np.testing.assert_array_equal(held_out_rows(np.arange(7), 3), [[0, 1, 2], [3, 4, 5]])
