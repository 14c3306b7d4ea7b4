"""Shared fixtures: temporary cache folders, no network, tiny models converted once per run."""

import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

# Set before huggingface_hub is imported and qrank looks up its cache: both read these only once.
os.environ["HF_HUB_OFFLINE"] = "0" if os.environ.get("QRANK_TEST_HUB") == "1" else "1"
os.environ["QRANK_CACHE"] = tempfile.mkdtemp(prefix="qrank-tests-")
os.environ["QRANK_DATA"] = tempfile.mkdtemp(prefix="qrank-tests-")
os.environ.pop("TOKENIZERS_PARALLELISM", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Read by OpenMP when torch or llama.cpp loads it. Threads of two workers that share the
    # processors would wait for each other at every operation, spinning: tiny models took up to
    # ninety times as long.
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

import bound  # noqa: F401 (sets bounds that others take over)
import tiny
import tiny_decoders
import tiny_encoders
from filelock import FileLock
from hub_server import Hub, serving, use_hub
from hypothesis import HealthCheck, settings

from qrank import Reranker
from qrank.bundle.manifest import Manifest
from qrank.bundle.sequences import Sequences
from qrank.converters.checkpoint.read import Checkpoint
from qrank.converters.convert import convert
from qrank.converters.onnx import export as onnx_converter
from qrank.system import paths
from qrank.system.signal_stack import SignalStack

# A slow run on a busy machine is not a failure.
settings.register_profile("qrank", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qrank")

# A run in a shell's background or under nohup ignores these, and so would the commands that tests
# start.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


FIRST = ("test_decoders.py", "test_openvino.py")
"""Files that take longest. `make test` gives a file to one worker; these begin first, so that no
worker is left alone with one at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files; within a file, the order stays."""
    items.sort(key=lambda item: (*FIRST, item.path.name).index(item.path.name))


STACK = pytest.StashKey[SignalStack]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Take note of the signal stack (pytest's, by faulthandler)."""
    session.config.stash[STACK] = SignalStack()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Return to it: OpenVINO cores that tests make themselves leave unmapped ones behind.

    A test that sends its own process a signal would end the run.
    """
    item.config.stash[STACK].restore()


def pytest_unconfigure() -> None:
    """Remove the run's folders."""
    for name in ("QRANK_CACHE", "QRANK_DATA"):
        shutil.rmtree(os.environ[name], ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """Collect what a file's tests leave, such as clients' sockets, under its own warning filters.

    Otherwise the collector warns of it in any later test, of another file.
    """
    yield
    gc.collect()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Make a folder that all workers of a run share; the first to ask makes it, the others wait."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, whole = shared / "shared" / name, shared / "shared" / f"{name}.whole"
        folder.parent.mkdir(exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not whole.exists():
                make(folder)
                whole.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def checkpoint_of(made_once: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the read-only folder of a kind of checkpoint (a key of one of the `CHECKPOINTS`)."""

    def get(kind: str) -> Path:
        kinds = tiny.CHECKPOINTS | tiny_encoders.CHECKPOINTS | tiny_decoders.CHECKPOINTS
        make = kinds[kind]
        return made_once(kind, lambda folder: make(folder / "tiny")) / "tiny"

    return get


@pytest.fixture(scope="session")
def bundle_of(
    checkpoint_of: Callable[[str], Path], made_once: Callable[..., Path]
) -> Callable[[str], Path]:
    """Return the read-only bundle of a kind of checkpoint: every variant, made on first use."""

    def get(kind: str) -> Path:
        def make(folder: Path) -> None:
            family = tiny_decoders.FAMILIES.get(kind)
            variants = tiny_decoders.VARIANTS if family else tiny.VARIANTS
            target = folder / "tiny-qrank"
            result = convert(str(checkpoint_of(kind)), variants, target, family=family)
            assert not result.failed, result.failed

        return made_once(f"{kind}-bundle", make) / "tiny-qrank"

    return get


@pytest.fixture(scope="session", params=list(tiny.CHECKPOINTS))
def kind(request: pytest.FixtureRequest) -> str:
    """Each kind of encoder checkpoint in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session", params=list(tiny_decoders.CHECKPOINTS))
def decoder(request: pytest.FixtureRequest) -> str:
    """Each kind of decoder checkpoint in turn."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def checkpoint(kind: str, checkpoint_of: Callable[[str], Path]) -> Path:
    """A tiny checkpoint of each kind in turn. Read only: copy it to change it."""
    return checkpoint_of(kind)


@pytest.fixture(scope="session")
def bundle(bundle_of: Callable[[str], Path]) -> Path:
    """Tiny BERT's bundle with every variant. Read only: copy it to change it."""
    return bundle_of("bert")


@pytest.fixture(scope="session")
def reranker(bundle: Path) -> Iterator[Reranker]:
    """The bundle's preferred variant, int8 on the CPU."""
    with Reranker(bundle) as opened:
        yield opened


@pytest.fixture(scope="module")
def length() -> Iterator[Reranker]:
    """`mini`, with a backend whose logit is the pair's token count."""
    with Reranker("mini", backend="fakes:length") as opened:
        yield opened


def subset(bundle: Path, folder: Path, variants: list[str]) -> Path:
    """Make a bundle with only some variants of another."""
    folder.mkdir()
    for path in bundle.iterdir():
        if path.name != "qrank.json":
            (folder / path.name).symlink_to(path)
    manifest = Manifest.load(bundle)
    replace(manifest, variants={name: manifest.variants[name] for name in variants}).save(folder)
    return folder


@pytest.fixture
def onnx_only(bundle: Path, tmp_path: Path) -> Path:
    """A bundle with a single variant: any other target comes from another package."""
    return subset(bundle, tmp_path / "onnx-only", ["onnx-int8"])


@pytest.fixture
def plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install another package's backends: a folder on the path with their entry points."""

    def install(**backends: str) -> None:
        site = tmp_path / "site"
        info = site / "doubles-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: doubles\nVersion: 1.0\n")
        lines = [f"{name} = {place}\n" for name, place in backends.items()]
        (info / "entry_points.txt").write_text("[qrank.backends]\n" + "".join(lines))
        monkeypatch.syspath_prepend(str(site))

    return install


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    """A modifiable copy of tiny BERT's bundle with all variants."""
    return Path(shutil.copytree(bundle, tmp_path / "tiny-qrank"))


@pytest.fixture
def without_fp32(copy: Path) -> Path:
    """The same copy without fp32, for conversions that add it."""
    manifest = Manifest.load(copy)
    del manifest.variants["onnx-fp32"]
    manifest.save(copy)
    shutil.rmtree(copy / "onnx-fp32")
    return copy


@pytest.fixture
def bert(checkpoint_of: Callable[[str], Path]) -> str:
    """Path of tiny BERT, as the source of a conversion."""
    return str(checkpoint_of("bert"))


@pytest.fixture
def ready_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Speed up conversion: a ready graph replaces the exporter; everything around it is real."""
    graph = bundle / "onnx-fp32" / "model.onnx"

    def convert(
        checkpoint: Checkpoint, precision: str, folder: Path, calibration: Sequences
    ) -> str:
        use(folder)
        return ""

    def use(folder: Path) -> None:
        shutil.copy(graph, folder)

    monkeypatch.setattr(onnx_converter, "convert", convert)
    return use


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that huggingface_hub connects to, with an empty cache and an empty data folder."""
    with serving() as found:
        use_hub(found.url, monkeypatch)
        cache = str(tmp_path / "cache")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", cache)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("QRANK_DATA", str(tmp_path / "data"))
        yield found


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache used by this test only: it shares no results with other tests."""
    monkeypatch.setenv("QRANK_CACHE", str(tmp_path / "cache"))
    paths.cache_folder.cache_clear()
    yield tmp_path / "cache"
    paths.cache_folder.cache_clear()
