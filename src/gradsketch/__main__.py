"""``python -m gradsketch``."""

import sys

from gradsketch.cli import main

sys.exit(main())
