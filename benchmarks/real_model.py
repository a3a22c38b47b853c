"""A real model beside transformers with torch, on the same weights: loading, forward pass, generation; certifying it.

The file is SmolLM2-135M-Instruct.Q4_1.gguf (``.ci/run`` gets it). The two programs are processes that take turns, each
on all cores, in float32, with torch's defaults: sdpa and a cache. Each measurement is the best of its turns, because
the others were disturbed by something else. Processor seconds are those of the best turn. Let nothing else run: the
threads of torch wait for each other without giving up the core, so a busy core costs torch far more than it costs us.

Loading is compared with reading the file. Its peak memory is that of a fresh process, less that of one which only
imports the library; it is given as a multiple of the float32 weights.

A token of one text needs all weights once, so generation cannot be faster than the memory: "reading" is the time of
summing all of them.

The bilinear form of all layers and its certificate, from 16 thousand tokens, are compared with three forward passes
over these tokens and a minute. It is done once, between two passes, so its compilation is part of it. The tokens are
random: the time does not depend on them.

    python benchmarks/real_model.py MODEL.gguf [--torch PYTHON]

PYTHON is an interpreter with torch, transformers, gguf and accelerate; by default this one. The error of "forward" is
the largest difference of log-probabilities, that of "generation" the share of tokens that differ.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

BATCH, SEQ = 4, 256
PROMPT, NEW = 16, 64
TURNS = 12
CERTIFIED = 64, 256

Workloads = dict[str, Callable[[], Any]]


def tokens(n_vocab: int, shape: tuple[int, int] = (BATCH, SEQ)) -> np.ndarray:
    return np.random.default_rng(0).integers(0, n_vocab, shape)


def peak() -> int:
    """The largest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def our_workloads(path: Path) -> tuple[Workloads, dict]:
    import jax
    import jax.numpy as jnp

    import bilinear_jax as bj
    from bilinear_jax.nn.generation import generate

    jax.block_until_ready(jnp.zeros(1))  # the backend is there
    before, start = peak(), time.perf_counter()
    lm = bj.load(path)
    jax.block_until_ready(lm.params)
    facts = {"load": time.perf_counter() - start, "memory": peak() - before}
    facts["weights"] = 4 * sum(a.size for a in jax.tree.leaves(lm.params))
    # Every layer's matrices and the unembedding; the embedding is only looked up.
    matrices = sum(a.size for a in jax.tree.leaves(lm.params["layers"]) if a.ndim == 3) + lm.w_u.size
    facts["products"] = 2 * BATCH * SEQ * matrices
    rows = tokens(lm.config.n_vocab)
    square = jax.random.normal(jax.random.key(0), (2048, 2048))
    multiply = jax.jit(jnp.matmul)
    add_up = jax.jit(lambda params: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)))
    many = tokens(lm.config.n_vocab, CERTIFIED)
    return {
        "forward": lambda: lm.logits(rows),
        "generation": lambda: generate(lm.config, lm.params, rows[:1, :PROMPT], max_length=NEW, temperature=0.0),
        "product": lambda: multiply(square, square),
        "reading": lambda: add_up(lm.params),
        "pass": lambda: lm.mean_loss(many).loss,
        "certify": lambda: bj.bilinear_form(lm, many).certificate.r2,
    }, facts


def torch_workloads(path: Path) -> tuple[Workloads, dict]:
    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    facts = {"load": time.perf_counter() - start}
    model.generation_config.eos_token_id = None  # so that all tokens are drawn
    model.generation_config.pad_token_id = 0
    rows = torch.from_numpy(tokens(model.config.vocab_size))
    prompt = rows[:1, :PROMPT]

    def forward():
        with torch.inference_mode():
            return model(rows, use_cache=False).logits.numpy()

    def generation():
        with torch.inference_mode():
            every = torch.ones_like(prompt)
            return model.generate(prompt, attention_mask=every, do_sample=False, max_new_tokens=NEW)[:, PROMPT:].numpy()

    return {"forward": forward, "generation": generation}, facts


