"""Shape and type annotations are enforced while testing; threads are few, so that workers do not fight."""

import os

from hypothesis import settings

import checked_types

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

checked_types.install()

# A busy machine is no failure, and the same examples are tried every time.
settings.register_profile("gradsketch", deadline=None, derandomize=True)
settings.load_profile("gradsketch")
