"""One program on eight simulated devices and in two processes: the loss and the gradients of one device."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("jax", reason="JAX is not installed: pip install 'diffusion_lessons[jax]'")

from diffusion_lessons.engine.commands import free_port
from diffusion_lessons.engine.config import InputError
from diffusion_lessons.jax.devices import PROCESS_VARIABLES, join_processes

# The same file for one device, eight, and two processes of four; it prints what it saw as one line of JSON.
PROGRAM = """
import json, sys
from diffusion_lessons.jax.devices import (bytes_held, copies_on, device_mesh, holdings, join_processes, layout_of,
                                           on_host, parts_over, place_batch, place_parameters)
joined = join_processes()
import jax, jax.numpy as jnp, numpy as np

shard = sys.argv[1] == "parts"
draws = np.random.default_rng(0)
shapes = {"in": (48, 64), "bias": (64,), "out": (64, 48)}
initial = {name: draws.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
whole = {name: draws.standard_normal((16, 48)).astype(np.float32) for name in ("subject", "class")}

def loss_of(parameters, rows):
    def error(x):
        return jnp.mean((jnp.tanh(x @ parameters["in"] / 7 + parameters["bias"]) @ parameters["out"] / 8 - x) ** 2)
    return error(rows["subject"]) + 0.5 * error(rows["class"])

def step(parameters, rows):
    loss, gradients = jax.value_and_grad(loss_of)(parameters, rows)
    return jax.tree.map(lambda one, slope: one - 0.5 * slope, parameters, gradients), loss, gradients

mesh = device_mesh()
mine = {name: np.split(rows, jax.process_count())[jax.process_index()] for name, rows in whole.items()}
parameters = place_parameters(initial, mesh, shard)
layout = layout_of(parameters, mesh)
compiled = jax.jit(step, out_shardings=(layout, copies_on(mesh), layout))
losses, first = [], None
for _ in range(4):
    parameters, loss, gradients = compiled(parameters, place_batch(mine, mesh))
    losses.append(float(loss))
    first = first or {name: array.ravel().tolist() for name, array in on_host(gradients).items()}
uneven = ""
try:
    place_batch(np.zeros(len(mesh.local_devices) + 1), mesh) if mesh.size > 1 else None
except ValueError as error:
    uneven = str(error)
print(json.dumps({
    "joined": joined, "processes": jax.process_count(), "process": jax.process_index(), "devices": jax.device_count(),
    "here": jax.local_device_count(), "losses": losses, "gradients": first, "uneven": uneven,
    "weights": {name: array.ravel().tolist() for name, array in on_host(parameters).items()},
    "specs": {name: [axis for axis in array.sharding.spec] for name, array in parameters.items()},
    "held": sorted(set(bytes_held(parameters).values())), "bytes": sum(each.nbytes for each in initial.values()),
    "rows": sorted([one[0].start, one[0].stop] for one in holdings(place_batch(mine, mesh)["subject"]).values()),
    "odd": [list(parts_over(mesh, shape).spec) for shape in ((3, 3, 320, 640), (3, 3, 320, 4), (7, 999), (8, 8))],
}))
"""


def start(devices: int, weights: str, **variables: str) -> subprocess.Popen:
    """One process with so many devices of its own."""
    flags = (f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false "
             "--xla_cpu_collective_call_terminate_timeout_seconds=300")  # a busy machine has the eight wait
    environment = {name: value for name, value in os.environ.items() if name not in PROCESS_VARIABLES}
    environment |= {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, weights], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)


def answers(started: list[subprocess.Popen]) -> list[dict]:
    """What the processes saw."""
    try:
        with ThreadPoolExecutor(len(started)) as pool:  # all at once: a process whose pipe is full would wait for ever
            said = list(pool.map(lambda process: process.communicate(timeout=500), started))
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, said, strict=True):
        assert process.returncode == 0, errors[-2000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in said]


@pytest.fixture(scope="module")
def alone() -> dict:
    (seen,) = answers([start(1, "copies")])
    assert (seen["devices"], seen["processes"], seen["joined"]) == (1, 1, False)
    assert seen["losses"][-1] < seen["losses"][0], "it learns"
    return seen


def same_training(seen: dict, alone: dict) -> None:
    """Losses, gradients of the first step and the last weights are those of one device, up to rounding."""
    np.testing.assert_allclose(seen["losses"], alone["losses"], rtol=1e-5)
    for what in ("gradients", "weights"):
        for name, numbers in alone[what].items():
            largest = np.abs(numbers).max()
            np.testing.assert_allclose(seen[what][name], numbers, rtol=0, atol=1e-5 * largest, err_msg=f"{what} {name}")


@pytest.mark.parametrize("weights", ["copies", "parts"])
def test_eight_devices_train_as_one(weights, alone):
    (seen,) = answers([start(8, weights)])
    assert (seen["devices"], seen["here"], seen["processes"]) == (8, 8, 1)
    same_training(seen, alone)
    assert seen["rows"] == [[2 * device, 2 * device + 2] for device in range(8)], "two rows on each"
    assert "rows on 8 devices" in seen["uneven"]
    if weights == "copies":
        assert seen["held"] == [seen["bytes"]] and not any(seen["specs"].values())
    else:
        assert seen["specs"] == {"in": [None, "data"], "bias": [], "out": ["data", None]}, "longest axis; bias whole"
        assert seen["held"] == [(seen["bytes"] - 64 * 4) // 8 + 64 * 4], "after four steps, too"
    odd = [[None, None, None, "data"], [None, None, "data", None], [], []]
    assert seen["odd"] == odd, "the longest divisible axis; indivisible and small ones whole"


@pytest.mark.parametrize("weights", ["copies", "parts"])
def test_two_processes_train_as_one_device(weights, alone):
    address = f"localhost:{free_port()}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = answers([start(2, weights, **common, JAX_PROCESS_ID=str(number)) for number in range(2)])
    assert [seen["process"] for seen in both] == [0, 1]
    for seen in both:
        assert (seen["processes"], seen["devices"], seen["here"], seen["joined"]) == (2, 4, 2, True)
        same_training(seen, alone)
    assert both[0]["losses"] == both[1]["losses"]


@pytest.mark.parametrize(
    "values, words",
    [
        (("localhost:1", "2", None), "not JAX_PROCESS_ID"),
        ((None, "2", None), "not JAX_COORDINATOR_ADDRESS, JAX_PROCESS_ID"),
        (("localhost:1", "2", "2"), "counted from 0"),
        (("localhost:1", "two", "0"), "JAX_NUM_PROCESSES two"),
    ],
)
def test_variables_that_make_no_sense_are_answered_before_anything_waits(values, words):
    given = {name: value for name, value in zip(PROCESS_VARIABLES, values, strict=True) if value is not None}
    with pytest.raises(InputError, match=words):
        join_processes(given)


def test_without_the_variables_nothing_is_started():
    assert join_processes({}) is False