def work(program: str, path: Path) -> None:
    """One of the two programs: it answers each line, the name of a workload and a file or nothing, with a JSON line."""
    answer = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    workloads, facts = {"ours": our_workloads, "torch": torch_workloads}[program](path)
    print(json.dumps(facts), file=answer, flush=True)
    for line in sys.stdin:
        name, *file = line.rstrip("\n").split(" ", maxsplit=1)
        start, busy = time.perf_counter(), time.process_time()
        result = np.asarray(workloads[name]())
        seconds = {"seconds": time.perf_counter() - start, "processor": time.process_time() - busy}
        if file:
            np.save(file[0], result)
        print(json.dumps(seconds), file=answer, flush=True)


class Program:
    """A running process of ``work``."""

    def __init__(self, python: str, program: str, path: Path):
        command = [python, __file__, str(path), "--program", program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self.answer()
        self.best: dict[str, dict] = {}

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a program ended before it answered; its error is above")
        return json.loads(line)

    def run(self, name: str, file: Path | None = None) -> None:
        self.process.stdin.write(f"{name} {file}\n" if file else f"{name}\n")
        self.process.stdin.flush()
        took = self.answer()
        if not file:  # that call also compiles
            self.best[name] = min(took, self.best.get(name, took), key=lambda t: t["seconds"])

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def reading(path: Path) -> float:
    """The least seconds of reading the file from the system's cache into memory."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        np.fromfile(path, np.uint8)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def errors(folder: Path) -> dict[str, float]:
    """How far the two programs' results are apart."""
    from scipy.special import log_softmax

    ours, theirs = (np.load(folder / f"{program}-forward.npy") for program in ("ours", "torch"))
    # A row at a time: four rows of log-probabilities would be a gigabyte.
    apart = max(float(np.abs(log_softmax(a, -1) - log_softmax(b, -1)).max()) for a, b in zip(ours, theirs, strict=True))
    new, expected = (np.load(folder / f"{program}-generation.npy") for program in ("ours", "torch"))
    return {"forward": apart, "generation": float(np.mean(new != expected))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="an interpreter that has torch")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--program", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.program:
        return work(args.program, args.path.resolve())

    from measure import case, report

    loads = []
    for _ in range(3):
        again = Program(sys.executable, "ours", args.path)
        again.close()
        loads.append(again.facts)
    load, memory = min(f["load"] for f in loads), max(f["memory"] for f in loads)
    print(f"loading: {load:.2f} s, at most {memory / loads[0]['weights']:.2f} times the float32 weights", flush=True)
    cases = [case("load", "reading the file", reading(args.path), load, 0.0, memory)]
    programs = {"ours": Program(sys.executable, "ours", args.path), "torch": Program(args.torch, "torch", args.path)}
    print(f"transformers loads the file in {programs['torch'].facts['load']:.2f} s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("forward", "generation"):
            for label, program in programs.items():
                program.run(name, Path(folder) / f"{label}-{name}.npy")
            for _ in range(args.turns):
                for program in programs.values():
                    program.run(name)
                programs["ours"].run("product")
                programs["ours"].run("reading")
        error = errors(Path(folder))
    best = {label: program.best for label, program in programs.items()}
    for name, count in (("forward", BATCH * SEQ), ("generation", NEW)):
        for label in programs:
            took = best[label][name]
            print(
                f"{name}, {label}: {count / took['seconds']:.1f} tokens/s, {took['processor']:.2f} s of the processor"
            )
        seconds = (best[label][name]["seconds"] for label in ("torch", "ours"))
        cases.append(case(name, "transformers with torch", *seconds, error[name], memory))
    rate = programs["ours"].facts["products"] / best["ours"]["forward"]["seconds"]
    share = rate / (2 * 2048**3 / best["ours"]["product"]["seconds"])
    print(f"the matrix products of the forward pass alone, at the rate of a large one: {share:.0%} of its time")
    step = best["ours"]["generation"]["seconds"] / NEW
    reading_once = best["ours"]["reading"]["seconds"]
    print(f"a generated token: {step * 1e3:.1f} ms; reading the weights once: {reading_once * 1e3:.1f} ms")
    programs["torch"].close()
    for name in ("pass", "certify", "pass"):
        programs["ours"].run(name)
    programs["ours"].close()
    one_pass, took = (best["ours"][name]["seconds"] for name in ("pass", "certify"))
    print(f"a forward pass over {np.prod(CERTIFIED):,} tokens: {one_pass:.1f} s; certifying: {took:.1f} s")
    cases.append(case("certify", "three forward passes and a minute", 3 * one_pass + 60, took, 0.0, memory))
    report("real_model", cases)


if __name__ == "__main__":
    main()
