"""The tests neither read nor write what the user's machine holds, whatever it holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import own_home
from glue_cache import save_glue_cache

#: Where libraries that were imported in the meantime would look for the user's files, or put theirs.
PLACES = """
import pathlib, tempfile
import datasets, fsspec.config, huggingface_hub.constants as hub, jupyter_core.paths, matplotlib, torch.hub
from merganser.lab.zoo import default_zoo
places = [
    pathlib.Path.home(), tempfile.gettempdir(), hub.HF_HOME, hub.HF_HUB_CACHE, hub.HF_TOKEN_PATH,
    datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, datasets.config.HF_MODULES_CACHE,
    torch.hub.get_dir(), matplotlib.get_cachedir(), matplotlib.get_configdir(), fsspec.config.conf_dir,
    jupyter_core.paths.jupyter_data_dir(), jupyter_core.paths.jupyter_runtime_dir(), default_zoo(),
]
"""


def test_every_library_is_at_home() -> None:
    pytest.importorskip("jupyter_core", reason="jupyter_core is not installed: pip install 'merganser[test]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'merganser[lab]'")
    here: dict[str, list[object]] = {}
    exec(PLACES, here)
    child = subprocess.run([sys.executable, "-c", PLACES + "print(*places, sep='\\n')"], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n")[:-1] == [str(place) for place in here["places"]]
    outside = [place for place in here["places"] if own_home.FOLDER not in Path(str(place)).parents]
    assert outside == []


def environment_of(user: Path, temporary: Path) -> dict[str, str]:
    """This process's environment as a user could have it: every setting leads astray, and can be told apart."""
    caches = {
        "HF_HOME": user, "HF_DATASETS_CACHE": user / "datasets", "HF_HUB_CACHE": user / "hub",
        "HUGGINGFACE_HUB_CACHE": user / "hub", "TRANSFORMERS_CACHE": user / "hub", "TORCH_HOME": user / "torch",
        "XDG_CACHE_HOME": user / "cache", "XDG_CONFIG_HOME": user / "config", "MPLCONFIGDIR": user / "mpl",
        "HOME": user / "home", "MERGANSER_ZOO": user / "zoo", "HF_TOKEN_PATH": user / "token",
        "JUPYTER_CONFIG_DIR": user / "jupyter", "IPYTHONDIR": user / "ipython", "AWS_CONFIG_FILE": user / "aws",
        "RAY_TMPDIR": user / "ray", "FSSPEC_CONFIG_DIR": user / "fsspec",
    }  # fmt: skip
    others = {
        "HF_TOKEN": "of the user", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "no",
        "HF_DATASETS_OFFLINE": "no", "http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
        "AWS_PROFILE": "of the user", "RAY_ADDRESS": "127.0.0.1:9", "OPENBLAS_CORETYPE": "Prescott",
        "OMP_NUM_THREADS": "3", "MKL_NUM_THREADS": "3", "COLUMNS": "20", "MPLBACKEND": "of the user",
        "NO_COLOR": "yes", "FORCE_COLOR": "yes", "TZ": "Asia/Kathmandu", "LC_ALL": "POSIX", "LC_NUMERIC": "de_DE",
        "LANGUAGE": "de", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "REGMEAN_STEPS": "7", "TRANSFORMERS_OFFLINE": "no",
    }  # fmt: skip
    mine = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHONUSERBASE"))}
    return {**mine, **others, **{name: str(place) for name, place in caches.items()}, "TMPDIR": str(temporary)}


def test_the_user_s_settings_are_gone(tmp_path: Path) -> None:
    theirs = {
        **environment_of(tmp_path / "user", tmp_path),
        "MERGANSER_RESOURCES": "corpora",
        "CUDA_VISIBLE_DEVICES": "7",
    }
    code = "import json, os, own_home, time; print(json.dumps([dict(os.environ), time.tzname]))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=theirs, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    left, zone = json.loads(done.stdout)
    changed = environment_of(tmp_path / "user", tmp_path).items() - os.environ.items()
    kept = changed & left.items()
    assert kept == set() and zone[0] == "UTC"
    assert left["MERGANSER_RESOURCES"] == "corpora" and left["CUDA_VISIBLE_DEVICES"] == "7"
    assert list(tmp_path.glob("mt-*")) == []


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one process", "xdist"])
def test_a_user_s_machine_changes_nothing(tmp_path: Path, workers: list[str]) -> None:
    user, temporary = tmp_path / "user", tmp_path / "tmp"
    rows = [{"sentence": "of the user's cache", "label": 1}]
    save_glue_cache(user / "datasets", "sst2", {"train": rows, "validation": rows})
    (user / "token").write_text("of the user")
    temporary.mkdir()
    before = listing(user)
    tests = Path(__file__).parent
    chosen = ["test_own_home.py::test_every_library_is_at_home", "tasks/test_data.py", "cli/test_zoo_cli.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *workers, *(str(tests / name) for name in chosen)],
        env=environment_of(user, temporary), cwd=tests.parent, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert listing(user) == before
    assert [path.name.split("-")[0] for path in temporary.iterdir()] == ["pytest"]
