"""The audit: faults planted in a model are caught by numbers; right models are right; every verb asks the same gate."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM
from typer.testing import CliRunner

from model_cases import BASE, CASES, case_config
from rank_pool import RankFailure, RankPool
from sparsering import cli
from sparsering.runtime.audit.audit import Audit, audit, require_model, small_model
from sparsering.runtime.audit.proof import TOLERANCE, prove
from sparsering.traces.errors import UnsupportedError
from train_runs import write_run

SEQ_LEN_TOKENS = 256
SMALL: dict[str, Any] = BASE


def audited(model_class: type[PreTrainedModel], config: Any = None, *, seq_len_tokens: int = SEQ_LEN_TOKENS) -> Audit:
    chosen = LlamaConfig(**SMALL) if config is None else config
    return audit(chosen, seq_len_tokens=seq_len_tokens, model_class=model_class, cache=None)


class Wrapped(Module):
    """A layer's MLP with something of a test's own after it."""

    def __init__(self, inner: Module, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.after = inner, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(x))


class OwnLlama(LlamaForCausalLM):
    """A class of a user's own that changes nothing."""


class ConvolvedOverTime(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer in layers:
            layer.mlp = Wrapped(layer.mlp, lambda x: x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])


class RunningMean(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[1].mlp = Wrapped(layers[1].mlp, lambda x: x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None])


class AttentionOfItsOwn(LlamaAttention):
    """Causal attention by torch, whatever the interface says."""

    def forward(self, hidden_states: Tensor, *args: Any, **keywords: Any) -> Any:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class IgnoresTheInterface(LlamaForCausalLM):
    """In its last layer only, so that the first calls the interface."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].self_attn = AttentionOfItsOwn(config, 1)


class ScaledHead(LlamaForCausalLM):
    """Its logits, and so its loss, are not what its head gives."""

    def forward(self, *args: Any, **keywords: Any) -> Any:
        labels, shifted = keywords.pop("labels", None), keywords.pop("shift_labels", None)
        count = keywords.pop("num_items_in_batch", None)
        output: Any = super().forward(*args, **keywords)
        output.logits = output.logits / 8.0
        if labels is not None:
            output.loss = self.loss_function(
                logits=output.logits, labels=labels, vocab_size=self.config.vocab_size, shift_labels=shifted,
                num_items_in_batch=count,
            )  # fmt: skip
        return output


class PositionsFromArange(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        rotary = self.model.rotary_emb
        plain = rotary.forward
        rotary.forward = lambda x, position_ids, *more: plain(x, torch.arange(x.shape[1])[None], *more)


class Memory(Module):
    """Adds the mean of what it saw in the call before."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner, self.before = inner, torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x) + self.before
        self.before = x.detach().mean()
        return out


class RemembersTheLastCall(LlamaForCausalLM):
    """A cache: what it computes depends on what it was called with before."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Memory(layers[0].mlp)


class RoutesByTheBatch(Qwen3MoeForCausalLM):
    """Every expert takes the tokens of the batch that want it most: a capacity."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        for layer in layers:
            layer.mlp = Wrapped(
                layer.mlp,
                lambda x: x * (x.norm(dim=-1) >= x.norm(dim=-1).median(dim=1, keepdim=True).values)[..., None],
            )


class NoisyLayers(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Wrapped(layers[0].mlp, lambda x: x + 0.01 * torch.randn_like(x))


class ShiftsLabelsItself(LlamaForCausalLM):
    def forward(self, *args: Any, **keywords: Any) -> Any:
        labels = keywords.pop("labels", None)
        keywords = {name: v for name, v in keywords.items() if name not in ("shift_labels", "num_items_in_batch")}
        output: Any = super().forward(*args, **keywords)
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1)
            output.loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return output


class Gate(Module):
    """Opens where there are many tokens: few give its parameter no gradient at all."""

    def __init__(self, inner: Module, width: int) -> None:
        super().__init__()
        self.inner, self.extra = inner, torch.nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out * self.extra if x.shape[1] > 16 else out


class UsesSomeParametersOnly(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        layers: Any = self.model.layers
        layers[0].mlp = Gate(layers[0].mlp, config.hidden_size)


def shifted(x: Tensor) -> Tensor:
    """Let every token see the one before it."""
    return x + 0.1 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]


