"""The examples, started as a user would on two gloo processes, equal the same training of the model alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from sparsering.planner.layouts.ring import Ring
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import zigzag
from sparsering.runtime.model.shard import shard
from tiny_models import tiny_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WORLD_SIZE, SEQ_LEN_TOKENS, STEPS, ACCUMULATE = 2, 256, 3, 2
LEARNING_RATE = 1e-3
TOLERANCE = 1e-5
PATIENCE_S = 180.0
Steps = list[dict[str, float]]

pytestmark = [pytest.mark.examples, pytest.mark.timeout(240)]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a user has on disk: a model with its tokenizer, a plan, token ids and labels [sequences, S], JSON lines."""

    folder: Path
    plan: Plan
    ids: Tensor
    labels: Tensor
    lines: list[dict[str, str]]

    def model(self) -> PreTrainedModel:
        """Return the model as it is without a plan: dense attention by transformers."""
        return AutoModelForCausalLM.from_pretrained(self.folder / "model", attn_implementation="sdpa")


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Labels are so masked that one rank has a multiple of the other's, which has none at all of some sequences."""
    folder = tmp_path_factory.mktemp("user")
    tiny_model("llama", dtype=torch.float64).save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    plan = _dense_plan()
    plan.save(folder / "plan.json")
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 97, (STEPS * ACCUMULATE, SEQ_LEN_TOKENS), generator=seeded)
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[20 * (number + 1) : 240 - 10 * number] = -100
    parts = [shard({"input_ids": ids, "labels": labels}, plan, rank)["labels"] for rank in range(WORLD_SIZE)]
    counts = [(part != -100).sum(1) for part in parts]
    assert (counts[0] > 2 * counts[1]).all() and counts[1].min() == 0 < counts[1].max()
    np.save(folder / "tokens.npy", ids.numpy())
    np.save(folder / "labels.npy", labels.numpy())
    lines = [_line(row, prompt_tokens=30 + 20 * number) for number, row in enumerate(ids[:STEPS])]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return Setting(folder=folder, plan=plan, ids=ids, labels=labels, lines=lines)


def _dense_plan() -> Plan:
    return make_plan(
        attention=AttentionSpec(
            model=ModelShape(layers=2, heads=4, kv_heads=2, head_dim=16),
            seq_len_tokens=SEQ_LEN_TOKENS,
            block_size=64,
            dtype="float64",
            columns_capacity=64,
        ),
        placement=zigzag(seq_len_tokens=SEQ_LEN_TOKENS, world_size=WORLD_SIZE, granularity_tokens=64),
        forward=Ring(),
        pattern=PatternSpec(
            source="choose",
            selector="sink-window",
            settings={"sink_tokens": 4, "window_tokens": SEQ_LEN_TOKENS},
        ),
        kernels=KernelSpec(backend="blockwise"),
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", *(f"w{number}" for number in range(3, 97))]
    plain = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue] # a property without stub
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")


def _line(ids: Tensor, *, prompt_tokens: int) -> dict[str, str]:
    words = [f"w{number}" for number in ids.tolist()]
    return {
        "prompt": " ".join(words[:prompt_tokens]),
        "completion": " " + " ".join(words[prompt_tokens : prompt_tokens + 50]),
    }


@pytest.fixture
def trainers_leave_no_trace() -> Iterator[None]:
    """Trainers keep state in the process and in its environment; later tests must not meet it."""
    state = pytest.importorskip("accelerate.state", reason="accelerate is not installed")
    before = dict(os.environ)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


