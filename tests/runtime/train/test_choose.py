"""Patterns that are chosen in some steps, and used again in the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from rank_pool import RankFailure, RankPool
from sparsering.cli import app
from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, PatternSpec, make_plan
from sparsering.planner.schedule.pairs import Pairs
from sparsering.runtime.data.writer import byte_tokenizer, write_data
from sparsering.runtime.train.config import ChooseSection, parse_config
from sparsering.runtime.train.estimate.memory import memory_bytes
from sparsering.runtime.train.setup import set_up
from sparsering.traces.dataset.store import Trace
from sparsering.traces.errors import InputError
from train_runs import write_run, write_text

Pools = Callable[[int], RankPool]
PATTERN = {
    "selector": "vertical-slash",
    "settings": {"columns": 16, "slashes": 3, "window_tokens": 20, "sink_tokens": 0},
}
TELLING = {"initializer_range": 0.5}  # weights so large that what is attended depends on the text
LAYERS = 2


def _config(folder: Path, choose: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    plan = {"pattern": PATTERN} | ({} if choose is None else {"choose": choose})
    checked = {"every_steps": 1, "rows": 16, "layers": LAYERS}
    model = TELLING | changes.pop("model", {})
    return write_run(folder, model=model, **({"plan": plan, "steps": 5, "verify": checked} | changes))


def _observed(rank_pools: Pools, config: dict[str, Any]) -> dict[str, Any]:
    return rank_pools(2).run("train_jobs.observed_choices", config=config)[0]


@pytest.fixture(scope="module")
def every_step(tmp_path_factory: pytest.TempPathFactory, rank_pools: Pools) -> dict[str, Any]:
    """A run that says nothing of when patterns are chosen."""
    return _observed(rank_pools, _config(tmp_path_factory.mktemp("every")))


def _same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(np.array_equal(value, wanted["parameters"][name]) for name, value in found["parameters"].items())


@pytest.mark.parametrize("choose", [{"every_steps": 1}, {"until_step": 5}])
def test_chosen_in_every_step_it_is_the_run_that_it_was(
    choose: dict[str, Any], tmp_path: Path, rank_pools: Pools, every_step: dict[str, Any]
) -> None:
    found = _observed(rank_pools, _config(tmp_path, choose))
    assert found["chosen"] == every_step["chosen"] == [LAYERS] * 5
    assert len(set(every_step["hashes"])) == 5  # or the next tests would show nothing
    assert found["hashes"] == every_step["hashes"]
    assert _same(found, every_step)


@pytest.mark.parametrize(
    ("choose", "steps_used"),
    [
        ({"every_steps": 3}, [0, 0, 0, 3, 3]),
        ({"until_step": 2}, [0, 1, 1, 1, 1]),
        ({"every_steps": 2, "until_step": 4}, [0, 0, 2, 2, 2]),
    ],
)
def test_other_steps_use_the_last_patterns_again(
    choose: dict[str, Any], steps_used: list[int], tmp_path: Path, rank_pools: Pools, every_step: dict[str, Any]
) -> None:
    """The self-check holds attention to the patterns that are used in every step."""
    found = _observed(rank_pools, _config(tmp_path, choose))
    assert found["hashes"] == [found["hashes"][used] for used in steps_used]
    assert len(set(found["hashes"])) == len(set(steps_used))
    assert found["hashes"][0] == every_step["hashes"][0]
    for step, used in enumerate(steps_used):
        assert found["chosen"][step] == (LAYERS if used == step else 0)
        assert (found["choosing_ms"][step] > 0) == (used == step)
        values = found["values"][step]
        assert values["patterns_of_step"] == used
        assert values["density_per_head"] == found["values"][used]["density_per_head"]
    masses = [values["kept_mass"] for values in found["values"]]
    assert len(set(masses)) == 5  # of every step's own queries and keys
    assert not _same(found, every_step)


def test_of_several_microbatches_and_replicas_each_replica_keeps_its_first(tmp_path: Path, rank_pools: Pools) -> None:
    config = _config(tmp_path, {"every_steps": 2}, steps=4, microbatches=2, parallel={"data": 2, "context": 2})
    ranks = rank_pools(4).run("train_jobs.observed_choices", config=config)
    for rank in ranks:
        assert rank["chosen"] == [2 * LAYERS, 0, 2 * LAYERS, 0]
        assert rank["firsts"][0] == rank["firsts"][1] != rank["firsts"][2] == rank["firsts"][3]
        assert len(set(rank["hashes"])) == 4  # a step that chooses has two microbatches' patterns
    assert ranks[0]["firsts"] == ranks[1]["firsts"] != ranks[2]["firsts"]


@pytest.mark.parametrize(
    ("choose", "dense", "chosen"),
    [
        ({"dense_every_steps": 2}, [1, 3], [0, 2, 4]),
        ({"dense_from_step": 3}, [3, 4], [0, 1, 2]),
        ({"dense_every_steps": 3, "every_steps": 2}, [2], [0, 2, 4]),  # step 3 uses what is chosen in step 2
    ],
)
def test_some_steps_attend_everything(
    choose: dict[str, Any], dense: list[int], chosen: list[int], tmp_path: Path, rank_pools: Pools
) -> None:
    """The self-check holds attention to the dense pattern, too."""
    found = _observed(rank_pools, _config(tmp_path, choose))
    assert [step for step, values in enumerate(found["values"]) if values["dense"]] == dense
    assert [step for step, count in enumerate(found["chosen"]) if count] == chosen
    for step, values in enumerate(found["values"]):
        assert (np.array(values["density_per_head"]) == 1.0).all() == (step in dense)
        assert (values["kept_mass"] == pytest.approx(1.0, abs=1e-6)) == (step in dense)
    assert len({found["hashes"][step] for step in dense}) == 1


@pytest.mark.parametrize("pattern", [PATTERN, {"selector": "block-mass", "settings": {"least_mass": 0.4}}])
@pytest.mark.parametrize("documents", [False, True])
def test_dense_steps_are_those_of_dense_attention(
    pattern: dict[str, Any], documents: bool, tmp_path: Path, rank_pools: Pools
) -> None:
    runs = []
    for name, plan in (
        ("sparse", {"pattern": pattern}),
        ("dense", {"pattern": pattern, "choose": {"dense_every_steps": 1}}),
        ("whole", {"pattern": {"selector": "dense"}}),
    ):
        (tmp_path / name).mkdir()
        write_data([write_text(tmp_path / name / "text")], tmp_path / name / "data", byte_tokenizer(), align_tokens=64)
        data = {"documents": {"attention": documents}}
        config = write_run(tmp_path / name, model=TELLING, plan=plan, steps=3, data=data)
        runs.append(rank_pools(2).run("train_jobs.run", config=config)[0])
    sparse, dense, whole = runs
    assert _same(dense, whole) and dense["losses"] == whole["losses"]
    assert not _same(sparse, dense)


def test_layers_that_the_model_limits_keep_their_own(tmp_path: Path, rank_pools: Pools) -> None:
    own = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1,
           "layer_types": ["full_attention", "sliding_attention"]}  # fmt: skip
    found = _observed(rank_pools, _config(tmp_path, {"every_steps": 2}, model=own, steps=3))
    assert found["chosen"] == [1, 0, 1]
    assert found["firsts"][0] == found["firsts"][1]


def test_a_stopped_run_resumes_bitwise(tmp_path: Path, rank_pools: Pools) -> None:
    section = {"every_steps": 2, "asynchronous": False}
    runs = []
    for name, stops in (("whole", [None]), ("stopped", [3, None])):
        config = _config(tmp_path / name, {"every_steps": 2}, trace_out={"folder": str(tmp_path / name / "trace"),
                         "every_steps": 1}, checkpoint=section | {"folder": str(tmp_path / name / "c")})  # fmt: skip
        runs.append([rank_pools(2).run("train_jobs.run", config=config, stop_before=stop)[0] for stop in stops][-1])
    assert runs[1]["first"] == 2
    assert runs[0]["losses"][2:] == runs[1]["losses"]
    assert _same(runs[1], runs[0])
    traces = [Trace.open(tmp_path / name / "trace") for name in ("whole", "stopped")]
    for step in range(5):
        heads = [one.layer_pattern(step, 1).heads for one in traces]
        assert [head.columns.tolist() for head in heads[0]] == [head.columns.tolist() for head in heads[1]]


@pytest.mark.parametrize(
    ("choose", "stop", "message"),
    [
        ({"until_step": 2}, 2, "step 2 uses the patterns of step 1, which no checkpoint holds"),
        ({"every_steps": 2}, None, "step 5 uses the patterns of step 4, which no checkpoint holds"),
        ({"every_steps": 1}, 2, "choose: the checkpoint has"),
    ],
)
def test_a_run_does_not_go_on_with_other_patterns(
    choose: dict[str, Any], stop: int | None, message: str, tmp_path: Path, rank_pools: Pools
) -> None:
    section = {"folder": str(tmp_path / "c"), "every_steps": 2, "asynchronous": False}
    config = _config(tmp_path, choose, checkpoint=section)
    rank_pools(2).run("train_jobs.run", config=config, stop_before=stop)
    if choose == {"every_steps": 1}:
        config["plan"]["choose"] = {"every_steps": 2}
    with pytest.raises(InputError) as raised:
        set_up(parse_config(config | {"steps": 7}))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(RankFailure, match="choose"):
        rank_pools(2).run("train_jobs.run", config=config | {"steps": 7})


def test_a_finished_run_is_finished(tmp_path: Path, rank_pools: Pools) -> None:
    section = {"folder": str(tmp_path / "c"), "every_steps": 2, "asynchronous": False}
    config = _config(tmp_path, {"until_step": 2}, checkpoint=section)
    rank_pools(2).run("train_jobs.run", config=config)
    assert rank_pools(2).run("train_jobs.run", config=config)[0]["losses"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "dense"}, "plan.choose: attention 'dense' chooses no patterns"),
        ({"attention": "dense-zigzag"}, "plan.choose: attention 'dense-zigzag' chooses no patterns"),
        ({"data": {"documents": {"attention": True}}}, "plan.choose and data.documents.attention: "),
        ({"checkpoint": {"folder": "c", "every_steps": 4}}, "checkpoint.every_steps 4 is no multiple of plan.choose."),
        ({"max_restarts": 1}, "max_restarts 1 with plan.choose.until_step 4"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as raised:
        parse_config(_config(tmp_path, {"every_steps": 3, "until_step": 4}, **changes))
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_plan_that_replays_a_trace_chooses_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path)
    plan = set_up(parse_config(config)).plan
    given = {"source": "trace", "selector": None, "settings": {}}
    replaying = make_plan(
        attention=AttentionSpec(
            model=plan.model, seq_len_tokens=plan.seq_len_tokens, block_size=plan.block_size, dtype=plan.dtype,
            columns_capacity=plan.columns_capacity,
        ),
        placement=plan.make_placement(), forward=Ring(), kernels=plan.kernels,
        pattern=PatternSpec.model_validate(given),
    )  # fmt: skip
    replaying.save(tmp_path / "plan.json")
    config["plan"] = {"file": str(tmp_path / "plan.json"), "choose": {"every_steps": 2}, "trace": str(tmp_path)}
    with pytest.raises(InputError, match=r"plan\.choose: the plan replays a trace: nothing is chosen"):
        set_up(parse_config(config))


def test_a_plan_that_leaves_out_pairs_has_no_dense_steps(tmp_path: Path) -> None:
    config = _config(tmp_path)
    plan = set_up(parse_config(config)).plan
    apart = make_plan(
        attention=AttentionSpec(
            model=plan.model, seq_len_tokens=plan.seq_len_tokens, block_size=plan.block_size, dtype=plan.dtype,
            columns_capacity=plan.columns_capacity,
        ),
        placement=plan.make_placement(), forward=Ring(), kernels=plan.kernels, pattern=plan.pattern,
        pairs=Pairs.of(np.eye(2, dtype=bool)),
    )  # fmt: skip
    apart.save(tmp_path / "plan.json")
    config["plan"] = {"file": str(tmp_path / "plan.json")}
    set_up(parse_config(config))
    config["plan"] = config["plan"] | {"choose": {"dense_from_step": 3}}
    with pytest.raises(InputError, match=r"plan\.json: plan\.choose: the plan leaves out pairs of shards"):
        set_up(parse_config(config))


def test_checkpoints_from_before_there_were_dense_steps_go_on(tmp_path: Path) -> None:
    setup = set_up(parse_config(_config(tmp_path)))
    manifest = {"facts": setup.run_facts() | {"choose": {"every_steps": 1, "until_step": None}}, "step": 2}
    setup.check_resumed(manifest, source=tmp_path)
    del manifest["facts"]["choose"]
    setup.check_resumed(manifest, source=tmp_path)
    manifest["facts"]["choose"] = {"dense_from_step": 2}
    with pytest.raises(InputError, match="choose: the checkpoint has"):
        setup.check_resumed(manifest, source=tmp_path)


@pytest.mark.parametrize("every", [1, 2, 3, 7])
@pytest.mark.parametrize("until", [None, 1, 4, 6, 100])
def test_how_many_steps_choose(every: int, until: int | None) -> None:
    choose = ChooseSection(every_steps=every, until_step=until)
    last = 0
    for step in range(20):
        last = step if choose.chooses_at(step) else last
        assert choose.chosen_in(step) == last
        assert choose.choosing_steps(step + 1) == sum(map(choose.chooses_at, range(step + 1)))


def test_a_dry_run_says_in_how_many_steps(tmp_path: Path) -> None:
    _config(tmp_path, {"every_steps": 2})
    done = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--dry-run"])
    assert "patterns: chosen in 3 of 5 steps" in done.output
    done = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--dry-run", "--json"])
    assert json.loads(done.stdout)["choosing_steps"] == 3
    _config(tmp_path / "dense", {"dense_from_step": 3})
    done = CliRunner().invoke(app, ["train", str(tmp_path / "dense" / "config.yaml"), "--dry-run"])
    assert "dense: 2 of 5 steps" in done.output


def test_listed_patterns_that_are_kept_take_memory(tmp_path: Path) -> None:
    kept = {}
    for name, choose in (("always", {}), ("seldom", {"every_steps": 2})):
        config = _config(tmp_path / name)
        config["plan"] = {"pattern": {"selector": "xattention"}, "block_size": 64, "choose": choose}
        setup = set_up(parse_config(config))
        sizes = memory_bytes(setup.config, setup.model_config, setup.facts, setup.plan)
        kept[name] = sizes["kept_patterns"]
    assert kept == {"always": 0, "seldom": LAYERS * 4 * 4 * 4}
