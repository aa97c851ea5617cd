"""A frozen denoiser whose weights are in main memory or on disk, and on the device only while a layer uses them.

By accelerate's hooks, from which adapters that are injected later are hidden. With gradient checkpointing, the backward
pass loads the weights of one block at a time; without it, it would keep all of them. (diffusers' group offloading is
made for inference: it takes away weights that the backward pass reads.)
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
    # As of a model that accelerate has spread over devices: `prepare` then leaves it where it is.
    denoiser.hf_device_map = {name: place for name, _ in denoiser.named_children()}
