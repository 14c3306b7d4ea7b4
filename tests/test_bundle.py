"""A bundle that does not match its manifest is refused."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qrank import Reranker
from qrank.bundle.manifest import MANIFEST, SCHEMA, TOKENIZER, Manifest
from qrank.cli import main
from qrank.errors import BundleError, ModelNotFoundError, TargetError

MODEL = "onnx-int8/model.onnx"


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A copy of a bundle that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def flip(path: Path, place: float = 0.5) -> None:
    """Flip one bit but keep size and modification time, like a failing disk."""
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
    """The second start trusts the hashes of the first, but not for a file written since."""
    Reranker(copy, backend="onnx-int8").close()
    Reranker(copy, backend="onnx-int8").close()
    flip(copy / name)
    os.utime(copy / name)
    with pytest.raises(BundleError):
        Reranker(copy, backend="onnx-int8")


def test_verify_hashes_what_is_remembered_as_good(copy: Path) -> None:
    """With the same size, time and inode, only reading the file shows the damage."""
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
    """The digest covers the whole file, including keys that qrank does not read."""
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
    # A change in a number's 17th digit may leave the same number.
    ours, theirs = (json.loads((f / MANIFEST).read_text("utf-8")) for f in (copy, bundle))
    assert ours == theirs


def test_the_digest_is_of_canonical_json(bundle: Path) -> None:
    """Anyone can compute it: sorted keys, no spaces, ASCII, without the digest itself."""
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
    for ours, theirs in zip(again.probes.work.ids, manifest.probes.work.ids, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int32


# Manifests from untrusted sources


def resigned(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest and update its digest to match."""
    path = folder / MANIFEST
    content = json.loads(path.read_text("utf-8"))
    del content["digest"]
    change(content)
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    path.write_text(json.dumps(content), "utf-8")


def rename(content: dict[str, Any], name: str, precision: str) -> None:
    """Rename variant onnx-int8 and its file."""
    variant = content["variants"].pop("onnx-int8")
    variant["precision"] = precision
    variant["files"] = {f"{name}/model.onnx": variant["files"]["onnx-int8/model.onnx"]}
    content["variants"][name] = variant


def put(content: dict[str, Any], name: str, key: str = "onnx-int8") -> None:
    """Add a file to a variant's list, or to the bundle's if `key` is empty."""
    files = content["variants"][key]["files"] if key else content["files"]
    files[name] = {"sha256": "0" * 64, "bytes": 1}


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "a folder elsewhere": lambda c: rename(c, "onnx-int8/../../out", "int8/../../out"),
    "a name that is not the variant's": lambda c: rename(c, "onnx-int9", "int8"),
    "no files": lambda c: c["variants"]["onnx-int8"].update(files={}),
    "a file above": lambda c: put(c, "onnx-int8/../../secret"),
    "a file of another variant": lambda c: put(c, "onnx-fp16/model.onnx"),
    "a file anywhere": lambda c: put(c, "/etc/passwd"),
    "a file of Windows": lambda c: put(c, "onnx-int8/..\\..\\secret"),
    "a drive": lambda c: put(c, "onnx-int8/C:secret"),
    "a pattern": lambda c: put(c, "onnx-int8/*"),
    "a file above the bundle": lambda c: put(c, "../secret", ""),
    "no tokenizer": lambda c: c["files"].pop(TOKENIZER),
    "no hash": lambda c: c["files"][TOKENIZER].update(sha256=""),
    "no size": lambda c: c["files"][TOKENIZER].update(bytes="1"),
    "no probes": lambda c: c["probes"].update(logits=[], sequences=[], segments=None),
    "few probes": lambda c: c["probes"].update(
        {key: c["probes"][key][:4] for key in ("logits", "sequences", "segments")}
    ),
    "fewer logits": lambda c: c["probes"].update(logits=c["probes"]["logits"][:-1]),
    "shorter types": lambda c: c["probes"]["segments"][3].pop(),
    "a logit that is none": lambda c: c["probes"]["logits"].__setitem__(0, float("nan")),
    "an empty probe": lambda c: [
        c["probes"][k].__setitem__(0, []) for k in ("sequences", "segments")
    ],
    "an unknown activation": lambda c: c["family"].update(activation="eval"),
    "an unknown pooling": lambda c: c["family"].update(pooling="best"),
    "no temperature": lambda c: c["family"].update(temperature=0),
    "a name that is no text": lambda c: c.update(name=["tiny"]),
}


@pytest.mark.parametrize("forged", FORGED)
def test_a_manifest_that_asks_for_what_no_bundle_does_is_refused(
    forged: str, bundle: Path, copy: Path
) -> None:
    """Its digest is correct: anyone can compute one."""
    shutil.copytree(bundle / "onnx-int8", copy.parent / "out")
    resigned(copy, FORGED[forged])
    with pytest.raises(BundleError, match="is damaged"):
        Reranker(copy)


