"""Tiny configurations of transformers' causal models, each standing for a kind, and whether it may be split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsering.planner.layouts.gather import Gather
from sparsering.planner.plan import AttentionSpec, KernelSpec, PatternSpec, Plan, make_plan
from sparsering.planner.schedule.placement import striped
from sparsering.runtime.model.shape import model_shape

SEQ_LEN_TOKENS = 256

BASE: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
       "num_key_value_heads": 4}  # fmt: skip
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
           "moe_intermediate_size": 32}  # fmt: skip
GEMMA4 = {"head_dim": 16, "global_head_dim": 24, "sliding_window": 64, "hidden_size_per_layer_input": 8,
          "vocab_size_per_layer_input": 256, "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
ROUTERS = {"output_router_logits": True, "router_aux_loss_coef": 0.7, "num_experts_per_tok": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
NESTED_DYNAMIC = {
    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
ENCODER = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OF_A_DECODER = {"d_model": 64, "decoder_layers": 2, "encoder_layers": 3, "decoder_attention_heads": 4,
                "decoder_ffn_dim": 96, "encoder_attention_heads": 2, "dropout": 0.0}  # fmt: skip
INDEXER = {"index_topk": 256, "index_n_heads": 2, "index_head_dim": 16}
# name -> (family, settings, what the refusal says; None: it is right)
CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "llama": ("llama", {}, None),
    "llama-gqa7": ("llama", {"num_attention_heads": 14, "hidden_size": 224, "head_dim": 16}, None),
    "llama-yarn": ("llama", {"rope_parameters": YARN}, None),
    "llama-dynamic-short": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                            None),
    "qwen3": ("qwen3", {"head_dim": 32}, None),
    "gemma3": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 64, "sliding_window": 4096}, None),
    "granite": ("granite", {"attention_multiplier": 0.125, "logits_scaling": 8.0, "residual_multiplier": 0.22,
                            "embedding_multiplier": 12.0}, None),
    "granite-scale-1": ("granite", {"attention_multiplier": 1.0}, None),
    "cohere": ("cohere", {"logit_scale": 0.0625}, None),
    "gemma3-capped": ("gemma3_text", {"head_dim": 16, "sliding_window": 4096, "final_logit_softcapping": 2.0}, None),
    "phi-bias": ("phi", {"partial_rotary_factor": 0.5}, None),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 32}, None),
    "gpt2": ("gpt2", {"n_positions": 4096, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, None),
    # windows, chunks, softcaps, learned sinks, experts
    "gemma2": ("gemma2", {"head_dim": 16, "sliding_window": 100, "query_pre_attn_scalar": 16,
                          "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}, None),
    "gemma3-window": ("gemma3_text", {"head_dim": 16, "sliding_window": 70, "num_hidden_layers": 3,
                                      "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                      None),
    "gpt-oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 33},
                None),
    # losses of routers, over all ranks
    "qwen3-moe-routers": ("qwen3_moe", ROUTERS | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 32}, None),
    "mixtral-routers": ("mixtral", ROUTERS | {"num_local_experts": 4, "sliding_window": None}, None),
    "gpt-oss-routers": ("gpt_oss", ROUTERS | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 33}, None),
    "olmoe-routers": ("olmoe", ROUTERS | {"num_experts": 4}, None),
    "mistral-window": ("mistral", {"sliding_window": 64}, None),
    "olmo3": ("olmo3", {"sliding_window": 90, "layer_types": ["sliding_attention", "full_attention"]}, None),
    "llama4-chunks": ("llama4_text", {"head_dim": 16, "attention_chunk_size": 72, "num_local_experts": 2,
                                      "intermediate_size_mlp": 96, "attn_temperature_tuning": False,
                                      "layer_types": ["chunked_attention", "full_attention"]}, None),
    # values narrower than keys; kinds of layers with heads of other sizes and numbers, some with the keys of others
    "deepseek-v3": ("deepseek_v3", MLA | EXPERTS, None),
    "mimo": ("mimo_v2_flash", {"head_dim": 24, "v_head_dim": 16, "sliding_window": 50, "n_routed_experts": 4,
                               "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                               "layer_types": ["full_attention", "sliding_attention"]}, None),
    "gemma4": ("gemma4_text", GEMMA4, None),
    "gemma4-shared-keys": ("gemma4_text", GEMMA4 | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "attention_k_eq_v": True, "num_global_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2}, None),
    "head-dim-96": ("llama", {"head_dim": 96}, None),
    "head-dim-80": ("llama", {"head_dim": 80}, None),
    # state along the sequence, outside attention
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 96, "block_multiple_of": 8},
             r"asked for by layers \[.*\] of 2"),
    "qwen3-next": ("qwen3_next", {**LINEAR, "num_experts": 0}, r"asked for by layers \[.*\] of 2"),
    "qwen3.5": ("qwen3_5_text", LINEAR, r"asked for by layers \[.*\] of 2"),
    "jamba": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "mamba_d_state": 8, "mamba_dt_rank": 8, "use_mamba_kernels": False},
              r"asked for by layers \[.*\] of 2"),
    "recurrent-gemma": ("recurrent_gemma", {"lru_width": 64, "attention_window_size": 4096,
                                            "block_types": ["recurrent", "attention"]}, "asked for by layers"),
    # attention that a class writes out: one K/V head, ALiBi, a window; positions that a class makes itself
    "falcon": ("falcon", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}, None),
    "bloom": ("bloom", {}, None),
    "gpt-neo": ("gpt_neo", {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
                            "window_size": 70}, None),
    "bart": ("bart", OF_A_DECODER, None),
    # encoders as decoders: a transform before the head; positions that begin after the padding's, and count tokens
    "bert": ("bert", ENCODER | {"is_decoder": True}, None),
    "roberta": ("roberta", ENCODER | {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0}, None),
    # what is added to the scores of a key; layers that ask twice; layers with fewer heads; keys that a model chooses
    "doge": ("doge", {"num_key_value_heads": 4}, None),
    "diffllama": ("diffllama", {}, None),
    "deepseek-v3.2": ("deepseek_v32", MLA | EXPERTS | INDEXER, None),
    "deepseek-v3.2-chooses": ("deepseek_v32", MLA | EXPERTS | INDEXER | {"index_topk": 255},
                              "index_topk: is 255, below the 256 tokens of a sequence: the model chooses keys itself"),
    # attention that is no plain one, though it is written out
    "cpmant": ("cpmant", {"dim_head": 16, "dim_ff": 96}, "attention scores"),
    # angles that depend on the length of what a rank sees, nested too
    "llama-dynamic": ("llama", {"max_position_embeddings": 96,
                                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
                      "rope_parameters.rope_type: 'dynamic' depends on the length a rank sees"),
    "gemma3-dynamic": ("gemma3_text", {"head_dim": 16, "sliding_window": 4096, "max_position_embeddings": 96,
                                       "rope_parameters": NESTED_DYNAMIC},
                       "rope_parameters.full_attention.rope_type: 'dynamic'"),
    # what attention is asked for beside plain causal
    # by places in a shard, not in the sequence, for attention's temperature
    "llama4-temperature": ("llama4_text", {"head_dim": 16, "attention_chunk_size": 64, "num_local_experts": 2,
                                           "intermediate_size_mlp": 96, "attn_temperature_tuning": True,
                                           "layer_types": ["chunked_attention", "full_attention"],
                                           "no_rope_layers": [1, 0], "floor_scale": 16},
                           "audit: "),
    "llama-dropout": ("llama", {"attention_dropout": 0.1}, "attention_dropout: is 0.1"),
    # a setting that its class does not know: alone it adds nothing
    "router-losses-ignored": ("afmoe", {"output_router_logits": True, "router_aux_loss_coef": 0.7},
                              "audit: loss is off by"),
    "router-losses-unknown": ("flint", {"output_router_logits": True, "num_experts_per_tok": 2},
                              "output_router_logits: is on, but FlintForCausalLM does not say which modules"),
    "router-losses-without": ("llama", {"output_router_logits": True}, "output_router_logits: is on, but "),
    "bert-encoder": ("bert", ENCODER, "is not causal"),
}  # fmt: skip
RIGHT = [name for name, (_, _, refusal) in CASES.items() if refusal is None]
REFUSED = [name for name, (_, _, refusal) in CASES.items() if refusal is not None]
WITHOUT_KV_HEADS = {"falcon", "gpt2", "bert", "bloom", "gpt_neo", "bart", "roberta", "cpmant"}


def case_config(name: str) -> Any:
    """Return the configuration of a case."""
    family, extra, _ = CASES[name]
    settings = BASE | extra
    if family in WITHOUT_KV_HEADS:
        settings.pop("num_key_value_heads")
    return AutoConfig.for_model(family, **settings)


def case_model(
    name: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, head_gain: float = 1.0
) -> PreTrainedModel:
    """Return the model in eval mode. head_gain > 1 enlarges the head, as training does: scales and caps show."""
    torch.manual_seed(seed)
    config = case_config(name)
    config._experts_implementation = "eager"  # grouped products of experts know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(head_gain)
    return model


def write_case(name: str, folder: Path) -> Path:
    """Write a case's config.json and return the folder."""
    case_config(name).save_pretrained(folder)
    return folder


def dense_plan(
    config: Any, *, world_size: int, selector: str = "sink-window", settings: Any = None, **changes: Any
) -> Plan:
    """Return a float64 plan over 256 tokens, striped by 64: every diagonal active unless another selector is named."""
    spec = {"model": model_shape(config), "seq_len_tokens": SEQ_LEN_TOKENS, "block_size": 64, "dtype": "float64",
            "columns_capacity": 0}  # fmt: skip
    attention = spec | {name: changes.pop(name) for name in spec if name in changes}
    given: dict[str, Any] = {
        "attention": AttentionSpec.model_validate(attention),
        "placement": striped(seq_len_tokens=SEQ_LEN_TOKENS, world_size=world_size, granularity_tokens=64),
        "forward": Gather(),
        "pattern": PatternSpec(
            source="choose",
            selector=selector,
            settings=settings or {"sink_tokens": 0, "window_tokens": SEQ_LEN_TOKENS},
        ),
        "kernels": KernelSpec(backend="blockwise"),
    }
    return make_plan(**(given | changes))
