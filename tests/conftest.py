"""Shape and type annotations are enforced while testing; threads are few, so that workers do not fight."""

import os

from jaxtyping import install_import_hook

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_hook = install_import_hook("gradsketch", "beartype.beartype")