class ShiftedIf(Module):
    """An MLP in which tokens see their neighbours where a condition holds."""

    def __init__(self, inner: Module, condition: Callable[[Module, Tensor], bool]) -> None:
        super().__init__()
        self.inner, self.condition = inner, condition

    def forward(self, x: Tensor) -> Tensor:
        return shifted(self.inner(x)) if self.condition(self, x) else self.inner(x)


def shifting(condition: Callable[[Any, int, Module, Tensor], bool]) -> type[LlamaForCausalLM]:
    """Return a class whose layers let tokens see their neighbours where (config, layer, module, x) say so."""

    class Shifting(LlamaForCausalLM):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            layers: Any = self.model.layers
            for number, layer in enumerate(layers):
                layer.mlp = ShiftedIf(layer.mlp, lambda module, x, n=number: condition(config, n, module, x))

    return Shifting


ManyTokens = shifting(lambda config, layer, module, x: x.shape[1] > 200)
LateLayers = shifting(lambda config, layer, module, x: layer >= 5)
LengthInADictionary = shifting(lambda config, layer, module, x: x.shape[1] > config.sparse_config["dense_len"])
LengthAsAFloat = shifting(lambda config, layer, module, x: x.shape[1] > config.dense_len)
OtherwiseInEval = shifting(lambda config, layer, module, x: not module.training)


