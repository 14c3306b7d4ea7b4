"""qrank on aarch64 under emulation: proof, ranking, and logits beside this machine's.

`make arm` runs it on Debian and x86-64, before a release. qemu and an arm64 Python come from where
apt gets its packages, the wheels from the package index. All of it lies in build/arm; nothing is
installed on this machine, and nothing needs root.

`--report FILE` writes what `qrank doctor --report` says there, for docs/reports.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qrank.bundle.locate import bundled
from qrank.bundle.manifest import MIN_PROBES, Manifest

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "arm"

QEMU = "trixie"
"""Debian's release that qemu is from: bookworm's 7.2 dies when onnxruntime is imported."""

SYSTEM, GLIBC, PYTHON = "bookworm", "2_36", "3.11"
"""Debian's release that is emulated, that of Raspberry Pi OS 12; its glibc and Python."""

CPU = "cortex-a76"
"""A Raspberry Pi 5's: int8 dot products and fp16, no int8 matrices, no bf16."""

TARGETS = {
    "onnx-int8": 0.1,
    "openvino-int8": 0.3,
}
"""Target -> largest difference of a logit of `mini` from this machine's. onnxruntime multiplies the
same integers, but an activation near the middle of two may round to the other. OpenVINO also rounds
activations to 8 bits on x86 CPUs with VNNI. Sums of int8 products that overflow were off by 0.8 and
more."""

PATIENCE = 1800.0
"""Seconds that a target may take in its own process, instead of the minute that is a hang."""

DOCUMENTS = ["Bees make honey.", "Plants make sugar from light.", "Mars is red."]

SCORE = f"""
import json, sys, time
from qrank import Reranker, backends
from qrank.backends import isolation
from qrank.converters.checkpoint.probes import probe_pairs

isolation._SECONDS = {PATIENCE}
name = sys.argv[1]
pairs = sorted(probe_pairs(), key=lambda pair: len("".join(pair)))[:12]
dtype = "fp32" if name.startswith("openvino") else None
start = time.monotonic()
with Reranker("mini", backend=name, compute_dtype=dtype, threads=1) as reranker:
    proof = time.monotonic() - start
    ranking = reranker.rank("how do plants make food?", {DOCUMENTS})
    found = {{
        "proof": proof,
        "order": [each.index for each in ranking],
        "logits": reranker.score(pairs, raw=True).tolist(),
    }}
print(json.dumps(found))
"""
"""Proves a target on its probes, ranks, and scores the shortest probes' texts."""


