"""Capture on tiny Hugging Face models: what is recorded is what they attend to, and they are left as they were."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function
from typer.testing import CliRunner

from sparsering import cli
from sparsering.kernels.select.choose import choose_vertical_slash, vertical_slash_budgets
from sparsering.kernels.select.probe import ShardTensors
from sparsering.runtime.attention.patterns import mask_of
from sparsering.runtime.attention.selectors import SETTINGS, make_selector, published_selector
from sparsering.runtime.hf.capture import (
    ATTENTION_NAME,
    CaptureSettings,
    capture_model,
    dense_causal,
    pattern_of,
    trace_header,
)
from sparsering.runtime.hf.capture_command import parse_layers
from sparsering.runtime.model.attention_call import check_attention_call, refuse_masks
from sparsering.traces.dataset.store import Trace, TraceWriter
from sparsering.traces.errors import InputError, UnsupportedError
from sparsering.traces.pattern import BlockMask, element_mask
from sparsering.traces.published import FixedBudget, FlexBudget
from sparsering.traces.stats import block_overlap, jaccard
from sparsering.traces.synthetic import SyntheticSettings, synthesize
from tiny_models import tiny_model

SEQ_LEN, BLOCK = 500, 64
FAMILIES = ["qwen2", "llama"]
VERTICAL_SLASH = make_selector("vertical-slash", {"columns": 40, "slashes": 60, "sink_tokens": 4, "window_tokens": 10})
BUDGETS = {"columns": 40, "slashes": 60}


def token_ids(seed: int = 0, length: int = SEQ_LEN) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed))


def captured(folder: Path, model: PreTrainedModel, *, layers: tuple[int, ...] | None = None, **settings: Any) -> Trace:
    header = trace_header(model, model_id="tiny", seq_len_tokens=SEQ_LEN, block_size=BLOCK, layers=layers)
    with TraceWriter(folder, header) as writer:
        capture_model(model, token_ids(), writer, CaptureSettings(**{"selector": VERTICAL_SLASH, **settings}))
    trace = Trace.open(folder)
    trace.verify()
    return trace


def body(model: PreTrainedModel) -> Any:
    return model.base_model


@contextmanager
def queries_and_keys(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collect (q, k), [1, S, heads, D] after rotation, from what goes into every attention layer.

    Written with the formula of RoPE (arXiv 2104.09864), not with the model's code or our hook.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def look(module: Any, _: Any, keywords: dict[str, Any]) -> None:
        hidden = keywords["hidden_states"]
        both = []
        for projection in (module.q_proj, module.k_proj):
            x = projection(hidden).unflatten(-1, (-1, module.head_dim))
            half = module.head_dim // 2
            inverse = 1.0 / 10000.0 ** (torch.arange(half, dtype=torch.float32) / half)
            angle = torch.arange(x.shape[1], dtype=torch.float32)[:, None] * inverse
            cos, sin = (f(angle).to(x.dtype)[None, :, None, :] for f in (torch.cos, torch.sin))
            both.append(torch.cat([x[..., :half] * cos - x[..., half:] * sin,
                                   x[..., half:] * cos + x[..., :half] * sin], dim=-1))  # fmt: skip
        found.append((both[0], both[1]))

    hooks = [layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in body(model).layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def last_hidden(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    found: list[Tensor] = []
    hook = body(model).norm.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        yield found
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_patterns_are_those_of_the_models_own_queries_and_keys(tmp_path: Path, family: str) -> None:
    model = tiny_model(family, dtype=torch.float64)
    with queries_and_keys(model) as seen, torch.no_grad():
        model.set_attn_implementation("sdpa")  # eager attention rounds to float32 on the way
        model(input_ids=token_ids()[None])
    trace = captured(tmp_path, model)
    assert len(seen) == len(trace.layers) == 2
    for layer, (q, k) in enumerate(seen):
        shard = ShardTensors(q=q, k=k, positions=torch.arange(SEQ_LEN), seq_len_tokens=SEQ_LEN, block_size=BLOCK)
        budgets = vertical_slash_budgets(VERTICAL_SLASH.layer_budgets(layer, 4), seq_len_tokens=SEQ_LEN)
        mask = choose_vertical_slash(shard, budgets, scale=16**-0.5, sink_tokens=4, window_tokens=10).mask
        recorded = trace.layer_pattern(0, layer)
        assert recorded.num_heads == 4
        for head, pattern in enumerate(recorded.heads):
            assert mask.columns is not None
            np.testing.assert_array_equal(pattern.columns, mask.columns[head].numpy())
            np.testing.assert_array_equal(
                pattern.block_bits(8)[:, 0], mask.active[head].numpy()
            )  # key block 0 meets every diagonal


def attention_of(q: Tensor, k: Tensor, head: int) -> np.ndarray:
    """Return [S, S], dense causal attention of one query head (two query heads share a KV head)."""
    scores = q[0, :, head] @ k[0, :, head // 2].T * 16**-0.5
    return torch.softmax(scores.masked_fill(~torch.ones_like(scores).tril().bool(), -torch.inf), -1).numpy()


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_selector_and_its_kept_mass(tmp_path: Path, name: str) -> None:
    model = tiny_model("qwen2", dtype=torch.float64)
    with queries_and_keys(model) as seen, torch.no_grad():
        model.set_attn_implementation("sdpa")
        model(input_ids=token_ids()[None])
    small = {"flex": {"column_cap": 9, "slash_cap": 2}, "moba-block": {"chunk_tokens": 64, "top_chunks": 3},
             "xattention": {"mass": 0.4}, "sink-window": {"window_tokens": 100},
             "vertical-slash": BUDGETS}  # fmt: skip
    selector = make_selector(name, small[name])
    trace = captured(tmp_path, model, selector=selector, sampled_rows=SEQ_LEN)
    for layer in trace.layers:
        pattern = trace.layer_pattern(0, layer)
        assert isinstance(pattern.heads[0], BlockMask) == (name in ("xattention", "moba-block"))
        for row in trace.layer_rows(0, layer):
            assert (row.choice.selector, row.choice.settings) == (name, {**SETTINGS[name], **small[name]})
            attention = attention_of(*seen[layer], row.head)
            kept = (attention * element_mask(pattern, row.head)).sum(-1)
            assert row.choice.kept_mass_sampled == pytest.approx(kept.mean(), abs=1e-9)  # all rows were sampled
            assert row.choice.kept_mass_probe == pytest.approx(kept[-64:].mean(), abs=1e-9)
            assert 0.1 < kept.mean() < 0.999


@pytest.mark.parametrize("family", FAMILIES)
def test_the_models_result_is_that_of_eager_attention(tmp_path: Path, family: str) -> None:
    model = tiny_model(family)
    model.train()
    body(model).layers[0].eval()  # a mixed state must come back as it was
    training = [module.training for module in model.modules()]
    with last_hidden(model) as hidden:
        captured(tmp_path, model)
    assert [module.training for module in model.modules()] == training
    assert model.config._attn_implementation == "eager"
    head = cast(Any, model.get_output_embeddings())
    with torch.no_grad():
        torch.testing.assert_close(head(hidden[0]), model.eval()(input_ids=token_ids()[None]).logits)


def test_sparse_capture_attends_what_it_records_and_nothing_else(tmp_path: Path) -> None:
    model = tiny_model("qwen2", layers=1)
    body(model).layers[0].self_attn.o_proj.weight.data.mul_(50)  # random attention adds next to nothing otherwise
    narrow = make_selector("sink-window", {"sink_tokens": 2, "window_tokens": 5})
    with last_hidden(model) as hidden:
        trace = captured(tmp_path, model, sparse=True, selector=narrow)
    pattern = trace.layer_pattern(0, 0)
    allowed = torch.from_numpy(np.stack([element_mask(pattern, head) for head in range(4)]))
    with last_hidden(model) as expected, torch.no_grad():
        model(input_ids=token_ids()[None], attention_mask=torch.zeros(1, 4, SEQ_LEN, SEQ_LEN).masked_fill(
            ~allowed[None], -torch.inf))  # fmt: skip
        model(input_ids=token_ids()[None])
    torch.testing.assert_close(hidden[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (hidden[0] - expected[1]).abs().max() > 1e-2, "dense attention gives something else"


def test_chosen_layers_and_steps(tmp_path: Path) -> None:
    model = tiny_model("llama", layers=3)
    everything = captured(tmp_path / "all", model)
    some = captured(tmp_path / "some", model, layers=(0, 2))
    assert (some.layers, some.header.model.layers, some.header.model.kv_heads) == ((0, 2), 3, 2)
    np.testing.assert_array_equal(
        some.layer_pattern(0, 2).heads[1].columns, everything.layer_pattern(0, 2).heads[1].columns
    )
    with TraceWriter(tmp_path / "some", some.header) as writer:
        settings = CaptureSettings(selector=VERTICAL_SLASH)
        assert capture_model(model, token_ids(1), writer, settings) == 1
        assert capture_model(model, token_ids(2)[None], writer, settings, training_step=70) == 70
        with pytest.raises(InputError, match="token_ids: has 499 tokens, the trace 500"):
            capture_model(model, token_ids(2)[:-1], writer, settings)
    assert Trace.open(tmp_path / "some").steps == (0, 1, 70)


def test_no_text_and_no_token_ids_are_stored(tmp_path: Path) -> None:
    ids = token_ids()
    captured(tmp_path, tiny_model("qwen2"))
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        assert ids[:16].numpy().tobytes() not in data and bytes(ids[:16].tolist()) not in data


def test_published_settings_per_head(tmp_path: Path) -> None:
    layer = (
        FixedBudget(columns=20, slashes=30, score=0.5),
        FlexBudget(columns_mass=0.5, columns_cap=100, slashes_mass=0.6, slashes_cap=100, score=0.0),
        FixedBudget(columns=64, slashes=1000, score=0.5),
        FixedBudget(columns=1, slashes=1, score=0.5),
    )
    trace = captured(tmp_path, tiny_model("qwen2"), selector=published_selector([layer, layer[::-1]]))
    rows = trace.heads(0)
    names = [row.choice.selector for row in rows[:4]]
    assert names == ["vertical-slash", "flex", "vertical-slash", "vertical-slash"]
    assert rows[5].choice.settings["columns"] == 64  # the second layer is the other way round
    assert rows[1].choice.settings == {"column_mass": 0.5, "column_cap": 100, "slash_mass": 0.6, "slash_cap": 100}
    assert [row.pattern.columns.size for row in (rows[0], rows[2], rows[3], rows[5])] == [20, 64, 1, 64]


@pytest.mark.parametrize("kind", ["vertical-slash", "xattention", "packed-documents"])
def test_masks_and_patterns_are_each_others_inverse(kind: str) -> None:
    written = synthesize(kind, SyntheticSettings(seq_len_tokens=SEQ_LEN, block_size=BLOCK, heads=2, columns=30,
                                                 density=0.3, mean_document_tokens=90))  # fmt: skip
    read = pattern_of(mask_of(written, columns_capacity=32, device=torch.device("cpu")))
    for head in range(2):
        np.testing.assert_array_equal(element_mask(read, head), element_mask(written, head))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_dense_causal(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 70, heads, 8, dtype=torch.float64, generator=generator)
               for heads in (6, kv_heads, kv_heads))  # fmt: skip
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(6 // kv_heads, 2)) * 0.3
    weights = torch.softmax(scores.masked_fill(~torch.ones(70, 70).tril().bool(), -torch.inf), -1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v.repeat_interleave(6 // kv_heads, 2))
    torch.testing.assert_close(dense_causal(q, k, v, scale=0.3), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
def test_a_gpu_records_what_a_cpu_does(tmp_path: Path, sparse: bool) -> None:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=97, hidden_size=256, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    on_cpu = captured(tmp_path / "cpu", model, sparse=sparse)
    on_gpu = captured(tmp_path / "gpu", model.cuda(), sparse=sparse)
    for layer in on_cpu.layers:
        for a, b in zip(on_cpu.layer_rows(0, layer), on_gpu.layer_rows(0, layer), strict=True):
            # float32 on a GPU may round through TF32 in the sparse kernels: a few scores at the cut change sides.
            assert jaccard(a.pattern.columns, b.pattern.columns) > 0.8
            assert block_overlap(a.pattern, b.pattern, 8) > 0.8
            assert b.choice.kept_mass_sampled == pytest.approx(a.choice.kept_mass_sampled, abs=0.02)


# ---------------------------------------------------------------- what is refused


class _Attention(torch.nn.Module):
    is_causal = True


REFUSED: dict[str, dict[str, Any]] = {
    "softcap: is 50.0": {"keywords": {"softcap": 50.0}},
    "s_aux: is a tensor": {"keywords": {"s_aux": torch.zeros(2)}},
    "sliding_window: is 9": {"keywords": {"sliding_window": 9}},
    "cu_seq_lens_q": {"keywords": {"cu_seq_lens_q": torch.tensor([0, 3, 10])}},
    "output_attentions": {"keywords": {"output_attentions": True}},
    "is_causal: is False": {"keywords": {"is_causal": False}},
    "surprise: is 'new'": {"keywords": {"surprise": "new"}},
    "dropout: is 0.1": {"dropout": 0.1},
    "explicit attention mask": {"attention_mask": torch.zeros(1, 1, 10, 10)},
    "a key/value cache": {"key": torch.zeros(1, 2, 12, 8)},
    "sliding_window: is 10": {"seq_len_tokens": 20},  # a window over this shard's tokens, not over the sequence's
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_attention_that_would_be_silently_wrong_is_refused(message: str) -> None:
    call: dict[str, Any] = {
        "key": torch.zeros(1, 2, 10, 8),
        "attention_mask": None,
        "dropout": 0.0,
        "keywords": {
            "sliding_window": 10,
            "softcap": None,
            "output_attentions": False,
            "position_ids": torch.arange(10),
        },
        "seq_len_tokens": 10,
    }
    query = torch.zeros(1, 4, 10, 8)
    check_attention_call(_Attention(), query, **call)
    with pytest.raises(UnsupportedError) as caught:
        check_attention_call(_Attention(), query, **{**call, **REFUSED[message]})
    assert message in str(caught.value)


def test_masks_that_would_be_needed_are_refused() -> None:
    plain: dict[str, Any] = {"batch_size": 1, "q_length": 9, "kv_length": 9, "mask_function": causal_mask_function}
    assert refuse_masks(**plain, attention_mask=torch.ones(1, 9, dtype=torch.bool)) is None
    assert refuse_masks(1, 9, 9, mask_function=sliding_window_causal_mask_function(9)) is None
    padded = torch.tensor([[True] * 8 + [False]])
    for change in (
        {"attention_mask": padded},
        {"mask_function": sliding_window_causal_mask_function(8)},
        {"kv_length": 12},
        {"q_offset": 3},
    ):
        with pytest.raises(UnsupportedError):
            refuse_masks(**{**plain, **change})


@pytest.mark.parametrize("call", ["padding", "packed", "mask4d"])
def test_a_whole_model_under_our_name_refuses_too(call: str) -> None:
    model = tiny_model("qwen2")
    model.set_attn_implementation(ATTENTION_NAME)
    keywords: dict[str, Any] = {
        "padding": {"attention_mask": (torch.arange(SEQ_LEN) > 3)[None].long()},
        "packed": {"position_ids": torch.cat([torch.arange(200), torch.arange(SEQ_LEN - 200)])[None]},
        "mask4d": {"attention_mask": torch.zeros(1, 1, SEQ_LEN, SEQ_LEN)},
    }
    with pytest.raises(UnsupportedError, match="attention_mask: "), torch.no_grad():
        model(input_ids=token_ids()[None], use_cache=False, **keywords[call])
    with pytest.raises(RuntimeError, match="outside capture_model"), torch.no_grad():
        model(input_ids=token_ids()[None], use_cache=False)


def _other_model(family: str, **settings: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, **settings,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("family, window", [("mistral", 100), ("gemma2", 4096)])
def test_models_with_other_attention_are_refused_and_left_as_they_were(
    tmp_path: Path, family: str, window: int
) -> None:
    model = _other_model(family, sliding_window=window)
    with pytest.raises(UnsupportedError):
        captured(tmp_path, model)
    assert model.config._attn_implementation == "eager"
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_a_model_with_learned_positions_and_no_grouped_heads(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "gpt2", vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    trace = captured(tmp_path, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert (trace.header.model.kv_heads, trace.header.model.head_dim) == (4, 16)


def test_a_batch_and_rounded_rotation_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    header = trace_header(model, model_id="tiny", seq_len_tokens=SEQ_LEN, block_size=BLOCK)
    settings = CaptureSettings(selector=VERTICAL_SLASH)
    with TraceWriter(tmp_path, header) as writer:
        with pytest.raises(InputError, match="has 1000 tokens"):
            capture_model(model, torch.stack([token_ids(), token_ids(1)]), writer, settings)
        with pytest.raises(UnsupportedError, match=r"rotary_emb.inv_freq: is torch.bfloat16"):
            capture_model(model.bfloat16(), token_ids(), writer, settings)


def test_settings_that_a_selector_cannot_have() -> None:
    for name, settings, message in (
        ("best", {}, "selector: 'best' is not one of vertical-slash"),
        ("flex", {"columns": 3}, "columns: flex has no such setting"),
        ("flex", {"column_mass": 1.5}, "column_mass: must be above 0"),
        ("moba-block", {"top_chunks": 0}, "top_chunks: must be a whole number from 1"),
        ("vertical-slash", {"columns": 2.5}, "columns: must be a whole number"),
    ):
        with pytest.raises(InputError, match=message):
            make_selector(name, settings)


def test_settings_that_do_not_fit_the_sequence_end_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="selector moba-block: chunk_tokens: 100 is no multiple"):
        captured(tmp_path, tiny_model("qwen2"), selector=make_selector("moba-block", {"chunk_tokens": 100}))


# ---------------------------------------------------------------- the command


def test_layers_of_the_command_line() -> None:
    assert parse_layers("all") is None
    assert parse_layers("3, 0-1,7") == (0, 1, 3, 7)
    for wrong in ("", "a", "3-1", "1-", "-1", "1,,2", "0-999999999999"):
        with pytest.raises(InputError, match="--layers"):
            parse_layers(wrong)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (config and safetensors), a config alone, and two texts."""
    folder = tmp_path_factory.mktemp("workshop")
    config = AutoConfig.for_model(
        "qwen2", vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "model")
    config.save_pretrained(folder / "bare")
    (folder / "a.txt").write_text("To be, or not to be, that is the question. " * 40)
    (folder / "b.txt").write_bytes(bytes(range(256)) * 4)
    return folder


