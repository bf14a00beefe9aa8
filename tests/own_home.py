"""A home and an environment of the tests' own: the user's neither change a test nor are written to.

Imported by ``conftest.py`` before any library that reads these variables when it is imported. Subprocesses inherit
everything. A worker of pytest-xdist imports this again and gets a folder inside that of the process that started it.
"""

from __future__ import annotations

import atexit
import contextlib
import locale
import os
import shutil
import site
import tempfile
import time
from pathlib import Path

#: Variables that begin like one of these are dropped: places outside of the home, addresses, tokens and accounts, and
#: what changes texts or numbers. Of these libraries, only what ``_SET`` says holds.
_DROPPED = (
    "HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_", "PYTORCH_TRANSFORMERS_", "TORCH_HOME", "ACCELERATE_",
    "MERGANSER_", "REGMEAN_", "XDG_", "RAY_", "AWS_", "FSSPEC_", "JUPYTER_", "IPYTHON", "MPL", "MATPLOTLIBRC",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "RANK", "LOCAL_RANK", "WORLD_SIZE",
    "OMP_", "OPENBLAS_", "MKL_NUM_THREADS", "MKL_CBWR",
    "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "TTY_", "LANGUAGE", "LC_",
)  # fmt: skip
#: Real corpora that the user has named on purpose; tests that need them only read them.
_KEPT = ("MERGANSER_RESOURCES", "MERGANSER_CACHE")
_SET = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",  # the models are tiny, and xdist's workers share the cores
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
}


def _prepare() -> Path:
    """Make the folder, which is gone when this process ends, and point the environment to it."""
    environment = os.environ
    # pytest and its plugins stay what the user wants: packages, colours, and tmp_path where failures are looked at.
    environment.setdefault("PYTHONUSERBASE", site.getuserbase())
    environment.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    for name, answer in (("NO_COLOR", "0"), ("FORCE_COLOR", "1")):
        if environment.get(name):
            environment.setdefault("PY_COLORS", answer)

    for name in list(environment):
        if name.upper().startswith(_DROPPED) and name not in _KEPT:
            del environment[name]
    folder = Path(tempfile.mkdtemp(prefix="mt-"))  # short: sockets below it have paths of at most 107 bytes
    atexit.register(_remove, folder, os.getpid())
    for name in ("home", "tmp"):
        (folder / name).mkdir()
    environment.update(_SET, HOME=str(folder / "home"), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None  # read TMPDIR again
    time.tzset()
    with contextlib.suppress(locale.Error):  # a system without it
        locale.setlocale(locale.LC_ALL, environment["LC_ALL"])
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


#: What this process and its children have in place of the user's home and temporary folder.
FOLDER = _prepare()
