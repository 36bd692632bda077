"""Clusters: hardware as data, read from YAML. Bandwidths are per direction; 1 GB/s is 1,000 bytes per microsecond."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from ...traces.errors import InputError, did_you_mean
from ...traces.validation import validated
from ...traces.yaml_files import read_yaml, with_settings
from ..specs import MAX_RANKS, Strict
from .tables import Calibration

CLUSTER_SCHEMA_VERSION = 1
PRESETS = Path(__file__).parent.parent / "presets"
MAX_CLUSTER_BYTES = 1 << 20


class Kernels(Strict):
    """What a backend's kernels reach: blocks a share of the GPU's peak, columns a share of the rate of blocks."""

    block_forward_efficiency: float = Field(gt=0, le=1)
    block_backward_efficiency: float = Field(gt=0, le=1)
    column_efficiency: float = Field(gt=0, le=1)


class Gpu(Kernels):
    """One GPU and what kernels reach on it; overhead is per kernel. Efficiencies: of all backends but those named."""

    name: str
    memory_bytes: int = Field(gt=0)
    peak_flops_per_us: float = Field(gt=0)
    multiprocessors: int = Field(gt=0)
    programs_per_multiprocessor: int = Field(default=1, gt=0)
    backends: dict[Literal["flash4"], Kernels] = Field(
        default_factory=dict, description="of backends whose kernels are not Triton's"
    )
    launch_overhead_us: float = Field(ge=0)
    memory_bandwidth_bytes_per_us: float | None = Field(
        default=None, gt=0, description="of the GPU's own memory; None: what launches read and write costs nothing"
    )
    host_bandwidth_bytes_per_us: float | None = Field(
        default=None, gt=0, description="of copies between the GPU and pinned host memory, one way; None: nobody said"
    )
    communication_slowdown: float = Field(
        default=0.0, ge=0, lt=1, description="share of compute speed lost while this GPU communicates"
    )
    pull_slowdown: float | None = Field(
        default=None, ge=0, lt=1, description="the same while copy engines alone carry it; None: no less"
    )
    matmul_efficiency: float = Field(
        default=0.75, gt=0, le=1, description="share of the peak that the matrix products of whole layers reach"
    )
    streaming_efficiency: float = Field(
        default=0.79, gt=0, le=1, description="share of the memory's bandwidth that what lies between them reaches"
    )
    dense_forward_efficiency: float | None = Field(
        default=None, gt=0, le=1, description="of dense attention's kernels; None: as the sparse ones"
    )
    dense_backward_efficiency: float | None = Field(default=None, gt=0, le=1, description="the same, backward")

    def kernels_of(self, backend: str) -> Kernels:
        """Return the efficiencies of a backend's kernels."""
        return next((kernels for name, kernels in self.backends.items() if name == backend), self)

    def slowdown_of(self, *, sends: bool, pulls: bool) -> float:
        """Return the share of compute speed lost while this GPU sends or receives, pulls or is pulled from."""
        of_pulls = self.communication_slowdown if self.pull_slowdown is None else self.pull_slowdown
        return max(self.communication_slowdown if sends else 0.0, of_pulls if pulls else 0.0)


class Link(Strict):
    """A kind of link. bandwidth_bytes_per_us: of one port, each way. latency_us: of one group call."""

    name: str
    bandwidth_bytes_per_us: float = Field(gt=0)
    latency_us: float = Field(ge=0)
    switch_bandwidth_bytes_per_us: float | None = Field(
        default=None, gt=0, description="what all ports together carry (of one node, or between nodes); else no limit"
    )


class NodeLink(Link):
    """The link within a node. pull_bandwidth_bytes_per_us: what copy engines carry where GPUs read others' memory."""

    pull_bandwidth_bytes_per_us: float | None = Field(
        default=None, gt=0, description="None: they cannot, or nobody measured it; plans are made without pulls"
    )

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.pull_bandwidth_bytes_per_us is not None and self.switch_bandwidth_bytes_per_us is not None:
            raise ValueError("a switch's capacity beside pulls is not modelled: give one of the two")
        return self


class Nics(Link):
    """The node's network cards: GPUs share them evenly, place p of a node uses card p * nics_per_node // gpus."""

    nics_per_node: int = Field(gt=0)


class Cluster(Strict):
    """Nodes of equal GPUs. Rank r is GPU r % gpus_per_node of node r // gpus_per_node."""

    schema_version: Literal[1] = CLUSTER_SCHEMA_VERSION
    name: str
    origin: Literal["measured", "datasheet"]
    nodes: int = Field(gt=0, le=4096)
    gpus_per_node: int = Field(gt=0, le=256)
    gpu: Gpu
    intra_node: NodeLink
    inter_node: Nics | None = None
    calibration: Calibration | None = Field(default=None, description="what `sparsering calibrate` measured")
    notes: str = ""

    @property
    def world_size(self) -> int:
        """GPUs of the cluster."""
        return self.nodes * self.gpus_per_node

    @property
    def pulls(self) -> bool:
        """Whether every GPU can read the memory of all others, as far as the file says."""
        return self.nodes == 1 and self.intra_node.pull_bandwidth_bytes_per_us is not None

    def node_of(self, rank: int) -> int:
        """Return the node that holds `rank`."""
        return rank // self.gpus_per_node

    def nic_of(self, rank: int) -> int:
        """Return the network card, within its node, that `rank` uses."""
        assert self.inter_node is not None
        return rank % self.gpus_per_node * self.inter_node.nics_per_node // self.gpus_per_node


def preset_names() -> list[str]:
    """Return the names of the cluster presets that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load_cluster(name_or_path: str | Path, settings: Sequence[str] = ()) -> Cluster:
    """Read a cluster from a YAML file or by preset name; InputError names file, field and value.

    settings: take the place of what the file says, each as `gpu.memory_bytes=80e9`.
    """
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        preset = PRESETS / f"{name_or_path}.yaml"
        if not preset.exists():
            near = did_you_mean(name_or_path, names := preset_names())
            raise InputError(f"no such file or preset; presets are {', '.join(names)}{near}", source=path)
        path = preset
    document = read_yaml(path, max_bytes=MAX_CLUSTER_BYTES)
    return parse_cluster(with_settings(document, settings, source=path), source=path)


def parse_cluster(document: object, *, source: str | Path) -> Cluster:
    """Build a Cluster from parsed YAML; InputError names the field and the value."""
    cluster = validated(Cluster, document, source, newest_schema=CLUSTER_SCHEMA_VERSION)
    if cluster.world_size > MAX_RANKS:
        problem = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs are {cluster.world_size}; at most {MAX_RANKS}"
        raise InputError(problem, source=source, field="nodes")
    if cluster.nodes > 1 and cluster.inter_node is None:
        raise InputError("is needed for more than one node", source=source, field="inter_node")
    return cluster
