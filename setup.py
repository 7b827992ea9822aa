"""Metadata and requirements come from settings.ini, so that nbdev and pip read the same lines."""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


class BuildWithNotebooks(build_py):
    "A wheel carries the stage notebooks and their settings, so that they can be run once installed."

    def run(self):
        super().run()
        target = Path(self.build_lib) / "recgen" / "notebooks"
        for source in [*(here / "nbs").glob("0*.ipynb"), *(here / "nbs" / "params").rglob("*.yaml"), *(here / "nbs" / "grids").glob("*.yaml")]:
            copy = target / source.relative_to(here / "nbs")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["recgen", "recgen.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split(), "bench": cfg["bench_requirements"].split(), "text": cfg["text_requirements"].split(), "track": cfg["track_requirements"].split(), "lab": cfg["lab_requirements"].split()},
    entry_points={"console_scripts": ["recgen=recgen.cli:main"]},
    cmdclass={"build_py": BuildWithNotebooks},
)
