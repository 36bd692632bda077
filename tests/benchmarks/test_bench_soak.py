"""benchmarks/soak.py: what it draws can be played again, what it watches it sees, and a short one is whole."""

from __future__ import annotations

import json
import mmap
import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsering.benchmarks.lib.soak import draws, pool, trends, watch
from sparsering.benchmarks.lib.soak.trends import trend_of
from sparsering.planner.layouts.registry import make_layout
from sparsering.planner.schedule.schedule import DIRECTIONS, Communicator
from sparsering.runtime.train.config import parse_config

HOUR_S = 3600.0
PLAIN = {
    "kind": "attention", "seed": 5, "world_size": 2, "mask": "vertical-slash", "seq_len_tokens": 300, "block_size": 64,
    "heads": 4, "kv_heads": 2, "head_dim": 16, "density": 0.3, "columns": 40, "documents": 2, "dtype": "float64",
    "batch": 2, "placement": "zigzag", "granularity_tokens": 64, "leave_out": True, "reorder_heads": True,
    "poison": True, "launches": "two", "forward": "ring", "forward_parameters": {"prefetch": 1}, "backward": "gather",
    "backward_parameters": {"chunks": 1},
}  # fmt: skip
KEPT_BYTES = 24 << 20


def test_configurations_are_json_and_say_all_of_a_case() -> None:
    dice, refused = random.Random(0), dict[str, int]()
    for _ in range(20):
        values = draws.playable_attention(dice, refused)
        again = json.loads(json.dumps(values))
        assert draws.attention_case(again).plan.digest == draws.attention_case(values).plan.digest
    assert set(refused) and all("\n" not in told for told in refused)


def test_a_soak_begins_with_every_communicator() -> None:
    opened = list(draws.opening())
    assert {(one["kind"], one["world_size"]) for one in opened} >= {("attention", n) for n in range(1, 5)}
    trained = [one for one in opened if one["kind"] == "training"]
    assert {one["world_size"] for one in trained} == {1, 2, 3, 4} and all(one["trace_out"] for one in trained)
    assert {one["forward"] for one in opened if one["kind"] == "attention"} >= {"ring", "gather", "hierarchical"}


def test_no_draw_asks_for_a_communicator_that_is_not_open() -> None:
    opened: dict[tuple[int, int], set[Communicator]] = {}
    for values in draws.opening():
        of_layer = values["kind"] == "attention"
        split = (values["world_size"], 1) if of_layer else (values["context"], values["data"])
        way = ("forward", "forward_parameters") if of_layer else ("layout", "layout_parameters")
        layout = make_layout(values[way[0]], values[way[1]])
        opened.setdefault(split, set()).update(draws.communicators_of(layout, split[0]))
    dice, refused = random.Random(1), dict[str, int]()
    for _ in range(150):
        values = draws.draw_training(dice)
        layout = make_layout(values["layout"], values["layout_parameters"])
        asked = draws.communicators_of(layout, values["context"])
        assert asked <= opened[values["context"], values["data"]], values
    for _ in range(30):
        values = draws.playable_attention(dice, refused)
        plan = draws.attention_case(values).plan
        asked = {one for way in DIRECTIONS for one in plan.schedule(way).communicators}
        assert asked <= opened[values["world_size"], 1], values
    assert set(opened) == set(draws.SPLITS)


def test_training_configurations_are_taken(tmp_path: Path) -> None:
    for seed in range(30):
        values = draws.draw_training(random.Random(seed))
        assert 1 <= values["stop_before"] < values["steps"]
        plan = {"layout": values["layout"], "layout_parameters": values["layout_parameters"],
                "pattern": {"selector": values["selector"], "settings": values["settings"]}}  # fmt: skip
        places = {"model": {"path": tmp_path}, "data": {"folder": tmp_path}, "seq_len_tokens": 64, "steps": 1}
        assert parse_config(places | {"plan": plan}).plan.layout == values["layout"]