def run_example(name: str, setting: Setting, out: Path, *arguments: str | Path) -> Steps:
    """Start an example under torchrun and return what it says of every step."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD_SIZE}",
        str(EXAMPLES / name), "--model", str(setting.folder / "model"), "--plan", str(setting.folder / "plan.json"),
        "--steps", str(STEPS), "--learning-rate", str(LEARNING_RATE), "--out", str(out), *map(str, arguments),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": ""}  # also where there are GPUs: fewer, maybe, than ranks
    environment.pop("PYTHONSAFEPATH", None)  # as users have it: a script finds what lies beside it
    with subprocess.Popen(
        command, cwd=setting.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as launcher:
        try:
            said, _ = launcher.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # so that torchrun ends its workers; killed, it would leave them behind
            raise
    assert launcher.returncode == 0, said[-8000:]
    return json.loads((out / "steps.json").read_text())


def token_files(setting: Setting) -> list[str | Path]:
    """Return the options that name token ids and labels."""
    return ["--tokens", setting.folder / "tokens.npy", "--labels", setting.folder / "labels.npy"]


def drawn_order(count: int) -> list[int]:
    """Return the order in which the trainers' examples show `count` sequences: drawn from the run's seed."""
    seeded = torch.Generator().manual_seed(42)
    return [int(number) for (number,) in DataLoader(TensorDataset(torch.arange(count)), shuffle=True, generator=seeded)]


def train_alone(model: Any, setting: Setting) -> Steps:
    """Train a model on whole sequences in a plain loop; return every step's loss and norm of gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    model.train()
    steps = []
    for ids, labels in zip(setting.ids[:STEPS], setting.labels[:STEPS], strict=True):
        loss = model(input_ids=ids[None], labels=labels[None]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss.item(), "grad_norm": norm.item()})
    return steps


def trainer_settings(out: Path, **changes: Any) -> dict[str, Any]:
    """Return what a trainer of one process needs to show the sequences in the order that it is given."""
    return {
        "output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 1, "learning_rate": LEARNING_RATE,
        "train_sampling_strategy": "sequential", "use_cpu": True, "logging_steps": 1, "save_strategy": "no",
        "report_to": "none",
    } | changes  # fmt: skip


def logged_steps(trainer: Any) -> Steps:
    """Return what a trainer logged of every step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same(steps: Steps, alone: Steps, weights: Path, expected: dict[str, Tensor]) -> None:
    """Compare with the model trained alone: losses, the weights in a file, and norms, for Adam hides a wrong factor."""
    assert len(steps) == len(alone) == STEPS
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose([step[name] for step in steps], [step[name] for step in alone], rtol=TOLERANCE)
    found = load_file(weights)
    assert set(found) == set(expected)
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor.numpy(), expected[name].numpy(), rtol=0, atol=TOLERANCE, err_msg=name)


def test_fsdp2_loop(setting: Setting, tmp_path: Path) -> None:
    steps = run_example("fsdp2_loop.py", setting, tmp_path, *token_files(setting))
    model = setting.model()
    alone = train_alone(model, setting)
    assert_same(steps, alone, tmp_path / "model.safetensors", model.state_dict())


def test_hf_trainer(setting: Setting, tmp_path: Path, trainers_leave_no_trace: None) -> None:
    from transformers import Trainer, TrainingArguments

    steps = run_example("hf_trainer.py", setting, tmp_path, *token_files(setting), "--accumulate", str(ACCUMULATE))
    order = drawn_order(STEPS * ACCUMULATE)
    rows = [{"input_ids": setting.ids[number], "labels": setting.labels[number]} for number in order]
    model = setting.model()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_settings(tmp_path / "alone", gradient_accumulation_steps=ACCUMULATE)),
        train_dataset=rows,  # pyright: ignore[reportArgumentType] # a list is a map-style data set
    )
    trainer.train()
    assert_same(steps, logged_steps(trainer), tmp_path / "model.safetensors", model.state_dict())


def test_trl_sft(setting: Setting, tmp_path: Path, trainers_leave_no_trace: None) -> None:
    pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    steps = run_example("trl_sft.py", setting, tmp_path, "--data", setting.folder / "data.jsonl")
    model = setting.model()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainer_settings(tmp_path / "alone", bf16=False)),
        train_dataset=Dataset.from_list([setting.lines[number] for number in drawn_order(STEPS)]),
        processing_class=AutoTokenizer.from_pretrained(setting.folder / "model"),
    )
    trainer.train()
    assert_same(steps, logged_steps(trainer), tmp_path / "model.safetensors", model.state_dict())


def test_lora_peft(setting: Setting, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")

    steps = run_example("lora_peft.py", setting, tmp_path, *token_files(setting))
    model = setting.model()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    alone = train_alone(adapted, setting)
    assert_same(steps, alone, tmp_path / "adapter_model.safetensors", peft.get_peft_model_state_dict(adapted))
