"""Uploading a finished run to the Hugging Face Hub: the adapter, its card, the metrics and the pictures."""

import re
from collections.abc import Callable
from pathlib import Path

from randlora_vision.errors import one_line
from randlora_vision.integrations import hub
from randlora_vision.names import printable
from randlora_vision.training.harness.options import HubOptions
from randlora_vision.training.harness.run_folder import RunFolder


def check_login(options: HubOptions) -> None:
    """Raise ValueError, before the training, when what is trained could not be uploaded."""
    if options.push_to_hub and not hub.hugging_face_hub().get_token():
        raise ValueError("--push-to-hub needs a login: set the environment variable HF_TOKEN, or run hf auth login")


def publish(
    run: RunFolder, options: HubOptions, write_card: Callable[[str | None], None], say: Callable[[str], None]
) -> None:
    """Write the card, for the repository if one is asked for, and upload the run; a failure is said in one line."""
    if not options.push_to_hub:
        write_card(None)
        return
    name = options.hub_model_id or repository_name(run.path)
    try:
        write_card(name)
        name = hub.full_name(name)
        write_card(name)
        files = [run.card, run.adapter, run.best, run.summary, run.metrics, *run.pictures()]
        url = hub.upload(run.path, [path.name for path in files if path.exists()], name, "The adapter and its card")
    except Exception as error:  # of huggingface_hub and of its transport; the run must not fail with it
        reason = printable(one_line(str(error)) or type(error).__name__, 500)
        say(
            f"note: the upload to {name} failed ({reason}); everything is in {run.path}, and the command "
            f"'hf upload {name} {run.path}' uploads it later"
        )
    else:
        say(f"uploaded: {url}")


def repository_name(folder: Path) -> str:
    """Return the name of a folder with only the characters that the Hub accepts."""
    name = re.sub(r"[^A-Za-z0-9_.-]+|-{2,}|\.{2,}", "-", folder.resolve().name)
    return re.sub(r"-{2,}", "-", name).strip("-.")[:96].strip("-.") or "adapter"
