"""Render README.md from nbs/index.ipynb; with --check only say whether it is up to date."""
import sys
from pathlib import Path

import nbformat

root = Path(__file__).resolve().parent.parent


def render(notebook) -> str:
    "Markdown cells as they are, code cells and their text output as fenced blocks."
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
        elif cell.cell_type == "code" and cell.source.strip() and "#| hide" not in cell.source:
            parts.append(f"```python\n{cell.source}\n```")
            texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
            if any(t.strip() for t in texts):
                parts.append("```\n" + "\n".join(t.rstrip("\n") for t in texts) + "\n```")
    return "\n\n".join(parts).replace("](images/", "](nbs/images/") + "\n"


text = render(nbformat.read(root / "nbs" / "index.ipynb", 4))
readme = root / "README.md"
if "--check" in sys.argv:
    if not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md differs from nbs/index.ipynb: run python .ci/readme.py")
else:
    readme.write_text(text, encoding="utf-8")
