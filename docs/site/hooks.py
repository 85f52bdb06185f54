"""What mkdocs is taught about these pages, so that they read on GitHub as they stand and on the site as well.

- Links that leave docs/ (../recipes) become links to the repository.
- cli.md is one page here; on the site every command has a page of its own, made of its section and of its own --help.
- `commands` and `operators` in the navigation stand for all pages of these folders; pages that nobody listed stand
  under "More", so that a new one is never missing, and one that is not there is left out.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s#]+)(#[^)]*)?\)")
COMMAND = re.compile(r"^### (attnconvert [\w -]+)\n(.*?)(?=^##|\Z)", flags=re.M | re.S)
FOLDERS = ("commands", "operators")


def sections(page: str) -> dict[str, str]:
    """Command → its section of cli.md, without the heading."""
    return {name.strip(): text.strip() for name, text in COMMAND.findall(page)}


def file_of(name: str) -> str:
    """The page of a command: `attnconvert recipes ls` → commands/recipes-ls.md"""
    return f"commands/{name.removeprefix('attnconvert ').replace(' ', '-')}.md"


def commands(group: Any = None, path: str = "attnconvert") -> Iterator[tuple[str, Any]]:
    """Every command with its full name."""
    if group is None:
        import typer

        from attnconvert import cli

        group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}", command


def command_page(name: str, command: Any, section: str) -> str:
    """The page of a command: what cli.md says of it, then what of its --help is not there, and its example."""
    lines = [f"# {name}", "", _from(section, "commands/x.md"), ""]
    told = set(re.findall(r"`(--[\w-]+)", section))
    further = [parameter for parameter in command.params if not told & set(parameter.opts)]
    lines += ["## Arguments and further options", "", "| option | meaning |", "|---|---|"]
    for parameter in further:
        options = ", ".join(f"`{one}`" for one in parameter.opts if one.startswith("-"))
        lines.append(f"| {options or f'`{_metavar(parameter)}`'} | {_plain(getattr(parameter, 'help', None) or '')} |")
    lines += ["| `--help`, `-h` | Show what the command does. |", ""]
    example = re.search(r"Example:\[/dim\] (.*)", command.help or "")
    if example:
        lines += ["## Example", "", "```bash", example[1].strip(), "```", ""]
    lines.append("Exit codes, variables and what all commands share: [the command line](../cli.md).")
    return "\n".join(lines) + "\n"


def _metavar(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper())


def _plain(text: str) -> str:
    return re.sub(r"\[/?[a-z]*\]", "", text).replace("|", "\\|").replace("<", "&lt;")


def _from(text: str, page: str) -> str:
    """Text of a page of docs/ with its links as they must be in a page of a folder."""
    folder = posixpath.dirname(page)

    def moved(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        return f"{match[1]}{posixpath.relpath(match[2], folder)}{match[3] or ''})"

    return LINK.sub(moved, text)


def index_of_commands(page: str) -> str:
    """cli.md with the first sentence of each command in the place of its section."""

    def short(match: re.Match[str]) -> str:
        paragraphs = [p for p in match[2].strip().split("\n\n") if not p.lstrip().startswith("`")]
        first = re.split(r"(?<=[.:])\s", " ".join(paragraphs[0].split()) + " ")[0] if paragraphs else ""
        return f"### {match[1]}\n\n{first} [All of it]({file_of(match[1].strip())})\n\n"

    return COMMAND.sub(short, page)


def outward(markdown: str, page: str, repository: str) -> str:
    """Links that leave docs/ as links to the repository."""

    def moved(match: re.Match[str]) -> str:
        where = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), match[2]))
        inside = where.startswith("docs/") and not re.match(r"docs/(site|benchmarks)/|.*\.(py|json|ya?ml)$", where)
        if "://" in match[2] or match[2].startswith("mailto:") or inside:
            return match[0]
        return f"{match[1]}{repository.rstrip('/')}/blob/main/{where}{match[3] or ''})"

    return LINK.sub(moved, markdown)


# --- what mkdocs calls ------------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Fills the navigation."""
    told = sections((DOCS / "cli.md").read_text(encoding="utf-8"))
    made = {"commands": [{name.removeprefix("attnconvert "): file_of(name)} for name in told]}
    made["operators"] = [{path.stem: f"operators/{path.name}"} for path in sorted((DOCS / "operators").glob("*.md"))]
    listed: list[str] = []

    def filled(entries: list[Any]) -> list[Any]:
        found: list[Any] = []
        for entry in entries:
            if isinstance(entry, dict):
                found += [{key: filled(value) if isinstance(value, list) else value} for key, value in entry.items()]
                listed.extend(value for value in entry.values() if isinstance(value, str))
            elif entry in made:
                found += made[entry]
            elif (DOCS / entry).is_file():
                listed.append(entry)
                found.append(entry)
        return found

    config.nav = filled(config.nav)
    more = [path.name for path in sorted(DOCS.glob("*.md")) if path.name not in listed]
    if more:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of commands."""
    told = sections((DOCS / "cli.md").read_text(encoding="utf-8"))
    for name, command in commands():
        page = command_page(name, command, told[name])
        files.append(File.generated(config, file_of(name), content=page))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page as it is on the site."""
    if page.file.src_uri == "cli.md":
        markdown = index_of_commands(markdown)
    return outward(markdown, page.file.src_uri, config.repo_url)
