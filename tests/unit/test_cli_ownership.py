"""`group move`, `drain` and the like: what is told while groups move, against nodes that say what a test wants."""

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli_status import CONFIG

from stortrends_ha.cli import ownership
from stortrends_ha.cli.main import main
from stortrends_ha.cli.ownership import Moving
from stortrends_ha.cluster.view import Peer, Replica, View
from stortrends_ha.node.operator import out_of_sync_since, risk
from stortrends_ha.record import Record

A, B = "node-a", "node-b"


def seen(owner: str = A, epoch: int = 5, **changes: Any) -> dict[str, Any]:
    """What a node says of the group; changed."""
    return {
        "owner": owner, "epoch": epoch, "phase": "following", "state": "in-sync", "why": "", "arbiter": "",
        "serving": False, "last_move": None,
    } | changes  # fmt: skip


def last(duration_ms: float = 42.0, ago_s: float = 0.01, kind: str = "handover") -> dict[str, Any]:
    return {"kind": kind, "duration_ms": duration_ms, "ago_s": ago_s}


def nodes(**views: dict[str, Any]) -> dict[str, Any]:
    """The nodes that answer: ``a`` and ``b``."""
    return {f"node-{name}": {"node": f"node-{name}", "groups": {"rg-a": view}} for name, view in views.items()}


class Watched:
    """A move of rg-a from node-a to node-b that began at 100 s."""

    def __init__(self, **options: Any) -> None:
        self.moving = Moving("rg-a", B, 5, 100.0, **options)
        self.now_s = 100.0

    def look(self, after_s: float = 0.02, **views: dict[str, Any]) -> str:
        self.now_s += after_s
        return self.moving.look(nodes(**views), self.now_s)


# --- Progress and the end -----------------------------------------------------------------------


def test_each_phase_is_told_once_and_the_end_with_how_long_clients_were_held() -> None:
    move = Watched()
    assert move.look(a=seen(), b=seen()) == ""
    busy = "Group rg-a: node-a answers what is under way, and takes no more requests."
    assert move.look(a=seen(phase="releasing"), b=seen()) == busy
    assert move.look(a=seen(phase="releasing"), b=seen()) == ""
    stopped = "Group rg-a: node-a has stopped, and the record is being changed."
    assert move.look(a=seen(phase="handing"), b=seen()) == stopped
    new = seen(B, 6, phase="leading")
    assert move.look(a=seen(B, 6), b=new) == "Group rg-a: node-b owns it now, and begins to serve."
    assert move.look(a=seen(B, 6), b=new | {"serving": True}) == ""  # the old owner has the last word
    done = "Group rg-a is on node-b now. Clients were held for 42 ms."
    assert move.look(a=seen(B, 6, last_move=last()), b=new | {"serving": True}) == done
    assert move.moving.arrived


def test_an_earlier_move_is_not_taken_for_this_one() -> None:
    move = Watched()
    before = last(duration_ms=999.0, ago_s=0.5)
    assert move.look(a=seen(last_move=before)) == ""
    assert move.look(a=seen(B, 6, last_move=before)) == "Group rg-a: node-b owns it now, and begins to serve."
    assert move.look(a=seen(B, 6, last_move=last())).endswith("Clients were held for 42 ms.")


def test_an_old_record_of_the_same_owner_is_not_the_end() -> None:
    assert not Watched().look(a=seen(B, 5, serving=True, last_move=last()))


def test_where_only_the_old_owner_answers_it_is_believed() -> None:
    move = Watched()
    assert "begins to serve" in move.look(a=seen(B, 6))
    assert move.look(a=seen(B, 6, last_move=last())) == "Group rg-a is on node-b now. Clients were held for 42 ms."


def test_where_only_the_new_owner_answers_a_bound_is_said() -> None:
    move = Watched()
    assert "begins to serve" in move.look(b=seen(B, 6))
    assert move.look(b=seen(B, 6, serving=True), after_s=0.03) == (
        "Group rg-a is on node-b now. Clients were held for less than 50 ms."
    )


