"""Everything that can fail, on real nodes in network namespaces, under load: see docs/failures.md.

What these tests have in common with the integration tests is theirs, and is found by its path.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "integration"))
