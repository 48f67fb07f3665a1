"""The mini model lies in weights/, where people look for weights; the wheel carries it inside the package."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

MINI = Path("weights/mini.safetensors")


class BuildWithMini(build_py):
    def run(self):
        super().run()
        if not self.editable_mode and MINI.is_file():
            target = Path(self.build_lib, "minisd", MINI)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(MINI), str(target))

    def get_source_files(self):
        return [*super().get_source_files(), *([str(MINI)] if MINI.is_file() else [])]


setup(cmdclass={"build_py": BuildWithMini})
