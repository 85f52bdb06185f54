"""The documentation says what is so: links resolve, code runs, commands parse, messages and settings exist."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
import yaml
from commands import RECIPE, place, whole  # noqa: F401 – fixtures

from attnconvert import cli
from attnconvert.convert.recipe import parse_recipe, shipped_recipes
from attnconvert.kernels import operators, outside
from attnconvert.kernels.spec import OPERATORS, plain

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (\w+)(?:: ([^>]*?))? -->\n)?```(\w*)\n(.*?)^```$", flags=re.M | re.S)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code of a page: its mark (`<!-- run -->`), what the mark names, its language and text."""

    mark: str
    named: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text(encoding="utf-8"))
    return [Block(*(part or "" for part in row)) for row in found]


# --- links ------------------------------------------------------------------------------------------------------------


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, flags=re.M):
        plain_text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain_text)))
    return found


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_to_files_and_anchors_that_are_there(page: Path) -> None:
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    wrong = []
    for target in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        file, _, anchor = target.partition("#")
        where = (page.parent / file).resolve() if file else page
        if not where.exists() or (anchor and (where.suffix != ".md" or anchor not in anchors(where))):
            wrong.append(target)
    assert wrong == []


def test_every_page_can_be_found_from_the_front_page_or_the_navigation() -> None:
    hooks = site_hooks()
    config = yaml.load((DOCS / "site" / "mkdocs.yml").read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    told = str(config["nav"])
    missing = [page.name for page in DOCS.glob("*.md") if f"'{page.name}'" not in told]
    assert missing == [], "docs/site/mkdocs.yml does not list them"
    assert set(hooks.FOLDERS) <= set(re.findall(r"'(\w+)'", told))


# --- code -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scene(
    whole: Path,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with what the pages speak of: my-model, my-texts, mine.yaml, runs/demo and the operator's file."""
    shutil.copytree(place / "model", tmp_path / "my-model")
    shutil.copytree(whole, tmp_path / "runs" / "demo")
    for side, name in (("train", "calibration"), ("test", "heldout")):
        (tmp_path / "my-texts" / side).mkdir(parents=True)
        shutil.copy(place / f"{name}.txt", tmp_path / "my-texts" / side / "one.txt")
    recipe = yaml.safe_load(RECIPE) | {"compare": [], "distill": {"lora": None}}
    recipe["model"]["folder"] = "my-model"
    recipe["text"] = {"calibration": {"files": ["my-texts/train/*.txt"]}, "heldout": {"files": ["my-texts/test/*.txt"]}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(DOCS / "examples" / "taylor.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def registered_elsewhere() -> Iterator[None]:
    """Operators that a page registers from its own folder take the place of the same ones of other tests."""
    kept = dict(OPERATORS), dict(outside._loaded)
    for name in set(OPERATORS) - set(operators.FILES):
        del OPERATORS[name]
    outside._loaded.clear()
    yield
    OPERATORS.clear()
    OPERATORS.update(kept[0])
    outside._loaded.clear()
    outside._loaded.update(kept[1])


RUN = [page for page in PAGES if any(block.mark == "run" for block in blocks(page))]


@pytest.mark.parametrize("page", RUN, ids=names)
def test_the_code_of_the_pages_runs(page: Path, scene: Path, registered_elsewhere: None) -> None:
    """The blocks of a page that are marked, in order, in one namespace, on tiny models."""
    given: dict[str, Any] = {"ids": torch.arange(1, 21)[None], "__name__": "page"}
    for block in blocks(page):
        if block.mark == "run":
            exec(compile(block.text, names(page), "exec"), given)
    for name, value in given.items():
        if name.startswith("test_"):  # a test that the page shows must pass on every case
            for spec, rule in value.pytestmark[0].args[1]:
                value(spec, rule)


def test_code_is_python_and_shown_files_are_those_that_are_there() -> None:
    shown = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.text)
            if block.mark == "file":
                shown.append(block.named)
                assert block.text == (DOCS / block.named).read_text(encoding="utf-8"), f"{page}: {block.named} differs"
    assert shown == ["examples/taylor.py"]


def test_the_example_operator_is_as_short_as_its_page_promises() -> None:
    lines = (DOCS / "examples" / "taylor.py").read_text(encoding="utf-8").splitlines()
    code = [line for line in lines if line.strip() and not line.strip().startswith(('"""', "#"))]
    assert len(code) <= 60


# --- commands ---------------------------------------------------------------------------------------------------------


def all_commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, (*path, name))
        else:
            yield (*path, name), command


def told_commands() -> list[Any]:
    """Every line of a page's shell blocks that begins with attnconvert."""
    shell = ((page, block) for page in PAGES for block in blocks(page) if block.language in ("", "bash", "sh"))
    lines = ((page, line) for page, block in shell for line in block.text.splitlines())
    return [pytest.param(x, id=f"{names(page)}: {x[:60].strip()}") for page, x in lines if x.startswith("attnconvert ")]


@pytest.mark.parametrize("line", told_commands())
def test_commands_of_the_pages_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    group: Any = typer.main.get_command(cli.app)
    if words[0].startswith("--"):  # of all commands: --backend NAME
        parsed, words, _ = group.make_parser(group.make_context("attnconvert", ["recipes", "ls"])).parse_args(words)
        assert parsed
    while hasattr(group, "commands"):
        assert words[0] in group.commands, f"there is no command {words[0]!r}"
        group = group.commands[words.pop(0)]
    if {"COMMAND", "…"} & set(words):
        return
    context = typer.Context(group, info_name="attnconvert")
    _, left, _ = group.make_parser(context).parse_args(words)
    required = [p.name for p in group.params if p.required and p.param_type_name == "argument"]
    assert left == [], f"it does not take {left}"
    assert len(required) <= len([word for word in words if not word.startswith("-")])


def test_recipes_of_the_pages_are_valid() -> None:
    told = 0
    for page in PAGES:
        for block in blocks(page):
            given = yaml.safe_load(block.text) if block.language == "yaml" else None
            if isinstance(given, dict) and {"name", "model"} <= set(given):
                parse_recipe(block.text, names(page))
                told += 1
    assert told >= 2


# --- what is named exists ---------------------------------------------------------------------------------------------


def templates() -> list[re.Pattern[str]]:
    """Every text with some words in the sources, what is filled in as anything."""
    found = []
    for folder in ("convert", "kernels", "distill", "."):
        for path in sorted((ROOT / folder).rglob("*.py") if folder != "." else ROOT.glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [re.escape(x.value) if isinstance(x, ast.Constant) else ".*?" for x in node.values]
                    fixed = sum(len(x.value) for x in node.values if isinstance(x, ast.Constant))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    parts, fixed = [re.escape(node.value)], len(node.value)
                else:
                    continue
                if fixed >= 18:
                    found.append(re.compile("".join(parts), flags=re.S))
    return found


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_sources() -> None:
    known = templates()
    told = [block.text.strip() for block in blocks(DOCS / "troubleshooting.md") if block.language == "text"]
    assert len(told) > 20
    assert [message for message in told if not any(one.fullmatch(message) for one in known)] == []


@pytest.mark.parametrize("name", sorted(operators.FILES))
def test_every_operator_has_a_page_with_all_its_settings(name: str) -> None:
    page = (DOCS / "operators" / f"{name}.md").read_text(encoding="utf-8")
    for heading in ("Formula", "When to use it", "Cost", "Settings", "Source"):
        assert f"\n## {heading}\n" in page
    spec = OPERATORS[name]()
    defaults = {field.name: plain(getattr(spec, field.name)) for field in dataclasses.fields(spec)}
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", page, flags=re.M))
    assert {key: yaml.safe_load(value) for key, value in rows.items()} == defaults
    assert f"operators/{name}.md" in (DOCS / "operators.md").read_text(encoding="utf-8")


def test_the_gallery_has_every_recipe_and_is_up_to_date(tmp_path: Path) -> None:
    page = (DOCS / "gallery.md").read_text(encoding="utf-8")
    assert re.findall(r"^### (.*)$", page, flags=re.M).sort() == list(shipped_recipes()).sort()
    gallery = load_script(DOCS / "benchmarks" / "gallery.py")
    shutil.copy(DOCS / "gallery.md", tmp_path)
    gallery.main(tmp_path / "gallery.md")
    assert (tmp_path / "gallery.md").read_text(encoding="utf-8") == page, "run `make docs`"


# --- the site ---------------------------------------------------------------------------------------------------------


def load_script(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"docs_{path.stem}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def site_hooks() -> ModuleType:
    """hooks.py, which needs two names of mkdocs to be imported."""
    if importlib.util.find_spec("mkdocs") is None:
        for name in ("mkdocs", "mkdocs.structure"):
            sys.modules.setdefault(name, ModuleType(name))
        files = ModuleType("mkdocs.structure.files")
        files.File = files.Files = object  # type: ignore[attr-defined]
        sys.modules.setdefault("mkdocs.structure.files", files)
    return load_script(DOCS / "site" / "hooks.py")


def test_the_site_has_a_page_for_every_command() -> None:
    hooks = site_hooks()
    told = hooks.sections((DOCS / "cli.md").read_text(encoding="utf-8"))
    found = dict(hooks.commands())
    assert set(told) == set(found)
    for name, command in found.items():
        page = hooks.command_page(name, command, told[name])
        assert page.startswith(f"# {name}\n")
        for parameter in command.params:
            for option in parameter.opts:
                assert option in page or not option.startswith("-")
    index = hooks.index_of_commands((DOCS / "cli.md").read_text(encoding="utf-8"))
    assert index.count("[All of it](commands/") == len(found)


def test_links_out_of_the_docs_lead_to_the_repository_on_the_site() -> None:
    outward = site_hooks().outward
    base = "https://example.org/r"
    assert outward("[a](../recipes)", "cli.md", base) == f"[a]({base}/blob/main/recipes)"
    assert (
        outward("[a](examples/taylor.py)", "own-operator.md", base) == f"[a]({base}/blob/main/docs/examples/taylor.py)"
    )
    for kept in ("[a](operators/window.md#source)", "[a](https://x.org/y)", "[a](#here)", "![a](masks.png)"):
        assert outward(kept, "index.md", base) == kept
    assert outward("[a](../masks.md)", "operators/radial.md", base) == "[a](../masks.md)"


def test_the_site_is_built_from_pinned_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert [name for name in project["optional-dependencies"]["docs"] if name.split(">=")[0] not in pins] == []


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: make docs installs it")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "site" / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
