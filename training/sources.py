"""Step 1: fetch openly licensed texts and cut them into passages.

Every text is from a Debian package (or the list of package descriptions itself), so a Debian or
Ubuntu system can repeat this without an account; SQuAD is from the folder given by `--data`. Writes
`passages.jsonl` ({"source", "title", "text"}) and `questions.jsonl` ({"text", "passage"}, the
passage being a line number) into the cache folder.
"""

import json
import os
import random
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import click
from platformdirs import user_cache_dir
from readers import READERS, Section, from_descriptions


class Source(NamedTuple):
    """One Debian package: its texts' licence, how and where to read it, and at most how much."""

    package: str
    licence: str
    reader: str
    files: str
    passages: int


# The caps keep any one manual's vocabulary from dominating. Engineering and science get most:
# that is where long natural questions meet long technical passages.
SOURCES = (
    Source("python-fluids-doc", "MIT", "html", "**/*.html", 1500),
    Source("code-saturne-doc", "GPL-2+", "pdf", "**/*.pdf", 1800),
    Source("code-saturne-doc", "GPL-2+", "html", "**/doxygen/**/*.html", 500),
    Source("libdeal.ii-doc", "LGPL-2.1+", "html", "**/step_*.html", 2500),
    Source("derivations", "GPL-2", "pdf", "**/*.pdf", 1200),
    Source("lammps-doc", "GPL-2", "pdf", "**/*.pdf.gz", 500),
    Source("liggghts-doc", "GPL-2+", "html", "**/*.html", 700),
    Source("gromacs-data", "LGPL-2.1", "html", "**/*.html", 1300),
    Source("gmsh-doc", "GPL-2+", "html", "**/*.html", 400),
    Source("petsc3.18-doc", "BSD-2-Clause", "html", "**/*.html", 1000),
    Source("rheolef-doc", "GPL-3+", "html", "**/*.html", 300),
    Source("rheolef-doc", "GPL-3+", "pdf", "**/*.pdf*", 600),
    Source("python-sfepy-doc", "BSD-3-Clause", "html", "**/*.html", 300),
    Source("dolfin-doc", "LGPL-3+", "html", "**/*.html", 300),
    Source("xmds2-doc", "GFDL-1.3+, no invariant sections", "html", "**/*.html", 300),
    Source("dyssol-doc", "BSD-3-Clause", "html", "**/*.html", 300),
    Source("ngspice-doc", "BSD-3-Clause, CC-BY-SA-4.0", "pdf", "**/*.pdf.gz", 900),
    Source("nlopt-doc", "LGPL-2.1+", "html", "**/*.html", 200),
    Source("geographiclib-doc", "MIT", "html", "**/*.html", 200),
    Source("ceres-solver-doc", "BSD-3-Clause", "html", "**/*.html", 300),
    Source("python-scipy-doc", "BSD-3-Clause", "html", "**/*.html", 1500),
    Source("python-statsmodels-doc", "BSD-3-Clause", "html", "**/*.html", 700),
    Source("python-sklearn-doc", "BSD-3-Clause", "html", "**/*.html", 1300),
    Source("python-skimage-doc", "BSD-3-Clause", "html", "**/*.html", 600),
    Source("python-astropy-doc", "BSD-3-Clause", "html", "**/*.html", 1000),
    Source("python-sympy-doc", "BSD-3-Clause", "html", "**/*.html", 1000),
    Source("python-mdanalysis-doc", "GPL-2+", "html", "**/*.html", 500),
    Source("python-dipy-doc", "BSD-3-Clause", "html", "**/*.html", 400),
    Source("python-ase-doc", "LGPL-2.1+", "html", "**/*.html", 500),
    Source("python-brian-doc", "CeCILL-2.0", "html", "**/*.html", 400),
    Source("openms-doc", "BSD-3-Clause", "html", "**/*.html", 600),
    Source("grass-doc", "GPL-2+", "html", "**/*.html", 1500),
    Source("gnuradio-doc", "GPL-3+", "html", "**/*.html", 600),
    Source("sumo-doc", "EPL-2.0", "html", "**/*.html", 800),
    Source("morse-simulator-doc", "BSD-3-Clause", "html", "**/*.html", 300),
    Source("octave-doc", "GPL-3+", "html", "**/*.html", 800),
    Source("maxima-doc", "GPL-2+", "html", "**/*.html", 600),
    Source(
        "linuxcnc-doc-en",
        "GFDL-1.1+, no invariant sections",
        "pdf",
        "**/LinuxCNC_Documentation.pdf",
        800,
    ),
    Source("debian-handbook", "GPL-2+ or CC-BY-SA-3.0", "html", "**/en-US/**/*.html", 1000),
    Source("debian-faq", "free to copy and modify, its own terms", "html", "**/*.en.html", 200),
    Source("gnome-user-docs", "CC-BY-SA-3.0", "mallard", "**/C/**/*.page", 1500),
    Source("libreoffice-help-en-us", "MPL-2.0", "html", "**/text/**/*.html", 1800),
    Source("postgresql-doc-15", "PostgreSQL", "html", "**/*.html", 1500),
    Source("python3.11-doc", "PSF-2.0", "html", "**/*.html", 1500),
    Source("linux-doc-6.1", "GPL-2", "html", "**/*.html", 1500),
    Source("cppreference-doc-en-html", "CC-BY-SA-3.0", "html", "**/*.html", 700),
    Source("dict-foldoc", "GFDL-1.1+, no invariant sections", "dictd", "**/*.index", 2500),
    Source("dict-gcide", "GPL-3+", "dictd", "**/*.index", 1500),
    Source("dict-jargon", "public domain", "dictd", "**/*.index", 800),
    Source("wordnet-base", "WordNet-3.0", "wordnet", "**/data.noun", 1500),
)
WORDS = (25, 35, 45, 60, 80, 110, 180)
DESCRIPTIONS = 4000


