"""A real supervisor over fake data processes, for tests that treat a node as a process.

fake_node.py BEHAVIOUR CONFIG NAME
"""

import sys
from pathlib import Path

import uvloop

from stortrends_ha import logs
from stortrends_ha.config import load
from stortrends_ha.errors import StorTrendsError
from stortrends_ha.node.supervisor import Supervisor

FAKE = Path(__file__).with_name("fake_data_process.py")


def main(behaviour: str, config: Path, name: str) -> int:
    logs.configure()
    program = [sys.executable, str(FAKE), behaviour]
    try:
        uvloop.run(Supervisor(load(config), config, name, program).run())
    except StorTrendsError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
