"""Hours of random configurations over gloo in processes that live all the time: right, flat, and nothing left.

Ranks 1 to 4 play drawn layers (mask, sizes, heads, placement, layout of each direction, type, documents), which are
compared with the dense reference (float64 to 1e-8, other types with plain torch's error), and small training runs that
check themselves every step and must give the same bits when stopped and resumed; now and then whole verbs run as
processes of their own. Every so many configurations each process is looked into: memory of its own, descriptors,
threads, listening sockets, children, shared memory, temporary files. What gains more an hour than `lib/soak/trends.py`
allows, what is left at the end, and every wrong result is in the result file; exit code 1 where there is any.

    python -m sparsering.benchmarks.soak --hours 2 --seed 0
    python -m sparsering.benchmarks.soak --play '{"kind": "attention", …}'    # one configuration of a result again
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .lib.common import RESULTS, ResultFile
from .lib.soak.draws import Values, draw_training, opening, playable_attention
from .lib.soak.pool import Answer, Pool
from .lib.soak.trends import BOUNDS_AN_HOUR, Trend, trend_of
from .lib.soak.verbs import draw_verbs, play_verbs, write_model_and_data
from .lib.soak.watch import QUANTITIES, files_below, held_by, marked, rest, shared_memory_of

MARK = "SPARSERING_SOAK"
TRAININGS, VERBS = 0.12, 0.015  # shares of the configurations; the others are layers
MOST_TOLD = 300  # problems that stand in the result one by one
ENDED_S = 10.0  # in which processes that were told to end are gone


class Soak:
    """One soak. folder: all that it and its processes write; samples: what each process held, by name."""

    def __init__(self, folder: Path, *, seed: int) -> None:
        self.folder, self.dice = folder, random.Random(seed)
        self.mark = uuid.uuid4().hex
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        tempfile.tempdir = str(self.temporary)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiled")  # which importing torch's compiler makes
        self.environment = os.environ | {MARK: self.mark, "TMPDIR": str(self.temporary), "PYTHONSAFEPATH": "1"}
        self.model, self.data = write_model_and_data(folder)
        self.pools: dict[int, Pool] = {}
        self.starts: Counter[int] = Counter()
        self.processes = [os.getpid()]
        self.began = time.monotonic()
        self.played: Counter[str] = Counter()
        self.refused: dict[str, int] = {}
        self.problems: list[Values] = []
        self.samples: dict[str, list[tuple[float, dict[str, int]]]] = {}

    def run(self, seconds: float) -> Iterator[None]:
        """Play configurations for so long; yields after each."""
        for values in opening():
            self.play(values)
            yield
        while time.monotonic() - self.began < seconds:
            draw = self.dice.random()
            if draw < VERBS:
                values = draw_verbs(self.dice)
            elif draw < VERBS + TRAININGS:
                values = draw_training(self.dice)
            else:
                values = playable_attention(self.dice, self.refused)
            self.play(values)
            yield

    def play(self, values: Values) -> None:
        """Play one configuration and keep what is wrong with it."""
        began, answer = time.monotonic(), Answer()
        work = self.folder / "work"
        work.mkdir()
        try:
            if values["kind"] == "verbs":
                answer = Answer(problems=play_verbs(values, work, environment=self.environment))
            else:
                paths = {"folder": str(work), "model": str(self.model), "data_folder": str(self.data)}
                pool = self._pool(values["world_size"])
                answer = pool.play(values | paths if values["kind"] == "training" else values)
                if not answer.in_step:
                    self._end(values["world_size"])
        except Exception as error:
            answer = Answer(problems=[f"{type(error).__name__}: {error}"])
        finally:
            shutil.rmtree(work)
        if answer.refused is not None:
            reason = f"{values['kind']}: {answer.refused}"[:160]
            self.refused[reason] = self.refused.get(reason, 0) + 1
        self.played[values["kind"]] += answer.refused is None
        if answer.problems:
            self._keep("wrong", answer.problems, values, time.monotonic() - began)

    def sample(self) -> None:
        """Note what every process holds while nothing is played."""
        at = time.monotonic() - self.began
        for pool in list(self.pools.values()):
            if answer := pool.play({"kind": "rest"}).problems:
                self._keep("wrong", answer, {"kind": "rest"}, 0.0)
                self._end(pool.world_size)
        rest()
        named = {"driver": os.getpid()}
        for size, pool in self.pools.items():
            again = f", start {self.starts[size]}" if self.starts[size] > 1 else ""
            named |= {f"rank {rank} of {size}{again}": one.pid for rank, one in enumerate(pool.processes)}
        for name, process in named.items():
            with suppress(FileNotFoundError, ProcessLookupError):
                self.samples.setdefault(name, []).append((at, held_by(process)))
        files = {"files": len(files_below(self.temporary))}
        self.samples.setdefault("all", []).append((at, files))

    def end(self) -> None:
        """End all ranks, and keep what they leave."""
        for size in list(self.pools):
            self._end(size)
        deadline = time.monotonic() + ENDED_S
        while (running := self._running()) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = [f"process {number} still runs: {line}" for number, line in running.items()]
        left += [f"temporary file {name}" for name in files_below(self.temporary)]
        left += [f"shared memory {name}" for name in shared_memory_of(self.processes)]
        if left:
            self._keep("left", left, {"kind": "end"}, 0.0)

    def trends(self) -> list[Trend]:
        """Return how everything that was sampled went."""
        found = []
        for name, samples in self.samples.items():
            times = [at for at, _ in samples]
            for quantity in ("files",) if name == "all" else QUANTITIES:
                found.append(trend_of(name, quantity, times, [held[quantity] for _, held in samples]))
        return found

    def rows(self) -> list[dict[str, Any]]:
        """Return all that is known, as rows of a result."""
        trends = self.trends()
        summary = {
            "row": "summary", "seconds": round(time.monotonic() - self.began, 1),
            **{f"played_{kind}": self.played[kind] for kind in ("attention", "training", "verbs")},
            "wrong": sum(one["row"] == "wrong" for one in self.problems),
            "left": sum(one["row"] == "left" for one in self.problems),
            "not_flat": sum(not one.flat for one in trends), "processes": len(self.samples) - 1,
            "samples": len(self.samples.get("all", ())),
        }  # fmt: skip
        refused = [{"row": "refused", "times": times, "told": told} for told, times in sorted(self.refused.items())]
        totals = [{"row": "sample", "seconds": round(at, 1)} | self._total(at) for at, _ in self.samples.get("all", ())]
        return [summary, *self.problems[:MOST_TOLD], *(one.row() for one in trends), *refused, *totals]

    def _pool(self, size: int) -> Pool:
        if size not in self.pools:
            self.pools[size] = Pool(size, environment=self.environment)
            self.starts[size] += 1
            self.processes += [one.pid for one in self.pools[size].processes]
        return self.pools[size]

    def _end(self, size: int) -> None:
        if problems := self.pools.pop(size).end():
            self._keep("left", problems, {"kind": "end", "world_size": size}, 0.0)

    def _running(self) -> dict[int, str]:
        return {number: line for number, line in marked(self.mark).items() if number != os.getpid()}

    def _total(self, at: float) -> dict[str, int]:
        """Return the sums over all processes of one sample."""
        held = [values for samples in self.samples.values() for when, values in samples if when == at]
        return {name: sum(one.get(name, 0) for one in held) for name in BOUNDS_AN_HOUR}

    def _keep(self, row: str, problems: list[str], values: Values, seconds: float) -> None:
        print(f"{row}: {problems[0][-600:]}\n    {json.dumps(values)}", file=sys.stderr, flush=True)
        self.problems.append(
            {"row": row, "problems": "\n".join(problems)[:4000], "configuration": json.dumps(values),
             "after_seconds": round(time.monotonic() - self.began, 1), "took_seconds": round(seconds, 1)}
        )  # fmt: skip


def main() -> int:
    """Soak, and write what was found; 1 where anything is wrong, was left, or grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=20, help="configurations between two samples")
    parser.add_argument("--play", type=json.loads, help="this configuration alone, as a result has it")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    result = ResultFile("soak", folder=arguments.results)
    soak = Soak(folder, seed=arguments.seed)
    try:
        if arguments.play is not None:
            soak.play(arguments.play)
        else:
            for number, _ in enumerate(soak.run(arguments.hours * 3600), start=1):
                if number % arguments.every == 0:
                    soak.sample()
                    result.write(soak.rows(), finished=False)
                    print(json.dumps(soak.rows()[0]), flush=True)
        soak.end()
        rows = soak.rows()
        if arguments.play is None:
            print(result.write(rows))
    finally:
        for size in list(soak.pools):
            soak.pools.pop(size).end()
        shutil.rmtree(folder)
    print(json.dumps(rows[0]))
    grew = [one for one in rows if one["row"] == "trend" and not one["flat"]]
    for one in grew:
        print(f"grew: {json.dumps(one)}", file=sys.stderr)
    return int(bool(soak.problems or grew))


if __name__ == "__main__":
    sys.exit(main())