def cache_folder() -> Path:
    """Where texts, candidates and checkpoints live: outside the repository, kept between runs."""
    folder = Path(os.environ.get("QRANK_TRAINING_DIR", user_cache_dir("qrank-training")))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch(package: str, folder: Path) -> Path:
    """Download and unpack a Debian package without installing it; done once."""
    target = folder / "x" / package
    if not target.exists():
        debs = folder / "debs"
        debs.mkdir(exist_ok=True)
        subprocess.run(["apt-get", "-q", "download", package], cwd=debs, check=True)
        deb = next(debs.glob(f"{package}_*.deb"))
        target.parent.mkdir(exist_ok=True)
        subprocess.run(["dpkg", "-x", deb, target], check=True)
    return target


def descriptions(folder: Path) -> str:
    """All package descriptions, which apt stores by language, separately from the package lists."""
    lists = folder / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    options = ["-o", "Acquire::Languages=en", "-o", f"Dir::State::Lists={lists}"]
    if not list(lists.glob("*Translation-en*")):
        subprocess.run(["apt-get", "-q", *options, "update"], check=True)
    command = ["/usr/lib/apt/apt-helper", "cat-file", *map(str, lists.glob("*Translation-en*"))]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cut(
    sections: Iterable[Section], rng: random.Random, *, merge: bool
) -> Iterator[tuple[str, str]]:
    """Passages (title, text) of varied length, from one sentence to about 200 words, half under 50.

    With `merge`, a section that leaves a passage less than half full is joined with the next one,
    under the first one's title: manuals have many sections of two lines.
    """
    words, taken, heading = 0, list[str](), ""
    limit = rng.choice(WORDS)
    for title, paragraphs in sections:
        if taken and not (merge and words < limit / 2):
            yield heading, " ".join(taken)
            words, taken = 0, []
        for paragraph in paragraphs:
            length = len(paragraph.split())
            if length > 230:
                continue
            if taken and words + length > limit * 1.15:
                yield heading, " ".join(taken)
                words, taken = 0, []
            if not taken:
                heading, limit = title, rng.choice(WORDS)
            words += length
            taken.append(paragraph)
    if taken:
        yield heading, " ".join(taken)


def passages_of(source: Source, root: Path, rng: random.Random) -> list[tuple[str, str]]:
    """A source's passages, from its files in random order, up to its cap."""
    files = sorted(path for path in root.glob(source.files) if path.is_file())
    rng.shuffle(files)
    entries = source.reader in ("wordnet", "dictd")
    least = 8 if entries else 22
    found = dict[str, str]()
    for path in files:
        for title, text in cut(READERS[source.reader](path), rng, merge=not entries):
            if len(text.split()) >= least:
                found.setdefault(text, title)
        if len(found) >= 1.2 * source.passages and not entries and source.reader != "pdf":
            break
    pairs = [(title, text) for text, title in found.items()]
    return rng.sample(pairs, min(len(pairs), source.passages))


@click.command()
@click.option(
    "--data",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="Folder with squad/paragraphs.jsonl and squad/questions.jsonl.",
)
def main(data: Path) -> None:
    """Fetch the texts and write passages.jsonl and questions.jsonl."""
    folder, rng = cache_folder(), random.Random(0)
    passages = [
        dict(source="squad", title=line["title"].replace("_", " "), text=line["text"])
        for line in map(json.loads, (data / "squad/paragraphs.jsonl").open())
    ]
    described = [
        pair
        for pair in cut(from_descriptions(descriptions(folder)), rng, merge=False)
        if len(pair[1].split()) >= 22
    ]
    groups = [("descriptions", rng.sample(described, DESCRIPTIONS))]
    groups += [(s.package, passages_of(s, fetch(s.package, folder), rng)) for s in SOURCES]
    seen = set[str]()
    for name, pairs in groups:
        fresh = [(title, text) for title, text in pairs if text[:80] not in seen]
        seen.update(text[:80] for _, text in fresh)
        passages += [dict(source=name, title=title, text=text) for title, text in fresh]
        click.echo(f"{len(fresh):6} {name}")
    with (folder / "passages.jsonl").open("w") as out:
        out.writelines(json.dumps(passage) + "\n" for passage in passages)
    with (folder / "questions.jsonl").open("w") as out:
        for line in map(json.loads, (data / "squad/questions.jsonl").open()):
            pair = dict(text=line["question"], passage=line["paragraph"])
            out.write(json.dumps(pair) + "\n")
    click.echo(f"{len(passages):6} passages")


if __name__ == "__main__":
    main()
