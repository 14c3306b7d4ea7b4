"""Writing a bundle's folder: atomically, and by one conversion at a time."""

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import contents

from qrank import Reranker
from qrank.bundle.manifest import MANIFEST, TOKENIZER, Manifest
from qrank.bundle.sequences import Sequences
from qrank.cli import main
from qrank.converters import publish
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.convert import convert
from qrank.converters.lock import LOCK
from qrank.converters.onnx import export as onnx_converter
from qrank.converters.publish import WORK, workshop
from qrank.errors import ConversionError, ModelNotFoundError, QrankError
from qrank.system import disk

FP32 = [("onnx", "fp32")]
posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Interruptions

CUT_SHORT = """
import signal, sys
# A shell's background jobs ignore Ctrl-C, and with them what they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
from qrank.cli import main
main(["convert", sys.argv[1], "--to", "onnx", "--precision", "fp32", "-o", sys.argv[2]])
"""


def cut_short(source: str, target: Path, number: int) -> tuple[int, str]:
    """Start a conversion, send it a signal once it writes; return its exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-c", CUT_SHORT, source, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (target / WORK).exists():
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


@posix
@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("add", [False, True])
def test_killed_in_the_middle(add: bool, without_fp32: Path, bert: str) -> None:
    folder = without_fp32.parent
    target = without_fp32 if add else folder / "new-qrank"
    before = contents(target) if add else {}
    code, _ = cut_short(bert, target, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert {LOCK, WORK} <= set(names(target))
    after = contents(target)
    assert {n: c for n, c in after.items() if not n.startswith((LOCK, WORK))} == before
    if add:
        Reranker(target).close()
    else:
        with pytest.raises(QrankError):
            Reranker(target)
    # The next run works normally and removes leftovers.
    assert "onnx-fp32" in convert(bert, FP32, target).manifest.variants
    assert not {LOCK, WORK} & set(names(target))
    assert set(names(folder)) == {target.name, without_fp32.name}


@posix
def test_interrupted_in_the_middle(without_fp32: Path, bert: str) -> None:
    folder = without_fp32.parent
    before = contents(folder)
    code, errors = cut_short(bert, without_fp32, signal.SIGINT)
    assert code != 0
    assert "Traceback" not in errors
    assert contents(folder) == before
    assert names(folder) == [without_fp32.name]


class KilledError(BaseException):
    """Simulates a killed process: nothing after it runs."""


def made_anew(target: Path, force: bool) -> None:
    """Publish like a conversion: one variant with other files, in a new bundle if forced."""
    old = Manifest.load(target)
    with workshop(target) as shop:
        for name in (TOKENIZER, "onnx-fp32/model.onnx"):
            (shop.new / name).parent.mkdir(exist_ok=True)
            shutil.copy(target.parent / "source" / name, shop.new / name)
        variant = Manifest.load(target.parent / "source").variants["onnx-fp32"]
        new = replace(old, name="new", variants={}) if force else old
        shop.publish(new.with_variant(variant), old, force=force)


@pytest.mark.parametrize("force", [False, True])
def test_wherever_it_is_killed_the_old_bundle_or_the_new_one_is_there(
    force: bool, bundle: Path, without_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = without_fp32
    shutil.copytree(bundle, target.parent / "source")
    # As another version may have left it.
    (target / "onnx-fp32").mkdir()
    (target / "onnx-fp32" / "model.onnx").write_bytes(b"half")
    (target / "notes.txt").write_text("mine", "utf-8")
    shutil.copytree(target, target.parent / "before")
    before = contents(target)
    steps = publish._move, Manifest.save, publish._remove_empty
    outcomes = []
    for place in range(60):
        shutil.rmtree(target)
        shutil.copytree(target.parent / "before", target)
        left = place

        def killing(step: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    monkeypatch.setattr(publish, "_recover", lambda target: None)
                    raise KilledError
                return step(*arguments)

            return run

        monkeypatch.setattr(publish, "_move", killing(steps[0]))
        monkeypatch.setattr(Manifest, "save", killing(steps[1]))
        monkeypatch.setattr(publish, "_remove_empty", killing(steps[2]))
        try:
            made_anew(target, force)
        except KilledError:
            outcomes.append("killed")
        else:
            outcomes.append("done")
        monkeypatch.undo()
        with workshop(target):
            pass  # cleans up like the next conversion
        after = contents(target)
        if after != before:
            assert after["notes.txt"] == b"mine"
            del after["notes.txt"]
            manifest = Manifest.load(target)
            files = [name for v in manifest.variants.values() for name in v.files]
            assert set(after) == {MANIFEST, TOKENIZER, *files}
            assert after["onnx-fp32/model.onnx"] == (bundle / "onnx-fp32/model.onnx").read_bytes()
            assert (manifest.name == "new") == force
            outcomes[-1] += ", new"
        if outcomes[-1] == "done, new":
            break
    assert outcomes[0] == "killed"
    assert outcomes[-1] == "done, new"
    assert len(outcomes) > (10 if force else 3)


# Concurrent conversions


def blocking(
    monkeypatch: pytest.MonkeyPatch, graph: Path
) -> tuple[threading.Event, threading.Event]:
    """Block conversions; return the events "one has begun" and "continue"."""
    begun, go = threading.Event(), threading.Event()

    def convert(
        checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        begun.set()
        assert go.wait(120)
        shutil.copy(graph, folder)
        return ""

    monkeypatch.setattr(onnx_converter, "convert", convert)
    return begun, go


def test_two_conversions_into_one_bundle_both_count(
    bundle: Path,
    bert: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, go = blocking(monkeypatch, bundle / "onnx-fp32" / "model.onnx")
    target = tmp_path / "out"
    threads = [
        threading.Thread(target=convert, args=(bert, [("onnx", precision)], target))
        for precision in ("fp32", "fp16")
    ]
    with caplog.at_level(logging.WARNING, "qrank"):
        threads[0].start()
        assert begun.wait(120)
        threads[1].start()
        while "waiting for process" not in caplog.text and threads[1].is_alive():
            time.sleep(0.05)
    assert f"waiting for process {os.getpid()}, which converts into {target}" in caplog.text
    go.set()
    for thread in threads:
        thread.join()
    manifest = Manifest.load(target)
    assert list(manifest.variants) == ["onnx-fp32", "onnx-fp16"]
    assert names(target) == ["onnx-fp16", "onnx-fp32", MANIFEST, TOKENIZER]


@pytest.mark.usefixtures("ready_graph")
def test_a_lock_that_nobody_holds_is_no_hindrance(without_fp32: Path, bert: str) -> None:
    """Its process id may by now belong to another process, or come from another container."""
    (without_fp32 / LOCK).write_text(str(os.getppid()), "utf-8")
    assert "onnx-fp32" in convert(bert, FP32, without_fp32).manifest.variants
    assert not (without_fp32 / LOCK).exists()


def test_a_lock_that_is_a_link_is_not_written_to(copy: Path, bert: str) -> None:
    mine = copy.parent / "mine.txt"
    mine.write_text("mine", "utf-8")
    (copy / LOCK).symlink_to(mine)
    with pytest.raises(ConversionError, match=r"\.qrank-lock is a link: remove it"):
        convert(bert, FP32, copy, force=True)
    assert mine.read_text("utf-8") == "mine"


def test_moves_that_lead_out_of_the_bundle_are_not_undone(copy: Path, bert: str) -> None:
    """A bundle may come from anyone, including supposed leftovers of a killed run."""
    outside = copy.parent / "outside.txt"
    outside.write_text("mine", "utf-8")
    (copy / WORK).mkdir()
    moves = '{"digest": "", "new": ["../outside.txt"], "old": []}'
    (copy / WORK / "moves.json").write_text(moves, "utf-8")
    with pytest.raises(ConversionError, match=r"moves\.json is none of qrank's: remove"):
        convert(bert, FP32, copy, force=True)
    assert outside.read_text("utf-8") == "mine"


# Locations


@pytest.fixture
def checkpoint_copy(bert: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bert, tmp_path / "mine" / "checkpoint"))


@pytest.mark.parametrize("place", [".", "..", "bundle", "../link", "../link/bundle"])
def test_force_never_touches_what_is_converted(
    place: str, checkpoint_copy: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it has a bundle: the output is, contains or is in the source, also through links."""
    (checkpoint_copy.parent / "link").symlink_to(checkpoint_copy)
    for folder in (checkpoint_copy, checkpoint_copy.parent, checkpoint_copy / "bundle"):
        folder.mkdir(exist_ok=True)
        shutil.copy(bundle / MANIFEST, folder / MANIFEST)
    before = contents(checkpoint_copy.parent)
    monkeypatch.chdir(checkpoint_copy)
    arguments = ["convert", str(checkpoint_copy), "--to", "onnx", "--force", "-o", place]
    made = CliRunner().invoke(main, arguments)
    assert made.exit_code == ConversionError.exit_code, made.output
    link = "is a link to" if place == "../link" else "is, holds or lies in"
    assert link in made.stderr
    assert contents(checkpoint_copy.parent) == before


