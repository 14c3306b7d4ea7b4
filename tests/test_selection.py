"""Selection of a target: measured or guessed, with every failure reported and survived."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import fakes
import pytest
import tiny
from click.testing import CliRunner, Result
from conftest import subset
from hypothesis import given
from hypothesis import strategies as st

from qrank import Reranker
from qrank.backends import BACKENDS, format_of, formats, keys, spec
from qrank.bundle.manifest import Manifest
from qrank.bundle.opened import Bundle
from qrank.cli import main
from qrank.errors import BundleError, InputError, MissingExtraError, TargetError
from qrank.measure import profiles
from qrank.select import losses
from qrank.select.losses import Loss
from qrank.select.measurements import PROFILES, Measurement, recalled, remember
from qrank.select.selection import TIE_MARGIN, Criteria, order
from qrank.select.targets import TargetKey, expected, guesses
from qrank.system import cache, machine
from qrank.system.cache import store

THREADS = machine.processors()


@pytest.fixture(autouse=True)
def _own_cache(own_cache: Path) -> None:
    """Use a separate cache per test, so that tests share no measurements."""


def qrank_(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def measurement(target: str, speed: float = 1.0, **fields: object) -> Measurement:
    variant, _, device = target.partition("@")
    speeds: dict[str, float] = dict.fromkeys(map(str, PROFILES), speed)
    made = Measurement(TargetKey(variant, device), speeds=speeds, threads=THREADS)
    return replace(made, **fields)  # type: ignore[arg-type]


# Failures


def test_every_failure_is_told_and_survived_and_the_next_best_is_chosen(
    onnx_only: Path, plug_in: Callable[..., None]
) -> None:
    plug_in(
        wrong="doubles:WRONG",
        hangs="doubles:HANGS",
        crashes="doubles:CRASHES",
        looked="doubles:CRASHES_WHEN_LOOKED_FOR",
        absent="no_such_module",
        nothing="doubles:NOTHING",
        tires="doubles:TIRES",
        frail="doubles:CRASHES_IN_THE_MIDDLE",
        exits="doubles:EXITS",
    )
    result = qrank_("tune", onnx_only, "--timeout", "20", "--json")
    assert result.exit_code == 0, result.output
    found = {m["target"]: m for m in json.loads(result.stdout)}
    assert [name for name, m in found.items() if m["reason"] is None] == ["onnx-int8@cpu"]
    reasons = {
        "wrong/onnx-int8@cpu": "computes wrongly on this machine (right 1.0)",
        "hangs/onnx-int8@cpu": "no answer within 20 s",
        "crashes/onnx-int8@cpu": "SIGSEGV" if os.name == "posix" else "its process died",
        "looked": "SIGSEGV" if os.name == "posix" else "its process died",
        "absent": "cannot be imported: ModuleNotFoundError",
        "nothing": "is doubles:NOTHING, which is str and not a qrank.backends.BackendSpec",
        "tires/onnx-int8@cpu": "MemoryError: no more",
        "frail/onnx-int8@cpu": "SIGSEGV" if os.name == "posix" else "its process died",
        "exits/onnx-int8@cpu": "its process died (exit code 0)",
    }
    assert set(found) == {"onnx-int8@cpu", *reasons}
    for name, reason in reasons.items():
        assert reason in found[name]["reason"], name
        assert "RuntimeWarning" not in found[name]["reason"]
    with Reranker(onnx_only) as reranker:
        assert reranker.choice.measured
        assert reranker.target.name == "onnx-int8@cpu"


def test_another_packages_backend_takes_part_and_is_chosen_where_it_is_fastest(
    onnx_only: Path, plug_in: Callable[..., None]
) -> None:
    plug_in(right="doubles:RIGHT", prints="doubles:PRINTS")
    result = qrank_("tune", onnx_only)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "not used" not in result.stdout
    with Reranker(onnx_only) as reranker:
        assert reranker.target.name in ("right/onnx-int8@cpu", "prints/onnx-int8@cpu")
        assert f"chosen: {reranker.target.name}" in result.stdout
        assert reranker.rank("a", ["a", "a a"])[0].index == 1
    with Reranker(onnx_only, backend="onnx") as reranker:
        assert reranker.target.name == "onnx-int8@cpu"
    for name in ("right", "right/onnx-int8"):
        with Reranker(onnx_only, backend=name) as reranker:
            assert reranker.target.name == "right/onnx-int8@cpu"
    with pytest.raises(TargetError, match=r"backends are: .*prints, right"):
        Reranker(onnx_only, backend="left")


def test_what_is_named_never_falls_back(bundle: Path, plug_in: Callable[..., None]) -> None:
    plug_in(wrong="doubles:WRONG")
    for backend in ("wrong", "wrong/onnx-fp32"):
        with pytest.raises(TargetError, match="computes wrongly on this machine"):
            Reranker(bundle, backend=backend)


def test_where_nothing_works_every_target_and_its_reason_is_told(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise TargetError(f"the driver is out ({len(arguments)})")

    names = [t.name for t in guesses(Manifest.load(bundle), None, None)]
    monkeypatch.setattr(sys, "frozen", True, raising=False)  # opens nothing in a child process
    for format in formats():
        monkeypatch.setattr(spec(format), "open", fail)
    with pytest.raises(TargetError, match="no target works here") as caught:
        Reranker(bundle)
    assert len(names) == len(Manifest.load(bundle).variants)
    for name in names:
        assert f"\n  {name}: the driver is out" in str(caught.value)
    assert len(caplog.records) == len(names) - 1


def test_a_guess_that_fails_is_told_and_the_next_is_taken(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise TargetError("the driver is out")

    monkeypatch.setattr(spec("openvino"), "open", fail)
    result = qrank_("score", "-m", bundle, "-q", "a", "-f", "json", stdin="a\n")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["target"] == "onnx-int8@cpu"
    assert "taking the next target: openvino-int8@cpu: the driver is out" in result.stderr
    assert qrank_("score", "-m", bundle, "-q", "a", "--backend", "openvino").exit_code == 7


def test_without_any_runtime_what_to_install_is_told(
    onnx_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match="pip install"):
        Reranker(onnx_only)


# Memory


def test_a_measurement_decides_from_then_on(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    before = guesses(manifest, None, None)[0].name
    speeds = {"onnx-fp32@cpu": 9.0, "onnx-int8@cpu": 5.0, "gguf-q8_0@cpu": 7.0}
    remember(manifest, THREADS, [measurement(name, speed) for name, speed in speeds.items()])
    assert before not in speeds
    with Reranker(bundle) as reranker:
        assert (reranker.target.name, reranker.choice.measured) == ("onnx-fp32@cpu", True)
    with Reranker(bundle, backend="gguf") as reranker:
        assert reranker.target.name == "gguf-q8_0@cpu"
    with Reranker(bundle, backend="onnx-int8") as reranker:
        assert reranker.target.name == "onnx-int8@cpu"
    with Reranker(bundle, threads=THREADS + 1) as reranker:
        assert (reranker.target.name, reranker.choice.measured) == (before, False)


def test_settings_are_taken_from_the_measurement_and_the_users_stand(bundle: Path) -> None:
    found = measurement("onnx-int8@cpu", max_batch_tokens=640, threads=1)
    remember(Manifest.load(bundle), THREADS, [found])
    with Reranker(bundle) as reranker:
        options = reranker.choice.options
        assert (options.max_batch_tokens, options.threads) == (640, 1)
    with Reranker(bundle, max_batch_tokens=320) as reranker:
        assert reranker.choice.options.max_batch_tokens == 320


@pytest.mark.parametrize(
    ("place", "change"),
    [
        (machine, {"cpu": lambda: "another"}),
        (machine, {"system": lambda: "Linux 99"}),
        (machine, {"accelerators": lambda: ["driver 1"]}),
        (machine, {"packages": lambda modules: ["onnxruntime-0.1"]}),
        (keys, {"__version__": "99.0"}),
    ],
    ids=["cpu", "system", "driver", "runtime", "qrank"],
)
def test_another_machine_driver_or_version_is_measured_anew(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, place: object, change: dict[str, object]
) -> None:
    manifest = Manifest.load(bundle)
    remember(manifest, 2, [measurement("onnx-int8@cpu")])
    assert len(recalled(manifest, 2)) == 1
    assert recalled(replace(manifest, name="another"), 2) == recalled(manifest, 3) == []
    for name, value in change.items():
        monkeypatch.setattr(place, name, value)
    assert recalled(manifest, 2) == []


def broken(**changes: object) -> dict[str, object]:
    """A stored measurement with some fields changed."""
    return {"targets": [asdict(measurement("onnx-int8@cpu")) | changes]}


@pytest.mark.parametrize(
    "record",
    [
        {},
        {"targets": [{"name": 1}]},
        {"targets": {}},
        {"targets": None},
        broken(speeds={"passages": 1.0}),
        broken(speeds=dict.fromkeys(PROFILES, "fast")),
        broken(target={"variant": "onnx-int2", "device": "cpu"}),
        broken(target="onnx-int8@cpu", selector="onnx-int8", device="cpu"),  # an earlier layout
        broken(kendall=None),
        broken(threads=0),
        broken(invented_later=1),
    ],
)
def test_a_measurement_that_is_not_whole_is_ignored_and_told(
    bundle: Path, caplog: pytest.LogCaptureFixture, record: dict[str, object]
) -> None:
    manifest = Manifest.load(bundle)
    remember(manifest, THREADS, [measurement("onnx-int8@cpu")])
    store("measurements", keys.of_machine(manifest, threads=THREADS), record)
    with Reranker(bundle) as reranker:
        assert not reranker.choice.measured
    assert "ignoring " in caplog.text


def test_a_remembered_start_looks_for_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads a few small files, starts no process and looks up no package version."""
    manifest = Manifest.load(bundle)
    remember(manifest, THREADS, [measurement("onnx-int8@cpu")])
    Reranker(bundle).close()

    def fail(*arguments: object, **named: object) -> None:
        raise AssertionError("asked")

    read: list[str] = []
    load = cache.load

    def counted(kind: str, key: cache.Key, parse: Callable[..., Any]) -> Any:
        read.append(kind)
        return load(kind, key, parse)

    monkeypatch.setattr(cache, "load", counted)
    monkeypatch.setattr("importlib.metadata.entry_points", fail)
    monkeypatch.setattr("importlib.metadata.version", fail)
    monkeypatch.setattr("subprocess.Popen", fail)
    Reranker(bundle, backend="onnx-int8", device="cpu").close()
    files = {"tokenizer.json", *manifest.variants["onnx-int8"].files}
    assert sorted(read) == sorted(["measurements", "proofs", *["hashes"] * len(files)])
    read.clear()
    Reranker(bundle).close()
    assert read.count("proofs") == read.count("measurements") == 1


def test_a_first_call_says_that_it_guesses_and_no_measure_keeps_quiet(bundle: Path) -> None:
    """Only on a terminal: the message is of no use in a pipeline's log."""

    def said(*more: str, terminal: bool = True) -> str:
        command = [sys.executable, "-c", "from qrank.cli import main; main()", "score"]
        command += ["-m", str(bundle), "-q", "a", "-f", "jsonl", *more]
        if not terminal:
            return subprocess.run(command, input="a\n", capture_output=True, text=True).stderr
        pty = pytest.importorskip("pty", reason="no pseudo-terminals here")
        ours, theirs = pty.openpty()
        subprocess.run(command, input="a\n", stdout=subprocess.PIPE, stderr=theirs, text=True)
        os.write(theirs, b"end")
        text = b""
        while not text.endswith(b"end"):
            text += os.read(ours, 4096)
        os.close(ours)
        os.close(theirs)
        return text.decode().removesuffix("end")

    (line,) = said().splitlines()
    assert line.startswith("qrank: not measured here yet: guessing that openvino-int8@cpu")
    assert line.endswith(f"qrank tune {bundle}")
    assert said(terminal=False) == ""
    assert said("--no-measure") == ""
    assert said("--backend", "onnx-int8") == ""
    remember(Manifest.load(bundle), THREADS, [measurement("onnx-int8@cpu")])
    assert said() == ""


def test_measuring_when_asked_to(bundle: Path, tmp_path: Path) -> None:
    folder = subset(bundle, tmp_path / "two", ["onnx-int8", "onnx-fp32"])
    command = ("score", "-m", folder, "-q", "a", "-f", "json", "--measure")
    assert json.loads(qrank_(*command, stdin="a\n").stdout)["target"].startswith("onnx-")
    found = recalled(Manifest.load(folder), THREADS)
    assert {m.target.name for m in found} == {"onnx-int8@cpu", "onnx-fp32@cpu"}
    for m in found:
        assert set(m.speeds) == set(PROFILES)
        assert min(m.speeds.values()) > 0


# Guesses


@pytest.mark.parametrize("device", [None, "cpu", "gpu", "npu", "cuda", "metal", "vulkan"])
def test_guesses_have_backends_that_know_the_device(bundle: Path, device: str | None) -> None:
    found = guesses(Manifest.load(bundle), None, device)
    assert {t.device for t in found} == {device or "cpu"}
    known = {f for f in formats() if (device or "cpu") in spec(f).kinds}
    assert {t.variant.format for t in found} == known
    assert found == sorted(found, key=expected)


def with_a_later_format(bundle: Path, folder: Path) -> Path:
    """A bundle with a variant in a format that only a later qrank knows."""
    folder = subset(bundle, folder, ["onnx-int8"])
    manifest = Manifest.load(folder)
    files = {
        name.replace("onnx-int8", "later-int8"): record
        for name, record in manifest.variants["onnx-int8"].files.items()
    }
    shutil.copytree(folder / "onnx-int8", folder / "later-int8")
    later = replace(manifest.variants["onnx-int8"], format="later", files=files)
    manifest.with_variant(later).save(folder)
    return folder


