"""Converting a published model of fw-medium's size, against copying its file; and the memory that this takes.

334 million random weights in float32 (1.3 GB in one safetensors file) are converted to a checkpoint of this library:
read, checked, hashed and written. "Copy" copies that file and waits until it is on disk, as the conversion does for
its checkpoint. The two take turns, and the shortest times are compared. Needs 4.5 GB of free disk.

    python benchmarks/convert.py [FOLDER]      # ratio: seconds of the copy / ours; FOLDER: where it may write

The first case is the function, the second the whole process with its imports. Peak memory is the resident memory of
the whole process, as Linux counts it. The error is 0 if every weight is the same, bit for bit.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from measure import FW_MEDIUM, case, random_params, report

CONVERT = """
import sys, time
from bilinear_jax.store.convert import convert
import bilinear_jax.store.checkpoint, jax, safetensors  # these and JAX's start are in the second case alone
from orbax.checkpoint import v1
jax.devices()
jax.random.key(0)
start = time.perf_counter()
convert(sys.argv[1], sys.argv[2])
seconds = time.perf_counter() - start
[peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(seconds, 1024 * int(peak))
"""
TURNS = 3


def copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copyfile(source, target)
    with open(target, "rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def converted(source: Path, target: Path) -> tuple[float, float, int]:
    """Seconds of the function and of the process, and the process's peak memory in bytes."""
    start = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", CONVERT, str(source), str(target)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - start
    seconds, peak = done.stdout.split()
    return float(seconds), whole, int(peak)


def main():
    import dataclasses

    import weights_convert
    from bilinear_jax.store.checkpoint import load_model

    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as temporary:
        source, target, copied = (Path(temporary) / name for name in ("model", "converted", "copy.safetensors"))
        source.mkdir()
        params = jax.tree.map(np.asarray, random_params(FW_MEDIUM))
        weights_convert.write_transformer(source, dataclasses.asdict(FW_MEDIUM), params)
        file = source / "model.safetensors"
        print(f"{file.stat().st_size} bytes", flush=True)
        copies, functions, processes, peaks = [], [], [], []
        for turn in range(TURNS):
            copies.append(copy(file, copied))
            copied.unlink()
            if turn:
                shutil.rmtree(target)
            one, whole, peak = converted(source, target)
            functions.append(one)
            processes.append(whole)
            peaks.append(peak)
        loaded = jax.tree.map(np.asarray, load_model(target).params)
        same = jax.tree.map(np.array_equal, loaded, params)
        error = 0.0 if all(jax.tree.leaves(same)) else float("nan")
        print(f"peak memory: {max(peaks)} bytes, {max(peaks) / file.stat().st_size:.2f} times the file", flush=True)
        cases = [
            case(f"334M parameters, the {name}", "copy of the file", min(copies), min(seconds), error, max(peaks))
            for name, seconds in (("function", functions), ("process", processes))
        ]
        report("convert", cases)


if __name__ == "__main__":
    main()
