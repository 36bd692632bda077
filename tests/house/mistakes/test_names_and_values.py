"""Wrong words and numbers on the command line; the nearest right name is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistakes import TRACE, Mistake, judge, mistake, names

NEW_PLAN = "plan --trace trace -o new.json --cluster"
CAPTURE = "capture --model run/model --random-weights --text text.txt -o new --seq-len 1024"
MISTAKES = [
    # names
    mistake("simulat plan.json", "'simulat'", "did you mean 'simulate'?"),
    mistake("--versoin", "--versoin", "did you mean '--version'?"),
    mistake("plan --trce trace", "--trce", "did you mean '--trace'?"),
    mistake("plan --trace trace", "--cluster", "is missing"),
    mistake("check", "PLAN", "is missing"),
    mistake("check plan.json triton.json", "extra argument"),
    mistake(f"{NEW_PLAN} a100-nvlink8", "a100-nvlink8", "did you mean 'a100-nvlink-8'?"),
    mistake(f"{NEW_PLAN} local-cpu-4 --layout rnig", "'rnig'", "layout", "did you mean 'ring'?"),
    mistake(f"{NEW_PLAN} local-cpu-4 --placement stripd", "placement", "did you mean 'striped'?"),
    mistake(f"{NEW_PLAN} local-cpu-4 --backend tritn", "--backend", "did you mean 'triton'?"),
    mistake(f"{NEW_PLAN} local-cpu-4 --dtype bf16", "--dtype", "'bf16'", "bfloat16"),
    mistake(f"{NEW_PLAN} local-cpu-4 --evaluator simulater", "did you mean 'simulator'?"),
    mistake(f"{NEW_PLAN} local-cpu-4 --pattern chose", "pattern", "'chose'", "did you mean 'choose'?"),
    mistake("simulate plan.json --cluster h100-nvlink", "h100-nvlink", "did you mean 'h100-nvlink-8'?"),
    mistake("synthesize vertical-slsh -o new", "did you mean 'vertical-slash'?"),
    mistake(f"{CAPTURE} --selector vertical_slash", "--selector", "did you mean 'vertical-slash'?"),
    mistake(f"{CAPTURE} --dtype bfloat", "--dtype", "did you mean 'bfloat16'?"),
    mistake(f"{CAPTURE} --tokenizer bytes", "--tokenizer", "did you mean 'byte'?"),
    mistake(f"{CAPTURE} --device gpu", "device", "'gpu'", "cuda"),
    mistake(f"{CAPTURE} --selector sink-window --slashes 3", "--slashes", "no such setting"),
    mistake("run plan.json --device gpu", "device", "'gpu'", "cuda"),
    mistake("calibrate -o new.yaml --cluster local-cpu-4 --backend blockwize", "did you mean 'blockwise'?"),
    mistake("calibrate -o new.yaml --cluster local-cpu-4 --backend blockwise --device gpu", "device", "'gpu'"),
    mistake("validate timeline.json.gz --tolerance stap=0.1", "stap=0.1", "step"),
    mistake("doctor --tune", "--kernels"),
    # numbers
    mistake("synthesize vertical-slash -o new --heads 0", "--heads", "0"),
    mistake("synthesize vertical-slash -o new --heads -3", "--heads", "-3"),
    mistake("synthesize vertical-slash -o new --heads many", "--heads", "many"),
    mistake("synthesize vertical-slash -o new --density nan", "density", "nan"),
    mistake("synthesize vertical-slash -o new --density 2", "density", "2"),
    mistake("synthesize vertical-slash -o new --density -0.5", "density", "-0.5"),
    mistake("synthesize vertical-slash -o new --block-size 100", "--block-size", "100", "64 or 128"),
    mistake("synthesize vertical-slash -o new --heads 6 --kv-heads 4", "kv_heads", "4", "6"),
    mistake("synthesize vertical-slash -o new --seq-len 1000000000000", "seq_len", "1000000000000"),
    mistake("synthesize vertical-slash -o new --heads 1000000000", "heads", "1000000000"),
    mistake("synthesize skewed -o new --skew nan", "skew", "nan"),
    mistake(f"synthesize vertical-slash -o new {TRACE} --layers 0", "--layers", "0"),
    mistake(f"{NEW_PLAN} local-cpu-4 --memory-fraction 0", "memory_fraction", "0"),
    mistake(f"{NEW_PLAN} local-cpu-4 --memory-fraction nan", "memory_fraction", "nan"),
    mistake(f"{NEW_PLAN} local-cpu-4 --memory-limit-bytes -1", "memory_limit_bytes", "-1"),
    mistake(f"{NEW_PLAN} local-cpu-4 --steps 0,x", "--steps", "0,x"),
    mistake(f"{NEW_PLAN} local-cpu-4 --steps 7", "7"),
    mistake(f"{NEW_PLAN} local-cpu-4 --layers 99", "99"),
    mistake("simulate plan.json --cluster local-cpu-4 --jitter nan", "jitter", "nan"),
    mistake("simulate plan.json --cluster local-cpu-4 --jitter -1", "jitter", "-1"),
    mistake("simulate plan.json --cluster local-cpu-4 --layer 99", "99"),
    mistake("simulate plan.json --cluster local-cpu-4 --step 99", "99"),
    mistake("simulate plan.json --cluster local-cpu-4 --trace other-trace", "other-trace"),
    mistake("run plan.json --repeats 0", "--repeats", "0"),
    mistake("run plan.json --timeout-s nan", "timeout", "nan"),
    mistake("run plan.json --patience-s 700", "patience_s", "700"),
    mistake("run plan.json --layer 99", "99"),
    mistake("run plan.json --trace other-trace", "other-trace"),
    mistake("run plan.json --device cuda", "device", "0 GPUs"),
    mistake(f"{CAPTURE} --layers 5-2", "--layers", "5-2"),
    mistake(f"{CAPTURE} --layers 99", "layers", "99"),
    mistake(f"{CAPTURE} --block-size 100", "--block-size", "100"),
    mistake(f"{CAPTURE} --columns -4", "columns", "-4"),
    mistake(f"{CAPTURE} --steps 0", "--steps", "0"),
    mistake(f"{CAPTURE} --steps 1000000", "text"),
    mistake("capture --model run/model --random-weights -o new", "--text"),
    mistake("audit run/model --seq-len 0", "--seq-len", "0"),
    mistake("demo -o new --seq-len 1000", "--seq-len", "1000"),
    mistake("demo -o new --seq-len 1030", "--seq-len", "1030", "64"),
    mistake("demo -o new --train-seconds nan", "--train-seconds", "nan"),
    mistake("data text.txt -o new --shard-tokens 0", "--shard-tokens", "0"),
    mistake("calibrate -o new.yaml --cluster local-cpu-4 --heads 16:3 --backend blockwise", "heads", "16:3"),
    mistake("calibrate -o new.yaml --cluster local-cpu-4 --heads 16 --backend blockwise", "heads", "16"),
    mistake("calibrate -o new.yaml --cluster local-cpu-4 --gpus 9", "--gpus", "9"),
    mistake("validate timeline.json.gz --tolerance step=x", "--tolerance", "'x'"),
    mistake("validate timeline.json.gz --spread nan", "--spread", "nan"),
    mistake("validate timeline.json.gz", "timeline"),
    mistake("cluster -o new.yaml --base a100-nvlink-8", "--topology"),
]


@pytest.mark.parametrize("made", MISTAKES, ids=names(MISTAKES))
def test_a_wrong_word_or_number_is_one_line(workspace: Path, made: Mistake):
    judge(workspace, made)
