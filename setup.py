"Everything is in pyproject.toml; this copies settings.ini, data/ and the notebooks into the wheel, as lmtrain/_data/."
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class WithData(build_py):
    "The package's modules, and the data files beside them."
    def data(self) -> dict[Path, Path]:
        to = Path(self.build_lib, "lmtrain", "_data")
        files = {HERE / "settings.ini": to / "settings.ini"}
        files |= {p: to / p.relative_to(HERE / "data") for p in sorted((HERE / "data").rglob("*.json"))}
        books = [p for p in sorted((HERE / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
        return files | {p: to / p.relative_to(HERE) for p in books}

    def run(self):
        super().run()
        if self.editable_mode: return  # a checkout finds them where they are
        for source, target in self.data().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *map(str, self.data().values())]


setup(cmdclass={"build_py": WithData})
