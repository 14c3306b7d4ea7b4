"""A bundle is what its manifest says, or it is refused."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle import MANIFEST, SCHEMA, TOKENIZER, Manifest
from qrank.cli import main
from qrank.errors import BundleError

MODEL = "onnx-int8/model.onnx"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A bundle that may be damaged."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def flip(path: Path, place: float = 0.5) -> None:
    """Change one bit of one byte, keeping size and time: as a failing disk does."""
    state = path.stat()
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize("place", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("name", [MODEL, TOKENIZER, MANIFEST])
def test_one_flipped_byte_is_refused(copy: Path, name: str, place: float) -> None:
    flip(copy / name, place)
    with pytest.raises(BundleError, match="convert the model again"):
        Reranker(copy, backend="onnx-int8")


@pytest.mark.parametrize("name", [MODEL, TOKENIZER, MANIFEST])
def test_a_flipped_byte_is_noticed_after_a_good_start_too(copy: Path, name: str) -> None:
    """The second start trusts what the first one hashed, but not a file written since."""
    Reranker(copy, backend="onnx-int8").close()
    Reranker(copy, backend="onnx-int8").close()
    flip(copy / name)
    os.utime(copy / name)
    with pytest.raises(BundleError):
        Reranker(copy, backend="onnx-int8")


def test_verify_hashes_what_is_remembered_as_good(copy: Path) -> None:
    """Same size, same time, same inode: only reading the file can tell."""
    Reranker(copy, backend="onnx-int8").close()
    runner = CliRunner()
    assert runner.invoke(main, ["inspect", str(copy), "--verify"]).exit_code == 0
    flip(copy / MODEL)
    assert runner.invoke(main, ["inspect", str(copy)]).exit_code == 0
    result = runner.invoke(main, ["inspect", str(copy), "--verify"])
    assert result.exit_code == BundleError.exit_code
    assert "damaged" in result.output


def test_verify_looks_at_every_variant(copy: Path) -> None:
    flip(copy / "onnx-fp16" / "model.onnx")
    Reranker(copy).close()
    result = CliRunner().invoke(main, ["inspect", str(copy), "--verify"])
    assert result.exit_code == BundleError.exit_code
    assert "onnx-fp16" in result.output


@pytest.mark.parametrize("name", [MODEL, TOKENIZER])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Reranker(copy, backend="onnx-int8")


@pytest.mark.parametrize("name", [MODEL, TOKENIZER])
def test_a_cut_file_is_refused(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="bytes"):
        Reranker(copy, backend="onnx-int8")


def edit(folder: Path, **values: Any) -> None:
    path = folder / MANIFEST
    content = {**json.loads(path.read_text("utf-8")), **values}
    path.write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("schema", [SCHEMA + 1, 0, "1", None])
def test_another_schema_version_is_told(copy: Path, schema: object) -> None:
    edit(copy, schema=schema)
    with pytest.raises(BundleError, match="schema version"):
        Manifest.load(copy)


@pytest.mark.parametrize(
    "values", [{"name": "other"}, {"files": {}}, {"note": "a key that nobody knows"}]
)
def test_an_edited_manifest_is_refused(copy: Path, values: dict[str, Any]) -> None:
    """What qrank does not read counts too: the digest is of the whole file."""
    edit(copy, **values)
    with pytest.raises(BundleError, match="digest"):
        Manifest.load(copy)


@pytest.mark.parametrize("values", [{"probes": None}, {"variants": []}, {"family": {"name": "x"}}])
def test_a_manifest_of_another_shape_is_refused(copy: Path, values: dict[str, Any]) -> None:
    edit(copy, **values)
    with pytest.raises(BundleError):
        Manifest.load(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\udcff"])
def test_a_manifest_that_is_none_is_refused(copy: Path, text: str) -> None:
    (copy / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError):
        Manifest.load(copy)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1))
def test_a_byte_anywhere_in_the_manifest_counts(copy: Path, bundle: Path, place: float) -> None:
    shutil.copy(bundle / MANIFEST, copy / MANIFEST)
    flip(copy / MANIFEST, place)
    try:
        Manifest.load(copy)
    except BundleError:
        return
    # The 17th digit of a number may say the same number.
    ours, theirs = (json.loads((f / MANIFEST).read_text("utf-8")) for f in (copy, bundle))
    assert ours == theirs


def test_the_digest_is_of_canonical_json(bundle: Path) -> None:
    """Anyone can work it out: keys sorted, no spaces, ASCII, without the digest itself."""
    content = json.loads((bundle / MANIFEST).read_text("utf-8"))
    digest = content.pop("digest")
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert digest == Manifest.load(bundle).digest


def test_a_manifest_survives_being_written_and_read(bundle: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(bundle)
    manifest.save(tmp_path)
    again = Manifest.load(tmp_path)
    assert again.digest == manifest.digest
    assert (tmp_path / MANIFEST).read_bytes() == (bundle / MANIFEST).read_bytes()
    assert (again.family, again.source, again.files, again.variants) == (
        manifest.family,
        manifest.source,
        manifest.files,
        manifest.variants,
    )
    assert again.probes.logits.tobytes() == manifest.probes.logits.tobytes()
    for ours, theirs in zip(
        again.probes.work.sequences, manifest.probes.work.sequences, strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int32
