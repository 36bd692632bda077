"""Models, configurations and processes that were changed since, or meanwhile: right again, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from transformers import BloomForCausalLM, LlamaForCausalLM
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel

from model_cases import case_config, case_model, dense_plan
from sparsering.runtime.audit.audit import audit
from sparsering.runtime.comm.mesh import Mesh, join_or_be_alone, leave
from sparsering.runtime.hf.attach import attach
from sparsering.runtime.model.attached import Attached
from sparsering.runtime.model.shard import shard
from sparsering.traces.errors import UnsupportedError

TOKENS = 256


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    yield join_or_be_alone(device="cpu", timeout_s=60)
    leave()


def _ids() -> Tensor:
    return torch.randint(3, 250, (1, TOKENS), generator=torch.Generator().manual_seed(0))


def _lively(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def _attached(model: Any, mesh: Mesh) -> tuple[Attached, dict[str, Any]]:
    plan = dense_plan(model.config, world_size=1)
    return attach(model, plan, mesh), shard({"input_ids": _ids()}, plan, 0)


class _Interrupting:
    """Attention during which Ctrl-C comes, in layer 1."""

    def __init__(self, attention: Any) -> None:
        self._attention = attention

    def __call__(self, *given: Any, layer: int, **settings: Any) -> Tensor:
        if layer == 1:
            raise KeyboardInterrupt
        return self._attention(*given, layer=layer, **settings)


def test_a_call_after_an_interrupted_one_is_right(mesh: Mesh) -> None:
    model = _lively(case_model("gpt-neo"))
    alone = model(_ids()).logits.detach()
    attached, given = _attached(model, mesh)
    before = model(**given).logits.detach()
    planned = attached.planned
    attached.planned = _Interrupting(planned)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        model(**given)
    attached.planned = planned
    assert torch.equal(model(**given).logits, before)
    attached.planned = _Interrupting(planned)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(KeyboardInterrupt):
        model(**given)
    attached.planned = planned
    attached.detach()
    assert isinstance(torch.matmul(torch.randn(1, 2, 5, 3), torch.randn(1, 2, 3, 5)), Tensor)
    assert torch.equal(model(_ids()).logits, alone)


def test_a_model_that_shares_its_configuration_with_an_attached_one_is_refused(mesh: Mesh) -> None:
    config = case_config("bloom")
    config._attn_implementation = "eager"
    trained, reference = (_lively(BloomForCausalLM(config).double()) for _ in range(2))
    alone = reference(_ids()).logits.detach()
    attached, given = _attached(trained, mesh)
    trained(**given)
    with pytest.raises(UnsupportedError, match="config: is that of an attached model too"):
        reference(_ids())
    trained(**given)
    attached.detach()
    assert torch.equal(reference(_ids()).logits, alone)


def test_a_method_put_on_one_module_is_refused(mesh: Mesh) -> None:
    model: Any = case_model("gpt-neo")
    module = model.transformer.h[0].attn.attention
    own = module._attn
    module._attn = lambda *given, **settings: own(*given, **settings)
    with pytest.raises(UnsupportedError, match=r"attention: has a method or hook of .*<lambda>"):
        _attached(model, mesh)


def test_a_window_changed_in_the_configuration_alone_is_refused(mesh: Mesh) -> None:
    model = case_model("gpt-neo")
    model.config.window_size = 200
    with pytest.raises(UnsupportedError, match=r"layer 1\..*bias: is not the mask that the configuration gives"):
        _attached(model, mesh)


def test_a_hook_on_all_modules_is_refused_and_no_audit_is_kept_with_it(mesh: Mesh, tmp_path: Path) -> None:
    model = case_model("gpt-neo")
    hook = register_module_forward_hook(lambda module, given, output: None)
    try:
        with pytest.raises(UnsupportedError, match=r"global hook: .*<lambda> is called for every module"):
            _attached(model, mesh)
        audit(model.config, seq_len_tokens=TOKENS, model_class=type(model), cache=tmp_path)
    finally:
        hook.remove()
    assert not list(tmp_path.iterdir())


def test_an_audit_is_not_kept_where_a_loss_was_put_in_place_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = case_model("gpt-neo")
    monkeypatch.setitem(LOSS_MAPPING, "ForCausalLM", lambda logits, labels, vocab_size, **settings: logits.mean())
    found = audit(model.config, seq_len_tokens=TOKENS, model_class=type(model), cache=tmp_path)
    assert not found.right
    assert not list(tmp_path.iterdir())


class _NearModel(LlamaModel):
    """Llama that looks `reach` tokens back, as its code says and its configuration does not."""

    reach = 128

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # called by name
        self, input_ids: Any = None, position_ids: Any = None, **settings: Any
    ) -> Any:  # fmt: skip
        hidden = self.embed_tokens(input_ids)
        places = torch.arange(hidden.shape[1])[None] if position_ids is None else position_ids
        given = {"config": self.config, "inputs_embeds": hidden, "attention_mask": None, "past_key_values": None}
        mask = create_causal_mask(**given, position_ids=places, and_mask_function=self.near())
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=self.rotary_emb(hidden, places))
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    def near(self) -> Any:
        return lambda batch, head, query, key: query - key < self.reach


class _WindowModel(_NearModel):
    """The same by a part of transformers' own."""

    def near(self) -> Any:
        return sliding_window_overlay(self.reach)


class _NearLM(LlamaForCausalLM):
    body: type[LlamaModel] = _NearModel

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.body(config)
        self.post_init()


class _WindowLM(_NearLM):
    body = _WindowModel


@pytest.mark.parametrize(
    ("kind", "told"),
    [(_NearLM, "masks attention: the audit proves nothing"), (_WindowLM, "a window of 128 tokens, the configuration")],
)
def test_a_mask_that_the_code_alone_knows_of_is_refused(kind: Any, told: str, mesh: Mesh) -> None:
    """It is wider than what an audit looks at, which finds nothing wrong."""
    config = case_config("llama")
    config.sliding_window = None
    model = kind._from_config(config, attn_implementation="eager").double()
    with pytest.raises(UnsupportedError, match=told):
        _attached(model, mesh)