@pytest.mark.parametrize(
    ("quantity", "values", "flat"),
    [
        ("memory_bytes", lambda hour: 10**9 + 12 * 2**20 * hour, True),
        ("memory_bytes", lambda hour: 10**9 + 30 * 2**20 * hour, False),
        ("memory_bytes", lambda hour: 10**9 + (10**9 if 0.9 < hour < 1 else 0), True),  # one busy moment
        ("memory_bytes", lambda hour: 10**9 * min(hour, 0.3), True),  # the warm-up
        ("descriptors", lambda hour: 100, True),
        ("descriptors", lambda hour: 100 + int(hour), False),
        ("threads", lambda hour: 100 - int(hour), True),
    ],
)
def test_what_is_called_flat(quantity: str, values: Callable[[float], float], flat: bool) -> None:
    times_s = np.linspace(0, 2 * HOUR_S, 100)
    trend = trend_of("rank 0 of 2", quantity, times_s.tolist(), [int(values(at / HOUR_S)) for at in times_s])
    assert trend.flat == flat, trend


def test_few_samples_say_nothing() -> None:
    assert trend_of("rank 0 of 2", "threads", [0.0, 60.0], [1, 100]).slope is None


def test_everything_that_a_process_holds_is_seen(tmp_path: Path) -> None:
    before = watch.held_by(os.getpid())
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    held = [open(tmp_path / f"{number}", "w") for number in range(5)]  # noqa: SIM115
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        # Pages of its own: an array may lie where a heap that others left had room.
        kept = mmap.mmap(-1, KEPT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        kept.write(b"1" * KEPT_BYTES)
        after = watch.held_by(os.getpid())
    done.set()
    thread.join()
    assert sleeper.pid in watch.children_of(os.getpid())
    sleeper.communicate(b"\n")
    for one in held:
        one.close()
    more = {name: after[name] - before[name] for name in watch.QUANTITIES}
    assert more["memory_bytes"] >= KEPT_BYTES
    kept.close()
    assert more["descriptors"] == 5 + 1 + 1  # files, the socket, the pipe to the child
    assert (more["threads"], more["listening"], more["children"]) == (1, 1, 1)
    assert watch.files_below(tmp_path) == [str(number) for number in range(5)]


def test_pages_of_files_are_nobodys_memory(tmp_path: Path) -> None:
    (tmp_path / "library").write_bytes(b"1" * KEPT_BYTES)
    with open(tmp_path / "library", "rb") as file:
        mapped = mmap.mmap(file.fileno(), KEPT_BYTES, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    before = watch.held_by(os.getpid())["memory_bytes"]
    assert sum(mapped[at] for at in range(0, KEPT_BYTES, mmap.PAGESIZE))
    assert watch.held_by(os.getpid())["memory_bytes"] - before < KEPT_BYTES // 2
    mapped.close()


# Threads that need memory at the same time, after one large array was freed, which makes glibc keep more.
BUSY_THREADS = """
import os, threading
import numpy as np
from sparsering.benchmarks.lib.soak.watch import held_by, rest
meet, end = threading.Barrier(9), threading.Event()
def work():
    meet.wait()
    arrays = [np.ones(12_000) for _ in range(200)]
    meet.wait()
    del arrays
    meet.wait()
    end.wait()
large = np.ones(2_500_000)
del large
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
rest()
before = held_by(os.getpid())["memory_bytes"]
for _ in range(3):
    meet.wait()
rest()
print(held_by(os.getpid())["memory_bytes"] - before)
end.set()
"""


def test_ranks_give_back_what_their_threads_have_freed() -> None:
    environment = os.environ | pool.SETTLED | {"PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", BUSY_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment, check=True)
    assert int(done.stdout) < 8 << 20


def _soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sparsering.benchmarks.soak", *arguments]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, check=False)


def _summary(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_configuration_can_be_played_again() -> None:
    done = _soak("--play", json.dumps(PLAIN))
    assert done.returncode == 0, done.stderr
    assert _summary(done)["played_attention"] == 1 and _summary(done)["wrong"] == _summary(done)["left"] == 0


@pytest.mark.slow
def test_a_wrong_result_ends_with_1() -> None:
    done = _soak("--play", json.dumps(PLAIN | {"kind": "nothing that ranks can play"}))
    assert done.returncode == 1
    assert _summary(done)["wrong"] == 1 and "wrong: rank 0: Traceback" in done.stderr


def test_bounds_are_of_everything_that_is_watched() -> None:
    assert set(trends.BOUNDS_AN_HOUR) == {*watch.QUANTITIES, "files"}
