"""What one rank computes and moves beside attention in one optimizer step.

Shape legend: E hidden size, M hidden size of the MLP, V vocabulary, D_q and D_kv elements of all query and K/V heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..specs import ModelShape

GATED_MLP_MATRICES = 3


@dataclass(frozen=True, kw_only=True)
class TransformerSizes:
    """A decoder of equal layers. parameters: all of them; layer_parameters: of one layer."""

    attention: ModelShape
    hidden: int
    mlp_hidden: int
    vocabulary: int
    parameters: int
    layer_parameters: int

    @property
    def root_parameters(self) -> int:
        """Parameters outside of the layers: embeddings, head, last norm."""
        return self.parameters - self.attention.layers * self.layer_parameters


@dataclass(frozen=True, kw_only=True)
class StepSettings:
    """How a step is computed.

    tokens: of one rank in one microbatch; ranks: processes that parameters and optimizer states are sharded over.
    whole_layers: so many layers keep everything, the others are computed a second time in backward, but for their
    attention. fused_layers: norms, rotation and the MLP's activation are one kernel each. fused_loss: the head's logits
    and their gradients are made and used up in one kernel. mlp_tiles: pieces of the tokens in which the MLP is
    computed, once more where there are several. offloaded_bytes: that a microbatch brings to the host, and back.
    unit_layers: layers whose parameters are gathered together.
    """

    tokens: int
    microbatches: int
    ranks: int
    whole_layers: int
    fused_layers: bool
    fused_loss: bool
    element_bytes: int
    master_bytes: int
    mlp_tiles: int = 1
    offloaded_bytes: int = 0
    unit_layers: int = 1


def layer_runs(sizes: TransformerSizes, settings: StepSettings) -> int:
    """Return how often a layer is computed forward in a microbatch, over all layers: recomputed ones count twice."""
    layers = sizes.attention.layers
    return 2 * layers - min(settings.whole_layers, layers)


def linear_flops(sizes: TransformerSizes, settings: StepSettings) -> float:
    """Return the FLOPs of the layers' matrices on one rank: 2 a parameter and token forward, twice that backward."""
    layers = sizes.attention.layers
    runs = layer_runs(sizes, settings) + 2 * layers
    again = GATED_MLP_MATRICES * sizes.hidden * sizes.mlp_hidden * layers if settings.mlp_tiles > 1 else 0
    return 2.0 * (sizes.layer_parameters * runs + again) * settings.tokens * settings.microbatches


def head_flops(sizes: TransformerSizes, settings: StepSettings) -> float:
    """Return the FLOPs of the head: logits, and the gradients of hidden states and weights, each once."""
    return 3 * 2.0 * sizes.vocabulary * sizes.hidden * settings.tokens * settings.microbatches


def layer_bytes(sizes: TransformerSizes, settings: StepSettings) -> float:
    """Return the bytes that what lies between a layer's matrices reads and writes on one rank: backward twice forward.

    Two norms, two residual sums, the rotation of queries and keys, the activation of a gated MLP; plain torch makes
    each of them several kernels, a norm and its types seven.
    """
    element, wide = settings.element_bytes, max(4, settings.element_bytes)
    shape = sizes.attention
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    if settings.fused_layers:
        norm, rotation, activation = 2 * element, 2 * element, 3 * element
    else:
        norm, rotation, activation = 5 * element + 7 * wide, 10 * element, 5 * element
    a_token = sizes.hidden * (2 * norm + 6 * element) + rotated * rotation + sizes.mlp_hidden * activation
    runs = layer_runs(sizes, settings) + 2 * shape.layers
    return float(a_token * settings.tokens * settings.microbatches * runs)


def logits_bytes(sizes: TransformerSizes, settings: StepSettings) -> float:
    """Return the bytes of passes over logits: read and turned into gradients in place, or copies of a wider type."""
    passes = 3 * settings.element_bytes if settings.fused_loss else 6 * max(4, settings.element_bytes)
    return float(sizes.vocabulary * settings.tokens * settings.microbatches * passes)


def optimizer_bytes(sizes: TransformerSizes, settings: StepSettings) -> float:
    """Return the bytes of AdamW and of clipping on one rank's shard: 10 passes over values of the master type."""
    return 10.0 * settings.master_bytes * sizes.parameters / settings.ranks


def gathered_bytes(parameters: int, settings: StepSettings) -> float:
    """Return the bytes that reach a rank when the other ranks' shards of these parameters are gathered."""
    return settings.element_bytes * parameters * (settings.ranks - 1) / settings.ranks


def scattered_bytes(parameters: int, settings: StepSettings) -> float:
    """Return the bytes that leave a rank when gradients are reduced and scattered, in at least float32."""
    return max(4, settings.element_bytes) * parameters * (settings.ranks - 1) / settings.ranks
