"""Capture on tiny Hugging Face models: what is recorded is what they attend to, and they are left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from capture_cases import BLOCK, SEQ_LEN, VERTICAL_SLASH, body, captured, last_hidden, token_ids
from sparsering.kernels.select.probe import ShardTensors
from sparsering.runtime.attention.masks import mask_of
from sparsering.runtime.hf.capture import (
    CaptureSettings,
    capture_model,
    dense_causal,
)
from sparsering.runtime.pattern.recorded import pattern_of
from sparsering.runtime.pattern.selectors import make_selector, published_selector
from sparsering.traces.dataset.store import Trace
from sparsering.traces.dataset.writer import TraceWriter
from sparsering.traces.errors import InputError
from sparsering.traces.pattern import BlockMask, element_mask
from sparsering.traces.published import FixedBudget, FlexBudget
from sparsering.traces.stats import block_overlap, jaccard
from sparsering.traces.synthetic import SyntheticSettings, synthesize
from tiny_models import tiny_model

FAMILIES = ["qwen2", "llama"]
SMALL: dict[str, dict[str, Any]] = {
    "flex": {"column_cap": 9, "slash_cap": 2}, "moba-block": {"chunk_tokens": 64, "top_chunks": 3},
    "xattention": {"mass": 0.4}, "sink-window": {"window_tokens": 100},
    "vertical-slash": {"columns": 40, "slashes": 60},
}  # fmt: skip


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
        mask = VERTICAL_SLASH.choose(shard, scale=16**-0.5)
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


@pytest.mark.parametrize("name", list(SMALL))
def test_every_selector_and_its_kept_mass(tmp_path: Path, name: str) -> None:
    model = tiny_model("qwen2", dtype=torch.float64)
    with queries_and_keys(model) as seen, torch.no_grad():
        model.set_attn_implementation("sdpa")
        model(input_ids=token_ids()[None])
    selector = make_selector(name, SMALL[name])
    trace = captured(tmp_path, model, selector=selector, sampled_rows=SEQ_LEN)
    for layer in trace.layers:
        pattern = trace.layer_pattern(0, layer)
        assert isinstance(pattern.heads[0], BlockMask) == (name in ("xattention", "moba-block"))
        for row in trace.layer_rows(0, layer):
            assert (row.choice.selector, row.choice.settings) == (name, selector.settings)
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
