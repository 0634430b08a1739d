"""Cluster files for tests of the configuration: right ones, and a way to break them."""

import re
from pathlib import Path

import pytest

from stortrends_ha.config import Cluster, load
from stortrends_ha.errors import ConfigError

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "config" / "cluster.example.yaml"

VALID = """\
cluster: demo
nodes:
  node-a: {address: 127.0.0.1, state_dir: state-a, metrics: 127.0.0.1:9811, heartbeat: [127.0.0.1:7811]}
  node-b: {address: 127.0.0.1, state_dir: state-b, metrics: 127.0.0.1:9812, heartbeat: [127.0.0.1:7812]}
groups:
  rg-a:
    preferred_owner: node-a
    nbd: 127.0.0.1:10809
    nbd_unix: {node-a: a.sock}
    link_ports: {node-a: 7801, node-b: 7802}
    volumes:
      vm-a:
        size: 1GiB
        backing: {node-a: a/vm-a.img, node-b: /dev/vg0/vm-a}
  rg-b:
    preferred_owner: node-b
    nbd: 127.0.0.1:10810
    link_ports: {node-a: 7803, node-b: 7804}
    volumes:
      vm-b:
        size: 4096
        backing: {node-a: a/vm-b.img, node-b: b/vm-b.img}
        read_only: true
        block: {minimum: 512, preferred: 1MiB, maximum: 2MiB}
        description: the second one
limits: {connections: 3, link_timeout_s: 0.5}
key_file: cluster.key
arbiter: {kind: witness, address: 127.0.0.1:7900}
"""


def changed(text: str, *changes: tuple[str, str]) -> str:
    """The text with the first place of each replaced."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return text


TWO_MACHINES = changed(
    VALID,
    ("node-a: {address: 127.0.0.1", "node-a: {address: 192.0.2.1"),
    ("node-b: {address: 127.0.0.1", "node-b: {address: 192.0.2.2"),
    (", heartbeat: [127.0.0.1:7811]", ""),
    (", heartbeat: [127.0.0.1:7812]", ""),
    ("127.0.0.1:7900", "192.0.2.3:7801"),
)


def examples() -> list[str]:
    """The example with each kind of arbiter; those but the first stand there in comments, with no space after the #."""
    text = EXAMPLE.read_text(encoding="utf-8")
    first = re.search(r"^arbiter:\n(?:(?: .*)?\n)*", text, re.MULTILINE)
    others = re.findall(r"^#arbiter:\n(?:#.*\n)*", text, re.MULTILINE)
    assert first
    return [text, *(text.replace(first[0], re.sub("^#", "", other, flags=re.MULTILINE) + "\n") for other in others)]


def load_text(directory: Path, text: str) -> Cluster:
    """The cluster of a file with this text."""
    file = directory / "cluster.yaml"
    file.write_text(text, encoding="utf-8")
    return load(file)


def problems_in(directory: Path, text: str) -> list[str]:
    """What is wrong with it."""
    with pytest.raises(ConfigError) as caught:
        load_text(directory, text)
    return caught.value.problems
