"""The benchmark's pure parts: workload names, medians and ratios, the table and the plot."""

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import plot, table
from bench.errors import BenchError
from bench.measure import Measurement
from bench.summary import Row, summarize
from bench.workloads import DEFAULT_NAMES, parse, parse_list

SVG = "{http://www.w3.org/2000/svg}"


def measured(
    server: str, round_: int, iops: float, workload: str = "w", cpu_s_per_kop: float | None = 0.02
) -> Measurement:
    return Measurement(
        round=round_, workload=workload, server=server, iops=iops, mib_s=iops / 256, mean_us=100.0,
        p99_us=200.0, cpu_s_per_kop=cpu_s_per_kop, other_cpus=None,
    )  # fmt: skip


def row(server: str, iops: float, workload: str = "w", cpu_s_per_kop: float | None = 0.02) -> Row:
    return summarize([measured(server, 1, iops, workload, cpu_s_per_kop)], server)[0]


def test_a_workload_name_says_what_fio_does() -> None:
    options = parse("randwrite-4k-qd32").fio_options()
    assert {"--rw=randwrite", "--bs=4k", "--iodepth=32"} <= set(options)
    assert "--fsync=1" not in options


def test_the_fsync_workload_flushes_after_every_write() -> None:
    assert {"--rw=randwrite", "--iodepth=1", "--fsync=1"} <= set(parse("fsync").fio_options())


def test_every_default_workload_is_one() -> None:
    assert [workload.name for workload in parse_list(",".join(DEFAULT_NAMES))] == list(DEFAULT_NAMES)


def test_a_workload_said_twice_is_measured_once() -> None:
    assert len(parse_list("fsync,randread-4k-qd1,fsync")) == 2


@pytest.mark.parametrize("name", ["", "randwrite", "randwrite-4k", "trim-4k-qd1", "read-4g-qd1", "fsync "])
def test_an_unknown_workload_is_named_in_the_error(name: str) -> None:
    with pytest.raises(BenchError, match=re.escape(f"'{name}'")):
        parse(name)


def test_a_row_has_the_medians_of_its_rounds() -> None:
    (only,) = summarize([measured("us", round_, iops) for round_, iops in enumerate((10.0, 90.0, 30.0))], "us")
    assert only.iops == 30.0
    assert only.ratio is None


def test_a_ratio_is_taken_within_a_round_and_not_of_the_medians() -> None:
    # The machine is ten times as fast in the second round: for both, so the ratio stays.
    rounds = [(1, 20.0, 10.0), (2, 200.0, 100.0), (3, 30.0, 10.0)]
    measurements = [measured("us", n, ours) for n, ours, _ in rounds]
    measurements += [measured("them", n, theirs) for n, _, theirs in rounds]
    ratio = summarize(measurements, "us")[1].ratio
    assert ratio is not None
    assert (ratio.median, ratio.least, ratio.most) == (2.0, 2.0, 3.0)


def test_a_round_that_one_server_missed_is_in_no_ratio() -> None:
    measurements = [measured("us", 1, 10.0), measured("us", 2, 50.0), measured("them", 2, 10.0)]
    ratio = summarize(measurements, "us")[1].ratio
    assert ratio is not None
    assert (ratio.least, ratio.most) == (5.0, 5.0)


def test_a_server_without_a_common_round_has_no_ratio() -> None:
    assert [r.ratio for r in summarize([measured("us", 1, 10.0), measured("them", 2, 10.0)], "us")] == [None] * 2


def test_our_row_is_first_in_every_workload_whoever_was_measured_first() -> None:
    measurements = [measured("them", 1, 1.0, "a"), measured("us", 1, 1.0, "a")]
    measurements += [measured("them", 1, 1.0, "b"), measured("us", 1, 1.0, "b")]
    rows = summarize(measurements, "us")
    assert [(r.workload, r.server) for r in rows] == [("a", "us"), ("a", "them"), ("b", "us"), ("b", "them")]


def test_unknown_cpu_time_is_shown_as_unknown_and_not_as_none_used() -> None:
    rows = summarize([measured("us", 1, 10.0, cpu_s_per_kop=None)], "us")
    assert rows[0].cpu_s_per_kop is None
    assert table.markdown(rows).splitlines()[-1].split("|")[7].strip() == "-"


def test_a_markdown_table_has_a_cell_for_every_column() -> None:
    lines = table.markdown([row("us", 12345.6), row("them", 7.0)]).splitlines()
    assert len(lines) == 4
    assert {line.count("|") for line in lines} == {len(table.HEADER) + 1}
    assert len(set(map(len, lines))) == 1
    assert lines[2].split("|")[3].strip() == "12346"


def test_a_terminal_table_says_each_workload_once() -> None:
    shown = table.terminal([row("us", 1.0, "fsync"), row("them", 1.0, "fsync"), row("us", 1.0, "other")])
    assert shown.count("fsync") == 1
    assert shown.count("us  ") == 2


def test_tables_without_a_row_have_a_header() -> None:
    assert "IOPS" in table.markdown([])
    assert "IOPS" in table.terminal([])


def bars(svg: str) -> dict[str, float]:
    """Each bar's hover text and length."""
    found = {}
    for rect in ElementTree.fromstring(svg).iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None and title.text:
            found[title.text] = float(rect.attrib["width"])
    return found


def test_bars_are_as_long_as_their_share_of_the_workloads_best() -> None:
    rows = [row("us", 50.0, "a"), row("them", 100.0, "a"), row("us", 8000.0, "b"), row("them", 2000.0, "b")]
    assert bars(plot.svg(rows, "")) == {
        "us: 50 IOPS": plot.BAR_MAX_PX / 2,
        "them: 100 IOPS": plot.BAR_MAX_PX,
        "us: 8,000 IOPS": plot.BAR_MAX_PX,
        "them: 2,000 IOPS": plot.BAR_MAX_PX / 4,
    }


def test_a_server_has_the_same_colour_in_every_workload_and_in_the_legend() -> None:
    rows = [row(server, 5.0, workload) for workload in ("a", "b") for server in ("us", "them")]
    root = ElementTree.fromstring(plot.svg(rows, ""))
    fills = [rect.attrib["fill"] for rect in root.iter(f"{SVG}rect") if "fill" in rect.attrib]
    assert fills == [plot.COLOURS[0], plot.COLOURS[1]] * 3  # the legend, then two workloads


def test_a_plot_is_readable_on_dark_and_on_light() -> None:
    assert "prefers-color-scheme: dark" in plot.svg([row("us", 1.0)], "")


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=12), st.text("<>&\"' ab", max_size=20))
def test_a_plot_is_well_formed_and_everything_is_inside(iops: list[float], name: str) -> None:
    rows = [row(f"{name}{i % 3}", value, f"{name}{i // 3}") for i, value in enumerate(iops)]
    root = ElementTree.fromstring(plot.svg(rows, name))
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for rect in root.iter(f"{SVG}rect"):
        x, y = float(rect.get("x", "0")), float(rect.get("y", "0"))
        assert 0 <= x <= x + float(rect.attrib["width"]) <= width
        assert 0 <= y <= y + float(rect.attrib["height"]) <= height
