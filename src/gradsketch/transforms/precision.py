"""Keep float32 products in float32, whatever the process allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch TF32, bf16 and autocast off for the matmuls inside, then put the caller's settings back.

    A transform that is orthonormal to 1e-7 would otherwise be so to 1e-3 for everyone who trains with
    ``torch.set_float32_matmul_precision("high")``.
    """
    with ExitStack() as stack:
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch ≥ 2.9
            mkldnn: Any = torch.backends.mkldnn
            for backend in (torch.backends.cuda.matmul, mkldnn.matmul):
                if backend.fp32_precision not in ("ieee", "none"):
                    stack.callback(setattr, backend, "fp32_precision", backend.fp32_precision)
                    backend.fp32_precision = "ieee"
        elif torch.get_float32_matmul_precision() != "highest":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield
