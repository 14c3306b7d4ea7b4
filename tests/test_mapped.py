"""Files that a runtime has mapped and read: their pages leave memory without losing data."""

import ctypes
import mmap
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qrank import Reranker
from qrank.backends import llama, mapped, openvino

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is given back")


def resident(file: Path) -> int:
    """Kilobytes of a mapped file that are resident in memory."""
    held, ours = 0, False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        if "-" in line.split()[0]:
            ours = line.endswith(f" {file.resolve()}")
        elif ours and line.startswith("Rss:"):
            held += int(line.split()[1])
    return held


def own(bundle: Path, folder: Path) -> Path:
    """Copy to disk and sync: pages that are dirty or mapped by other processes would stay."""
    copied = Path(shutil.copytree(bundle, folder))
    os.sync()
    return copied


def test_what_openvino_has_read_leaves_memory(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own(bundle, tmp_path / "bundle")
    found = []
    for large in (mapped.LARGE, 0):
        monkeypatch.setattr(mapped, "LARGE", large)
        # A kept graph has weights of its own.
        monkeypatch.setattr(openvino, "_place", lambda *_: None)
        with Reranker(bundle, backend="openvino-int8", compute_dtype="fp32") as reranker:
            logits = [r.logit for r in reranker.rank("a", ["b c", "d " * 40, "e"])]
            found.append((resident(bundle / "openvino-int8" / "model.bin"), logits))
    (kept, expected), (left, logits) = found
    assert kept > 0
    assert left == 0
    assert logits == expected


def test_what_llama_cpp_has_repacked_leaves_memory(
    bundle_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = own(bundle_of("qwen3"), tmp_path / "bundle")
    path = bundle / "gguf-q8_0" / "model.gguf"
    found = []
    for large in (mapped.LARGE, 0):
        monkeypatch.setattr(mapped, "LARGE", large)
        model = llama.load(path, "cpu")
        held = resident(path)
        llama.library().llama_model_free(model)
        with Reranker(bundle, backend="gguf-q8_0") as reranker:
            found.append((held, [r.logit for r in reranker.rank("a", ["b c", "d " * 40, "e"])]))
    (kept, expected), (left, logits) = found
    assert kept > 0
    assert left == 0
    assert logits == expected


def test_memory_that_somebody_else_has_by_now_keeps_what_it_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime may unmap a file between the lookup of its address and the call that frees it."""
    file = tmp_path / "unmapped"
    file.write_bytes(b"x")
    with mmap.mmap(-1, 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as heap:
        heap.write(b"\x01" * len(heap))
        held = (ctypes.c_char * len(heap)).from_buffer(heap)
        start = ctypes.addressof(held)
        del held
        monkeypatch.setattr(mapped, "LARGE", 0)
        monkeypatch.setattr(mapped, "_ranges", lambda path: [(start, start + len(heap))])
        with mapped.dropping_pages(file):
            pass
        assert heap[:] == b"\x01" * len(heap)
