"""Texts and token ids that are endless, or much larger than their files: little is read, and little memory is used."""

import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pyarrow as pa
import pyarrow.parquet

import bilinear_jax as bj
from bilinear_jax.store.datasets import LONGEST_ROW
from bilinear_jax.store.documents import LARGEST_DOCUMENT

MEMBER = gzip.compress(b"a" * 2**24, mtime=0)  # 16 kB of gzip are 16 MB of text


def parquet(path: Path, column, name: str = "text", **options) -> None:
    pyarrow.parquet.write_table(pa.table({name: column}), path, **options)


def repeated(values: pa.Array, count: int) -> pa.Array:
    """The first of the values, many times; on disk it is stored once."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), values)


def write_texts(folder: Path) -> None:
    """4 GB of text each, in small files."""
    (folder / "one.txt.gz").write_bytes(MEMBER * 256)
    (folder / "one.jsonl.gz").write_bytes(gzip.compress(b'{"text": "', mtime=0) + MEMBER * 256)
    (folder / "many.txt.gz").write_bytes((MEMBER + gzip.compress(b"<|endoftext|>", mtime=0)) * 256)
    parquet(folder / "many.parquet", repeated(pa.array(["a" * 2**24]), 256))
    large = repeated(pa.array(["a" * (4 * LARGEST_DOCUMENT + 1)]), 100)
    parquet(folder / "one.parquet", large, compression="zstd")


READ = """
import itertools, resource, sys
from pathlib import Path
import pyarrow.compute, pyarrow.parquet
from bilinear_jax.store.datasets import load_token_rows
from bilinear_jax.store.documents import read_documents
from bilinear_jax.store.tokenizers import load_tokenizer
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (1 << 30), taken + (1 << 30)))
def attempt(name, read):
    try:
        print(name, read(), flush=True)
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()), flush=True)
folder = Path(sys.argv[1])
"""


def run(code: str, folder: Path) -> list[str]:
    """What a program prints that may take one gigabyte of addresses more than its imports, within two minutes."""
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"}
    environment |= {"PYTHONPATH": str(Path(bj.__file__).parents[1])}
    command = [sys.executable, "-c", READ + code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_four_gigabytes_of_text_in_a_small_file(tmp_path):
    write_texts(tmp_path)
    printed = run(
        """
for path in sorted(folder.iterdir()):
    attempt(path.name, lambda: [len(text) for text in itertools.islice(read_documents(path), 4)])
""",
        tmp_path,
    )
    most = f"has more than {LARGEST_DOCUMENT} characters, which would take much memory"
    raise_it = "or raise max_characters (--max-characters, or --data.max_characters for training)"
    assert printed == [
        f"many.parquet {[2**24] * 4}",
        f"many.txt.gz {[2**24] * 4}",
        f"one.jsonl.gz ValueError line 1 of {tmp_path}/one.jsonl.gz {most}: cut it, {raise_it}",
        f"one.parquet ValueError a document of {tmp_path}/one.parquet {most}: cut it, {raise_it}",
        f"one.txt.gz ValueError a document of {tmp_path}/one.txt.gz {most}: separate its documents with "
        f"<|endoftext|>, {raise_it}",
    ]


def test_many_token_ids_of_which_four_rows_are_read(tmp_path):
    ids = pa.ListArray.from_arrays(np.arange(0, 2**25 + 1, 2**10, dtype=np.int32), pa.array(np.zeros(2**25, np.int8)))
    with pyarrow.parquet.ParquetWriter(tmp_path / "rows.parquet", pa.schema({"input_ids": ids.type})) as file:
        for _ in range(4):
            file.write_table(pa.table({"input_ids": ids}))
    wide = pa.ListArray.from_arrays(np.array([0, 2**25], np.int32), pa.array(np.zeros(2**25, np.int8)))
    parquet(tmp_path / "wide.parquet", wide, "input_ids")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2**21
    printed = run(
        """
for name in ("rows", "wide"):
    attempt(name, lambda: load_token_rows(folder / f"{name}.parquet", rows=4).shape)
""",
        tmp_path,
    )
    assert printed == [
        "rows (4, 1024)",
        f"wide ValueError {tmp_path}/wide.parquet has rows of 33554432 token ids, but at most {LONGEST_ROW} are read "
        "from a Parquet file: cut the rows, or save them with numpy.save, as a .npy file",
    ]


def test_endless_files_of_a_tokenizer(tmp_path):
    """Devices, pipes, 8 GB of zeros and brackets, as a tokenizer.json and beside one."""
    published.write_tokenizer(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for kind in ("pipe", "zeros", "brackets"):
            place = tmp_path / f"{kind}-{name}"
            place.mkdir()
            (place / "tokenizer.json").write_text(whole)
            (place / name).unlink(missing_ok=True)
            if kind == "pipe":
                os.mkfifo(place / name)
            elif kind == "zeros":
                with open(place / name, "wb") as file:
                    file.truncate(2**33)
            else:
                (place / name).write_text("[" * 200_000)
    printed = run(
        """
for place in sorted(path for path in folder.iterdir() if path.is_dir()):
    attempt(place.name, lambda: load_tokenizer(str(place), None))
attempt("device", lambda: load_tokenizer("/dev/zero", None))
""",
        tmp_path,
    )
    expected = {
        "brackets-tokenizer.json": "ValueError .* is not a tokenizer that can be read",
        "brackets-tokenizer_config.json": "ValueError .* is not JSON",
        "device": "FileNotFoundError .*/dev/zero is a file",
        "pipe-tokenizer.json": "FileNotFoundError .* has no tokenizer.json",
        "pipe-tokenizer_config.json": "ValueError .* is not a file",
        "zeros-tokenizer.json": r"ValueError .* has 8589934592 bytes, but at most \d+ are read",
        "zeros-tokenizer_config.json": r"ValueError .* has 8589934592 bytes, but at most \d+ are read",
    }
    lines = dict(line.split(" ", 1) for line in printed)
    assert lines.keys() == expected.keys()
    for name, message in expected.items():
        assert re.match(message, lines[name]), (name, lines[name])
