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
key_file: cluster.key
arbiter: {{kind: manual}}
nodes:
  node-a: {{address: 127.0.0.1, state_dir: {dir}/a, metrics: 127.0.0.1:9811, heartbeat: [127.0.0.1:7811]}}
  node-b: {{address: 127.0.0.1, state_dir: {dir}/b, metrics: 127.0.0.1:9812, heartbeat: [127.0.0.1:7812]}}
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
        "in_sync": ["node-a", "node-b"],
        "phase": "leading" if primary else "following",
        "serving": primary,
        "arbiter": "",
        "last_move": None,
        "addresses": "",
        "link": {
            "state": "connected",
            "peer": "node-b" if primary else "node-a",
            "why": "",
            "round_trip_ms": 0.213 if primary else None,
            "peer_version": "0.1.0",
        },
        "resync": None,
        "verify": {"running": None, "last": None, "volumes": {}},
        "volumes": {
            "vm-a": {
                "uri": "nbd://192.168.100.11:10809/vm-a",
                "size_bytes": 1 << 30,
                "in_flight": 31,
                "intent_regions": 0,
                "dirty_bytes": 0,
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
        "nodes": {
            name: {"state": "up", "drained": False, "stopping": False, "other_sections": []}
            for name in ("node-a", "node-b")
        },
        "heartbeats": [path("10.0.0.1:7800"), path("10.1.0.1:7800")],
        "groups": {"rg-a": group},
    }


RESYNC = {
    "done_bytes": 1 << 28, "total_bytes": 1 << 30, "copied_bytes": 1 << 27, "rate": 96.0 * (1 << 20),
    "why": "the link is full",
}  # fmt: skip


def path(own: str) -> dict[str, Any]:
    """A heartbeat path that is well."""
    return {
        "own": own, "peer": own.replace("0.1:", "0.2:"), "silent_s": 0.05, "sent": 2000, "received": 1990,
        "dropped": 3, "why": "",
    }  # fmt: skip


def moved(kind: str = "handover", ago_s: float = 200.0) -> dict[str, Any]:
    return {"kind": kind, "duration_ms": 84.4, "ago_s": ago_s}


def page(capsys: pytest.CaptureFixture[str], *nodes: dict[str, Any], verbose: bool = False) -> str:
    report.show({node["node"]: node for node in nodes}, verbose=verbose)
    return capsys.readouterr().out


def below(capsys: pytest.CaptureFixture[str], *nodes: dict[str, Any], verbose: bool = False) -> str:
    """What is said below the tables, in one line."""
    return " ".join(page(capsys, *nodes, verbose=verbose).rpartition("\n\n")[2].split())


def test_the_page_has_nodes_groups_and_volumes(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split() for line in page(capsys, status(), status("node-b")).splitlines()]
    assert ["node-a", "up", "0.1.0", "3", "min", "pid", "4242"] in lines
    assert ["rg-a", "node-a", "both", "7", "node-a", "in-sync", "connected", "0.21", "ms", "-"] in lines
    assert ["node-b", "in-sync", "connected", "-", "-"] in lines
    assert ["nbd://192.168.100.11:10809/vm-a", "1", "GiB", "31", "120", "0.5", "71,823", "280.6"] in lines


def test_the_page_fits_80_columns_and_has_no_colours_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    why = "no link to node-b (Connection refused): 32 requests of clients are held until it is back " * 3
    link = status()["groups"]["rg-a"]["link"] | {"state": "connecting", "round_trip_ms": 12.34}
    bad: dict[str, Any] = {"state": "connecting", "why": why, "link": link, "arbiter": why, "addresses": why,
                           "last_move": moved(), "in_sync": ["node-a"]}  # fmt: skip
    text = page(capsys, status(**bad), status("node-b", **bad), verbose=True)
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
    text = page(capsys, status(state="syncing", why="", link=link, resync=RESYNC))
    assert "rg-a on node-a is syncing.\n" in text
    assert "The link of rg-a from node-a to node-b is refused: node-b is of cluster other.\n" in text
    assert "The resync of rg-a: the link is full.\n" in text
    assert "rg-a node-b █████░░░░░░░░░░░░░░░ 25% 256 MiB of 1 GiB 96 MiB/s 8 s" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80


def test_a_verify_has_a_bar_and_what_was_found_stays_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"verified_s": None, "differing_bytes": 5 << 16, "ranges": [[at << 20, 1 << 16] for at in range(5)]}
    running = RESYNC | {"run": "1f", "repair": False, "source": "", "found_bytes": 0}
    verify = {"running": running, "last": None, "volumes": {"vm-a": known}}
    text = page(capsys, status(verify=verify))
    assert "Verifies " in text
    assert "256 MiB of 1 GiB" in text
    assert "The verify of rg-a: the link is full." in text
    told = "64 KiB at byte 0, 64 KiB at byte 1048576, 64 KiB at byte 2097152, and more"
    assert f"Warning: 320 KiB of vm-a differ between the nodes ({told})." in " ".join(text.split())
    assert "--repair --from NODE" in " ".join(text.split())


