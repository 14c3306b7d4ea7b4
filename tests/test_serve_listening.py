"""Where `qrank serve` listens, what it reports, and how its options reach the models."""

from __future__ import annotations

import os
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from serving import SECONDS, process, serving
from test_serve import body

from qrank import Reranker
from qrank.bundle.locate import locate
from qrank.cli import main
from qrank.cli.names import split_name
from qrank.errors import InputError, QrankError
from qrank.serve.listening import listen
from qrank.serve.notify import notify


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets here")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short path: a socket's path is limited to about a hundred bytes."""
    path = tmp_path_factory.getbasetemp().parent / f"s{os.getpid()}"
    path.mkdir()
    yield path
    for left in path.iterdir():
        left.unlink()
    path.rmdir()


def asked_at(path: Path) -> int:
    """Send a request over a Unix socket; return its status."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), timeout=60) as client:
        return client.post("http://a/v1/rerank", json=body("/v1/rerank", ["a"])).status_code


@needs_ipv6
@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the system keeps them apart")
def test_two_colons_answer_both_kinds_of_address(length: Reranker) -> None:
    with serving({"mini": length}, host="::") as url:
        assert url.endswith(" (IPv4 too)")
        port = url.split(" ")[0].rpartition(":")[2]
        for host in ("127.0.0.1", "[::1]", "localhost"):
            assert httpx.get(f"http://{host}:{port}/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", "127.0.0.1:"),
        ("0.0.0.0", "0.0.0.0:"),
        pytest.param("::1", "[::1]:", marks=needs_ipv6),
        pytest.param("[::1]", "[::1]:", marks=needs_ipv6),
    ],
)
def test_addresses_are_told_as_clients_need_them(host: str, shown: str) -> None:
    with listen(host, 0) as listening:
        (address,) = listening.addresses("https")
        assert address.startswith(f"https://{shown}")
        assert listening.public is (host == "0.0.0.0")


def test_a_name_listens_at_every_address_it_has_here(length: Reranker) -> None:
    with listen("localhost", 0) as listening:
        addresses = listening.addresses("http")
        assert len({address.rpartition(":")[2] for address in addresses}) == 1
        assert len(addresses) == len({found.getsockname()[0] for found in listening.sockets})
        assert not listening.public
    with serving({"mini": length}, host="localhost") as url:
        assert httpx.get(f"http://localhost:{url.rpartition(':')[2]}/health").status_code == 200


@pytest.mark.parametrize(
    "host", ["", "no.such.host.invalid", "127.0.0.1:80", "http://a", "1.2.3.4.5"]
)
def test_what_is_no_address_names_the_option(host: str) -> None:
    with pytest.raises(InputError, match=r"--host .* is no address .*; give one such as"):
        listen(host, 0)


def test_an_address_that_cannot_be_had_names_the_option() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.sockets[0].getsockname()[1]
        with pytest.raises(QrankError, match=f"--host 127.0.0.1 --port {port}: .*in use"):
            listen("127.0.0.1", port)
        done = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert done.exit_code == 1
    assert "--host 127.0.0.1" in done.stderr
    # An address from a block reserved for documentation.
    with pytest.raises(QrankError, match=r"--host 192\.0\.2\.1 --port 0: "):
        listen("192.0.2.1", 0)


@needs_unix
def test_a_unix_socket_answers_and_is_removed_at_the_end(length: Reranker, folder: Path) -> None:
    path = folder / "q.sock"
    with serving({"mini": length}, host=f"unix:{path}") as address:
        assert address == f"unix:{path}"
        assert asked_at(path) == 200
    assert not path.exists()


@needs_unix
def test_the_command_listens_at_a_unix_socket(folder: Path) -> None:
    path = folder / "q.sock"
    with process("--backend", "fakes:length", "--unix-socket", path) as (address, running):
        assert address == f"unix:{path}"
        assert asked_at(path) == 200
        done = CliRunner().invoke(main, ["serve", "--host", f"unix:{path}"])
        assert done.exit_code == 1
        assert f"--host unix:{path}: another server listens there" in done.stderr
        assert asked_at(path) == 200
        running.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
    assert not path.exists()


@needs_unix
@pytest.mark.parametrize("abstract", [False, True], ids=["file", "abstract"])
def test_systemd_is_told_when_it_is_ready_and_when_it_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch, abstract: bool
) -> None:
    name = f"{folder}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
        with process("--backend", "fakes:length") as (_, running):
            assert manager.recv(100) == b"READY=1"
            running.send_signal(signal.SIGTERM)
            assert manager.recv(100) == b"STOPPING=1"
            assert running.wait(SECONDS) == 0


@needs_unix
def test_a_service_manager_that_is_gone_is_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{folder}/nobody")
    with pytest.raises(QrankError, match="systemd cannot be told READY=1"):
        notify("READY=1")


@needs_unix
def test_a_socket_file_that_was_left_is_replaced(length: Reranker, folder: Path) -> None:
    path = folder / "q.sock"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    with serving({"mini": length}, host=f"unix:{path}"):
        assert asked_at(path) == 200
    assert not path.exists()


@needs_unix
def test_a_file_that_is_no_socket_stays(folder: Path) -> None:
    path = folder / "q.sock"
    path.write_text("mine", "utf-8")
    with pytest.raises(QrankError, match=r"--host unix:.*: there is a file .* no socket"):
        listen(f"unix:{path}", 0)
    assert path.read_text("utf-8") == "mine"


@needs_unix
@pytest.mark.parametrize("path", ["no/such/folder/q.sock", "q" * 200, "."])
def test_a_socket_that_cannot_be_made_names_the_option(folder: Path, path: str) -> None:
    with pytest.raises(QrankError, match="cannot listen at --host unix:"):
        listen(f"unix:{folder / path}", 0)


@needs_unix
def test_a_socket_file_of_another_server_is_not_removed(folder: Path) -> None:
    path = folder / "q.sock"
    with listen(f"unix:{path}", 0):
        path.unlink()
        other = listen(f"unix:{path}", 0)
    assert path.exists()
    other.close()
    assert not path.exists()


def test_an_equals_sign_in_a_path_names_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run=3" / "bundle").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    there = str(tmp_path / "run=3" / "bundle")
    for given, expected in [
        (there, ("", there)),
        ("run=3/bundle", ("", "run=3/bundle")),
        (f"legal={there}", ("legal", there)),
        ("/no/such=3/bundle", ("", "/no/such=3/bundle")),
        ("./no=3/bundle", ("", "./no=3/bundle")),
        ("BAAI/bge=./my-bundle", ("BAAI/bge", "./my-bundle")),
        ("legal=mini", ("legal", "mini")),
        ("mini", ("", "mini")),
    ]:
        assert split_name(given) == expected


def test_a_bundle_below_a_path_with_an_equals_sign_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "run=3"
    folder.mkdir()
    (folder / "bundle").symlink_to(locate("mini").folder)
    with process("--backend", "fakes:length", folder / "bundle", f"b={folder}/bundle") as (url, _):
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
    assert names == ["mini", "b"]


def test_aliases_are_names_too() -> None:
    arguments = ["mini", "other=mini", "--alias", "rerank-v3.5=mini", "--alias=b=other"]
    arguments.append("--strict-models")
    with process("--backend", "fakes:length", *arguments) as (url, _):
        names = [model["id"] for model in httpx.get(f"{url}/v1/models").json()["data"]]
        assert names == ["mini", "other", "rerank-v3.5", "b"]
        for asked, served in [("rerank-v3.5", "mini"), ("b", "other"), (None, "mini")]:
            answer = httpx.post(
                f"{url}/v2/rerank", json={**body("/v2/rerank", ["a"]), "model": asked}
            )
            assert answer.headers["x-qrank-model"] == served
        unknown = httpx.post(f"{url}/v1/rerank", json={**body("/v1/rerank", ["a"]), "model": "x"})
        assert unknown.status_code == 404
        assert "there are: mini, other, rerank-v3.5, b" in unknown.json()["detail"]


def test_options_that_do_not_go_together_say_so() -> None:
    for arguments, text in [
        (["--host", "::1", "--unix-socket", "q"], "give --host or --unix-socket"),
        (["--alias", "a=b", "--port", "0"], "where NAME is one of: mini"),
        (["--alias", "mini=mini", "--port", "0"], "the name of a model already"),
        (["--instruction", "x", "--port", "0"], "--instruction: "),
        (["--scores", "calibrated", "--port", "0"], "qrank calibrate"),
        (["--min-kendall", "0.9999", "--port", "0"], "Kendall tau of 0.9999"),
        (["--compute-dtype", "fp7", "--port", "0"], "fp7"),
    ]:
        done = CliRunner().invoke(main, ["serve", *arguments])
        assert done.exit_code != 0
        assert text in done.stderr
        assert "Traceback" not in done.output
