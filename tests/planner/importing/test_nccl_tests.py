"""Tables of nccl-tests, new and old, and the line through them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsering.planner.importing.nccl_tests import NcclTable, PortLine, fit_line, read_nccl_table
from sparsering.traces.errors import InputError, UnsupportedError
from tool_texts import MIB, nccl_table

SEVEN_EIGHTHS = 7 / 8


def line_of(tmp_path: Path, text: str, test: str | None = None) -> tuple[NcclTable, PortLine]:
    path = tmp_path / "table.txt"
    path.write_text(text)
    table = read_nccl_table(path, test=test)
    return table, fit_line(table, path)


def test_a_port_sends_the_whole_size_in_a_ring(tmp_path: Path) -> None:
    table, line = line_of(tmp_path, nccl_table())
    assert (table.test, table.ranks, table.nodes, set(table.gpus)) == ("sendrecv_perf", 8, 1, {"NVIDIA H100 80GB HBM3"})
    assert line.latency_us == pytest.approx(20.0, rel=0.01)
    assert line.bandwidth_bytes_per_us == pytest.approx(200e3, rel=0.01)
    assert line.sizes == 10 and line.largest_error < 0.01


@pytest.mark.parametrize("test", ["all_gather_perf", "alltoall_perf"])
def test_a_port_sends_all_but_its_own_part_where_all_exchange(test: str, tmp_path: Path) -> None:
    _, line = line_of(tmp_path, nccl_table(test=test, share=SEVEN_EIGHTHS, bytes_per_us=300e3))
    assert line.bandwidth_bytes_per_us == pytest.approx(300e3, rel=0.01)


def test_older_tables_and_labelled_lines_are_read(tmp_path: Path) -> None:
    text = nccl_table(test=None, old=True, wrong="0e+00", share=SEVEN_EIGHTHS, bytes_per_us=100e3)
    for label in ("", "[1,0]<stdout>:", "0: "):
        labelled = "".join(f"{label}{line}\n" for line in text.splitlines())
        table, line = line_of(tmp_path, labelled, test="alltoall_perf")
        assert (table.ranks, len(table.rows)) == (8, 10)
        assert line.bandwidth_bytes_per_us == pytest.approx(100e3, rel=0.01)


def test_the_command_above_the_table_names_the_test(tmp_path: Path) -> None:
    text = "$ srun ./build/sendrecv_perf_mpi -b 1K -e 256M -f 4\n" + nccl_table(test=None)
    assert line_of(tmp_path, text)[0].test == "sendrecv_perf"


def test_the_line_is_nearest_in_relative_error(tmp_path: Path) -> None:
    """Times 10 % above and below a line at alternate sizes: the line is found within that."""
    lines = nccl_table(sizes=tuple(1 << power for power in range(10, 30))).splitlines()
    rows = [number for number, line in enumerate(lines) if line.split()[:1] and line.split()[0].isdecimal()]
    for place, number in enumerate(rows):
        words = lines[number].split()
        words[-8] = str(float(words[-8]) * (1.1 if place % 2 else 0.9))
        lines[number] = " ".join(words)
    _, line = line_of(tmp_path, "\n".join(lines))
    assert line.latency_us == pytest.approx(20.0, rel=0.05)
    assert line.bandwidth_bytes_per_us == pytest.approx(200e3, rel=0.05)
    assert 0.08 < line.median_error < 0.12


def test_large_sizes_alone_say_nothing_of_latency(tmp_path: Path) -> None:
    _, line = line_of(tmp_path, nccl_table(sizes=(64 * MIB, 128 * MIB, 256 * MIB)))
    assert line.latency_us is None
    assert line.bandwidth_bytes_per_us == pytest.approx(200e3, rel=0.01)


def test_a_size_of_nothing_is_passed_over(tmp_path: Path) -> None:
    lines = nccl_table().splitlines()
    lines.insert(
        14, "           0             0     float    none      -1     0.24    0.00    0.00      0     0.2 0.00 0.00 N/A"
    )
    assert len(line_of(tmp_path, "\n".join(lines))[0].rows) == 10


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "does not say which test it is"),
        ("sendrecv_perf: command not found\n", "holds no rows of nccl-tests"),
        (nccl_table(test=None), "does not say which test it is: name it with --test"),
        (nccl_table() + "# Collective test starting: alltoall_perf\n", "holds alltoall_perf and sendrecv_perf"),
        (nccl_table(wrong="3"), r"line 15: its results were wrong \(#wrong '3'\)"),
        (nccl_table(wrong="1e+00"), "line 15: its results were wrong"),
        (nccl_table().replace(" float none -1 ", " float none -1 x ", 1), "line 15: a row has 10 to 13 words, not 14"),
        (nccl_table().replace(" 20.01 ", " inf ", 1), "line 15: 'inf' us, '0.05' GB/s cannot be"),
        (nccl_table().replace(" 20.01 ", " -2 ", 1), "line 15: '-2' us, '0.05' GB/s cannot be"),
        (nccl_table().replace(" 20.01 ", " soon ", 1), "line 15: is no row of numbers"),
        (nccl_table().replace(" 20.01 ", " 1e-320 ", 1), "line 15: '1e-320' us, '0.05' GB/s cannot be"),
        (nccl_table().replace("Rank  3 ", f"Rank  {'3' * 5000} "), "is no rank"),
        (nccl_table(hosts=("node1",)), "1 ranks are listed under `Using devices`"),
        (nccl_table(sizes=(1024, 16 * MIB)), "has 2 sizes; a line needs 3"),
        (nccl_table(sizes=(1024, 2048, 4096)), "no port carried more than 4,096 bytes"),
        (nccl_table(share=2.0), "busbw is 2.00 of algbw, with sendrecv_perf of 8 ranks it is 1.00: another test?"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line(text: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=problem) as caught:
        line_of(tmp_path, text)
    assert "\n" not in str(caught.value) and str(tmp_path / "table.txt") in str(caught.value)


def test_times_that_do_not_grow_make_no_line(tmp_path: Path) -> None:
    rows = tuple((float(size), 30.0 - index) for index, size in enumerate((1, MIB, 16 * MIB)))
    table = NcclTable(test="sendrecv_perf", hosts=("a", "a"), gpus=("g", "g"), rows=rows)
    with pytest.raises(InputError, match="its times do not grow with the size"):
        fit_line(table, tmp_path)


def test_other_tests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="all_reduce_perf is not read"):
        line_of(tmp_path, nccl_table(test="all_reduce_perf", share=1.75))
    with pytest.raises(InputError, match="--test: 'ping' is not one of sendrecv_perf"):
        line_of(tmp_path, nccl_table(), test="ping")
    with pytest.raises(InputError, match="--test: 'alltoall_perf', the text says sendrecv_perf"):
        line_of(tmp_path, nccl_table(), test="alltoall_perf")