def invoke(*arguments: str | Path):
    return CliRunner().invoke(cli.app, ["capture", *map(str, arguments)])


def test_command_captures_continues_and_reports(workshop: Path, tmp_path: Path) -> None:
    start = ["--model", workshop / "model", "--text", workshop / "a.txt", workshop / "b.txt", "--seq-len", "512", "-o",
             tmp_path / "t", "--columns", "50", "--slashes", "60", "--json"]  # fmt: skip
    first = invoke(*start, "--steps", "1")
    assert first.exit_code == 0, first.output
    again = invoke(*start, "--steps", "3")
    assert again.exit_code == 0, again.output
    summary, trace = json.loads(again.stdout), Trace.open(tmp_path / "t")
    assert (summary["steps"], summary["digest"]) == ([0, 1, 2], trace.digest())
    assert (trace.header.model.model_id, trace.header.origin) == ("model", "real")
    assert {"torch", "transformers"} <= set(trace.header.versions)
    once = invoke(*start[:-5], "--columns", "50", "--slashes", "60", "--steps", "3", "-o", tmp_path / "once")
    assert once.exit_code == 0, once.output
    assert "vertical-slash" in once.stdout
    for ours, theirs in zip(trace.manifest.parts, Trace.open(tmp_path / "once").manifest.parts, strict=True):
        assert ours == theirs, "interrupted or not, the trace is the same"


