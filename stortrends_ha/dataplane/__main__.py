"""The command line by which a supervisor starts a data process; see ``process``."""

import sys

from .process import main

sys.exit(main())
