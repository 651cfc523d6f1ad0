"""The tables and figures of Schioppa, "Efficient Sketches" (arXiv 2402.03994), one script each.

``python -m benchmarks.paper --quick`` runs them all in minutes, ``--all`` in hours; ``--page`` writes docs/results.md.
"""

import sys
from pathlib import Path

# The other benchmarks name one another as modules of one folder, and these scripts build on them.
sys.path.append(str(Path(__file__).parents[1]))
