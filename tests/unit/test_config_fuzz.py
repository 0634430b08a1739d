"""Invariant tested: any file either loads or raises ConfigError with at least one problem, and nothing else.

Whatever loads keeps the promises of `stortrends_ha.config.model`, and every problem is one printable line.
"""

import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from config_texts import EXAMPLE, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stortrends_ha.config import Cluster, Fencing, load
from stortrends_ha.config.keys import FILE
from stortrends_ha.config.kinds import walk
from stortrends_ha.errors import ConfigError

EXAMPLE_TEXT = EXAMPLE.read_text(encoding="utf-8")
EXAMPLES = [yaml.safe_load(text) for text in examples()]

KEYS = sorted({path.rpartition(".")[2] for path, _ in walk(FILE)})
TELLING_TEXTS = [
    *(
        "",
        "~",
        "null",
        "no",
        "true",
        "NaN",
        ".inf",
        "-1",
        "0",
        "007",
        "1e9",
        "1GiB",
        "0KiB",
        "9" * 30,
        "1_000",
    ),
    *("witness", "etcd", "fencing", "manual", "automatic", "never", "http://e:1", "192.0.2.21/24", "eth1"),
    *("node-a", "node-b", "node-c", "vm-a", "rg-a", "..", "/", "a/../b", "\0"),
    *(
        "[::1]:10809",
        "127.0.0.1:0",
        "localhost:70000",
        "::",
        "fe80::1%eth0",
        "192.0.2.21:10809",
        "[]:1",
        ":1",
    ),
]
names = st.sampled_from([*KEYS, "node-a", "node-c", "vm-a", "rg-a", "<<", "="]) | st.text(max_size=8)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(TELLING_TEXTS),
    st.binary(max_size=8),
    st.dates(),
)
structures = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | scalars, inner, max_size=6),
    max_leaves=30,
)


def keep_promises(cluster: Cluster) -> None:
    assert len(cluster.nodes) == 2
    assert all(node.state_dir.is_absolute() for node in cluster.nodes.values())
    assert cluster.key_file.keys() == cluster.nodes.keys()
    first, second = (len(node.heartbeat) for node in cluster.nodes.values())
    assert first == second > 0
    if isinstance(cluster.arbiter, Fencing):
        assert cluster.arbiter.agents.keys() == cluster.nodes.keys()
    failover = cluster.failover
    assert failover.lease_s > failover.suspect_after_s > 2 * failover.heartbeat_interval_s > 0
    volumes = [volume for group in cluster.groups.values() for volume in group.volumes]
    assert len({volume.name for volume in volumes}) == len(volumes) > 0
    for group in cluster.groups.values():
        assert group.preferred_owner in cluster.nodes
        assert group.link_ports.keys() == cluster.nodes.keys()
        assert group.nbd_unix.keys() <= cluster.nodes.keys()
        assert all(floating.interface.keys() == cluster.nodes.keys() for floating in group.floating)
    for volume in volumes:
        assert volume.backing.keys() == cluster.nodes.keys()
        assert volume.size_bytes > 0
        assert volume.size_bytes % volume.minimum_block_bytes == 0
        assert volume.minimum_block_bytes <= volume.preferred_block_bytes <= volume.maximum_payload_bytes
        assert volume.maximum_payload_bytes <= cluster.limits.window_bytes


@pytest.fixture(scope="module")
def load_bytes() -> Iterator[Callable[[bytes], None]]:
    """Loads a file with this content and checks the invariant."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "cluster.yaml"

        def load_bytes(content: bytes) -> None:
            file.write_bytes(content)
            try:
                cluster = load(file)
            except ConfigError as error:
                problems = error.problems
            else:
                keep_promises(cluster)
                return
            assert problems
            assert all(problem.isprintable() for problem in problems)

        yield load_bytes


def places(values: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Every mapping and key below `values`."""
    if isinstance(values, dict):
        for key in values:
            yield values, key
            yield from places(values[key])
    elif isinstance(values, list):
        for item in values:
            yield from places(item)


fuzz = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@fuzz
@given(content=st.binary(max_size=200))
def test_any_bytes(load_bytes: Callable[[bytes], None], content: bytes) -> None:
    load_bytes(content)


@fuzz
@given(text=st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#,\\ \n\t01.~<=", max_size=60) | st.text(max_size=60))
def test_any_text(load_bytes: Callable[[bytes], None], text: str) -> None:
    load_bytes(text.encode("utf-8", "surrogatepass"))


@fuzz
@given(structure=structures)
def test_any_structure(load_bytes: Callable[[bytes], None], structure: Any) -> None:
    load_bytes(yaml.safe_dump(structure, allow_unicode=True).encode())


@fuzz
@given(data=st.data(), value=structures)
def test_the_example_with_any_value_replaced(
    load_bytes: Callable[[bytes], None], data: st.DataObject, value: Any
) -> None:
    values = deepcopy(data.draw(st.sampled_from(EXAMPLES)))
    mapping, key = data.draw(st.sampled_from(list(places(values))))
    mapping[key] = value
    load_bytes(yaml.safe_dump(values).encode())


@fuzz
@given(data=st.data(), name=names | scalars)
def test_the_example_with_any_key_renamed(load_bytes: Callable[[bytes], None], data: st.DataObject, name: Any) -> None:
    values = deepcopy(data.draw(st.sampled_from(EXAMPLES)))
    mapping, key = data.draw(st.sampled_from(list(places(values))))
    mapping[name] = mapping.pop(key)
    load_bytes(yaml.safe_dump(values, sort_keys=False).encode())


@fuzz
@given(
    at=st.integers(0, len(EXAMPLE_TEXT)),
    length=st.integers(0, 80),
    text=st.text(alphabet="ab:-?[]{}&*!|>'\"%@`#,\\ \n\t01.~<=", max_size=6),
)
def test_the_example_with_any_piece_of_text_replaced(
    load_bytes: Callable[[bytes], None], at: int, length: int, text: str
) -> None:
    load_bytes((EXAMPLE_TEXT[:at] + text + EXAMPLE_TEXT[at + length :]).encode())
