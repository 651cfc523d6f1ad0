"""Shape and type annotations are enforced while testing; threads are few, so that workers do not fight."""

import os
import sys
from importlib.machinery import PathFinder

from hypothesis import settings

import checked_types

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

checked_types.install()


class _Unchecked:
    """Past that hook: Triton reads the functions of this module, and Python never calls them."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path, target) if name == "gradsketch.kernels.programs" else None


sys.meta_path.insert(0, _Unchecked)

# A busy machine is no failure, and the same examples are tried every time.
settings.register_profile("gradsketch", deadline=None, derandomize=True)
settings.load_profile("gradsketch")
