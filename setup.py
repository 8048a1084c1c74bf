"Everything is in pyproject.toml; this copies settings.ini, data/ and the notebooks into the wheel, as lmtrain/_data/."
import re
import shutil
import tomllib
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


def is_chapter(path: Path) -> bool:
    "A notebook of the package: the index, the design, glossary and notation, a numbered chapter or an experiment. A stray Untitled.ipynb is none."
    place = path.relative_to(HERE / "nbs").as_posix()
    return bool(re.fullmatch(r"(index|design|glossary|notation|\d_\w+/\d\d_\w+|7_experiments/[a-z]\w*)\.ipynb", place))


def described(readme: str, home: str | None) -> str:
    "The README for the page of a package index, where no file lies beside it: links to files lead to `home`, or are text."
    local = r"(!?)\[([^\]]*)\]\((?!https?:|#|mailto:)([^)]+)\)"
    if home is None: return re.sub(local, lambda m: "" if m[1] else m[2], readme)
    where = lambda m: f"{home.rstrip('/')}/{'raw' if m[1] else 'blob'}/HEAD/{m[3]}"
    return re.sub(local, lambda m: f"{m[1]}[{m[2]}]({where(m)})", readme)


class WithData(build_py):
    "The package's modules, and the data files beside them."
    def data(self) -> dict[Path, Path]:
        to = Path(self.build_lib, "lmtrain", "_data")
        files = {HERE / "settings.ini": to / "settings.ini"}
        files |= {p: to / p.relative_to(HERE / "data") for p in sorted((HERE / "data").rglob("*.json"))}
        books = filter(is_chapter, sorted((HERE / "nbs").rglob("*.ipynb")))
        return files | {p: to / p.relative_to(HERE) for p in books}

    def run(self):
        old = Path(self.build_lib, "lmtrain")              # of an earlier build: what was removed since is still in it
        if not self.editable_mode and old.exists(): shutil.rmtree(old)
        super().run()
        if self.editable_mode: return                      # a checkout finds them where they are
        for source, target in self.data().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *map(str, self.data().values())]


project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
text = described((HERE / "README.md").read_text(encoding="utf-8"), project.get("urls", {}).get("Repository"))
setup(cmdclass={"build_py": WithData}, long_description=text, long_description_content_type="text/markdown")
