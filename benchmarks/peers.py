"""Other tools to compare with, each in a virtual environment of its own, installed from PyPI.

    python benchmarks/peers.py

The environments lie outside the repository, in ``--cache`` or ``$MERGANSER_BENCHMARKS`` or the user's cache folder,
and are made once. PyTorch goes first and by itself, in the version of ``constraints.txt``, so that the peer runs on
the same PyTorch build; everything else is as the peer's own requirements resolve.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

MERGEKIT = "mergekit==0.1.5"


def mergekit(cache: Path | None = None) -> Path:
    """The folder of mergekit's programs, installed when first asked for.

    Raises:
        subprocess.CalledProcessError: pip could not install it; pip has said why.
    """
    return _environment(MERGEKIT, "mergekit-yaml", cache or default_cache())


def default_cache() -> Path:
    """Where the environments go unless told otherwise."""
    stated = os.environ.get("MERGANSER_BENCHMARKS")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(stated) if stated else caches / "merganser-benchmarks"


def installed_version(programs: Path, package: str) -> str:
    """The version of a package in the environment that holds ``programs``."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.check_output([programs / "python", "-c", code], text=True).strip()


def _environment(requirement: str, program: str, cache: Path) -> Path:
    folder = cache / requirement.replace("==", "-")
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    done = folder / "installed"
    if done.exists():
        return programs
    print(f"installing {requirement} into {folder}", file=sys.stderr)
    subprocess.check_call([sys.executable, "-m", "venv", "--clear", str(folder)])
    pin = folder / "constraints.txt"
    pin.write_text(_torch_pin() + "\n")
    for wanted in ("torch", requirement):
        pip = [programs / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.check_call([*pip, "-c", str(pin), wanted], stdout=sys.stderr)
    subprocess.check_call([programs / program, "--help"], stdout=subprocess.DEVNULL)
    done.touch()
    return programs


def _torch_pin() -> str:
    pins = (Path(__file__).resolve().parents[1] / "constraints.txt").read_text().splitlines()
    return next(line for line in pins if line.startswith("torch=="))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, help="folder of the environments")
    print(mergekit(parser.parse_args().cache))
