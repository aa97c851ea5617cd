"""The notebooks of examples/ as pages of the site."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[1] / "examples"


def files() -> Iterator[tuple[str, str | bytes]]:
    """Yield the path in the site's source and the content of every page and picture."""
    for path in sorted(EXAMPLES.glob("*.ipynb")):
        lines: list[str] = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                lines.append(source.replace("](../docs/", "](../"))
                continue
            lines.append(f"```python\n{source}\n```")
            for output in cell["outputs"]:
                picture = output.get("data", {}).get("image/png")
                if picture:
                    name = f"{path.stem}-{len(lines)}.png"
                    lines.append(f"![What the code above draws]({name})")
                    yield f"examples/{name}", base64.b64decode("".join(picture))
                else:
                    lines.append(f"```text\n{_text(output).rstrip()}\n```")
        yield f"examples/{path.stem}.md", "\n\n".join(lines) + "\n"


def linked(markdown: str) -> str:
    """Return a page whose links to notebooks lead to their pages."""
    return re.sub(r"\]\(\.\./((?:\.\./)*examples/\w+)\.ipynb\)", r"](\1.md)", markdown)


def _text(output: dict[str, Any]) -> str:
    return "".join(output.get("text") or output["data"]["text/plain"])
