"""The code blocks of the documentation, and what they need to run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
"""The pages whose blocks run and whose links are followed."""

RUN = ("python", "sh", "console")
"""Languages that run. A `console` block has lines that begin with `$ `, and their output."""

SHOWN = (
    "",
    "text",
    "json",
    "jsonc",
    "toml",
    "yaml",
    "ini",
    "javascript",
    "js",
    "html",
    "c",
    "rust",
)
"""Languages that only show something."""

_FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_REASON = re.compile(r"<!-- not run: (.+?) -->\n *$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        place: page and line, for messages.
        language: after the fence.
        code: between the fences.
        reason: why it is not run, by the comment above it; "" if it is.
        output: the block without a language right below it; None if there is none.
    """

    place: str
    language: str
    code: str
    reason: str
    output: str | None


def blocks(page: str) -> list[Block]:
    """A page's blocks, in order."""
    text = (ROOT / page).read_text("utf-8")
    fences = list(_FENCE.finditer(text))
    found = []
    for place, fence in enumerate(fences):
        reason = _REASON.search(text[: fence.start()])
        following = fences[place + 1] if place + 1 < len(fences) else None
        is_output = (
            following is not None
            and following[2] == ""
            and not text[fence.end() : following.start()].strip()
        )
        found.append(
            Block(
                f"{page}:{text.count(chr(10), 0, fence.start()) + 1}",
                fence[2].strip(),
                re.sub(f"^{fence[1]}", "", fence[3], flags=re.MULTILINE),
                "" if reason is None else reason[1],
                following[3] if following is not None and is_output else None,
            )
        )
    return found


def without_code(page: str) -> str:
    """A page's text without its blocks and its code in backquotes."""
    return re.sub(r"`[^`\n]*`", "", _FENCE.sub("", (ROOT / page).read_text("utf-8")))


def lines(block: Block) -> list[str]:
    """The commands of a block; a backslash continues a line."""
    text = block.code.replace("\\\n", " ")
    if block.language == "console":
        return [line[2:] for line in text.splitlines() if line.startswith("$ ")]
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def plain_words(line: str) -> list[str] | None:
    """The words of a simple command; None if it takes a shell: pipes, variables, assignments."""
    found = shlex.shlex(line, posix=True, punctuation_chars=True)
    found.whitespace_split = True
    try:
        words = list(found)
    except ValueError:  # a quotation that ends on another line
        return None
    special = any(set(word) <= set("|&;<>()") for word in words) or "$" in line
    return None if special or "=" in words[0] else words


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as repositories' viewers make them."""
    text = _FENCE.sub("", (ROOT / page).read_text("utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
