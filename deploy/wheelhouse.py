"""Collect all wheels that qrank needs on a platform, to install it there without a network.

uv resolves for the platform: its packages may need others than this machine's (colorama on
Windows), which pip does not see. pip downloads. In the end, uv installs from the folder alone,
without writing anything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

WINDOWS = {"win_amd64": "x86_64-pc-windows-msvc", "win_arm64": "aarch64-pc-windows-msvc"}


def main() -> None:
    """Parse arguments and collect."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--platform",
        default="native",
        help="a wheel's platform tag: manylinux_2_28_aarch64, win_amd64, macosx_14_0_arm64 "
        "[default: %(default)s, this machine]",
    )
    parser.add_argument("--python", help="such as 3.12  [default: the version that runs this]")
    parser.add_argument("--extras", default="onnx", help="of qrank  [default: %(default)s]")
    parser.add_argument("--wheel", type=Path, help="qrank's  [default: built from this checkout]")
    parser.add_argument("--out", type=Path, help="folder  [default: dist/wheels-PLATFORM-PYTHON]")
    options = parser.parse_args()
    python = options.python or f"{sys.version_info.major}.{sys.version_info.minor}"
    out = options.out or ROOT / "dist" / f"wheels-{options.platform}-{python}"
    if out.exists() and any(path.suffix != ".whl" for path in out.iterdir()):
        parser.error(f"{out} holds other things than wheels: name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".wheels-") as temporary:
        folder = Path(temporary) / "wheels"
        collect(folder, options.platform, python, options.extras, options.wheel)
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)
    wheels = list(out.iterdir())
    size = sum(path.stat().st_size for path in wheels) / 1e6
    sys.stdout.write(
        f"{len(wheels)} wheels, {size:.0f} MB. There: "
        f'pip install --no-index --find-links {out.name} "qrank[{options.extras}]"\n'
    )


def collect(folder: Path, platform: str, python: str, extras: str, wheel: Path | None) -> None:
    """Fill a folder with qrank's wheel and those that it needs.

    Args:
        folder: to make.
        platform: a wheel's tag, or `native`.
        python: version of the target's Python.
        extras: of qrank, separated by commas.
        wheel: qrank's; None: build it.
    """
    folder.mkdir()
    if wheel is None:
        _run("pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.iterdir()
    else:
        wheel = Path(shutil.copy(wheel, folder))
    for_uv, for_pip = tags(platform)
    uv = ["--quiet", "--only-binary", ":all:", "--python-version", python, *for_uv]
    wanted, needed = folder.parent / "wanted", folder.parent / "needed"
    wanted.write_text(f"qrank[{extras}] @ {wheel.resolve().as_uri()}\n", "utf-8")
    _run("uv", "pip", "compile", *uv, "--no-emit-package", "qrank", "-o", needed, wanted)
    pip: list[str | Path] = ["--quiet", "--only-binary", ":all:", "--no-deps", "--dest", folder]
    if for_pip:
        pip += ["--python-version", python, *for_pip]
    _run("pip", "download", *pip, "--requirement", needed)
    alone: list[str | Path] = [
        "--no-index",
        "--find-links",
        folder,
        "--target",
        folder.parent / "nowhere",
    ]
    _run("uv", "pip", "install", "--dry-run", *uv, *alone, f"qrank[{extras}]")


def tags(platform: str) -> tuple[list[str], list[str]]:
    """The arguments of uv and of pip that name a platform.

    Args:
        platform: a wheel's tag; `native`: both take this machine.
    """
    if platform == "native":
        return [], []
    accepted = [platform]
    if found := re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform):
        minor, machine = int(found[1]), found[2]
        name = f"{machine}-manylinux_2_{minor}"
        # A newer glibc runs wheels for an older one; pip takes the tags literally.
        accepted = [f"manylinux_2_{each}_{machine}" for each in range(minor, 16, -1)]
        accepted.append(f"manylinux2014_{machine}")
    elif found := re.fullmatch(r"macosx_(\d+)_(\d+)_(arm64|x86_64)", platform):
        os.environ["MACOSX_DEPLOYMENT_TARGET"] = f"{found[1]}.{found[2]}"  # read by uv
        name = f"{found[3].replace('arm64', 'aarch64')}-apple-darwin"
    elif platform in WINDOWS:
        name = WINDOWS[platform]
    else:
        sys.exit(
            f"no platform {platform!r}: it is manylinux_2_28_x86_64 or the like, "
            f"macosx_14_0_arm64 or the like, {' or '.join(WINDOWS)}, or native"
        )
    return ["--python-platform", name], [x for tag in accepted for x in ("--platform", tag)]


def _run(module: str, *arguments: str | Path) -> None:
    command = [sys.executable, "-m", module, *map(str, arguments)]
    if (code := subprocess.run(command).returncode) != 0:
        sys.exit(code)  # it has said why


if __name__ == "__main__":
    main()