def test_an_old_owner_that_never_says_how_long_it_took_is_not_waited_for() -> None:
    move = Watched()
    served = {"a": seen(B, 6), "b": seen(B, 6, serving=True)}
    assert "begins to serve" in move.look(a=seen(B, 6), b=seen(B, 6))
    assert move.look(after_s=0.08, **served) == ""
    assert "held for less than 100 ms" in move.look(after_s=1.5, **served)


def test_a_takeover_that_comes_before_the_handover_is_called_so() -> None:
    end = Watched().look(b=seen(B, 6, serving=True, last_move=last(1650, kind="takeover")))
    assert end == "Group rg-a is on node-b now, which took over by itself. Clients were held for 1650 ms."


def test_what_it_waits_for_is_told_once_however_its_numbers_change() -> None:
    move = Watched()
    assert move.look(a=seen(why="no link to node-b for 1 s")) == ""
    why = "Group rg-a: not yet, no link to node-b for 2 s."
    assert move.look(after_s=2.0, a=seen(why="no link to node-b for 2 s")) == why
    assert move.look(a=seen(why="no link to node-b for 13 s")) == ""
    assert move.look(a=seen(arbiter="the witness is away")) == "Group rg-a: not yet, the witness is away."
    assert move.look(a=seen()) == "Group rg-a: waiting until node-a can hand it over."


def test_a_new_owner_that_does_not_serve_says_why() -> None:
    move = Watched()
    why = "cannot listen on 192.0.2.21:10809 for NBD: Address already in use"
    old, new = seen(B, 6), seen(B, 6, phase="leading", state="held", why=why)
    assert move.look(a=old, b=new) == "Group rg-a: node-b owns it now, and begins to serve."
    assert move.look(after_s=2, a=old, b=new) == f"Group rg-a: node-b owns it now, but does not serve yet: {why}."


def test_an_owner_that_serves_again_has_given_the_move_up_if_it_tries_once() -> None:
    for once in (True, False):
        move = Watched(once=once)
        move.look(a=seen(phase="handing"))
        move.look(a=seen(phase="leading"))
        assert move.moving.failed is once


def test_nobody_who_answers_is_no_news() -> None:
    assert Watched().look() == ""


# --- The commands, against a node that answers what a test wants --------------------------------

Serve = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.yaml"
    path.write_text(CONFIG.format(dir=tmp_path))
    return path


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Answer at a node's control socket; returns the requests that come, apart from those for the status."""
    listeners: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(node: str, statuses: list[dict[str, Any]], **answers: Any) -> list[dict[str, Any]]:
        """``statuses`` one after the other, the last one for ever; the other answers by command."""
        path = tmp_path / node[-1] / "control.sock"
        path.parent.mkdir()
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        requests: list[dict[str, Any]] = []
        views = [{"node": node, "groups": {"rg-a": view}} for view in statuses]

        def answer(request: dict[str, Any]) -> dict[str, Any] | None:
            command = request["command"]
            if command == "status":
                return {"ok": True, "status": views.pop(0) if len(views) > 1 else views[0]}
            requests.append(request)
            result = answers[command]
            if isinstance(result, str):
                return {"ok": False, "error": result}
            return None if result is None else {"ok": True, command: result}

        threads.append(threading.Thread(target=_answer_all, args=(listener, answer)))
        threads[-1].start()
        listeners.append(listener)
        return requests

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)  # ends the accept
    for thread in threads:
        thread.join()
    for listener in listeners:
        listener.close()