def test_a_resync_that_does_not_go_on_has_no_end_in_sight_and_is_not_all_done(
    capsys: pytest.CaptureFixture[str],
) -> None:
    still = RESYNC | {"done_bytes": 1023 << 20, "rate": 0.0}
    text = page(capsys, status(resync=still))
    assert "99% 1023 MiB of 1 GiB 0 B/s -" in " ".join(text.split())
    assert "100%" in page(capsys, status(resync=still | {"done_bytes": 1 << 30}))


def test_what_an_absent_node_lacks_and_what_a_crash_would_cost_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status()
    seen["groups"]["rg-a"]["volumes"]["vm-a"]["dirty_bytes"] = 3 << 30
    seen["groups"]["rg-a"]["volumes"]["vm-a"]["intent_regions"] = 3
    assert below(capsys, seen) == "node-b lacks 3 GiB of rg-a, which is copied when it is back."
    words = "rg-a has 3 regions (12 MiB) in its intent log, to be compared after a crash."
    assert below(capsys, seen, verbose=True).endswith(words)


def test_who_owns_and_who_is_in_sync_is_shown_as_each_node_knows_it(capsys: pytest.CaptureFixture[str]) -> None:
    late = status("node-b", state="connecting", why="waiting", epoch=6)
    lines = [line.split() for line in page(capsys, status(in_sync=["node-a"], state="alone"), late).splitlines()]
    assert ["rg-a", "node-a", "node-a", "7", "node-a", "alone", "connected", "0.21", "ms", "-"] in lines
    assert ["rg-a", "node-a", "both", "6", "node-b", "connecting", "connected", "-", "-"] in lines


def test_a_drained_and_a_stopping_node_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status()
    seen["nodes"]["node-a"]["drained"] = True
    seen["nodes"]["node-b"]["stopping"] = True
    text = page(capsys, seen)
    assert "node-a  up, drained" in text
    assert "node-b  up, stopping" in text
    assert "node-a is drained: no group moves to it until: stortrends-ha undrain node-a" in text
    assert "node-b is being stopped: its groups are handed over first." in text


def test_cluster_files_that_are_not_the_same_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status()
    seen["nodes"]["node-b"]["other_sections"] = ["arbiter", "limits"]
    assert (
        "node-a and node-b run with cluster files that are not the same: see their arbiter, limits. Put one file on "
        "both, then restart the node that has another one; if both have, first the one that serves nothing."
        in below(capsys, seen)
    )


def test_only_a_silent_heartbeat_path_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status()
    seen["heartbeats"][1] |= {"silent_s": 12.3, "why": "10.1.0.1:7800 to 10.1.0.2:7800: Network is unreachable"}
    assert below(capsys, seen) == (
        "node-a hears no heartbeat from 10.1.0.2:7800 on 10.1.0.1:7800 for 12 s: 10.1.0.1:7800 to 10.1.0.2:7800: "
        "Network is unreachable."
    )


