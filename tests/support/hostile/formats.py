"""Every format that is read from files of others: a good example, how a changed one is written, and what reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mutations import as_json
from report_files import METRICS_LINE, invoke, write_cluster, write_metrics, write_plan, write_timelines, write_trace
from sparsering.planner.commands import check
from sparsering.planner.cost.cluster import load_cluster
from sparsering.planner.importing.nccl_tests import fit_line, read_nccl_table
from sparsering.planner.importing.topology import read_topology
from sparsering.planner.plan import Plan, load_launches, load_plan
from sparsering.simulator.comparisons import read_comparisons
from sparsering.simulator.metrics import timeline_metrics
from sparsering.simulator.report.inputs import read_inputs
from sparsering.simulator.report.page import report_html
from sparsering.simulator.report.parts.assemble import make_report
from sparsering.simulator.validate import judge
from sparsering.traces.dataset.row_formats import SCHEMA
from sparsering.traces.dataset.store import Trace
from sparsering.traces.files import sealed, sha256_of_bytes
from sparsering.traces.published import read_published
from sparsering.traces.timeline import Timeline
from tool_texts import nccl_table, topology

Reader = Callable[[Path], object]
Writer = Callable[[Path, Any], None]


@dataclass(frozen=True, kw_only=True)
class Format:
    """One format. make: writes a good example into a folder and returns the file that is to be changed.

    read: reads it, and does with it what is done first; document: the example as plain values; write: puts a changed
    document in the file's place, its digests made to fit. Without these two it is text, changed byte by byte only.
    """

    name: str
    make: Callable[[Path], Path]
    read: Reader
    document: Callable[[Path], Any] | None = None
    write: Writer | None = None


def of_json(path: Path) -> Any:
    """Return an example of a format that is JSON as plain values."""
    return json.loads(path.read_bytes())


def write_text(path: Path, document: Any) -> None:
    """Write a changed document as it is."""
    path.write_bytes(as_json(document))


def write_sealed(path: Path, document: Any) -> None:
    """Write a changed document with the digest that fits it, where there is one."""
    if isinstance(document, dict):
        with suppress(ValueError, TypeError, RecursionError):
            document = sealed(document)
    write_text(path, document)


def _trace(folder: Path) -> Path:
    return write_trace(folder / "trace", "vertical-slash", columns=8, tokens=1024) / "manifest.json"


def _masks(folder: Path) -> Path:
    return write_trace(folder / "trace", "xattention", tokens=1024) / "part-00000000.parquet"


def _read_trace(path: Path) -> None:
    trace = Trace.open(path.parent)
    trace.verify()
    assert trace.unlisted_parts is not None


def _rows(path: Path) -> Any:
    rows = pq.read_table(path).to_pylist()
    return [row | {"block_bits": row["block_bits"] and row["block_bits"].hex()} for row in rows]


def _write_rows(path: Path, rows: Any) -> None:
    """Write rows as they are, where Parquet can hold them, and let the manifest vouch for them."""
    with suppress(pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError, RecursionError):
        made = [row | {"block_bits": row.get("block_bits") and bytes.fromhex(row["block_bits"])} for row in rows]
        sink = BytesIO()
        pq.write_table(pa.Table.from_pylist(made, schema=SCHEMA), sink)
        path.write_bytes(sink.getvalue())
    vouched(path)


def vouched(path: Path) -> None:
    """Let a trace's manifest vouch for a part as it is now."""
    manifest, data = path.parent / "manifest.json", path.read_bytes()
    document = of_json(manifest)
    document["parts"][0] |= {"sha256": sha256_of_bytes(data), "bytes": max(1, len(data))}
    write_sealed(manifest, document)


