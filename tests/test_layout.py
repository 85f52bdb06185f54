"""The repository is the package; what keeps that working is checked here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_PACKAGES = {"tests", "docs", "runs", "build", "dist"}
FOLDERS = ("convert", "distill", "kernels", "recipes")


def sources() -> list[Path]:
    """The Python files of the package, from the repository's root."""
    paths = [
        path.relative_to(ROOT)
        for path in ROOT.rglob("*.py")
        if not any(p[0] == "." for p in path.relative_to(ROOT).parts)
    ]
    return [path for path in paths if path.parts[0] not in NOT_PACKAGES]


def test_the_folders_are_namespace_packages() -> None:
    # transformers imports Hugging Face's package named `kernels`. A folder `kernels` on the path that held an
    # __init__.py would be taken for it; without one, a real package wins over the folder.
    assert [path for path in sources() if path.name == "__init__.py"] == [Path("__init__.py")]
    assert [folder for folder in FOLDERS if not (ROOT / folder).is_dir()] == []


def test_the_packages_of_the_wheel_are_the_folders_that_hold_sources() -> None:
    found = {".".join(("attnconvert", *path.parent.parts)) for path in sources()} | {"attnconvert.recipes"}
    assert sorted(found) == SETUPTOOLS["packages"]


def test_every_recipe_is_shipped() -> None:
    recipes = {path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    patterns = SETUPTOOLS["package-data"]["attnconvert.recipes"]
    shipped = {path for pattern in patterns for path in (ROOT / "recipes").glob(pattern)}
    assert {path for path in recipes if path.suffix != ".py"} == shipped
    assert (ROOT / "py.typed").exists()


def test_no_file_is_named_like_a_module_of_the_standard_library() -> None:
    # `python convert/x.py` puts its folder first on the path, and `import profile` would find ours.
    tests = [path.relative_to(ROOT) for path in (ROOT / "tests").glob("*.py")]
    allowed = {"__init__", "__main__"}
    names = {path: path.stem for path in [*sources(), *tests] if path.stem not in allowed}
    assert [path for path, name in names.items() if name in sys.stdlib_module_names] == []


def test_imports_run_one_way() -> None:
    # The package root may use everything; below it convert knows nothing of distill, kernels of neither.
    allowed = {"kernels": {"kernels"}, "convert": {"kernels", "convert"}, "distill": {"kernels", "convert", "distill"}}
    wrong = []
    for path in sources():
        if path.parts[0] not in allowed:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                above = path.parts[: len(path.parts) - node.level]
                names = [*above, *(node.module or "").split(".")] if node.module else [*above, node.names[0].name]
                if names != ["__version__"] and names[0] not in allowed[path.parts[0]]:
                    wrong.append(f"{path}:{node.lineno} imports {'.'.join(names)}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                if name and name.split(".")[0] in ("attnconvert", *FOLDERS):
                    wrong.append(f"{path}:{node.lineno} imports {name}: within the package imports are relative")
    assert wrong == []


@pytest.mark.parametrize(
    "module", ["attnconvert", "attnconvert.cli", "attnconvert.convert.recipe", "attnconvert.convert.report"]
)
def test_importing_loads_no_heavy_library(module: str) -> None:
    if not (ROOT / f"{module.removeprefix('attnconvert.').replace('.', '/')}.py").exists() and module != "attnconvert":
        pytest.skip(f"{module} is not there")
    heavy = ("torch", "transformers", "peft", "datasets", "diffusers", "matplotlib", "scipy")
    code = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_the_constraints_hold_exact_public_versions_of_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line)] == []
    pinned = {_normal(line.partition("==")[0]) for line in pins}
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    assert [r for r in wanted if _normal(re.split(r"[\[<>=!~; ]", r)[0]) not in pinned] == []
    assert [r for r in wanted if ">=" not in r] == []


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
