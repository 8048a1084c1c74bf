"Write README.md from nbs/index.ipynb: `python docs/readme.py`, or with --check only say whether it is up to date."
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTE = "<!-- Made from nbs/index.ipynb by docs/readme.py: edit the notebook, not this file. -->"


def output(cell: dict) -> str:
    "The text outputs of a cell."
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.get("outputs", [])]
    return "\n".join("".join(p).rstrip("\n") for p in parts if p)


def section(cell: dict) -> str:
    "A cell as markdown; a directive such as `#| export` at its top is left out, and so is a cell with `#| hide`."
    source = "".join(cell["source"])
    if source.startswith("#| hide"): return ""
    source = re.sub(r"^(#\|.*\n)+\n*", "", source)
    if cell["cell_type"] == "code":
        said = output(cell)
        return f"```python\n{source}\n```" + (f"\n\n```text\n{said}\n```" if said else "")
    source = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", source)
    return source.replace("](../", "](")


def readme(root: Path = ROOT) -> str:
    cells = json.loads((root / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([NOTE, *filter(None, map(section, cells))]) + "\n"


if __name__ == "__main__":
    path, text = ROOT / "README.md", readme()
    if "--check" not in sys.argv: path.write_text(text, encoding="utf-8")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        sys.exit("README.md is not what nbs/index.ipynb says: run make readme")
