"`lmtrain course`: the chapters for a class, without the solutions for students and with them for teachers."
import json
from pathlib import Path

from ..labs.serve import notebooks, shipped

SOLUTIONS = "9_solutions"
HIDDEN = {"solution", "teacher"}  # tags of cells that students do not get


def for_students(text: str, clear: bool = False) -> str:
    "A notebook without the cells that are tagged so, and without outputs: of exercises, or with `clear` of all cells."
    nb = json.loads(text)
    tags = lambda cell: {*cell["metadata"].get("tags", ())}
    nb["cells"] = [c for c in nb["cells"] if not tags(c) & HIDDEN]
    for c in nb["cells"]:
        if c["cell_type"] == "code" and (clear or "exercise" in tags(c)): c |= {"outputs": [], "execution_count": None}
    return json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def solutions() -> dict[str, str]:
    "The notebooks with solutions by their place. Raises FileNotFoundError where there are none: they are not installed."
    root = notebooks()
    found = {p.relative_to(root).as_posix(): p.read_text(encoding="utf-8") for p in sorted((root / SOLUTIONS).glob("*.ipynb"))}
    if not found: raise FileNotFoundError("the solutions do not come with the installed package, so that students who have it "
                                          "have not got them: make the teacher's copy in a clone of the repository")
    return found


def copy(folder: Path, texts: dict[str, str]) -> str:
    """Write texts to their places in `folder`, all or none, and say what was done.

    Raises ValueError if the folder is not empty, and OSError if it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a folder that is, or that does not exist yet")
    begun: list[Path] = []
    try:
        for name, text in texts.items():
            begun.append(folder / name)
            begun[-1].parent.mkdir(parents=True, exist_ok=True)
            begun[-1].write_text(text, encoding="utf-8", newline="")
    except BaseException:
        for path in begun: path.unlink(missing_ok=True)
        for path in sorted({p.parent for p in begun}, reverse=True): path.rmdir() if path.is_dir() else None
        raise
    return f"{len(texts)} notebooks copied to {folder}."


def course(student: Path | None, teacher: Path | None, clear: bool = False) -> list[str]:
    "Copy the chapters for students, for teachers, or both; a line each. Raises ValueError if neither is wanted."
    if student is None and teacher is None: raise ValueError("say for whom: --student FOLDER, --teacher FOLDER, or both")
    for_all, lines = shipped(), []
    if teacher: lines.append(copy(teacher, for_all | solutions()) + " Solutions are in 9_solutions.")
    if student: lines.append(copy(student, {n: for_students(t, clear) for n, t in for_all.items()}) + " Solutions are not among them.")
    return lines
