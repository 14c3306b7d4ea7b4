"""Readers of the formats the training texts come in: each turns files into sections of prose.

A section is a heading with its paragraphs. Everything that is not prose (code, tables, menus,
formulas, signatures) is dropped here, because a reranker's documents are prose.
"""

import gzip
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lxml.etree
import lxml.html


class Section(NamedTuple):
    """A heading (possibly empty) and the paragraphs under it."""

    title: str
    paragraphs: list[str]


_SPACE = re.compile(r"\s+")
_WORD = re.compile(r"[A-Za-z]{2,}")
_COMMON = frozenset(
    "the of and to in a is that for it as was with be by on not are this or an from at which "
    "have has can you will if when one may all its used more than only but".split()
)
_HEADINGS = frozenset(("h1", "h2", "h3", "h4", "title"))
_PARAGRAPHS = frozenset(("p", "dd"))
_NOT_PROSE = (
    "//script|//style|//pre|//nav|//footer|//table|//math|//head|//form|//aside"
    "|//*[contains(@class,'math')]|//*[contains(@class,'headerlink')]"
    "|//*[contains(@class,'sidebar')]|//*[contains(@class,'navigation')]"
)


def clean(text: str) -> str:
    """Collapse white space and drop pilcrows and the numbers that manuals put before headings."""
    text = _SPACE.sub(" ", text.replace("\u00b6", " ").replace("\u2019", "'")).strip()
    return re.sub(r"^(?:\d+\.)+\d*\s+|^Chapter \d+\.?\s+", "", text)


def is_prose(text: str) -> bool:
    """Whether a paragraph reads as English sentences: mostly letters, with common short words."""
    words = text.split()
    if len(words) < 8 or sum(c.isalpha() or c == " " for c in text) < 0.86 * len(text):
        return False
    common = sum(word.lower().strip(".,;:()") in _COMMON for word in words)
    return common >= 0.2 * len(words) and len(_WORD.findall(text)) >= 0.7 * len(words)


def from_html(path: Path) -> Iterator[Section]:
    """Sections of an HTML page, cut at its headings."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(raw) > 2_000_000 or not raw.strip():
        return
    try:
        tree = lxml.html.fromstring(
            raw.decode("utf-8", "replace").encode(), parser=lxml.html.HTMLParser(encoding="utf-8")
        )
    except (lxml.etree.ParserError, lxml.etree.XMLSyntaxError):
        return
    for element in tree.xpath(_NOT_PROSE):
        element.drop_tree() if element.getparent() is not None else None
    title, paragraphs = "", list[str]()
    for element in tree.iter():
        if element.tag in _HEADINGS:
            if paragraphs:
                yield Section(title, paragraphs)
            title, paragraphs = clean(element.text_content()), []
        elif element.tag in _PARAGRAPHS and not element.xpath("ancestor::dd|.//p"):
            paragraph = clean(element.text_content())
            if is_prose(paragraph):
                paragraphs.append(paragraph)
    if paragraphs:
        yield Section(title, paragraphs)


def from_mallard(path: Path) -> Iterator[Section]:
    """Sections of a Mallard help page (GNOME's user help)."""
    root = lxml.etree.parse(str(path)).getroot()
    space = "{http://projectmallard.org/1.0/}"
    for part in [root, *root.iter(f"{space}section")]:
        title = part.find(f"{space}title")
        texts = [clean("".join(p.itertext())) for p in part.iter(f"{space}p")]
        paragraphs = [text for text in dict.fromkeys(texts) if is_prose(text)]
        if title is not None and paragraphs:
            yield Section(clean("".join(title.itertext())), paragraphs)


def from_pdf(path: Path) -> Iterator[Section]:
    """Paragraphs of a PDF by `pdftotext`; headings are not recognized, so titles stay empty."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    done = subprocess.run(
        ["pdftotext", "-enc", "UTF-8", "-", "-"], input=raw, capture_output=True, check=True
    )
    blocks = re.split(r"\n\s*\n|\f", done.stdout.decode("utf-8", "replace"))
    texts = (clean(re.sub(r"-\n(?=[a-z])", "", block)) for block in blocks)
    paragraphs = [text for text in texts if is_prose(text)]
    for start in range(0, len(paragraphs), 8):
        yield Section("", paragraphs[start : start + 8])


def _dictd_number(text: str) -> int:
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
    number = 0
    for char in text:
        number = number * 64 + digits.index(char)
    return number


def from_dictd(index: Path) -> Iterator[Section]:
    """Entries of a dictd dictionary: an `.index` of base-64 offsets next to a `.dict.dz`."""
    data = gzip.decompress(index.with_suffix(".dict.dz").read_bytes())
    seen = set[int]()
    for line in index.read_text("utf-8").splitlines():
        word, start, length = line.split("\t")[:3]
        offset = _dictd_number(start)
        if word.startswith("00") or offset in seen:
            continue
        seen.add(offset)
        entry = data[offset : offset + _dictd_number(length)].decode("utf-8", "replace")
        blocks = entry.partition("\n")[2].split("\n\n")
        texts = [clean(re.sub(r"[{}]|\[1913 Webster\]|<[^>]*>", "", block)) for block in blocks]
        paragraphs = [text for text in texts if is_prose(text)]
        if paragraphs:
            yield Section(word, paragraphs)


def from_wordnet(path: Path) -> Iterator[Section]:
    """Glosses of a WordNet data file, under the synset's first words."""
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("  ") or " | " not in line:
            continue
        fields, gloss = line.split(" | ", 1)
        parts = fields.split()
        words = [parts[4 + 2 * i].replace("_", " ") for i in range(min(int(parts[3], 16), 2))]
        text = clean(gloss.split('; "')[0])
        if len(text.split()) >= 8:
            yield Section(words[0], [f"{', '.join(words)}: {text}"])


def from_descriptions(dump: str) -> Iterator[Section]:
    """Package descriptions of an apt translation list: the synopsis is the long text's heading."""
    seen = set[str]()
    for stanza in dump.split("\n\n"):
        match = re.search(r"^Description(?:-en)?: (.+)\n((?: .*\n?)+)", stanza, re.M)
        if match is None or match[1].lower() in seen:
            continue
        seen.add(match[1].lower())
        texts = [clean(block) for block in re.split(r"\n \.\n", match[2])]
        paragraphs = [text for text in texts if is_prose(text) and "This package" not in text[:20]]
        if paragraphs:
            yield Section(match[1].split(" - documentation")[0], paragraphs)


READERS = {
    "html": from_html,
    "mallard": from_mallard,
    "pdf": from_pdf,
    "dictd": from_dictd,
    "wordnet": from_wordnet,
}