class SegmentsByToken(LlamaForCausalLM):
    """Counts how often a special token came before: over the shard, not over the sequence."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        embed = self.model.embed_tokens
        embed.register_forward_hook(lambda module, inputs, out: out + (inputs[0] == 2).cumsum(1)[..., None])


MOE = case_config("qwen3-moe")
OTHERS = r"what a token becomes depends on others|off by .*: split over ranks it is another model"
FAULTS = [
    (ConvolvedOverTime, None, OTHERS),
    (RunningMean, None, OTHERS),
    (IgnoresTheInterface, None, r"asked for by layers \[0\] of 2"),
    (ScaledHead, None, r"off by .* by the loss of train"),
    (PositionsFromArange, None, OTHERS),
    (RemembersTheLastCall, None, rf"off by .* when it is called a second time, alone|{OTHERS}"),
    (RoutesByTheBatch, MOE, OTHERS),
    (NoisyLayers, None, OTHERS),
    (ShiftsLabelsItself, None, r"off by .* by the loss of attach"),
    (UsesSomeParametersOnly, None, rf"gets a gradient only from some tokens|{OTHERS}"),
]
# What a small copy of few tokens, few layers, in training mode, would not show.
HIDDEN = [
    (ManyTokens, {}),
    (LateLayers, {"num_hidden_layers": 8}),
    (LengthInADictionary, {"sparse_config": {"dense_len": 200}}),
    (LengthAsAFloat, {"dense_len": 200.0}),
    (SegmentsByToken, {}),
    (OtherwiseInEval, {}),
]


@pytest.mark.parametrize(("model_class", "changes"), HIDDEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_that_hides_from_a_small_copy_is_caught(model_class: Any, changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = SMALL | changes
    found = audited(model_class, LlamaConfig(**settings), seq_len_tokens=512)
    assert not found.right
    assert "what a token becomes depends on others" in f"{found.reason}", found.reason


@pytest.mark.parametrize(("model_class", "config", "reason"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_proof_alone_catches_a_planted_fault(model_class: Any, config: Any, reason: str) -> None:
    chosen = LlamaConfig(**SMALL) if config is None else config
    with pytest.raises(UnsupportedError):
        prove(small_model(chosen, model_class, SEQ_LEN_TOKENS))


@pytest.mark.parametrize(("model_class", "config", "reason"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_caught_by_numbers(model_class: Any, config: Any, reason: str) -> None:
    found = audited(model_class, config)
    assert not found.right
    assert re.search(reason, f"{found.about}: {found.reason}"), found.reason


def test_a_class_of_ones_own_without_a_fault_is_right() -> None:
    for found in (audited(OwnLlama), audited(Qwen3MoeForCausalLM, MOE)):
        assert found.right, found.reason
        assert set(found.errors) == {"attach", "train"}
        assert all(0 <= error < 1e-12 for road in found.errors.values() for error in road.values())
        assert found.shape == {"layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16}


@pytest.mark.parametrize("name", list(CASES))
def test_a_family_is_right_or_refused_with_the_reason(name: str) -> None:
    refusal = CASES[name][2]
    found = audit(case_config(name), seq_len_tokens=SEQ_LEN_TOKENS, cache=None)
    assert found.right == (refusal is None), found.reason
    if refusal is None:
        assert all(error < TOLERANCE for road in found.errors.values() for error in road.values())
    else:
        assert re.search(refusal, f"{found.about}: {found.reason}")
        assert "\n" not in f"{found.reason}"


def test_windows_and_lengths_count_against_the_sequence() -> None:
    config = case_config("mistral-window")
    assert audit(config, seq_len_tokens=64, cache=None).right
    chunks = case_config("llama4-chunks")
    assert audit(chunks, seq_len_tokens=64, cache=None).right
    learned = case_config("gpt2")
    too_long = audit(learned, seq_len_tokens=8192, cache=None)
    assert not too_long.right and "does not run" in f"{too_long.reason}"


@pytest.mark.parametrize(
    ("field", "value"), [("num_hidden_layers", 24), ("hidden_size", 2048), ("intermediate_size", 8192)]
)
def test_a_large_model_is_audited_small(field: str, value: int) -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
    settings: dict[str, Any] = SMALL | sizes | {"vocab_size": 128256, field: value}
    found = audited(LlamaForCausalLM, LlamaConfig(**settings))
    assert found.right, found.reason
    assert found.layers == 2 and (found.parameters or 0) < 1_000_000
    assert found.shape is not None and found.shape["layers"] == {"num_hidden_layers": value}.get(field, 2)


def test_every_kind_of_layer_is_in_the_small_copy() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = AutoConfig.for_model("gemma3_text", **SMALL | {"num_hidden_layers": 12}, head_dim=16, sliding_window=4096,
                                  layer_types=kinds * 2)  # fmt: skip
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=None).layers == 6


def test_audits_are_kept_by_digest_and_nothing_else_is_believed(tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    first = audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path)
    path = tmp_path / f"{first.digest}.json"
    assert first.right and Audit(**json.loads(path.read_text())) == first
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 77.0}))
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path).seconds == 77.0  # it was taken from there
    assert audit(config, seq_len_tokens=128, cache=tmp_path).digest != first.digest
    config.attention_dropout = 0.1
    assert not audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path).right
    path.write_text("{}")
    config.attention_dropout = 0.0
    again = audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=tmp_path)
    assert again.right and again.digest == first.digest and again.seconds != 77.0


def test_the_digest_is_of_the_classs_source_too() -> None:
    own, plain = audited(OwnLlama), audited(LlamaForCausalLM)
    assert own.digest != plain.digest and replace(own, seconds=0.0).right


class OwnMLP(LlamaMLP):
    """A class that is one of the model's own, and something else."""


def _with_memory(model: Any) -> None:
    model.model.layers[1].mlp = Memory(model.model.layers[1].mlp)


def _with_own_mlp(model: Any) -> None:
    model.model.layers[1].mlp = OwnMLP(model.config)


def _with_own_forward(model: Any) -> None:
    mlp = model.model.layers[1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: shifted(plain(x))


def _with_hook(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, out: shifted(out))


def _with_own_loss(model: Any) -> None:
    model.loss_function = lambda logits, **more: 2 * logits.mean()


def _with_dropout(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.Dropout(0.1)


def _with_another_scale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling = 1.0


def _with_another_activation_setting(model: Any) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with_memory, r"model.layers.1.mlp: is a \S*Memory, which LlamaForCausalLM does not have"),
        (_with_own_mlp, r"model.layers.1.mlp: is a \S*OwnMLP, which LlamaForCausalLM does not have"),
        (_with_own_forward, r"model.layers.1.mlp: has a method or hook of \S*_with_own_forward"),
        (_with_hook, r"model.layers.1.mlp: has a method or hook of \S*_with_hook"),
        (_with_own_loss, r"LlamaForCausalLM: has a method or hook of \S*_with_own_loss"),
        (_with_dropout, r"model.layers.0.mlp.act_fn: drops 0.1"),
        (_with_another_scale, r"model.layers.1.self_attn.scaling: is 1.0, the model's configuration makes it 0.25"),
        (_with_another_activation_setting, r"model.rotary_emb.rope_type: is 'default', .* makes it 'linear'"),
    ],
)
def test_what_came_into_a_model_later_is_refused(change: Callable[[Any], None], message: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    require_model(model, seq_len_tokens=SEQ_LEN_TOKENS)
    change(model)
    with pytest.raises(UnsupportedError, match=message):
        require_model(model, seq_len_tokens=SEQ_LEN_TOKENS)


def test_adapters_of_lora_are_let_through() -> None:
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    )
    assert require_model(adapted.get_base_model(), seq_len_tokens=SEQ_LEN_TOKENS).right