def _answer_all(listener: socket.socket, answer: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, connection.makefile("rb") as file:
            result = answer(json.loads(file.readline()))
            if result is not None:
                connection.sendall(json.dumps(result).encode() + b"\n")


def test_the_owner_is_asked_if_it_answers(config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    done = seen(B, 6, last_move=last(ago_s=0.0))
    owner = serve(A, [seen(phase="leading"), done], move={"already": False, "epoch": 5})
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 0
    assert owner == [{"command": "move", "group": "rg-a", "to": B}]
    assert capsys.readouterr().out.splitlines() == [
        "Group rg-a: node-a is asked to move it from node-a to node-b.",
        "Group rg-a is on node-b now. Clients were held for 42 ms.",
    ]


def test_a_refusal_is_printed_as_it_is(config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]) -> None:
    serve(A, [seen()], move="Group rg-a cannot move to node-b now: node-b is drained.")
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 1
    assert capsys.readouterr().err == "stortrends-ha: Group rg-a cannot move to node-b now: node-b is drained.\n"


def test_a_node_that_ends_while_it_is_asked_is_said(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(A, [seen()], move=None)
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"stortrends-ha: Node node-a gave no answer at {config.parent}/a/control.sock: ")
    assert "Whether it does what was asked is not known: see `stortrends-ha status`." in said


def test_on_the_new_owner_already_but_not_served_is_no_success(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(B, [seen(B, state="held", why="the disk failed")], move={"already": True, "epoch": 5})
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 1
    said = capsys.readouterr()
    assert said.out == "Group rg-a is on node-b already.\n"
    assert "  node-b says: node-b owns rg-a; here it is held: the disk failed.\n" in said.err


def test_a_move_that_does_not_come_about_ends_with_the_reason(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "PATIENCE_S", 0.2)
    serve(A, [seen(state="alone", why="no link to node-b", arbiter="the witness is away")],
          move={"already": False, "epoch": 5})  # fmt: skip
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "stortrends-ha: Group rg-a has not moved to node-b.",
        "  node-a says: node-a owns rg-a; here it is alone: no link to node-b; the witness is away.",
        "The nodes try no longer: ask again.",
    ]


def test_an_owner_that_gives_up_ends_the_command_at_once(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(A, [seen(), seen(phase="handing"), seen(phase="leading", why="it was refused")],
          move={"already": False, "epoch": 5})  # fmt: skip
    assert main(["group", "move", "rg-a", "--to", B, "--config", str(config)]) == 1
    assert "here it is in-sync: it was refused." in capsys.readouterr().err


def test_a_drain_says_which_groups_stay_and_when_they_go(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    stays = {"epoch": 5, "why": "node-b is not in sync", "until": "node-b is in sync", "serving": True}
    serve(A, [seen()], drain={"groups": {"rg-a": stays}})
    assert main(["drain", A, "--config", str(config)]) == 1
    said = capsys.readouterr()
    assert said.out == "Node node-a is drained: nothing moves to it until: stortrends-ha undrain node-a\n"
    assert said.err.splitlines() == [
        "Group rg-a stays on node-a, which goes on serving it: node-b is not in sync.",
        "  It moves by itself when node-b is in sync.",
    ]


def test_a_drain_of_a_node_that_owns_nothing_is_done(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    serve(A, [seen(B)], drain={"groups": {}})
    assert main(["drain", A, "--config", str(config)]) == 0
    assert "node-a owns no group: it can be stopped" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["drain", B], ["undrain", B], ["group", "force-own", "rg-a", "--name", B]])
def test_a_command_for_the_other_machines_node_says_where_it_is_given(
    config: Path, serve: Serve, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    asked = serve(A, [seen()])
    assert main([*command, "--config", str(config)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("stortrends-ha: Node node-b does not answer on this machine, only node-a does. ")
    assert said.endswith("is given on the machine of node-b itself, while node-b runs.\n")
    assert asked == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["group", "move", "rg-x", "--to", B], "has no group 'rg-x'; its groups are rg-a."),
        (["group", "move", "rg-a", "--to", "node-c"], "has no node 'node-c'; its nodes are node-a and node-b."),
        (["drain", "node-c"], "has no node 'node-c'"),
        (["group", "move", "rg-a", "--to", B], "No node of "),
    ],
)
def test_what_cannot_be_asked_is_an_error_in_a_sentence(
    config: Path, capsys: pytest.CaptureFixture[str], command: list[str], words: str
) -> None:
    assert main([*command, "--config", str(config)]) == 1
    assert words in capsys.readouterr().err


# --- What the override may lose -----------------------------------------------------------------

_WELL = Replica(epoch=5, leading=False, session=False, serving=False, joinable=False, peer_unfit="", failure="",
                lost_cache=False, needs_sync=False, settled_epoch=0)  # fmt: skip


def view(peer: Peer | None = None, *, alive: bool = False, silent_s: float = 180, **replica: bool) -> View:
    changed = {field: getattr(_WELL, field) for field in Replica.__slots__} | replica
    return View(
        now_ns=0, alive=alive, suspected=not alive, silent_ns=round(silent_s * 1e9), peer=peer, lease_until_ns=0,
        may_serve_from_ns=0, draining=False, peer_draining=False, stopping=False, peer_stopping=False,
        replica=Replica(**changed),
    )  # fmt: skip


MIRRORED, ALONE = Record(5, A, (A, B)), Record(6, A, (A,))
PEER = Peer(ALONE, leading=False, serving=False, promise=False, unfit="", lost=False, wants=False)
OFF = "node-a was heard last 3 min ago. Be sure that it is off."


def test_a_node_that_is_out_of_sync_is_told_when_that_was_learnt_and_who_has_everything() -> None:
    since = "2025-11-21 14:02:11+0000"
    assert risk(B, A, ALONE, view(PEER), since) == [
        f"node-b is out of sync (it learnt of it at {since}): what node-a has acknowledged since the two were "
        "connected last would be lost.",
        "node-a alone has everything.",
        f"{OFF} To bring it back instead loses nothing.",
    ]


def test_a_copy_that_was_being_synced_is_called_what_it_is() -> None:
    said = risk(B, A, ALONE, view(PEER, needs_sync=True), "")
    assert said[0].startswith("node-b is out of sync: what node-a has acknowledged since the two were connected last")
    assert said[1] == "A sync of node-b has begun and did not end: its copy is a mixture of old and new data."


def test_a_copy_that_was_never_in_sync_may_be_empty() -> None:
    assert risk(B, A, ALONE, view(PEER), "", never=True)[0].endswith("its copy may be empty.")


def test_a_node_that_is_in_sync_but_lost_its_cache_lacks_what_was_not_flushed() -> None:
    said = risk(B, A, MIRRORED, view(PEER, lost_cache=True), "")
    assert said[0].endswith("may be missing here. What clients have flushed is here.")


def test_a_node_that_has_everything_is_told_what_only_the_arbiter_could_know() -> None:
    said = risk(B, A, MIRRORED, view(), "", unknown="the witness does not answer")
    assert said[0].startswith("By the newest record that is known here node-b has everything. If node-a went on alone")
    assert said[1:] == [
        "Whether node-a went on alone is not known now: the witness does not answer.",
        "node-a has not been heard since this node started, 3 min ago. Be sure that it is off. "
        "To bring it back instead loses nothing.",
    ]


def test_a_peer_that_is_there_is_said_with_why_it_does_not_serve() -> None:
    unfit = Peer(MIRRORED, False, False, False, "its disk failed: vm-a", False, False)
    assert risk(B, A, MIRRORED, view(unfit, alive=True), "")[-1] == (
        "node-a is there but must not serve, as its disk failed: vm-a."
    )


@pytest.mark.parametrize(
    ("history", "found"),
    [
        ([], (False, "")),
        ([MIRRORED], (False, "")),
        ([MIRRORED, ALONE], (False, "at 1")),
        ([MIRRORED, ALONE, Record(7, A, (A,))], (False, "at 1")),
        ([MIRRORED, ALONE, Record(7, A, (A, B)), Record(8, B, (B,)), Record(9, A, (A,))], (False, "at 4")),
        ([ALONE, Record(7, A, (A,))], (True, "")),
    ],
)
def test_the_history_says_since_when_a_node_is_out_of_sync(
    tmp_path: Path, history: list[Record], found: tuple[bool, str]
) -> None:
    path = tmp_path / "rg-a.history"
    path.write_text("".join(f"atT{number} {record}\n" for number, record in enumerate(history)))
    assert out_of_sync_since(path, B) == found
    assert out_of_sync_since(tmp_path / "missing", B) == (False, "")
