"""The page of every error message, collected from the source when the site is built.

    python docs/messages.py     # prints it

A message in the source is one that a `raise` statement holds, directly, in a variable, or in a function that it calls.
Every package that raises needs a remedy below: its own, or that of the package around it.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SHORTEST = 12  # a message of fewer characters says nothing without its values

# Folder -> (title, remedy).
REMEDIES = {
    "randlora_vision": (
        "Settings of an adapter",
        "A field of `RandLoRAConfig` or a value in a JSON file has the wrong type or range. The message names the "
        "field and what it accepts; the docstring of [RandLoRAConfig](reference/core.md) describes every field.",
    ),
    "randlora_vision/bases": (
        "Random bases",
        "The bases cannot be made as asked. Take another kind of `bases`, or, for a PEFT folder, the one that it was "
        "trained with.",
    ),
    "randlora_vision/compute": (
        "Products",
        "An operation is used where it has no meaning, such as gradients of gradients of a fast path. Use "
        '`compute="dense"`, or plain PyTorch around it.',
    ),
    "randlora_vision/layers": (
        "Adapted layers",
        "Something changes an adapted layer in a way that would lose the adapter: call `merge` and `remove` first, "
        "or do it before `inject`. [Things to know](method.md#things-to-know) lists the order of operations.",
    ),
    "randlora_vision/injection": (
        "Adding, merging and removing adapters",
        "The targets do not exist, the model is wrapped, sharded or offloaded, or another module holds the adapters. "
        "Print `plan(model, config)` to see what would be adapted, call `inject` before wrapping, and pass the module "
        "that `inject` was called on.",
    ),
    "randlora_vision/adapters": (
        "Saving, loading and adding up adapters",
        "The file does not belong to this base model, or the adapters cannot be combined exactly. `randlora info FILE` "
        "shows what a file holds, `randlora verify FILE --model MODEL` where it does not fit.",
    ),
    "randlora_vision/files": (
        "Files",
        "The file is damaged, altered, of a newer version, or not an adapter file. Fetch it again, upgrade this "
        "package, or write it anew with `save_adapter`. `randlora verify` checks a file by itself.",
    ),
    "randlora_vision/cli": (
        "The randlora command",
        "An argument is wrong or a library is missing: `randlora COMMAND --help` lists the arguments, `randlora "
        "doctor` what is installed.",
    ),
    "randlora_vision/training": (
        "All training scripts",
        "An option, the run folder or a checkpoint is not as it must be. `--help` and `--help-all` list the options. A "
        "folder that holds a run is replaced only with `--overwrite`; `--resume latest` goes on with it.",
    ),
    "randlora_vision/training/methods": (
        "Methods",
        "The method does not fit the model or the file: LoRA and VeRA of PEFT are refused where PEFT would lose "
        "adapters. Take `--method randlora`, or the base model of the file.",
    ),
    "randlora_vision/training/data": (
        "Data",
        "The data cannot be used as given. [Data](data.md) has the rules for images, labels, captions and splits; "
        "`skipped.txt` in the run folder lists what was left out.",
    ),
    "randlora_vision/training/data/sources": (
        "Sources of data",
        "A folder, table, shard or data set is missing or has another form. [Data](data.md) shows each form; "
        "`--download` allows downloads.",
    ),
    "randlora_vision/training/evaluation": ("Evaluation", "There is nothing to measure: check the evaluated split."),
    "randlora_vision/training/clip": (
        "train_clip.py",
        "Options that contradict each other, the model or the data. [The training scripts](scripts.md) describes them.",
    ),
    "randlora_vision/training/classifier": (
        "train_classifier.py",
        "Options that contradict each other, the model or the data. [The training scripts](scripts.md) describes them.",
    ),
    "randlora_vision/training/dreambooth": (
        "train_dreambooth.py",
        "The pipeline is of a kind that is not trained here, or options contradict it. "
        "[Your subject](tutorials/subject.md) starts from a command that works.",
    ),
    "integrations": (
        "Hosts",
        "The model is not one of the host that the preset or function is for, or lacks the part that it needs. "
        "[The hosts and their presets](models.md) says what fits.",
    ),
    "integrations/export": (
        "Exports",
        "The format cannot express this adapter, or no tool reads it for this model. The message names formats that "
        "can; a merged checkpoint always can. See [interchange](interchange.md).",
    ),
    "integrations/pipelines": (
        "Pipelines",
        "The file and the parts of the pipeline do not match. `randlora info FILE` names the parts in the file.",
    ),
    "integrations/presets": (
        "Presets",
        "The preset is for another kind of model: list `target_modules`, or take the preset that the message names.",
    ),
    "train_scripts": (
        "The scripts themselves",
        "An option has no meaning for this script. `--help` lists those that have.",
    ),
}


def folder_of(path: Path) -> str:
    """Return the key of the nearest folder with a remedy."""
    folder = path.relative_to(ROOT).parent
    while str(folder) not in REMEDIES and str(folder) != ".":
        folder = folder.parent
    return str(folder)


def messages(path: Path) -> Iterator[str]:
    """Yield the error messages in a file, in order, with … for what is filled in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            yield from _texts(node.exc.args[0], _around(node, parents), functions)