def test_a_variant_of_a_later_format_is_left_out_and_told(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_a_later_format(bundle, tmp_path / "later")
    with Reranker(folder) as reranker:
        assert reranker.target.name == "onnx-int8@cpu"
    assert "leaving out later-int8 of the bundle" in caplog.text
    with pytest.raises(TargetError, match="no variant for backend 'later-int8'"):
        Reranker(folder, backend="later-int8")
    manifest = Manifest.load(folder)
    del manifest.variants["onnx-int8"]
    manifest.save(folder)
    with pytest.raises(TargetError, match="install the qrank that wrote it"):
        Reranker(folder)


def test_a_damaged_variant_is_told_and_the_next_is_taken(
    bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(subset(bundle, tmp_path / "two", ["onnx-int8", "onnx-fp32"]), folder)
    (folder / "onnx-int8" / "model.onnx").unlink()
    with Reranker(folder) as reranker:
        assert reranker.target.name == "onnx-fp32@cpu"
    assert "taking the next target: onnx-int8@cpu: " in caplog.text
    with pytest.raises(BundleError, match="lacks onnx-int8"):
        Reranker(folder, backend="onnx-int8")


def test_a_device_that_no_format_knows_is_told(bundle: Path) -> None:
    with pytest.raises(TargetError, match=r"no device 'tpu'.*openvino cpu, gpu, npu"):
        Reranker(bundle, device="tpu")


def test_every_precision_has_its_place() -> None:
    places = []
    for format in map(format_of, BACKENDS):
        assert format is not None
        made = [precision for precision in format.precisions if precision.made]
        places += [precision.cpu for precision in made]
        assert max(precision.elsewhere for precision in made) < math.inf
    assert sorted(places) == list(range(1, len(places) + 1))


def test_what_is_not_installed_is_no_guess(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert {t.variant.format for t in guesses(Manifest.load(bundle), None, None)} == {
        "onnx",
        "gguf",
        "mlx",
    }


# Policies

some_measured = st.lists(
    st.builds(
        measurement,
        st.sampled_from(["onnx-int8@cpu", "gguf-q8_0@cpu", "openvino-int8@gpu"]),
        st.floats(0.1, 1e4),
        kendall=st.floats(-1, 1),
        bytes=st.integers(1, 10**9),
        reason=st.sampled_from([None, None, None, "broken"]),
    ),
    max_size=8,
)


@given(found=some_measured, least=st.none() | st.floats(-1, 1))
def test_fastest_is_the_fastest_or_as_good_as_and_more_faithful(
    found: list[Measurement], least: float | None
) -> None:
    ordered = order(found, Criteria(min_kendall=least))
    fit = [m for m in found if m.reason is None and (least is None or m.kendall >= least)]
    assert sorted(map(id, ordered)) == sorted(map(id, fit))
    if fit:
        top = max(m.speeds["passages"] for m in fit)
        assert ordered[0].speeds["passages"] >= top * (1 - TIE_MARGIN)
        alike = [m for m in fit if m.speeds["passages"] >= top * (1 - TIE_MARGIN)]
        assert ordered[0].kendall == max(m.kendall for m in alike)


@given(found=some_measured)
def test_the_other_policies(found: list[Measurement]) -> None:
    fit = [m for m in found if m.reason is None]
    if fit:
        smallest = order(found, Criteria(policy="smallest"))[0]
        assert smallest.bytes == min(m.bytes for m in fit)
        faithful = order(found, Criteria(policy="most-faithful"))[0]
        assert faithful.kendall == max(m.kendall for m in fit)


def test_policies_hold_for_guesses_too(bundle: Path) -> None:
    variants = Manifest.load(bundle).variants.values()
    with Reranker(bundle, policy="smallest") as reranker:
        assert reranker.target.variant.bytes == min(v.bytes for v in variants)
    with Reranker(bundle, policy="most-faithful") as reranker:
        best = max(v.fidelity.kendall for v in variants)
        assert reranker.target.variant.fidelity.kendall == best
    with pytest.raises(
        TargetError, match=r"no target has a Kendall tau of 0.99 or more.*onnx-int8"
    ):
        Reranker(bundle, min_kendall=0.99, backend="onnx-int8")


def test_a_bound_on_the_loss_keeps_what_was_measured_to_lose_no_more(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    first, *others = guesses(manifest, None, None)
    with pytest.raises(TargetError, match=r"measured here: none.*qrank eval"):
        Reranker(bundle, max_loss=0.005)
    (second, *_) = others
    losses.remember(
        manifest,
        {
            first.variant.name: Loss(0.02, 0.01, 100, "cranfield"),
            second.variant.name: Loss(0.004, 0.01, 100, "cranfield"),
        },
    )
    with Reranker(bundle, max_loss=0.005) as reranker:
        assert reranker.target == second
    with pytest.raises(TargetError, match=r"0\.0200 \(±0\.0100, 100 queries of cranfield\)"):
        Reranker(bundle, max_loss=0.005, backend=first.variant.name)


def test_bounds_that_different_variants_satisfy_are_told(bundle: Path) -> None:
    manifest = Manifest.load(bundle)
    by_tau = sorted(manifest.variants.values(), key=lambda v: v.fidelity.kendall)
    worst, best = by_tau[0], by_tau[-1]
    losses.remember(manifest, {worst.name: Loss(0.0, 0.01, 100, "cranfield")})
    between = (worst.fidelity.kendall + best.fidelity.kendall) / 2
    for backend in (None, worst.format):
        with pytest.raises(TargetError, match=r"both loses 0\.005.*or less|Kendall tau of"):
            Reranker(bundle, max_loss=0.005, min_kendall=between, backend=backend)


@tiny.needs_vnni
def test_what_loses_much_or_nobody_knows_what_is_taken_last(bundle: Path, tmp_path: Path) -> None:
    speeds = {"openvino-int8-w8a8": 9.0, "openvino-int8": 8.0, "onnx-int8": 5.0}
    bundle = subset(bundle, tmp_path / "three", list(speeds))
    measured = [measurement(f"{name}@cpu", speed) for name, speed in speeds.items()]
    manifest = Manifest.load(bundle)
    remember(manifest, THREADS, measured)

    def chosen(**criteria: Any) -> str:
        with Reranker(bundle, **criteria) as reranker:
            return reranker.target.variant.name

    def lost(variant: str, mean: float) -> None:
        losses.remember(manifest, {variant: Loss(mean, 0.001, 100, "cranfield")})

    assert chosen() == "openvino-int8-w8a8"
    # As bundles were before conversions ranked.
    manifest = manifest.with_variant(replace(manifest.variants["openvino-int8-w8a8"], ranking=None))
    manifest.save(bundle)
    remember(manifest, THREADS, measured)
    assert chosen() == "openvino-int8"
    assert chosen(backend="openvino") == "openvino-int8-w8a8"
    lost("openvino-int8", 0.02)
    assert chosen() == "onnx-int8"
    lost("openvino-int8-w8a8", 0.002)
    assert chosen() == "openvino-int8-w8a8"
    shown = qrank_("tune", bundle, "--timeout", "30").stdout
    assert "taken last: openvino-int8, which loses" in shown
    assert "taken last: openvino-int8-w8a8" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"policy": "best"}, "policy is 'best'; give one of 'fastest'"),
        ({"profile": "huge"}, "profile is 'huge'; give one of 'short'"),
        ({"min_kendall": 2}, "min_kendall is 2"),
    ],
)
def test_wishes_that_cannot_be(bundle: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reranker(bundle, **arguments)  # type: ignore[arg-type]


def test_profiles_have_the_tokens_they_say(bundle: Path) -> None:
    opened = Bundle.load(bundle)
    with Reranker(opened, backend="fakes:recording") as reranker:
        for profile, (count, tokens) in PROFILES.items():
            texts = profiles.documents(opened, profile)
            assert len(texts) == count
            fakes.recorded.clear()
            reranker.rank(profiles.QUERY, texts)
            lengths = fakes.recorded[-1].lengths
            limit = opened.manifest.family.max_length
            assert all(min(tokens, limit) <= n <= tokens + 12 for n in lengths.tolist())
