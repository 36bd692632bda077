"""kill -9 and Ctrl-C before every single step in the file system that a verb's work takes, one run for each.

`test_crashes.py` kills at random moments, which meets the short ones by luck only.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mistakes import PLAN, TRACE, assert_one_line, listing, used
from moments import CTRL_C, KILL, Ended, Moments, moments

MOST_STEPS = 150  # of one command line


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A command line that writes.

    output: its file or folder; valid: a command line that accepts it; once: an output that is there whole is refused;
    alike: two runs write the same (a plan names the seconds that it took).
    """

    arguments: str
    output: str
    valid: str
    once: bool = False
    alike: bool = True


SYNTHESIZE = f"synthesize vertical-slash {TRACE} -o out"
VERBS = {
    "synthesize": Writing(arguments=SYNTHESIZE, output="out", valid="inspect out"),
    "synthesize, into an empty folder": Writing(
        arguments=SYNTHESIZE.replace("-o out", "-o empty"), output="empty", valid="inspect empty"
    ),
    "synthesize, continued": Writing(
        arguments=f"{SYNTHESIZE.replace('-o out', '-o trace')} --steps 2", output="trace", valid="inspect trace"
    ),
    "plan, again": Writing(arguments=f"plan --trace trace {PLAN} --layout ring -o plan.json", output="plan.json",
                           valid="check plan.json", alike=False),
    "export": Writing(arguments="export timeline.json.gz -o out", output="out", valid="", once=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good files to work on."""
    folder, before = tmp_path_factory.mktemp("moments") / "good", Path.cwd()
    folder.mkdir()
    os.chdir(folder)
    try:
        used(f"synthesize vertical-slash -o trace {TRACE}")
        used(f"plan --trace trace {PLAN} -o plan.json")
        used("simulate plan.json --cluster local-cpu-4 -o timeline.json.gz")
        (folder / "empty").mkdir()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module")
def ended_at() -> Iterator[Moments]:
    """What runs a command line up to a moment."""
    with moments() as found:
        yield found


def _each_moment(ended_at: Moments, good: Path, writing: Writing, end: str) -> Iterator[tuple[Path, Ended]]:
    """Yield a folder for each step, and how the command line ended that was stopped there before it."""
    for step in range(1, MOST_STEPS):
        folder = good.parent / "at"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        ended = ended_at.run(writing.arguments, folder, end=end, before=step)
        if ended.code == 0:  # it takes fewer steps
            assert step > 4
            return
        yield folder, ended
    raise AssertionError(f"more than {MOST_STEPS} steps")


def _whole(ended_at: Moments, folder: Path, writing: Writing) -> bool:
    """Whether the output is there and valid; fails where it is there and is not."""
    output = folder / writing.output
    if not output.exists() or (writing.output == "empty" and not (output / "manifest.json").exists()):
        return False
    seen = ended_at.run(writing.valid, folder) if writing.valid else Ended(0, "")
    assert seen.code == 0 or "no training step" in seen.stderr, seen.stderr
    return seen.code == 0


def _without(found: dict[str, str], writing: Writing) -> dict[str, str]:
    """A listing without what differs from run to run."""
    return {name: digest for name, digest in found.items() if writing.alike or name != writing.output}


def _finished(ended_at: Moments, good: Path, writing: Writing) -> dict[str, str]:
    """What is there after a run that nothing stopped."""
    folder = good.parent / "finished"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    assert ended_at.run(writing.arguments, folder).code == 0
    assert _whole(ended_at, folder, writing)
    return _without(listing(folder), writing)


@pytest.mark.parametrize("verb", VERBS)
def test_killed_before_any_step_it_goes_on_or_begins_anew(ended_at: Moments, good: Path, verb: str) -> None:
    writing = VERBS[verb]
    wanted = _finished(ended_at, good, writing)
    for folder, ended in _each_moment(ended_at, good, writing, KILL):
        assert ended.code == -signal.SIGKILL
        whole = _whole(ended_at, folder, writing)
        again = ended_at.run(writing.arguments, folder)
        if whole and writing.once:
            assert_one_line(again.stderr, ["is not empty"])
        else:
            assert again.code == 0, again.stderr
        assert _without(listing(folder), writing) == wanted


@pytest.mark.parametrize("verb", VERBS)
def test_interrupted_before_any_step_it_leaves_nothing_or_the_whole(ended_at: Moments, good: Path, verb: str) -> None:
    writing = VERBS[verb]
    before, wanted = _without(listing(good), writing), _finished(ended_at, good, writing)
    for folder, ended in _each_moment(ended_at, good, writing, CTRL_C):
        assert (ended.code, ended.stderr) == (128 + signal.SIGINT, "sparsering: interrupted\n")
        assert _without(listing(folder), writing) in (before, wanted)
        assert ended_at.run(writing.arguments, folder).code == 0 or _whole(ended_at, folder, writing)
        assert _without(listing(folder), writing) == wanted
