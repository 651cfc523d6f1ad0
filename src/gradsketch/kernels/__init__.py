"""Machine code for what torch does slowly. torch remains the reference, and does the work where a kernel cannot.

On GPUs ``SignedBlocks`` is what sketches ask. ``programs`` runs on the device and needs Triton, ``plan`` says how work
is cut, ``start`` launches, ``trust`` holds each program against ``definition`` at its first use on a device. On CPUs
``native`` compiles this package's C when it is first needed.
"""

from gradsketch.kernels.blocks import SignedBlocks
from gradsketch.kernels.trust import switched_off

__all__ = ["SignedBlocks", "switched_off"]
