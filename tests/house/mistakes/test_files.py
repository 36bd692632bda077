"""Wrong files: paths that are not there, files of another kind, broken ones, and outputs in the place of something."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistakes import Mistake, judge, mistake, names

MISTAKES = [
    # not there
    mistake("inspect nowhere", "nowhere", "manifest.json"),
    mistake("plan --trace nowhere --cluster local-cpu-4", "nowhere", "manifest.json"),
    mistake("plan --trace trace --cluster nowhere.yaml", "nowhere.yaml", "No such file"),
    mistake("check nowhere.json", "nowhere.json", "No such file"),
    mistake("simulate nowhere.json --cluster local-cpu-4", "nowhere.json", "No such file"),
    mistake("run nowhere.json", "nowhere.json", "No such file"),
    mistake("compare timeline.json.gz nowhere.json.gz", "nowhere.json.gz", "No such file"),
    mistake("validate nowhere.json", "nowhere.json", "No such file"),
    mistake("train nowhere.yaml", "nowhere.yaml", "No such file"),
    mistake("data nowhere.txt -o new", "nowhere.txt", "no such file"),
    mistake("capture --model nowhere --text text.txt -o new", "nowhere"),
    mistake("capture --model run/model --random-weights --text nowhere.txt -o new", "nowhere.txt"),
    mistake("audit nowhere", "nowhere"),
    mistake("cluster -o new.yaml --base a100-nvlink-8 --topology nowhere.txt", "nowhere.txt"),
    mistake("plan --trace trace --cluster local-cpu-4 --launches nowhere.json", "nowhere.json"),
    # of another kind
    mistake("inspect plan.json", "plan.json", "is not a trace"),
    mistake("inspect folder", "folder", "manifest.json"),
    mistake("plan --trace plan.json --cluster local-cpu-4", "plan.json", "is not a trace"),
    mistake("plan --trace trace --cluster plan.json", "plan.json"),
    mistake("plan --trace trace --cluster run/config.yaml", "run/config.yaml"),
    mistake("check trace", "trace", "Is a directory"),
    mistake("check timeline.json.gz", "timeline.json.gz"),
    mistake("check text.txt", "text.txt", "is not valid JSON"),
    mistake("check list.json", "list.json", "mapping"),
    mistake("simulate timeline.json.gz --cluster local-cpu-4", "timeline.json.gz"),
    mistake("simulate plan.json --cluster local-cpu-4 --trace plan.json", "plan.json", "is not a trace"),
    mistake("run trace", "trace", "Is a directory"),
    mistake("run plan.json --trace text.txt", "text.txt", "is not a trace"),
    mistake("compare plan.json timeline.json.gz", "plan.json", "traceEvents"),
    mistake("compare trace timeline.json.gz", "trace", "Is a directory"),
    mistake("compare list.json timeline.json.gz", "list.json"),
    mistake("validate plan.json", "plan.json"),
    mistake("validate text.txt", "text.txt"),
    mistake("train plan.json", "plan.json"),
    mistake("train text.txt", "text.txt", "mapping"),
    mistake("train folder", "folder", "Is a directory"),
    mistake("train triton.json", "triton.json"),
    mistake("data folder -o new", "no token"),
    mistake("data text.txt -o new --tokenizer no-model", "no-model"),
    mistake("data text.txt -o new --tokenizer run/model", "run/model"),
    mistake("capture --model text.txt --text text.txt -o new", "text.txt"),
    mistake("capture --model no-model --text text.txt -o new", "no-model", "config.json"),
    mistake("capture --model broken-model --text text.txt -o new", "broken-model"),
    mistake("capture --model run/model --text text.txt -o new --seq-len 1024 --tokenizer byte", "run/model", "weights"),
    mistake("capture --model run/model --random-weights --text folder -o new", "folder"),
    mistake("capture --model run/model --random-weights --text empty.txt -o new", "text"),
    mistake("capture --model run/model --random-weights --text text.txt -o new --tokenizer model", "tokenizer"),
    mistake("audit no-model", "no-model", "config.json"),
    mistake("audit text.txt", "text.txt"),
    mistake("audit unknown-type", "unknown-type", "qwen2x"),
    mistake("audit odd-heads", "odd-heads"),
    mistake("audit bad-rope", "bad-rope", "yarm"),
    mistake("data bad.jsonl -o new", "bad.jsonl", "line 1", "text"),
    mistake("cluster -o new.yaml --base a100-nvlink-8 --topology text.txt", "text.txt"),
    mistake("cluster -o new.yaml --base a100-nvlink-8 --nccl-tests empty.txt", "empty.txt"),
    # broken
    mistake("inspect cut-trace", "cut-trace", "bytes"),
    mistake("inspect newer-trace", "newer-trace", "schema_version", "9"),
    mistake("plan --trace cut-trace --cluster local-cpu-4 -o new.json", "cut-trace"),
    mistake("check cut-plan.json", "cut-plan.json", "is not valid JSON"),
    mistake("check flipped-plan.json", "flipped-plan.json"),
    mistake("check newer-plan.json", "newer-plan.json", "schema_version", "9"),
    mistake("compare timeline.json.gz cut-timeline.json.gz", "cut-timeline.json.gz", "truncated"),
    mistake("plan --trace trace --cluster broken.yaml", "broken.yaml", "line"),
    mistake("train broken.yaml", "broken.yaml", "line"),
    mistake("plan --trace trace --cluster cluster-newer.yaml", "schema_version", "9"),
    # outputs
    mistake("plan --trace trace --cluster local-cpu-4 -o notes.md", "notes.md", "not overwritten"),
    mistake("plan --trace trace --cluster local-cpu-4 -o folder", "folder", "is a folder"),
    mistake("plan --trace trace --cluster local-cpu-4 -o text.txt/plan.json", "text.txt"),
    mistake("plan --trace trace --cluster local-cpu-4 -o /proc/plan.json", "/proc/plan.json", "cannot be written"),
    mistake("simulate plan.json --cluster local-cpu-4 -o plan.json", "plan.json", "not overwritten"),
    mistake("run plan.json -o notes.md", "notes.md", "not overwritten"),
    mistake("synthesize vertical-slash -o notes.md", "notes.md", "cannot be written"),
    mistake("synthesize vertical-slash -o run", "run", "is not empty"),
    mistake("synthesize vertical-slash -o trace", "trace", "the trace has"),
    mistake("synthesize vertical-slash -o /proc/trace", "/proc/trace", "cannot be written"),
    mistake("capture --model run/model --random-weights --text text.txt -o run --seq-len 64", "run"),
    mistake("data text.txt -o run", "run", "is not empty"),
    mistake("data text.txt -o notes.md", "notes.md", "is no folder"),
    mistake("data text.txt -o /proc/data", "/proc/data", "cannot be written"),
    mistake("demo -o run", "run", "which no demo wrote"),
    mistake("demo -o notes.md", "notes.md", "is no folder"),
    mistake("demo -o /proc/demo", "/proc/demo", "cannot be written"),
    mistake("calibrate -o notes.md --cluster local-cpu-4", "notes.md", ".yaml"),
    mistake("calibrate -o run/config.yaml --cluster local-cpu-4 --backend blockwise", "config.yaml", "not overwritten"),
    mistake("cluster -o run/config.yaml --base a100-nvlink-8 --topology text.txt", "config.yaml", "not overwritten"),
    mistake("validate timeline.json.gz --report notes.md", "notes.md", ".html"),
    mistake("train run/config.yaml --export notes.md", "checkpoint"),
    mistake("compare timeline.json.gz other-timeline.json.gz --report", "--report"),
]


@pytest.mark.parametrize("made", MISTAKES, ids=names(MISTAKES))
def test_a_wrong_file_is_one_line(workspace: Path, made: Mistake):
    judge(workspace, made)
