"""The parts of a training step as times: work by the rates of a GPU and its links, beside simulated attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...traces.errors import UnsupportedError
from ..cost.cluster import Cluster
from .work import (
    StepSettings,
    TransformerSizes,
    gathered_bytes,
    head_flops,
    layer_bytes,
    linear_flops,
    logits_bytes,
    optimizer_bytes,
    scattered_bytes,
)

Basis = Literal["simulated", "rates", "given"]


@dataclass(frozen=True, kw_only=True)
class StepPart:
    """One part of a step on the busiest rank. basis: simulated, from the cluster's rates, or given by the user."""

    name: str
    us: float
    basis: Basis


@dataclass(frozen=True, kw_only=True)
class AttentionTimes:
    """Attention of all layers in one microbatch, in microseconds: forward, backward, and choosing its patterns."""

    forward_us: float
    backward_us: float
    choosing_us: float = 0.0
    choosing_basis: Basis = "given"


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """A step: its parts, in order, and the tokens of all ranks that it trains on."""

    parts: tuple[StepPart, ...]
    tokens: int

    @property
    def us(self) -> float:
        """The step's time."""
        return sum(part.us for part in self.parts)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all ranks a second."""
        return self.tokens / self.us * 1e6

    def gpu_hours(self, *, steps: int, ranks: int) -> float:
        """Return the GPU-hours of so many steps on so many ranks."""
        return self.us * steps * ranks / 3.6e9


def estimate_step(
    sizes: TransformerSizes, settings: StepSettings, cluster: Cluster, attention: AttentionTimes, *, tokens: int
) -> StepEstimate:
    """Return a step's parts. tokens: of all ranks.

    Assumes that a rank's parts follow each other and that communication of parameters hides behind a layer's
    computation where that takes longer. Raises UnsupportedError where the cluster says no memory bandwidth.
    """
    gpu = cluster.gpu
    if gpu.memory_bandwidth_bytes_per_us is None:
        raise UnsupportedError("is needed for a whole step", source=cluster.name,
                               field="gpu.memory_bandwidth_bytes_per_us")  # fmt: skip
    flops_per_us = gpu.peak_flops_per_us * gpu.matmul_efficiency
    bytes_per_us = gpu.memory_bandwidth_bytes_per_us * gpu.streaming_efficiency
    linear_us = linear_flops(sizes, settings) / flops_per_us
    between_us = layer_bytes(sizes, settings) / bytes_per_us
    loss_us = head_flops(sizes, settings) / flops_per_us + logits_bytes(sizes, settings) / bytes_per_us
    layers, batches = sizes.attention.layers, settings.microbatches
    a_layer_us = (linear_us + between_us) / batches + attention.forward_us + attention.backward_us
    parts = [
        StepPart(name="attention, forward", us=attention.forward_us * batches, basis="simulated"),
        StepPart(name="attention, backward", us=attention.backward_us * batches, basis="simulated"),
        StepPart(name="choosing patterns", us=attention.choosing_us * batches, basis=attention.choosing_basis),
        StepPart(name="matrices of the layers", us=linear_us, basis="rates"),
        StepPart(name="norms, activations, sums", us=between_us, basis="rates"),
        StepPart(name="loss", us=loss_us, basis="rates"),
        StepPart(name="sharded parameters, waited for", us=_waited_us(sizes, settings, cluster, a_layer_us / layers),
                 basis="rates"),
        StepPart(name="copies to the host and back", us=_offloaded_us(settings, cluster), basis="rates"),
        StepPart(name="optimizer", us=optimizer_bytes(sizes, settings) / bytes_per_us, basis="rates"),
    ]  # fmt: skip
    return StepEstimate(parts=tuple(part for part in parts if part.us), tokens=tokens)


def shard_link_bytes_per_us(cluster: Cluster, ranks: int) -> float:
    """Return what reaches a GPU a microsecond when `ranks` of them gather shards: the slowest link on the way.

    As NCCL's rings do: every GPU receives all that others hold through its own port, every node through all its cards.
    """
    link = cluster.intra_node
    rates = [link.bandwidth_bytes_per_us]
    if link.switch_bandwidth_bytes_per_us is not None:
        rates.append(link.switch_bandwidth_bytes_per_us / min(ranks, cluster.gpus_per_node))
    if ranks > cluster.gpus_per_node and cluster.inter_node is not None:
        nics, nodes = cluster.inter_node, -(-ranks // cluster.gpus_per_node)
        rates.append(nics.bandwidth_bytes_per_us * nics.nics_per_node)  # a ring through every card
        if nics.switch_bandwidth_bytes_per_us is not None:
            rates.append(nics.switch_bandwidth_bytes_per_us / nodes)
    return min(rates)


def _offloaded_us(settings: StepSettings, cluster: Cluster) -> float:
    """Return what copying activations to the host and back takes: nothing else is computed meanwhile.

    UnsupportedError where something is copied and the cluster does not say how quickly.
    """
    if not settings.offloaded_bytes:
        return 0.0
    if cluster.gpu.host_bandwidth_bytes_per_us is None:
        raise UnsupportedError("is needed for activations that wait in host memory", source=cluster.name,
                               field="gpu.host_bandwidth_bytes_per_us")  # fmt: skip
    return 2 * settings.offloaded_bytes * settings.microbatches / cluster.gpu.host_bandwidth_bytes_per_us


def _waited_us(sizes: TransformerSizes, settings: StepSettings, cluster: Cluster, a_layer_us: float) -> float:
    """Return what of gathering and scattering does not hide: the root's, the first unit's, and what exceeds a layer.

    A unit is one layer or several. Its parameters are gathered in forward and again in backward, where its gradients
    are scattered too.
    """
    if settings.ranks == 1:
        return 0.0
    rate = shard_link_bytes_per_us(cluster, settings.ranks)
    layer, root = sizes.layer_parameters, sizes.root_parameters
    layer_us = (2 * gathered_bytes(layer, settings) + scattered_bytes(layer, settings)) / rate
    first = settings.unit_layers * layer + root
    first_us = (2 * gathered_bytes(first, settings) + scattered_bytes(root, settings)) / rate
    exceeding_us = max(0.0, layer_us - a_layer_us) * sizes.attention.layers
    return (first_us + exceeding_us) * settings.microbatches