def test_a_path_of_rare_heartbeats_is_not_taken_for_silent(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status()
    for each in seen["heartbeats"]:
        each |= {"sent": 20, "silent_s": 9.9}
    assert below(capsys, seen) == ""


def test_every_path_is_said_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    text = below(capsys, status(), verbose=True)
    assert text.startswith("node-a hears heartbeats from 10.0.0.2:7800 on 10.0.0.1:7800 (1990 received, 3 dropped, 200")
    assert text.count("hears heartbeats") == 2


WITNESS = "the witness at 192.0.2.9:7801 cannot be asked: Connection refused"


def test_an_arbiter_that_does_not_answer_is_one_warning(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status(arbiter=WITNESS)
    seen["groups"]["rg-b"] = seen["groups"]["rg-a"]
    warning = (
        f"Warning: {WITNESS}. Nothing changes while both nodes see each other; if a node fails now, the other one "
        "holds."
    )
    assert below(capsys, seen) == warning
    assert below(capsys, seen, status("node-b", arbiter=WITNESS, phase="following")) == warning


def test_a_reason_that_ends_as_a_sentence_gets_no_second_full_stop(capsys: pytest.CaptureFixture[str]) -> None:
    why = "the arbiter has an older record: was it restored from a backup?"
    assert below(capsys, status(arbiter=why)).startswith(f"Warning: {why} Nothing changes")
    assert below(capsys, status(state="held", why=why)) == f"rg-a on node-a is held: {why}"
    assert below(capsys, status(state="held", why="so it is.")) == "rg-a on node-a is held: so it is."


def test_with_a_node_away_the_warning_says_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    seen = status(arbiter=WITNESS)
    seen["nodes"]["node-b"]["state"] = "not answering"
    text = below(capsys, seen)
    assert text == f"Warning: {WITNESS}. Until that is over, no group can get another owner or another node in sync."


def test_what_a_secondary_that_is_well_heard_of_the_arbiter_once_is_no_warning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "Warning" not in page(capsys, status("node-b", arbiter=WITNESS))
    assert "Warning" in page(capsys, status("node-b", arbiter=WITNESS, state="held", why="x"))


def test_a_problem_with_floating_addresses_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    problem = "192.0.2.21/24 cannot be added to eth1: Operation not permitted."
    assert below(capsys, status(addresses=problem)) == f"Addresses of rg-a on node-a: {problem}"


@pytest.mark.parametrize(
    ("kind", "node", "owner", "words"),
    [
        ("handover", "node-a", "node-b", "rg-a moved to node-b 3 min ago; clients were held for 84 ms."),
        ("takeover", "node-b", "node-b", "rg-a was taken over by node-b 3 min ago; clients were held for 84 ms."),
        ("alone", "node-a", "node-a", "rg-a went on alone on node-a 3 min ago; clients were held for 84 ms."),
        ("override", "node-b", "node-b", "rg-a was given to node-b by the operator's override 3 min ago."),
    ],
)
def test_the_last_move_is_said(
    capsys: pytest.CaptureFixture[str], kind: str, node: str, owner: str, words: str
) -> None:
    assert below(capsys, status(node, owner=owner, last_move=moved(kind))) == words


def test_the_newest_move_counts_and_none_that_was_undone_by_one_that_only_the_other_node_saw(
    capsys: pytest.CaptureFixture[str],
) -> None:
    older, newer = status(last_move=moved(ago_s=600.0)), status("node-b", last_move=moved(ago_s=65.0))
    assert below(capsys, older, newer) == "rg-a moved to node-a 1 min ago; clients were held for 84 ms."
    assert "taken over" not in page(capsys, status("node-b", last_move=moved("takeover")))


def test_an_old_move_is_said_only_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    old = status(owner="node-b", last_move=moved(ago_s=3 * 86400.0))
    assert "moved" not in page(capsys, old)
    assert below(capsys, old, verbose=True).endswith("rg-a moved to node-b 3 d ago; clients were held for 84 ms.")


def test_the_link_to_a_node_that_is_gone_needs_no_words(capsys: pytest.CaptureFixture[str]) -> None:
    link = status()["groups"]["rg-a"]["link"] | {"state": "connecting", "why": "Connection refused"}
    seen = status(state="alone", why="node-b has not been heard for 12 s; it is synced when it is back", link=link)
    assert "The link of" in page(capsys, seen)
    seen["nodes"]["node-b"]["state"] = "not answering"
    assert below(capsys, seen) == (
        "rg-a on node-a is alone: node-b has not been heard for 12 s; it is synced when it is back."
    )


def test_states_have_colours_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = page(capsys, status(state="held", why="x"), status("node-b", state="alone", why="y"))
    assert "\x1b[1;31mheld\x1b[0m" in text
    assert "\x1b[33malone\x1b[0m" in text


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
