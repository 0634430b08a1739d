"""The status page: what a person sees, in 80 columns, with and without a terminal."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stortrends_ha.cli import report
from stortrends_ha.cli.main import main

CONFIG = """\
cluster: test
nodes:
  node-a: {{address: 127.0.0.1, state_dir: {dir}/a, metrics: 127.0.0.1:9811}}
  node-b: {{address: 127.0.0.1, state_dir: {dir}/b, metrics: 127.0.0.1:9812}}
groups:
  rg-a:
    preferred_owner: node-a
    nbd: 127.0.0.1:10809
    link_ports: {{node-a: 7801, node-b: 7802}}
    volumes: {{vm-a: {{size: 1GiB, backing: {{node-a: a.img, node-b: b.img}}}}}}
"""


def status(node: str = "node-a", **changes: Any) -> dict[str, Any]:
    primary = node == "node-a"
    group = {
        "role": "primary" if primary else "secondary",
        "state": "in-sync",
        "why": "",
        "epoch": 7,
        "owner": "node-a",
        "link": {
            "state": "connected",
            "peer": "node-b" if primary else "node-a",
            "why": "",
            "round_trip_ms": 0.213 if primary else None,
            "peer_version": "0.1.0",
        },
        "resync": None,
        "volumes": {
            "vm-a": {
                "uri": "nbd://192.168.100.11:10809/vm-a",
                "size_bytes": 1 << 30,
                "in_flight": 31,
                "rates": {"read_iops": 120.4, "read_mib_s": 0.5, "write_iops": 71823.0, "write_mib_s": 280.6},
            }
        },
    } | changes
    return {
        "cluster": "test",
        "node": node,
        "version": "0.1.0",
        "pid": 4242,
        "uptime_s": 200.0,
        "nodes": {"node-a": {"state": "up"}, "node-b": {"state": "up"}},
        "groups": {"rg-a": group},
    }


def page(capsys: pytest.CaptureFixture[str], *nodes: dict[str, Any]) -> str:
    report.show({node["node"]: node for node in nodes})
    return capsys.readouterr().out


def test_the_page_has_nodes_groups_and_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in page(capsys, status(), status("node-b")).splitlines()]
    assert ["node-a", "up", "0.1.0", "3", "min", "pid", "4242"] in lines
    assert ["rg-a", "node-a", "primary", "in-sync", "node-a", "7", "connected", "0.21", "ms", "-"] in lines
    assert ["node-b", "secondary", "in-sync", "node-a", "7", "connected", "-", "-"] in lines
    assert ["nbd://192.168.100.11:10809/vm-a", "1", "GiB", "31", "120", "0.5", "71,823", "280.6"] in lines


def test_the_page_fits_80_columns_and_has_no_colours_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    why = "no link to node-b (Connection refused): 32 requests of clients are held until it is back " * 3
    text = page(capsys, status(state="connecting", why=why), status("node-b", state="connecting", why=why))
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_names_too_long_for_80_columns_stay_whole_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    long = status()
    long["groups"]["rg-a"]["volumes"]["vm-a"]["uri"] = uri = "nbd://192.168.100.11:10809/" + "v" * 64
    assert uri in page(capsys, long)


def test_what_is_held_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    link = status()["groups"]["rg-a"]["link"] | {"state": "connecting", "why": "connection refused"}
    text = page(capsys, status(state="held", why="node-b is away (connection refused)", link=link))
    assert "rg-a on node-a is held: node-b is away (connection refused).\n" in text
    assert "The link of" not in text  # its reason has been given


def test_a_refused_link_and_a_resync_are_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    link = status()["groups"]["rg-a"]["link"] | {"state": "refused", "why": "node-b is of cluster other"}
    resync = {"done_bytes": 1 << 28, "total_bytes": 1 << 30}
    text = page(capsys, status(state="syncing", why="", link=link, resync=resync))
    assert "rg-a on node-a is syncing.\n" in text
    assert "The link of rg-a from node-a to node-b is refused: node-b is of cluster other.\n" in text
    assert "The resync of rg-a has done 256 MiB of 1 GiB.\n" in text
    assert "25%" in text


def test_when_all_is_well_nothing_is_said_below_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert page(capsys, status(), status("node-b")).splitlines()[-2].startswith("nbd://")


Answering = Callable[[Path, dict[str, Any]], None]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Makes something that answers one connection at a control socket."""
    threads: list[threading.Thread] = []
    sockets: list[socket.socket] = []

    def start(path: Path, answer: dict[str, Any]) -> None:
        path.parent.mkdir(exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        sockets.append(listener)
        threads.append(threading.Thread(target=_answer_once, args=(listener, answer)))
        threads[-1].start()

    yield start
    for thread in threads:
        thread.join()
    for listener in sockets:
        listener.close()


def _answer_once(listener: socket.socket, answer: dict[str, Any]) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.recv(1000)
        connection.sendall(json.dumps({"ok": True, "status": answer}).encode() + b"\n")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CONFIG.format(dir=tmp_path))
    return path


def test_the_json_has_the_nodes_that_answered(
    config: Path, answering: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(config.parent / "b" / "control.sock", status("node-b"))
    assert main(["status", "--json", "--config", str(config)]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": {"node-b": status("node-b")}}


def test_a_control_socket_can_be_asked_without_a_cluster_file(
    tmp_path: Path, answering: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(tmp_path / "control.sock", status())
    assert main(["status", "--json", "--control", str(tmp_path / "control.sock")]) == 0
    assert json.loads(capsys.readouterr().out) == {"nodes": {"node-a": status()}}


def test_another_node_at_the_same_path_is_not_taken_for_the_named_one(
    config: Path, answering: Answering, capsys: pytest.CaptureFixture[str]
) -> None:
    answering(config.parent / "a" / "control.sock", status("node-b"))
    assert main(["status", "--config", str(config), "--name", "node-a"]) == 1
    assert "it is node-b that answers there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "No node of {config} answers on this machine ("),
        (["--name", "node-b"], "Node node-b of {config} does not answer on this machine ("),
        (["--name", "node-c"], "{config} has no node 'node-c'; its nodes are node-a and node-b."),
        (["--control", "/no/such.sock"], "No node answers at /no/such.sock: it is not running."),
    ],
)
def test_no_answer_is_an_error_in_a_sentence(
    config: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--config", str(config), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("stortrends-ha: " + sentence.format(config=config))
    assert captured.out == ""
