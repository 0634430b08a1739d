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

from stortrends_ha import __version__
from stortrends_ha.errors import StorTrendsError

DEFAULT_CONFIG = Path("/etc/stortrends-ha/cluster.yaml")
DEMO_PORT_BASE = 10809  # the first port is then the one that IANA gives to NBD
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
    status.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    status.add_argument("--name", help="ask only this node of the file")
    status.add_argument("--control", type=Path, help="ask the node behind this control socket, without a cluster file")
    status.set_defaults(run=_status)

    check = commands.add_parser("check", help="say whether a cluster file is right, and what it describes")
    check.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="cluster file (default: %(default)s)")
    check.set_defaults(run=_check)

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
        help="first of the eight ports it uses on 127.0.0.1 (default: %(default)s)",
    )
    demo.add_argument("--json", action="store_true", help="for programs: one line of JSON when everything is in sync")
    demo.set_defaults(run=_demo)
    return parser  # fmt: skip


def _port_base(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535 - 7:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to {65535 - 7}")
    return int(text)


def _node(options: argparse.Namespace) -> int:
    from stortrends_ha import logs
    from stortrends_ha.node import supervisor

    logs.configure()
    supervisor.run(options.config, options.name)
    return 0


def _status(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import status

    if options.control:
        return status.status_of_socket(options.control, as_json=options.json)
    return status.status_of_cluster(options.config, options.name, as_json=options.json)


def _check(options: argparse.Namespace) -> int:
    from stortrends_ha.cli.check import check

    return check(options.config)


def _demo(options: argparse.Namespace) -> int:
    from stortrends_ha.cli import demo

    return demo.demo(options.dir, options.port_base, as_json=options.json)
