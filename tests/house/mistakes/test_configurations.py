"""Mistakes in cluster files and in training configurations."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistakes import Mistake, judge, mistake, names


def _train(name: str, *says: str) -> Mistake:
    return mistake(f"train train-{name}.yaml --dry-run", *says)


def _cluster(name: str, *says: str) -> Mistake:
    return mistake(f"plan --trace trace --cluster cluster-{name}.yaml -o new.json", f"cluster-{name}.yaml", *says)


MISTAKES = [
    _train("misspelt", "optimiser", "did you mean 'optimizer'?"),
    _train("misspelt-inside", "optimizer.learning_rte", "did you mean 'learning_rate'?"),
    _train("negative", "steps", "-1"),
    _train("nan", "learning_rate", "nan"),
    _train("text-for-number", "steps", "'many'"),
    _train("list-for-section", "optimizer", "mapping"),
    _train("layout", "layout", "did you mean 'ring'?"),
    _train("layout-parameter", "prefech", "did you mean 'prefetch'?"),
    _train("selector", "did you mean 'vertical-slash'?"),
    _train("setting", "window_token", "did you mean 'window_tokens'?"),
    _train("backend", "backend", "did you mean 'blockwise'?"),
    _train("attention", "attention", "did you mean 'dense-zigzag'?"),
    _train("dtype", "dtype", "did you mean 'bfloat16'?"),
    _train("float16", "dtype", "float16"),
    _train("device", "device", "cuda"),
    _train("no-data", "nowhere"),
    _train("no-model", "no-model", "config.json"),
    _train("no-weights", "run/model", "weights"),
    _train("rope", "yarm"),
    _train("rope-number", "factor"),
    _train("other-plan", "plan.json"),
    _train("trace-as-plan", "manifest.json"),
    _train("no-ranks", "parallel.context", "0"),
    _train("too-long", "1000000000"),
    _cluster("misspelt", "multiprocesors", "did you mean 'multiprocessors'?"),
    _cluster("negative", "nodes", "-1"),
    _cluster("none", "gpus_per_node", "0"),
    _cluster("huge", "nodes", "1000000000"),
    _cluster("nan", "peak_flops_per_us", "nan"),
    _cluster("newer", "schema_version", "9"),
]


@pytest.mark.parametrize("made", MISTAKES, ids=names(MISTAKES))
def test_a_mistake_in_a_file_is_one_line(workspace: Path, made: Mistake):
    judge(workspace, made)
