"""One file of a repository on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ADAPTER_FILE = "adapter.safetensors"
"""The name of an adapter in a repository, or in a folder."""
_SUFFIXES = (".safetensors", ".json")


def download(repository: str, name: str = ADAPTER_FILE, revision: str | None = None) -> Path:
    """One file of a repository, from the cache where it is there.

    Raises:
        FileNotFoundError: If the Hub cannot be reached or does not have it.
        ValueError: If the name does not end in ``.safetensors`` or ``.json``: others are not fetched.
    """
    if not name.endswith(_SUFFIXES):
        raise ValueError(f"{name!r} of {repository!r}: only {' and '.join(_SUFFIXES)} files are fetched")
    hub, options = hugging_face_hub(), {} if revision is None else {"revision": revision}
    try:
        return Path(hub.hf_hub_download(repository, name, **options))
    except (OSError, ValueError) as error:  # whatever the Hub's library raises is one of them
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"there is no file or folder {repository!r} here, and {name} of the repository {repository!r} could not "
            f"be downloaded from the Hugging Face Hub: {reason}"
        ) from None


def hugging_face_hub() -> Any:
    """huggingface_hub, imported at use."""
    try:
        import huggingface_hub
    except ModuleNotFoundError:
        raise ValueError("the Hub needs huggingface_hub: pip install 'randlora_vision[hub]'") from None
    return huggingface_hub
