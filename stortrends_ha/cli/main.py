"""The `stortrends-ha` command: reads what was typed and hands over to one module for each subcommand.

Invariants: what an operator can mend is said in a sentence on stderr, with exit code 1 and no traceback; a
traceback is always a bug. Subcommands are imported when they are used, so that a daemon does not carry what
only a person at a terminal needs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from stortrends_ha import __version__
from stortrends_ha.errors import StorTrendsError

if TYPE_CHECKING:
    from stortrends_ha.config import Address

    _Commands = argparse._SubParsersAction[argparse.ArgumentParser]

DEFAULT_CONFIG = Path("/etc/stortrends-ha/cluster.yaml")
DEMO_PORT_BASE = 10809  # the first port is then the one that IANA gives to NBD
WITNESS_LISTEN = "0.0.0.0:7801"
EXPORT_LISTEN = "127.0.0.1:10899"
WITNESS_STATE = Path("/var/lib/stortrends-ha-witness")
INTERRUPTED = 130  # what shells show for a command that was ended by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
    except StorTrendsError as error:
        print(f"stortrends-ha: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="stortrends-ha", description="Mirrored block storage for two Linux machines.")
    parser.add_argument("--version", action="version", version=f"stortrends-ha {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    node = commands.add_parser("node", help="run a node (the daemon)")
    node.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    node.add_argument("--name", required=True, help="which node of the file this machine is")
    node.set_defaults(run=_node)

    status = commands.add_parser("status", help="show nodes, groups and volumes")
    status.add_argument("--json", action="store_true", help="for programs: one JSON object")
    status.add_argument("--verbose", action="store_true", help="every heartbeat path, and moves of long ago")
    status.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    status.add_argument("--name", help="ask only this node of the file")
    status.add_argument("--control", type=Path, help="ask the node behind this control socket, without a cluster file")
    status.set_defaults(run=_status)

    check = commands.add_parser("check", help="say whether a cluster file is right, and what it describes")
    check.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    check.set_defaults(run=_check)

    _add_repair(commands, _add_ownership(commands))
    _add_verify(commands)

    witness = commands.add_parser(
        "witness", help="run the witness (the daemon on a third machine that has the last word)"
    )
    witness.add_argument(
        "--listen",
        type=_address,
        default=WITNESS_LISTEN,
        metavar="HOST:PORT",
        help="address that it listens on (default: %(default)s)",
    )
    witness.add_argument(
        "--state",
        type=Path,
        default=WITNESS_STATE,
        metavar="DIR",
        help="where its registers are, and the key of each cluster as keys/CLUSTER.key (default: %(default)s)",
    )
    witness.set_defaults(run=_witness)

    release = commands.add_parser(
        "release-addresses", help="remove a node's floating addresses from this machine, after the node has ended"
    )
    release.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    release.add_argument("--name", required=True, help="which node of the file this machine is")
    release.set_defaults(run=_release_addresses)

    demo = commands.add_parser("demo", help="run a cluster of two nodes on this machine, to try it")
    demo.add_argument(
        "--dir",
        type=Path,
        help="keep its state here, and go on with what is there (default: a temporary directory, removed at the end)",
    )
    demo.add_argument(
        "--port-base",
        type=_port_base,
        default=DEMO_PORT_BASE,
        metavar="P",
        help="first of the eleven ports it uses on 127.0.0.1 (default: %(default)s)",
    )
    demo.add_argument("--json", action="store_true", help="for programs: one line of JSON when everything is in sync")
    demo.set_defaults(run=_demo)
    return parser  # fmt: skip


def _add_ownership(commands: "_Commands") -> "_Commands":
    """Returns what the actions of ``group`` can be added to."""
    group = commands.add_parser("group", help="move a group, own it whatever may be lost, or mend copies that differ")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)

    move = actions.add_parser("move", help="hand a group over to the other node")
    move.add_argument("group", metavar="GROUP")
    move.add_argument("--to", required=True, metavar="NODE", help="the node that shall own it")
    move.set_defaults(run=_move)

    force = actions.add_parser("force-own", help="make this node the owner though it may lack acknowledged writes")
    force.add_argument("group", metavar="GROUP")
    force.add_argument("--accept-data-loss", action="store_true", help="needed: what this node lacks is lost")
    force.add_argument("--name", help="which node, if both run on this machine")
    force.set_defaults(run=_force_own)

    drain = commands.add_parser("drain", help="move everything away from this machine's node, for maintenance")
    drain.add_argument("node", metavar="NODE")
    drain.set_defaults(run=_drain)

    undrain = commands.add_parser("undrain", help="let groups be owned by this machine's node again")
    undrain.add_argument("node", metavar="NODE")
    undrain.set_defaults(run=_undrain)

    for parser in (move, force, drain, undrain):
        parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    return actions


def _add_repair(commands: "_Commands", groups: "_Commands") -> None:
    volume = commands.add_parser("volume", help="replace the disk of a volume")
    actions = volume.add_subparsers(title="actions", metavar="ACTION", required=True)

    replace = actions.add_parser(
        "replace", help="make a node's copy anew from the other node, after its disk was replaced"
    )
    replace.add_argument("volume", metavar="VOLUME")
    replace.add_argument(
        "--node", required=True, metavar="NODE", help="whose disk was replaced: the node of this machine"
    )
    replace.add_argument("--yes", action="store_true", help="do not ask")
    replace.set_defaults(run=_replace)

    diff = groups.add_parser("diff", help="show where copies without a common history differ, and how that came")
    diff.add_argument("group", metavar="GROUP")
    diff.add_argument("--json", action="store_true", help="for programs: one JSON object")
    diff.add_argument("--export", metavar="NODE", help="instead serve that node's copy read-only over NBD until Ctrl-C")
    diff.add_argument(
        "--listen", type=_address, default=EXPORT_LISTEN, metavar="HOST:PORT", help="where (default: %(default)s)"
    )
    diff.set_defaults(run=_diff)

    resolve = groups.add_parser(
        "resolve", help="keep one of two copies without a common history; what differs in the other, in a file"
    )
    resolve.add_argument("group", metavar="GROUP")
    what = resolve.add_mutually_exclusive_group(required=True)
    what.add_argument("--keep", metavar="NODE", help="whose copy is kept; given on the machine of the other node")
    what.add_argument("--list", action="store_true", help="show the files of what was kept on this machine")
    what.add_argument("--extract", type=Path, metavar="FILE", help="write what is in such a file to images in --to")
    what.add_argument("--drop", type=Path, metavar="FILE", help="remove such a file")
    resolve.add_argument(
        "--to", type=Path, metavar="DIR", help="with --extract: where VOLUME.img is made, or overwritten in places"
    )
    resolve.add_argument("--yes", action="store_true", help="do not ask")
    resolve.set_defaults(run=_resolve)

    for parser in (replace, diff, resolve):
        parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")


def _diff(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import diverged

    if options.export:
        return diverged.export(options.config, options.group, options.export, options.listen)
    return diverged.diff(options.config, options.group, as_json=options.json)


def _resolve(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import diverged, kept

    if options.keep:
        return diverged.resolve(options.config, options.group, options.keep, confirmed=options.yes)
    if options.list:
        return kept.show(options.config, options.group)
    if options.drop:
        return kept.drop(options.drop, confirmed=options.yes)
    return kept.extract(options.extract, options.to)


def _replace(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import repair

    return repair.replace(options.config, options.volume, options.node, confirmed=options.yes)


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    verify = commands.add_parser(
        "verify",
        help="compare both replicas while clients work, and repair what differs",
        description="Compares both replicas of groups or volumes while clients work. Exit code: 0, they are the same "
        "now; 1, it was refused or ended early; 2, something differs.",
    )
    verify.add_argument("names", nargs="*", metavar="GROUP|VOLUME")
    verify.add_argument("--all", action="store_true", dest="everything", help="all groups that nodes here own")
    verify.add_argument("--repair", action="store_true", help="repair what only one node's disk reports an error for")
    verify.add_argument("--from", dest="source", metavar="NODE", help="repair all that differs from this node's copy")
    verify.add_argument("--stop", action="store_true", help="end the verifies of these groups that are under way")
    verify.add_argument("--json", action="store_true", help="for programs: one JSON object at the end")
    verify.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    verify.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import verify

    if not options.names and not options.everything:
        raise StorTrendsError("Say which groups or volumes are to be verified, or --all.")
    if options.source and not options.repair:
        raise StorTrendsError("--from says which copy counts in a repair: add --repair, or leave it out.")
    names = [] if options.everything else options.names
    if options.stop:
        return verify.stop(options.config, names)
    return verify.verify(
        options.config, names, repair=options.repair, source=options.source or "", as_json=options.json
    )


def _move(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import ownership

    return ownership.move(options.config, options.group, options.to)


def _force_own(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import ownership

    return ownership.force_own(options.config, options.group, options.name, accept_data_loss=options.accept_data_loss)


def _drain(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import ownership

    return ownership.drain(options.config, options.node)


def _undrain(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import ownership

    return ownership.undrain(options.config, options.node)


def _port_base(text: str) -> int:
    from stortrends_ha.cli.demo_layout import PORTS

    last = 65536 - PORTS
    if not text.isdigit() or not 1 <= int(text) <= last:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to {last}")
    return int(text)


def _address(text: str) -> "Address":
    from stortrends_ha.config.values import parse_address

    try:
        return parse_address(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an address such as {WITNESS_LISTEN} or [::]:7801") from None


def _node(options: argparse.Namespace) -> int:
    from stortrends_ha import logs
    from stortrends_ha.node import supervisor

    logs.configure()
    supervisor.run(options.config, options.name)
    return 0


def _status(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import status

    if options.control:
        return status.status_of_socket(options.control, as_json=options.json, verbose=options.verbose)
    return status.status_of_cluster(options.config, options.name, as_json=options.json, verbose=options.verbose)


def _check(options: argparse.Namespace) -> int:
    from stortrends_ha.cli.check import check

    return check(options.config)


def _witness(options: argparse.Namespace) -> int:
    from stortrends_ha.cli.witness import witness

    return witness(options.listen, options.state)


def _release_addresses(options: argparse.Namespace) -> int:
    from stortrends_ha.cli.release_addresses import release_addresses

    return release_addresses(options.config, options.name)


def _demo(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import demo

    return demo.run(options.dir, options.port_base, as_json=options.json)
