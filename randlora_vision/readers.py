"""Who reads an adapted weight: most want the effective one, a few would lose the adapters by it.

A property cannot tell its readers apart by anything but the code that asks, so that is looked at:

- PEFT's layers around an adapted one write their own merges to ``weight.data``. The effective weight is a temporary,
  in which the write would be lost; they get the base's Parameter, and both adapters act.
- ``fuse_projections`` of diffusers copies query, key and value for good, after which neither the layers nor their
  adapters are ever run again.
"""

from __future__ import annotations

import sys
from types import FrameType

# The `weight` of a PEFT layer hands on to the layer inside: the reader is who asked PEFT.
_HANDS_ON = ("weight", "bias")


def peft_reader() -> str | None:
    """The name of PEFT's function that reads a weight, two calls up, if it is PEFT's: it must get the Parameter itself.

    Raises:
        RuntimeError: If the reader copies the weight for good.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _in_peft(frame) and frame.f_code.co_name in _HANDS_ON:
        frame = frame.f_back
    if frame is None:
        return None
    if frame.f_code.co_name == "fuse_projections":
        raise RuntimeError(
            "fuse_qkv_projections copies adapted weights into new layers, where the adapters would neither train nor "
            "leave again: fuse before the adapters are added, or merge and remove them first"
        )
    return frame.f_code.co_name if _in_peft(frame) else None


def _in_peft(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("peft.")
