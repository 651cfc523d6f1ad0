"""Hold products against central differences of gradients, which need first derivatives only.

Symmetry is no proof: what a hand-written backward pass loses is often symmetric itself. A difference at one step is no
proof either, because of rounding, truncation and kinks; so a product is right where it agrees with a difference at any
step, and wrong only where two steps agree with each other and not with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