def test_force_never_touches_the_reference_or_the_calibration_file(
    checkpoint_copy: Path, bundle: Path, copy: Path
) -> None:
    pairs = copy / "pairs.jsonl"
    pairs.write_text('{"query": "a", "document": "b"}\n', "utf-8")
    theirs = copy.parent / "theirs"
    shutil.copytree(bundle / "onnx-fp32", theirs)
    shutil.copy(checkpoint_copy / "config.json", theirs)
    shutil.copytree(checkpoint_copy, copy / "checkpoint")
    before = contents(copy.parent)
    for source, options in (
        (str(checkpoint_copy), {"calibration": pairs}),
        (str(theirs), {"reference": str(copy / "checkpoint")}),
    ):
        with pytest.raises(ConversionError, match="it is, holds or lies in"):
            convert(source, FP32, copy, force=True, **options)
    assert contents(copy.parent) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_link_is_not_written_through(force: bool, copy: Path, bert: str) -> None:
    link = copy.with_name("link")
    link.symlink_to(copy)
    before = contents(copy)
    with pytest.raises(ConversionError, match=r"link is a link to .*: name that folder itself"):
        convert(bert, FP32, link, force=force)
    (copy / "onnx-fp16").rename(copy.parent / "elsewhere")
    (copy / "onnx-fp16").symlink_to(copy.parent / "elsewhere")
    if force:
        with pytest.raises(ConversionError, match=r"behind a link, and .*onnx-fp16 is one"):
            convert(bert, FP32, copy, force=True)
        assert (copy.parent / "elsewhere" / "model.onnx").is_file()
    assert {**contents(copy), **contents(copy / "onnx-fp16")}.keys() >= before.keys() - {
        "onnx-fp16/model.onnx"
    }