def _plan(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    trace, cluster = write_trace(folder / "trace", tokens=1024), write_cluster(folder / "cluster.yaml")
    return write_plan(folder / "plan.json", trace, cluster, "--backend", "blockwise", "--dtype", "float32")


def _write_plan(path: Path, document: Any) -> None:
    """Write a plan whose digests fit, where there can be such."""
    with suppress(Exception):  # it is none any more: its digests do not matter
        document.pop("record_sha256")
        plan = Plan.model_validate(document)
        document["digest"] = plan.compute_digest()
        record = {name: plan.model_dump(mode="json")[name] for name in ("predictions", "provenance")}
        document["record_sha256"] = sha256_of_bytes(
            json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        )
    write_text(path, document)


def _read_plan(path: Path) -> None:
    with redirect_stdout(StringIO()):
        check(path, as_json=True)
    load_plan(path)


def _timeline(folder: Path) -> Path:
    plan = _plan(folder)
    write_timelines(folder, plan, folder / "trace", folder / "cluster.yaml")
    timeline = Timeline.load(folder / "simulated.json.gz")
    timeline.save(folder / "simulated.json")
    return folder / "simulated.json"


def _read_timeline(path: Path) -> None:
    timeline_metrics(Timeline.load(path))
    read_comparisons([path, path.parent / "measured.json.gz"], spread=0.01)


def _cluster(folder: Path) -> Path:
    return write_cluster(folder / "cluster.yaml")


def of_yaml(path: Path) -> Any:
    """Return an example of a format that is YAML as plain values."""
    return yaml.safe_load(path.read_text())


def write_yaml(path: Path, document: Any) -> None:
    """Write a changed document where YAML can say it."""
    with suppress(yaml.YAMLError, RecursionError, UnicodeEncodeError):
        path.write_text(yaml.safe_dump(document))


def _published(folder: Path) -> Path:
    fixed = ["vertical_and_slash", 1000, 6096, 0.5]
    flex = ["flex_vertical_and_slash", [0.9, 4096], [0.95, 2048], 0.0]
    (folder / "settings.json").write_text(json.dumps([{"0": fixed, "1": flex}, {"0": flex, "1": fixed}]))
    return folder / "settings.json"


def _results(folder: Path) -> Path:
    workload = {"seq_len": 4096, "heads": 8, "world_size": 4, "spread": 0.01}
    rows = [
        {"configuration": name, "direction": "step", "measured_us": us, "predicted_us": 1.1 * us, "measured_bytes": 5.0,
         "predicted_bytes": 6.0} | workload
        for name, us in (("a", 100.0), ("b", 110.0), ("c", 125.0))
    ]  # fmt: skip
    (folder / "fidelity.json").write_text(json.dumps({"benchmark": "fidelity", "rows": rows}))
    return folder / "fidelity.json"


def _read_results(path: Path) -> None:
    judge(read_comparisons([path], spread=0.01).rows)
    _report(path)


def _report(path: Path) -> None:
    inputs = read_inputs([path])
    report_html(inputs, make_report(inputs))


def _metrics(folder: Path) -> Path:
    return write_metrics(folder, ranks=1, steps=range(3)) / "rank-00000.jsonl"


def _write_metrics(path: Path, document: Any) -> None:
    path.write_bytes(as_json(METRICS_LINE) + b"\n" + as_json(document) + b"\n")


def _launches(folder: Path) -> Path:
    launch = {"m": 64, "n": 64, "warps": 4, "stages": 2, "tma": False, "registers": 0}
    tuned = {"capability": 90, "head_dim": 128, "block_size": 128, "launches": {"forward": launch}}
    (folder / "launches.json").write_text(json.dumps(tuned))
    return folder / "launches.json"


def _validation(folder: Path) -> Path:
    result = invoke("validate", _results(folder), "--json")
    (folder / "validated.json").write_text(result.stdout)
    return folder / "validated.json"


def _topology(folder: Path) -> Path:
    (folder / "topo.txt").write_text(topology(cards=["NIC0", "NIC1"]))
    return folder / "topo.txt"


def _nccl(folder: Path) -> Path:
    (folder / "table.txt").write_text(nccl_table())
    return folder / "table.txt"


def _read_nccl(path: Path) -> None:
    asdict(fit_line(read_nccl_table(path), path))


LAPTOP = [
    Format(name="trace-manifest", make=_trace, read=_read_trace, document=of_json, write=write_sealed),
    Format(name="trace-rows", make=_masks, read=_read_trace, document=_rows, write=_write_rows),
    Format(name="plan", make=_plan, read=_read_plan, document=of_json, write=_write_plan),
    Format(name="plan-in-a-report", make=_plan, read=_report, document=of_json, write=_write_plan),
    Format(name="timeline", make=_timeline, read=_read_timeline, document=of_json, write=write_text),
    Format(name="timeline-in-a-report", make=_timeline, read=_report, document=of_json, write=write_text),
    Format(name="cluster", make=_cluster, read=load_cluster, document=of_yaml, write=write_yaml),
    Format(name="published", make=_published, read=read_published, document=of_json, write=write_text),
    Format(name="results", make=_results, read=_read_results, document=of_json, write=write_text),
    Format(name="validation", make=_validation, read=_report, document=of_json, write=write_text),
    Format(name="metrics", make=_metrics, read=_report, document=lambda _: dict(METRICS_LINE), write=_write_metrics),
    Format(name="launches", make=_launches, read=load_launches, document=of_json, write=write_text),
    Format(name="topology", make=_topology, read=read_topology),
    Format(name="nccl-tests", make=_nccl, read=_read_nccl),
]
FORMATS_BY_NAME = {one.name: one for one in LAPTOP}
