"""``python -m stortrends_ha``: the same as the ``stortrends-ha`` command."""

import sys

from stortrends_ha.cli.main import main

sys.exit(main())
