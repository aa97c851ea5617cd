"""Download one file of a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from randlora_vision.errors import reason_of
from randlora_vision.names import printable

ADAPTER_FILE = "adapter.safetensors"
"""The file name of an adapter in a repository or folder."""
_SUFFIXES = (".safetensors", ".json")


def download(repository: str, name: str = ADAPTER_FILE, revision: str | None = None) -> Path:
    """Return the path of one file of a repository, downloaded unless it is cached.

    Raises:
        FileNotFoundError: If the Hub cannot be reached or does not have the file.
        ValueError: If the name does not end in ``.safetensors`` or ``.json``; other files are not fetched.
    """
    if not name.endswith(_SUFFIXES):
        raise ValueError(f"{name!r} of {repository!r}: only {' and '.join(_SUFFIXES)} files are fetched")
    hub, options = hugging_face_hub(), {} if revision is None else {"revision": revision}
    try:
        return Path(hub.hf_hub_download(repository, name, **options))
    except (OSError, ValueError) as error:  # all exceptions of huggingface_hub derive from one of these
        reason = printable(reason_of(error))
        raise FileNotFoundError(
            f"there is no local file or folder {repository!r}, and {name} of the repository {repository!r} could not "
            f"be downloaded from the Hugging Face Hub: {reason}"
        ) from None


def hugging_face_hub() -> Any:
    """Import and return huggingface_hub."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ValueError("the Hugging Face Hub needs huggingface_hub: pip install 'randlora_vision[hub]'") from None
    return huggingface_hub