def main() -> None:
    """Set up, and check every target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="[default: all]")
    parser.add_argument("--report", type=Path, help="write a report to this file instead")
    options = parser.parse_args()
    targets = options.targets or list(TARGETS)
    if sys.platform != "linux" or os.uname().machine != "x86_64" or not shutil.which("apt-get"):
        sys.exit("this takes Debian, or what is made of it, on x86-64")
    start = time.monotonic()
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        python = emulated_python(Path(folder))
        say(f"Debian {SYSTEM} on {CPU} in {version()}: {time.monotonic() - start:.0f} s")
        if options.report:
            write_report(python, targets, options.report)
            return
        examine(python)
        if different := [target for target in targets if not agrees(python, target)]:
            sys.exit(f"aarch64 and this machine differ: {', '.join(different)}")


def examine(python: Path) -> None:
    """Have `qrank doctor` compute in every backend there."""
    backends = json.loads(run(python, "-P", "-m", "qrank", "doctor", "--json"))["backends"]
    able = [
        backend["name"]
        for backend in backends
        for device in backend["devices"]
        if device["name"] == "cpu" and device["computes"]
    ]
    say(f"doctor: {', '.join(able)} compute")
    if missing := {target.partition("-")[0] for target in TARGETS} - set(able):
        sys.exit(f"{', '.join(missing)} cannot: {json.dumps(backends, indent=2)}")


def agrees(python: Path, target: str) -> bool:
    """Whether a target computes there as here; says how far they are apart."""
    start = time.monotonic()
    there = json.loads(run(python, "-P", "-c", SCORE, target, HF_HUB_OFFLINE="1").splitlines()[-1])
    took = time.monotonic() - start
    here = json.loads(run(sys.executable, "-P", "-c", SCORE, target).splitlines()[-1])
    differences = np.abs(np.subtract(there["logits"], here["logits"]))
    say(f"{target}: proven there in {there['proof']:.0f} s, {took:.0f} s in all")
    say("  aarch64 " + " ".join(f"{logit:7.3f}" for logit in there["logits"]))
    say("  here    " + " ".join(f"{logit:7.3f}" for logit in here["logits"]))
    say(
        f"  order {there['order']}, here {here['order']}; largest difference of a logit "
        f"{differences.max():.4f}, allowed {TARGETS[target]}"
    )
    return bool(there["order"] == here["order"] and differences.max() <= TARGETS[target])


def write_report(python: Path, targets: Sequence[str], path: Path) -> None:
    """Have `qrank doctor` write a report there, and add that it is an emulation."""
    bundle = python.with_name("mini")
    shutil.copytree(bundled()["mini"], bundle)
    manifest = Manifest.load(bundle)
    probes = manifest.probes
    # A second computes 15 to 25 tokens: the shortest, as many as a bundle must have.
    short = np.argsort(probes.work.lengths, kind="stable")[:MIN_PROBES]
    few = replace(probes, work=probes.work.take(short), logits=probes.logits[short])
    variants = {name: manifest.variants[name] for name in targets}
    replace(manifest, probes=few, variants=variants).save(bundle)
    say(run(python, "-P", "-m", "qrank", "doctor", "--report", path.absolute(), "-m", bundle))
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    report["machine"] |= {"cpu": CPU, "emulator": version()}
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", "utf-8")


def emulated_python(folder: Path) -> Path:
    """A command in a new folder that is Python on aarch64, with qrank and an empty cache."""
    emulator, system = WORK / "qemu", WORK / "system"
    if not emulator.exists():
        unpack(debian(QEMU, "amd64", "qemu-user"), emulator, "./usr/bin/qemu-aarch64")
    if not system.exists():
        unpack(debian(SYSTEM, "arm64", f"python{PYTHON}", "libstdc++6"), system)
    wheels, site = folder / "wheels", folder / "site"
    uv = ROOT / ".venv-wheelhouse" / "bin" / "python"
    tag = f"manylinux_{GLIBC}_aarch64"
    house: list[str | Path] = [uv, ROOT / "deploy" / "wheelhouse.py", "--extras", "onnx,openvino"]
    run(*house, "--platform", tag, "--python", PYTHON, "--out", wheels)
    platform = f"aarch64-manylinux_{GLIBC}"
    install: list[str | Path] = [uv, "-m", "uv", "pip", "install", "--quiet", "--target", site]
    install += ["--python-platform", platform, "--python-version", PYTHON]
    run(
        *install,
        "--only-binary",
        ":all:",
        "--no-index",
        "--find-links",
        wheels,
        "qrank[onnx,openvino]",
    )
    # A child process starts this command again: it is what the emulated Python takes itself for.
    command = [emulator / "usr/bin/qemu-aarch64", "-cpu", CPU, "-L", system, "-0"]
    python = folder / "python"
    lines = [
        "#!/bin/sh",
        f"export PYTHONHOME={shlex.quote(str(system / 'usr'))}",
        f"export PYTHONPATH={shlex.quote(str(site))}",
        f"export QRANK_CACHE={shlex.quote(str(folder / 'cache'))}",
        f'exec {shlex.join(map(str, command))} "$0" '
        f'{shlex.quote(str(system / f"usr/bin/python{PYTHON}"))} "$@"',
    ]
    python.write_text("\n".join(lines) + "\n", "utf-8")
    python.chmod(0o755)
    return python


def debian(release: str, architecture: str, *packages: str) -> list[Path]:
    """Files of Debian's packages and all that they depend on, downloaded by apt with its keys."""
    folder = WORK / f"apt-{release}-{architecture}"
    for part in ("lists/partial", "archives/partial", "parts"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "status").write_text("")  # nothing is installed
    asked = "$(LABEL)\t$(COMPONENT)\t$(REPO_URI)"
    known = [
        line.split("\t") for line in run("apt-get", "indextargets", "--format", asked).split("\n")
    ]
    mirrors = [line[2] for line in known if line[:2] == ["Debian", "main"]]
    if not mirrors:
        sys.exit("apt has no mirror of Debian: see /etc/apt and `apt-get update`")
    key = "/usr/share/keyrings/debian-archive-keyring.gpg"
    source = f"deb [signed-by={key}] {mirrors[0]} {release} main\n"
    (folder / "sources.list").write_text(source, "utf-8")
    settings = {
        "APT::Architecture": architecture,
        "APT::Architectures": architecture,
        "APT::Sandbox::User": "root",
        "Acquire::Languages": "none",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "Dir::Etc::preferencesparts": folder / "parts",
        "Dir::Etc::sourcelist": folder / "sources.list",
        "Dir::Etc::sourceparts": folder / "parts",
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
    }
    apt = [
        "apt-get",
        "-qq",
        *(x for name, value in settings.items() for x in ("-o", f"{name}={value}")),
    ]
    run(*apt, "update")
    run(*apt, "--yes", "--no-install-recommends", "--download-only", "install", *packages)
    return sorted((folder / "archives").glob("*.deb"))


def unpack(packages: Sequence[Path], folder: Path, *members: str) -> None:
    """Unpack Debian's packages, or only some of their files; the folder is there when all are."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    for package in packages:
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE
        ) as tar:
            subprocess.run(["tar", "-x", "-C", new, *members], stdin=tar.stdout, check=True)
    new.rename(folder)


def version() -> str:
    """The emulator's name and version: `qemu 10.0.13`."""
    said = run(WORK / "qemu/usr/bin/qemu-aarch64", "--version")
    return f"qemu {said.split()[2]}"


def run(*command: str | Path, **variables: str) -> str:
    """What a command prints; if it fails, this ends with what it said.

    Python gets -P: the current folder holds sources of qrank.
    """
    words = [str(word) for word in command]
    done = subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{shlex.join(words)[:300]} failed ({done.returncode}):\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