def _texts(value: ast.expr, around: ast.AST, functions: dict[str, ast.FunctionDef], deep: bool = True) -> Iterator[str]:
    text = _literal(value, _strings(around))
    if text is not None:
        if len(text.replace("…", "").strip()) >= _SHORTEST:
            yield text
    elif isinstance(value, ast.IfExp):
        for part in (value.body, value.orelse):
            yield from _texts(part, around, functions, deep)
    elif isinstance(value, ast.Name) and deep:
        for node in ast.walk(around):
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == value.id for t in node.targets):
                yield from _texts(node.value, around, functions, deep=False)
    elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in functions and deep:
        called = functions[value.func.id]
        for node in ast.walk(called):
            if isinstance(node, ast.Return) and node.value is not None:
                yield from _texts(node.value, called, functions, deep=False)


def _literal(value: ast.expr, strings: dict[str, str]) -> str | None:
    """The text of a string, f-string or sum of them; None for anything else. `strings` are variables that hold text."""
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        return value.value
    if isinstance(value, ast.JoinedStr):
        return "".join(_part(part, strings) for part in value.values)
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
        parts = [_literal(side, strings) for side in (value.left, value.right)]
        return None if parts == [None, None] else "".join(part or "…" for part in parts)
    return None


def _part(value: ast.expr, strings: dict[str, str]) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    inner = value.value if isinstance(value, ast.FormattedValue) else value
    return strings.get(inner.id, "…") if isinstance(inner, ast.Name) else "…"


def _strings(around: ast.AST) -> dict[str, str]:
    """The variables of a function that are assigned a text once."""
    found: dict[str, list[str | None]] = {}
    for node in ast.walk(around):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(_literal(node.value, {}))
    return {name: texts[0] for name, texts in found.items() if len(texts) == 1 and texts[0] is not None}


def _around(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node]
    return node


def page() -> str:
    """Return the text of the page."""
    found: dict[str, dict[str, None]] = {key: {} for key in REMEDIES}
    for top in ("randlora_vision", "integrations", "train_scripts"):
        for path in sorted((ROOT / top).rglob("*.py")):
            found[folder_of(path)].update(dict.fromkeys(messages(path)))
    lines = [
        "# Every error message",
        "",
        "Collected from the source; … stands for what a message fills in. A message says what was expected, what was",
        "found and what to do; the text above each list says where to look further. Search this page for some words of",
        "yours. The scripts print one line `error: ...`; `RANDLORA_DEBUG=1` shows the traceback.",
    ]
    for folder, texts in found.items():
        if texts:
            title, remedy = REMEDIES[folder]
            lines += ["", f"## {title}", "", remedy, "", *(f"- {_code(text)}" for text in sorted(texts, key=_order))]
    return "\n".join(lines) + "\n"


def _order(text: str) -> str:
    return text.lstrip("…:- '\"").lower()


def _code(text: str) -> str:
    text = re.sub("…+", "…", " ".join(text.split()))
    return f"`` {text} ``" if "`" in text else f"`{text}`"


if __name__ == "__main__":
    print(page(), end="")
