"""One program over many devices, and over processes that are joined, gives what one device gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import joined
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from bilinear_jax.training.fit import ByStep
from bilinear_jax.training.mesh import OnMesh, join_processes, make_mesh, one_copy, place, place_rows

PATIENCE = 300  # seconds after which the joined processes are taken to hang


def assert_close(found: list[dict], expected: list[dict]) -> None:
    """The same lines with the same names, and numbers within 1e-5."""
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    for line, other in zip(found, expected, strict=True):
        for key in line:
            np.testing.assert_allclose(line[key], other[key], rtol=1e-5, atol=1e-5, err_msg=key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, list[dict]]:
    """What one device gives."""
    directory = tmp_path_factory.mktemp("alone")
    return {"lm": joined.train_lm(directory / "lm", None), "sae": joined.train_sae(directory / "sae", None)}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """The folder of two processes with two devices each, which share one mesh; the last run in it was stopped."""
    directory = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, joined.__file__, str(directory)]
    processes = [
        subprocess.Popen(
            command, env=environment | {"JAX_PROCESS_ID": str(index)}, stderr=subprocess.PIPE, encoding="utf-8"
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=PATIENCE)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], "\n".join(said)
    assert all(f"stopped at step 6 of 10; it is saved in {directory / 'stopped'}" in text for text in said)
    return directory


@pytest.mark.parametrize("run", ["lm", "sae"])
def test_two_processes_give_what_one_device_gives(alone, together, run):
    for index in range(2):
        assert_close(json.loads((together / f"{index}.json").read_text())[run], alone[run])


def test_what_two_processes_saved_goes_on_on_one_device(together, tmp_path):
    """A signal to one of them stopped both at the next step that was logged; the run ends as if on one device."""
    expected = joined.train_until_told(tmp_path, None)
    np.testing.assert_allclose(joined.train_until_told(together / "stopped", None), expected, rtol=1e-5, atol=1e-5)
    assert [line["step"] for line in joined.metrics(together / "stopped")] == [3, 6, 9, 10]
    assert_close(joined.metrics(together / "stopped"), joined.metrics(tmp_path))


def test_weights_are_cut_as_the_table_says_and_moments_with_them():
    params = joined.weights()
    state = place({"params": params, "opt_state": optax.adam(1e-3).init(params)}, make_mesh(4, 2))
    adam = state["opt_state"][0]
    for tree in (state["params"], adam.mu, adam.nu):
        attention, mlp = tree["layers"]["attention"], tree["layers"]["mlp"]
        assert attention["w_q"].sharding.spec == attention["w_v"].sharding.spec == P(None, "model", None)
        assert attention["w_o"].sharding.spec == mlp["w_p"].sharding.spec == P(None, None, "model")
        assert mlp["w_l"].sharding.spec == mlp["w_r"].sharding.spec == P(None, "model", None)
        assert tree["w_e"].sharding.spec == tree["w_u"].sharding.spec == P("model", None)
        assert mlp["w_l"].addressable_shards[0].data.shape == (2, 16, 16)
    assert adam.count.sharding.spec == P()
    jax.tree.map(np.testing.assert_array_equal, one_copy(state["params"], make_mesh(4, 2)), params)


def test_what_cannot_be_cut_evenly_stays_whole():
    params = place({"w_e": jnp.ones((31, 4)), "w_dec": jnp.ones((4, 6)), "b_dec": jnp.ones(4)}, make_mesh(4, 2))
    assert [params[name].sharding.spec for name in ("w_e", "w_dec", "b_dec")] == [P(), P(None, "model"), P(None)]


def test_keys_are_placed():
    placed = place({"key": jax.random.key(5)}, make_mesh(8))["key"]
    assert len(placed.sharding.device_set) == 8
    np.testing.assert_array_equal(jax.random.normal(placed, (3,)), jax.random.normal(jax.random.key(5), (3,)))


def test_each_device_gets_its_rows():
    mesh = make_mesh(4, 2)
    batch = next(OnMesh(ByStep(lambda step: {"x": np.arange(24).reshape(8, 3)}), mesh))["x"]
    for shard in batch.addressable_shards:
        part = int(np.argwhere(mesh.devices == shard.device)[0, 0])
        np.testing.assert_array_equal(shard.data, np.arange(24).reshape(8, 3)[2 * part : 2 * part + 2])
    assert place_rows(np.zeros((7, 3)), mesh).sharding.spec == P()
    with pytest.raises(
        ValueError, match=r"a batch of 6 rows cannot be split evenly over 4 devices: .* a multiple of 4"
    ):
        next(OnMesh(ByStep(lambda step: np.zeros((6, 2))), mesh))


def test_a_mesh_has_all_devices():
    assert dict(make_mesh(model=2).shape) == {"data": 4, "model": 2}
    for wrong in [(3, 2), (8, 2), (None, 3), (None, 0), (0, 8)]:
        with pytest.raises(ValueError, match="do not make 8, the number of devices"):
            make_mesh(*wrong)


@pytest.mark.parametrize(
    "given, environment, message",
    [
        (("10.0.0.1:1234",), {}, r"also give processes \(\$JAX_NUM_PROCESSES\) and index \(\$JAX_PROCESS_ID\)"),
        ((None, 2, 0), {}, r"also give coordinator \(\$JAX_COORDINATOR_ADDRESS\)"),
        (("10.0.0.1:1234", 2, 2), {}, "index must lie in 0 ... 1, got 2"),
        (("10.0.0.1", 2, 0), {}, "coordinator must be \"address:port\", .* got '10.0.0.1'"),
        (("10.0.0.1:1234", 2), {"JAX_PROCESS_ID": "one"}, r"\$JAX_PROCESS_ID must be a number, got 'one'"),
        (("127.0.0.1:9", 2, 1), {}, r"no answer from 127.0.0.1:9 for 0 s \(.*\): check that process 0 is running"),
        (("10.0.0.1:1234", 2, 0), {}, "process 0 of 2 could not join the others at 10.0.0.1:1234: .*before any JAX"),
    ],
)
def test_joining_says_what_is_missing(monkeypatch, given, environment, message):
    jax.devices()
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, RuntimeError), match=message):
        join_processes(*given, timeout=0.0)


def test_alone_there_is_nobody_to_join(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    join_processes()
    assert jax.process_count() == 1