def test_an_audit_does_not_depend_on_its_surroundings() -> None:
    config = LlamaConfig(**SMALL)
    threads = torch.get_num_threads()
    with torch.no_grad(), torch.inference_mode(), torch.device("meta"):
        assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, cache=None).right
    assert torch.get_num_threads() == threads


def test_only_audits_of_untouched_classes_of_transformers_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    config = LlamaConfig(**SMALL)
    assert audit(config, seq_len_tokens=SEQ_LEN_TOKENS, model_class=OwnLlama, cache=tmp_path).right
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: shifted(self.down_proj(self.up_proj(x))))
    assert not audit(config, seq_len_tokens=SEQ_LEN_TOKENS, model_class=LlamaForCausalLM, cache=tmp_path).right
    assert not list(tmp_path.iterdir())


def _one_line(arguments: list[str]) -> str:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("name", ["lfm2", "falcon", "llama-dynamic", "deepseek-v3", "llama4-chunks", "qwen3.5"])
def test_capture_attach_and_train_refuse_alike(
    name: str, tmp_path: Path, rank_pools: Callable[[int], RankPool]
) -> None:
    refusal = CASES[name][2]
    assert refusal is not None
    text = tmp_path / "text.txt"
    text.write_text("ring " * 100)
    folder = tmp_path / "model"
    case_config(name).save_pretrained(folder)
    asked = ["capture", "--model", str(folder), "--random-weights", "--text", str(text), "--seq-len", "256"]
    captured = _one_line([*asked, "-o", str(tmp_path / "trace")])
    write_run(tmp_path / "run")
    run = (tmp_path / "run/config.yaml").read_text().replace(str(tmp_path / "run/model"), str(folder))
    (tmp_path / "run/config.yaml").write_text(run)
    trained = _one_line(["train", str(tmp_path / "run/config.yaml"), "--dry-run"])
    shown = _one_line(["audit", str(folder), "--seq-len", "256"])
    with pytest.raises(RankFailure) as caught:
        rank_pools(2).run("attach_case", name=name)
    for told in (captured, trained, shown, str(caught.value)):
        assert re.search(refusal, told), told
    assert captured == trained == shown
    assert not (tmp_path / "trace").exists()


def test_the_verb_shows_a_right_model(tmp_path: Path) -> None:
    case_config("granite").save_pretrained(tmp_path)
    told = CliRunner().invoke(cli.app, ["audit", str(tmp_path), "--seq-len", "256"])
    assert told.exit_code == 0 and told.stdout.startswith("right: GraniteForCausalLM at 256 tokens"), told.output
    shown = json.loads(CliRunner().invoke(cli.app, ["audit", str(tmp_path), "--seq-len", "256", "--json"]).stdout)
    assert shown["right"] and shown["errors"]["train"]["gradient"] < TOLERANCE
    case_config("head-dim-96").save_pretrained(tmp_path / "96")
    told = CliRunner().invoke(cli.app, ["audit", str(tmp_path / "96"), "--seq-len", "256"]).stdout
    assert "triton padded to 128" in told and "flash4 no" in told and "blockwise yes" in told


def test_what_is_no_causal_model_is_one_line(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    assert "model_type: 'vit' is no causal language model" in _one_line(["audit", str(tmp_path)])
    assert "none/config.json: no such file" in _one_line(["audit", str(tmp_path / "none/config.json")])