def test_command_refuses_in_one_line(workshop: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps([{"0": ["vertical_and_slash", 9, 9, 0.0]}]))
    good = ["--model", workshop / "bare", "--random-weights", "--text", workshop / "a.txt", "--seq-len", "256", "-o",
            tmp_path / "t"]  # fmt: skip
    cases = {
        "no such file": [*good, "--model", workshop / "absent"],
        "holds no safetensors weights": [item for item in good if item != "--random-weights"],
        "tokens in 1 files; 9 windows of 256 need 2304": [*good, "--steps", "9"],
        "block-size: is 100": [*good, "--block-size", "100"],
        "cap: vertical-slash has no such setting": [*good, "--cap", "10"],
        "window_tokens: flex has no such setting": [*good, "--selector", "flex", "--window", "7"],
        "recorded_layers has 5 in a model of 2": [*good, "--layers", "1,5"],
        "settings.json: layers: has 1 layers, the model has 2": [*good, "--settings", tmp_path / "settings.json"],
        "tokenizer: holds no tokenizer": [*good, "--tokenizer", "model"],
        "device: 'tpu' is": [*good, "--device", "tpu"],
        "cannot be read": [*good, "--text", workshop / "absent.txt"],
    }
    for message, arguments in cases.items():
        result = invoke(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), (message, result.output)
        assert message in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "t").exists(), "refused before anything was written"


def test_command_with_random_weights_in_a_process_of_its_own(workshop: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sparsering.cli", "capture", "--model", workshop / "bare" / "config.json",
               "--random-weights", "--text", workshop / "a.txt", "--seq-len", "256", "--selector", "flex", "--p", "0.8",
               "--cap", "64", "--block-size", "64", "--layers", "1", "-o", tmp_path / "t"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    trace = Trace.open(tmp_path / "t")
    assert (trace.layers, trace.header.model.model_id) == ((1,), "bare (random weights)")
    assert trace.heads(0)[0].choice.settings == {
        "column_mass": 0.8, "slash_mass": 0.8, "column_cap": 64, "slash_cap": 64,
    }  # fmt: skip
    (tmp_path / "t" / "manifest.json").write_bytes(b"{")
    failed = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=200)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
