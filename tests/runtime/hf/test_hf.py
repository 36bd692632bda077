"""A Hugging Face model under a plan, on real gloo processes, equal to the same model alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rank_pool import RankFailure, RankPool
from sparsering.planner.layouts.registry import make_layout
from sparsering.planner.plan import AttentionSpec, KernelSpec, ModelShape, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped, zigzag
from sparsering.runtime.model.shard import shard
from sparsering.traces.errors import InputError, UnsupportedError
from tiny_models import tiny_model

SEQ_LEN_TOKENS = 230
SHAPE = ModelShape(layers=2, heads=4, kv_heads=2, head_dim=16)


def _plan(
    world_size: int, *, layout: str = "ring", window_tokens: int = SEQ_LEN_TOKENS, model: ModelShape = SHAPE
) -> Plan:
    make = zigzag if layout == "ring" else striped
    return make_plan(
        attention=AttentionSpec(
            model=model,
            seq_len_tokens=SEQ_LEN_TOKENS,
            block_size=64,
            dtype="float64",
            columns_capacity=64,
        ),
        placement=make(seq_len_tokens=SEQ_LEN_TOKENS, world_size=world_size, granularity_tokens=64),
        forward=make_layout(layout),
        pattern=PatternSpec(
            source="choose",
            selector="sink-window",
            settings={"sink_tokens": 4, "window_tokens": window_tokens},
        ),
        kernels=KernelSpec(backend="blockwise"),
    )


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("layout", ["ring", "gather"])
def test_density_one_equals_the_model_alone(family: str, layout: str, rank_pools: Callable[[int], RankPool]) -> None:
    ids = torch.randint(0, 97, (1, SEQ_LEN_TOKENS), generator=torch.Generator().manual_seed(0))
    model = tiny_model(family, dtype=torch.float64)
    alone = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
    alone.backward()
    results = rank_pools(2).run("model_step", plan=_plan(2, layout=layout), family=family, ids=ids.numpy())
    assert sum(r["loss_sum"] for r in results) / (SEQ_LEN_TOKENS - 1) == pytest.approx(alone.item(), abs=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        # The model's eager attention rounds its probabilities to float32 even in a float64 model.
        summed = sum(result["gradients"][name] for result in results) / (SEQ_LEN_TOKENS - 1)
        np.testing.assert_allclose(summed, parameter.grad.numpy(), rtol=1e-5, atol=1e-7, err_msg=name)


def test_a_sparse_pattern_changes_the_loss(rank_pools: Callable[[int], RankPool]) -> None:
    ids = torch.randint(0, 97, (1, SEQ_LEN_TOKENS), generator=torch.Generator().manual_seed(0))
    loss = [
        sum(
            r["loss_sum"]
            for r in rank_pools(2).run("model_step", plan=_plan(2, window_tokens=w), family="llama", ids=ids.numpy())
        )
        for w in (SEQ_LEN_TOKENS, 64)
    ]
    assert abs(loss[0] - loss[1]) > 1e-6


def test_another_model_shape_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    other = SHAPE.model_copy(update={"layers": 3})
    ids = torch.zeros(1, SEQ_LEN_TOKENS, dtype=torch.long)
    with pytest.raises(RankFailure, match="model: the plan is for"):
        rank_pools(2).run("model_step", plan=_plan(2, model=other), family="llama", ids=ids.numpy())


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"softcap": -30.0}, "softcap"),
        ({"s_aux": np.zeros(3)}, "s_aux"),
        ({"sliding_window": 8}, "sliding_window"),
        ({"dropout": 0.1}, "dropout"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"attention_mask": np.zeros((1, 1, 4, 4))}, "attention_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_change_attention_is_refused(
    keywords: dict, message: str, rank_pools: Callable[[int], RankPool]
) -> None:
    with pytest.raises(RankFailure, match=message):
        rank_pools(1).run("attention_call", plan=_plan(1), keywords=keywords)


def test_a_padding_mask_is_refused(rank_pools: Callable[[int], RankPool]) -> None:
    ids = torch.zeros(1, SEQ_LEN_TOKENS, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[:, -3:] = 0
    with pytest.raises(RankFailure, match="attention_mask"):
        rank_pools(1).run("model_step", plan=_plan(1), family="llama", ids=ids.numpy(), attention_mask=mask.numpy())


def test_shards_hold_every_token_once_with_globally_shifted_labels() -> None:
    plan = _plan(2)
    ids = torch.arange(SEQ_LEN_TOKENS)[None]
    seen = {}
    for rank in range(2):
        part = shard({"input_ids": ids}, plan, rank)
        for token, position, label in zip(
            *(part[n][0].tolist() for n in ("input_ids", "position_ids", "labels")), strict=True
        ):
            seen[position] = (token, label)
    assert sorted(seen) == list(range(256))
    assert all(seen[p] == (p, p + 1) for p in range(SEQ_LEN_TOKENS - 1))
    assert seen[SEQ_LEN_TOKENS - 1] == (SEQ_LEN_TOKENS - 1, -100)
    assert all(seen[p] == (0, -100) for p in range(SEQ_LEN_TOKENS, 256))


def test_shard_refuses_what_does_not_fit() -> None:
    ids = torch.zeros(1, 100, dtype=torch.long)
    with pytest.raises(InputError, match="input_ids"):
        shard({"input_ids": ids}, _plan(2), 0)
    with pytest.raises(InputError, match="rank"):
        shard({"input_ids": ids}, _plan(2), 2)
    whole = torch.zeros(1, SEQ_LEN_TOKENS, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="padding"):
        shard({"input_ids": whole, "attention_mask": torch.zeros_like(whole)}, _plan(2), 0)
