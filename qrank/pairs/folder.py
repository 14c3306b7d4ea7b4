"""An output folder: how its files were scored, and which process works on each of them.

    _qrank.json        model, target and settings of all files
    a.jsonl            a whole output
    _a.jsonl.rejects   rows of its input that could not be scored, if there are any
    _b.jsonl.part      an output that is being written
    _b.jsonl.kept      its scores so far; locked by the process that works on it

Readers of folders, such as Spark, Arrow and pandas, pass by what begins with "_".
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from qrank.errors import InputError
from qrank.system.disk import cannot_write
from qrank.system.locks import lies_at, try_lock
from qrank.system.safejson import parse_json
from qrank.system.version import __version__

SETTINGS = "_qrank.json"
SCHEMA = 1
ELSEWHERE = "name another folder"


def hidden(output: Path, suffix: str) -> Path:
    """The path of a file that belongs to an output."""
    return output.with_name(f"_{output.name}{suffix}")


def settle(folder: Path, settings: Mapping[str, Any], outputs: Iterator[Path]) -> None:
    """Write down how a folder's files are scored, or compare with what is written there.

    Args:
        folder: created if it is missing.
        settings: everything that scores depend on, as JSON values.
        outputs: files that will be in the folder.

    Raises:
        InputError: the settings are others, or an output is there already without settings.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    wanted = {"schema": SCHEMA, **settings}
    if not path.exists():
        if (there := next(filter(Path.exists, outputs), None)) is not None:
            raise InputError(
                f"{there} is there already, and no {SETTINGS} says how it was scored; {ELSEWHERE}"
            )
        text = json.dumps({"qrank": __version__, **wanted}, indent=1, ensure_ascii=False)
        _create(path, text + "\n")
    try:
        found = parse_json(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); {ELSEWHERE}") from None
    found.pop("qrank", None)
    differing = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    if differing:
        told = "; ".join(
            f"{name}: {json.dumps(found.get(name))} there, {json.dumps(wanted.get(name))} now"
            for name in differing
        )
        raise InputError(f"{folder} has files that were scored otherwise: {told}; {ELSEWHERE}")


def _create(path: Path, text: str) -> None:
    """Create a file as a whole; if another process was faster, its file stays."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        temporary.write_text(text, "utf-8")
        with suppress(FileExistsError):
            try:
                os.link(temporary, path)
            except FileExistsError:
                raise
            except OSError:  # a file system without links
                temporary.rename(path)
    except OSError as error:
        raise cannot_write(error, path, ELSEWHERE) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def claimed(output: Path) -> Iterator[IO[bytes] | None]:
    """The file that an output's scores are kept in, locked; None if another process has it.

    It is removed afterwards if the output is there, or nothing was kept.
    """
    path = hidden(output, ".kept")
    try:
        # Unbuffered, so that what was written is there if this process is killed.
        file = path.open("a+b", buffering=0)
    except OSError as error:
        raise error if error.filename else cannot_write(error, path, ELSEWHERE) from error
    with file:
        if not (try_lock(file) and lies_at(file, path)):
            yield None
            return
        try:
            yield file
        finally:
            if output.exists() or not os.fstat(file.fileno()).st_size:
                forget(output)


def forget(output: Path) -> None:
    """Remove what was kept of an output."""
    with suppress(PermissionError):  # Windows does not remove files that a process has open
        hidden(output, ".kept").unlink(missing_ok=True)


def append(file: IO[bytes], content: bytes, path: Path) -> None:
    """Append to a file that `claimed` gave, whose path is for errors.

    Raises:
        OSError: the disk is full.
    """
    try:
        written = 0
        while written < len(content):
            written += os.write(file.fileno(), content[written:])
    except OSError as error:
        raise cannot_write(error, path, ELSEWHERE) from error


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which appears under its name if the block ends without an error."""
    part = hidden(path, ".part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # One from writing has no file name.
        raise error if error.filename else cannot_write(error, part, ELSEWHERE) from error
    finally:
        part.unlink(missing_ok=True)
