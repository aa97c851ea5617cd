"""A frozen denoiser whose weights are in main memory or on disk, and on the device only while a layer uses them.

This uses accelerate's hooks, which do not see adapters that are injected later. With gradient checkpointing, the
backward pass loads the weights of one block at a time; without it, all of them would stay on the device. (diffusers'
group offloading is made for inference: it offloads weights that the backward pass still reads.)
"""

import shutil
import tempfile
import weakref
from typing import Any, Literal

Place = Literal["cpu", "disk"]


def offload(denoiser: Any, place: Place, device: Any) -> None:
    """Offload a denoiser without adapters that computes on `device`; files on disk exist as long as it does."""
    import accelerate

    if place == "cpu":
        accelerate.cpu_offload(denoiser, device)
    else:
        folder = tempfile.mkdtemp(prefix="randlora-")
        weakref.finalize(denoiser, shutil.rmtree, folder, ignore_errors=True)  # also when Python ends
        accelerate.disk_offload(denoiser, folder, device)
    # `prepare` leaves a model with this attribute where it is, as one that accelerate has spread over devices.
    denoiser.hf_device_map = {name: place for name, _ in denoiser.named_children()}