@pytest.mark.usefixtures("ready_graph")
@pytest.mark.parametrize("case", ["new", "add", "force"])
def test_a_mount_point_and_the_working_directory_can_be_bundles(
    case: str, without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither can be renamed, and a volume contains files of its file system."""
    target = without_fp32
    if case == "new":
        shutil.rmtree(target)
        (target / "lost+found").mkdir(parents=True)
    rename, change = os.rename, os.replace

    def refuse(source: Any, to: Any, **options: Any) -> None:
        if {Path(source).resolve(), Path(to).resolve()} & {target, *target.parents}:
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        if Path(source).is_dir():
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        (change if target in Path(to).parents else rename)(source, to, **options)

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.chdir(target)
    options = ["--force"] if case == "force" else []
    command = ["convert", bert, "--to", "onnx", "--precision", "fp32", "-o", ".", *options]
    made = CliRunner().invoke(main, command)
    assert made.exit_code == 0, made.output
    assert "onnx-fp32" in Manifest.load(target).variants
    Reranker(target, backend="onnx-fp32").close()
    assert not {LOCK, WORK} & set(names(target))


# Disks


def test_what_cannot_be_written_is_found_out_before_any_work(
    bert: str, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    steps: list[str] = []
    for force, target in ((False, copy.parent / "new" / "out"), (True, copy)):
        with pytest.raises(ConversionError, match=r"cannot be written; name another folder"):
            convert(bert, FP32, target, force=force, progress=steps.append)
    assert steps == ["reading the model"] * 2
    # If the bundle already has every requested variant, nothing is written.
    assert not convert(bert, FP32, copy).failed


def test_a_disk_that_is_too_small_is_found_out_before_any_work(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free", lambda path: 100_000)
    steps: list[str] = []
    needed = r"to onnx-fp32: the disk at .* too little space: \d+ kB needed, 100 kB free"
    with pytest.raises(ConversionError, match=needed) as caught:
        convert(bert, FP32, tmp_path / "out", progress=steps.append)
    assert caught.value.exit_code == 8
    assert steps == ["reading the model"]
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError("131072 requested and 25664 written"),
        RuntimeError("could not write"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=["system", "numpy", "library", "quota"],
)
def test_a_disk_that_gets_full_is_told(
    error: Exception, without_fp32: Path, bert: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = False

    def convert_(
        checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        nonlocal full
        full = True
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    monkeypatch.setattr(onnx_converter, "convert", convert_)
    free = disk.free
    monkeypatch.setattr(disk, "free", lambda path: 1000 if full else free(path))
    before = contents(without_fp32)
    command = ["convert", bert, "--to", "onnx", "--precision", "fp32", "-o", str(without_fp32)]
    made = CliRunner().invoke(main, command)
    assert made.exit_code == ConversionError.exit_code
    where = "quota on the disk" if "quota" in str(error) else "the disk at"
    assert where in made.stderr
    assert "needed" in made.stderr
    assert contents(without_fp32) == before


def test_a_disk_too_full_for_what_stands_around_a_variant_is_told(
    bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("qrank.converters.lock._acquire", fail)
    with pytest.raises(ConversionError, match=r"the disk at .* is full: .* free"):
        convert(bert, FP32, tmp_path / "out")


def test_a_model_that_cannot_be_looked_at_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", fail)
    with pytest.raises(ModelNotFoundError, match=r"secret cannot be looked at: .*denied"):
        Reranker("/root/secret")
