"""The house stays in order: six modules, six rooms, imports that run one way (README, "Map")."""

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = ("starquant", "kernels", "model", "calibrate", "evaluate", "bench")
ROOMS = ("runtime", "checkpoint", "methods", "tiny", "calibration", "experiments")
# bottom to top: a floor may import what stands below it, and a room its own files
FLOORS = ({"kernels", "starquant"}, {"runtime"}, {"checkpoint"}, {"model"}, {"methods", "tiny"}, {"calibration"},
          {"calibrate"}, {"experiments"}, {"evaluate", "bench"})
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = [ROOT / f"{name}.py" for name in MODULES] + [f for room in ROOMS for f in sorted((ROOT / room).rglob("*.py"))]
OTHERS = {"README.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "pyproject.toml", "requirements.txt", "docs",
          "results", "tests"}
IGNORED = {line.strip("/\n") for line in (ROOT / ".gitignore").read_text().splitlines()}


def imported(file):
    """(line, top-level name) of every import of a file, those inside of functions included."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import"
            yield node.lineno, node.module.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    home = file.relative_to(ROOT).parts[0].removesuffix(".py")
    upward = [f"line {line}: {name}" for line, name in imported(file)
              if name != home and FLOOR_OF.get(name, -1) >= FLOOR_OF[home]]
    assert upward == []


def test_the_top_level_is_six_modules_six_rooms_and_what_packaging_needs():
    here = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")} - IGNORED
    here = {name for name in here if not name.endswith(".egg-info")}
    assert here == {f"{name}.py" for name in MODULES} | set(ROOMS) | OTHERS
    assert len(here) <= 22


def test_an_installation_has_every_file_of_the_modules_and_rooms(tmp_path):
    """The wheel that `pip install .` makes, built in a copy, beside which setuptools (torch brings it) writes."""
    unlike = shutil.ignore_patterns("__pycache__", ".*")
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=unlike)
    for name in (*(f"{module}.py" for module in MODULES), "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    files = {str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*") if f.is_file()}
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").iterdir()
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == files - {"pyproject.toml", "README.md", "LICENSE"}
