"""`randlora train`: the training scripts, started from anywhere."""

import importlib
import sys
from collections.abc import Sequence

from randlora_vision.errors import user_errors

SCRIPTS = {"clip": "train_clip", "classifier": "train_classifier", "dreambooth": "train_dreambooth"}
_USAGE = f"usage: randlora train {{{','.join(SCRIPTS)}}} [options of the script; --help lists them]"


@user_errors
def start(argv: Sequence[str]) -> None:
    """Run the script that the first argument names; raise ValueError if there is none or a library is missing."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stdout if argv else sys.stderr)
        raise SystemExit(0 if argv else 2)
    name, *rest = argv
    if name not in SCRIPTS:
        raise ValueError(f"there is no script {name!r}: randlora train starts {', '.join(SCRIPTS)}")
    try:
        script = importlib.import_module(f"randlora_vision.train_scripts.{SCRIPTS[name]}")
    except ModuleNotFoundError as error:
        raise ValueError(f"randlora train needs {error.name}: pip install 'randlora_vision[train]'") from None
    script.main(rest)
