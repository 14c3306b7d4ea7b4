"""What `mkdocs build` cannot do by itself, to show the same Markdown as a repository's viewer does.

- The home page is README.md.
- A link to a file outside docs/ leads to a copy of it in the site, below `repository/`.
- A backslash at the end of a line breaks it, and a heading ends a table, as in CommonMark.
- docs/cli.md gets the help of every command where it says so.
- A page that would load anything from another host is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from qrank.cli import main

ROOT = Path(__file__).parent.parent
COMMANDS = "<!-- the help of every command -->"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
FENCE = re.compile(r"^( *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
LOADED = re.compile(
    r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"https?:|<link\b[^>]*\bhref=\"https?:"
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, and everything outside docs/ that is linked to, directly or from there."""
    for name in ("README.md", *_outside()):
        place = "index.md" if name == "README.md" else f"repository/{name}"
        files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite what the site shows differently; code blocks stay as they are."""
    here = _name(page.file)
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, "\n".join(_commands()))
    parts = FENCE.split(markdown)
    for place in range(0, len(parts), 2):
        text = re.sub(r"\\$", "<br>", parts[place], flags=re.MULTILINE)
        text = re.sub(r"^(#+ )", r"\n\1", text, flags=re.MULTILINE)
        parts[place] = LINK.sub(lambda link: _moved(link, here, page.file.src_uri), text)
    return "".join(parts)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse a page that needs another host."""
    if found := LOADED.search(output):
        raise PluginError(f"{page.file.src_uri} would load from another host: {found[0]}")
    return output


def _outside() -> list[str]:
    """Files outside docs/ that pages link to, by their names in the repository."""
    todo = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
    known = set(todo)
    for name in todo:
        for target in _targets(name):
            if target not in known and not target.startswith("docs/"):
                known.add(target)
                todo.append(target)
    return [name for name in todo[1:] if not name.startswith("docs/")]


def _targets(name: str) -> Iterator[str]:
    """Files that a page of the repository links to."""
    if name.endswith(".md"):
        text = FENCE.sub("", (ROOT / name).read_text("utf-8"))
        for _, target, _ in LINK.findall(text):
            found = _resolved(target, name)
            if (ROOT / found).is_file():
                yield found


def _moved(link: re.Match[str], here: str, uri: str) -> str:
    """A link as it has to be in the site."""
    start, target, end = link.groups()
    name = _resolved(target, here)
    if ":" in target or not (ROOT / name).is_file():
        return link[0]  # if it leads nowhere, mkdocs says so
    place = "index.md" if name == "README.md" else f"repository/{name}"
    if name.startswith("docs/"):
        place = name.removeprefix("docs/")
    return f"{start}{os.path.relpath(place, PurePosixPath(uri).parent)}{end}"


def _resolved(target: str, here: str) -> str:
    """A link's target as a name in the repository."""
    return os.path.normpath(PurePosixPath(here).parent / target)


def _name(file: File) -> str:
    """The name that a page of the site has in the repository."""
    if file.src_uri == "index.md":
        return "README.md"
    if file.src_uri.startswith("repository/"):
        return file.src_uri.removeprefix("repository/")
    return f"docs/{file.src_uri}"


def _commands() -> Iterator[str]:
    """Markdown: every command with its help, at 80 columns as on a terminal."""
    context = click.Context(main, info_name="qrank", terminal_width=80, **main.context_settings)
    yield from ("```text", main.get_help(context), "```")
    for name, command in sorted(main.commands.items()):
        inner = click.Context(command, context, info_name=name, terminal_width=80)
        yield from ("", f"## qrank {name}", "", "```text", command.get_help(inner), "```")