def test_a_precision_of_a_later_version_is_left_out_and_the_others_run(copy: Path) -> None:
    def later(content: dict[str, Any]) -> None:
        rename(content, "onnx-int2", "int2")

    (copy / "onnx-int8").rename(copy / "onnx-int2")
    resigned(copy, later)
    with Reranker(copy, backend="onnx-fp16") as reranker:
        assert len(reranker.rank("a", ["b", "c"])) == 2
    with pytest.raises(TargetError, match="knows no precision 'int2'"):
        Reranker(copy, backend="onnx-int2")


@tiny.needs_vnni
def test_a_bundle_with_a_precision_by_its_former_name_runs_and_gains_variants(
    without_fp32: Path, bert: str, ready_graph: object
) -> None:
    """A bundle written when int8-w8a8 was called int8-full; its folder keeps that name."""
    bundle, name, former = without_fp32, "openvino-int8-w8a8", "openvino-int8-full"
    pairs = [("red", "mars is red"), ("red", "bread"), ("a", "")]
    with Reranker(bundle, backend=name) as reranker:
        expected = reranker.score(pairs, raw=True)

    def before(content: dict[str, Any]) -> None:
        variant = content["variants"].pop(name)
        files = {file.replace(name, former): of for file, of in variant["files"].items()}
        content["variants"][former] = {**variant, "precision": "int8-full", "files": files}

    (bundle / name).rename(bundle / former)
    resigned(bundle, before)
    command = ["convert", bert, "--to", "onnx", "--precision", "fp32", "-o", str(bundle)]
    for _ in range(2):
        with Reranker(bundle, backend=name) as reranker:
            np.testing.assert_array_equal(reranker.score(pairs, raw=True), expected)
            assert reranker.target.variant.folder == former
        assert CliRunner().invoke(main, command).exit_code == 0
    assert {name, "onnx-fp32"} <= set(Manifest.load(bundle).variants)
    assert not (bundle / name).exists()
    with pytest.raises(ModelNotFoundError, match="is a part of the bundle"):
        Reranker(bundle / former)


@pytest.mark.parametrize("text", ["[0,  1]", "[1,\n2]", "[ -1.5e3 ]", '"[0,   0]"', "\\[3,  4]"])
def test_texts_that_look_like_lists_of_numbers_stay_as_they_are(bundle: Path, text: str) -> None:
    manifest = Manifest.load(bundle)
    family = replace(manifest.family, template=(*manifest.family.template, text), instruction=text)
    with tempfile.TemporaryDirectory() as temporary:
        replace(manifest, family=family).save(Path(temporary))
        assert Manifest.load(Path(temporary)).family == family


def test_a_manifest_is_laid_out_for_people(bundle: Path) -> None:
    """A list of numbers is on one line; every other value has its own line."""
    lines = (bundle / MANIFEST).read_text("utf-8").splitlines()
    probes = Manifest.load(bundle).probes
    for sequence in probes.work.ids:
        assert f"      {json.dumps(sequence.tolist())}" in [line.rstrip(",") for line in lines]
    assert len(lines) < 1000


def test_json_that_is_nested_very_deeply_is_refused(copy: Path) -> None:
    (copy / MANIFEST).write_text("[" * 200_000 + "]" * 200_000, "utf-8")
    with pytest.raises(BundleError, match="cannot be read"):
        Reranker(copy)


def test_what_helps_is_said_and_helps(copy: Path, bert: str, ready_graph: object) -> None:
    """Converting again into the same folder without --force would raise the same error."""
    edit(copy, schema=SCHEMA + 1)
    command = ["convert", bert, "--to", "onnx", "--precision", "fp32", "-o", str(copy)]
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == BundleError.exit_code
    assert "convert the model again, with --force" in refused.stderr
    assert CliRunner().invoke(main, [*command, "--force"]).exit_code == 0
    Reranker(copy).close()


def test_a_manifest_that_is_being_read_is_replaced_a_little_later(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, where an open file cannot be replaced."""
    monkeypatch.setattr("qrank.bundle.manifest._WAITS", (0.0, 0.0, 0.0))
    change, left = Path.replace, 2

    def busy(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left >= 0:
            raise PermissionError("The process cannot access the file")
        return change(path, target)

    monkeypatch.setattr(Path, "replace", busy)
    replace(Manifest.load(copy), name="other").save(copy)
    assert Manifest.load(copy).name == "other"
    left = 9
    with pytest.raises(PermissionError):
        Manifest.load(copy).save(copy)
