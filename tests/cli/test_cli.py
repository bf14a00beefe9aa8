"""The command line end to end: data on standard output, everything else on standard error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from merganser.cli import COMMANDS, main


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def pair(save_ready, tmp_path: Path) -> tuple[list[Path], Path]:
    """Two models that can read text, and data for them."""
    models = [save_ready(f"m{n}", "bert", seed=n) for n in (1, 2)]
    rows = [{"text": f"a b {word} d", "label": n % 2} for n, word in enumerate("efghijkl")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return models, data


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, click.testing; from merganser.cli import cli\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    result = click.testing.CliRunner().invoke(cli, [name, '--help'])\n"
        "    assert result.exit_code == 0 and result.output.startswith('Usage'), result.output\n"
        "assert click.testing.CliRunner().invoke(cli, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'datasets', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_collect_merge_evaluate_inspect_verify_reproduce(pair, tmp_path: Path, capsys) -> None:
    models, data = pair
    for model in models:
        assert run("collect", model, "--data", data, "--fisher", "--label", "letters") == 0
        out, err = capsys.readouterr()
        assert out.strip() == str(model / "merge_statistics.safetensors")
        assert "8 examples" in err and "publish" in err
    merged = tmp_path / "merged"
    assert run("merge", *models, "--method", "regmean", "-o", merged, "--weights", "1,2", "--alpha", "0.5") == 0
    assert capsys.readouterr()[0].strip() == str(merged)
    recipe = json.loads((merged / "provenance.json").read_text())["recipe"]
    assert recipe["options"]["alpha"] == 0.5
    assert [c["coefficient"] for c in recipe["contributors"]] == [1, 2]
    assert run("evaluate", merged, *models, "--data", data, "--ensemble", "--json", "--bootstrap", 0) == 0
    out, _ = capsys.readouterr()
    assert "ensemble" in out and json.loads(out)
    assert run("evaluate", merged, "--data", data) == 0
    assert "merged" in capsys.readouterr()[0]
    for path in (models[0], merged, models[0] / "merge_statistics.safetensors"):
        assert run("inspect", path) == 0
        assert run("inspect", path, "--json") == 0
    assert run("inspect", models[0] / "merge_statistics.safetensors", "--validate") == 0
    assert "positive semi-definite" in capsys.readouterr()[0]
    assert run("verify", merged) == 0
    assert run("reproduce", merged) == 0
    assert "every byte the same" in capsys.readouterr()[0]
    (merged / "config.json").write_text("{}")
    assert run("verify", merged) == 2
    assert "config.json was changed" in capsys.readouterr()[1]


def test_a_recipe_and_flags_mean_the_same(pair, tmp_path: Path, capsys) -> None:
    models, data = pair
    for model in models:
        assert run("collect", model, "--data", data) == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: regmean\ncontributors:\n  - {{model: {models[0]}, coefficient: 1}}\n"
        f"  - {{model: {models[1]}, coefficient: 3}}\noptions: {{alpha: 0.5}}\nexclude: '*.layer.1.*'\n"
    )
    assert run("merge", recipe, "-o", tmp_path / "a") == 0
    flags = ["--method", "regmean", "--weights", "1,3", "--option", "alpha=0.5", "--exclude", "*.layer.1.*"]
    assert run("merge", *models, *flags, "-o", tmp_path / "b") == 0
    names = ("model.safetensors", "provenance.json", "README.md", "config.json", "tokenizer.json")
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert run("merge", recipe, "--alpha", "0.1", "-o", tmp_path / "c") == 0  # flags win
    assert json.loads((tmp_path / "c" / "provenance.json").read_text())["recipe"]["options"]["alpha"] == 0.1


@pytest.mark.parametrize("own", [{"density": 0.5}, None])
def test_a_flag_without_effect_is_refused(tmp_path: Path, capsys, own: dict[str, float] | None) -> None:
    """Options that every contributor has of its own, or that a file of mergekit leaves to mergekit's defaults."""
    file = tmp_path / "merge.yaml"
    base, *models = "org/base", "org/a", "org/b"
    people = [{"model": model, "options": own} for model in models]
    ours = {"method": "ties", "base": base, "contributors": people}
    weights = [{"model": model, "parameters": {"weight": 1}} for model in models]
    theirs = {"merge_method": "ties", "base_model": base, "models": weights, "dtype": "float32"}
    file.write_text(yaml.safe_dump(ours if own else theirs))
    with pytest.raises(SystemExit) as end:
        main(["merge", str(file), "--option", "density=0.1", "--explain"])
    told = capsys.readouterr().err
    assert end.value.code == 2 and f"every contributor of {file} has its own density" in told
    with pytest.raises(SystemExit) as end:
        main(["merge", str(file), "--option", "scale=0.1", "--explain"])
    assert end.value.code == 0 and "scale: 0.1" in capsys.readouterr().out


def test_a_dry_run_prints_the_plan_and_writes_nothing(pair, tmp_path: Path, capsys) -> None:
    models, data = pair
    for model in models:
        run("collect", model, "--data", data)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    models = [*models, "--method", "regmean"]
    assert run("merge", *models, "--dry-run") == 0
    out, _ = capsys.readouterr()
    assert "regmean" in out and "token counts" in out and "peak memory" in out and "not a linear map" in out
    assert run("merge", *models, "--dry-run", "--json", "-o", tmp_path / "never") == 0
    plan = json.loads(capsys.readouterr()[0])
    weights = sum(t.numel() * t.element_size() for t in _state(models[0]).values())
    assert plan["bytes_written"] == weights
    assert sum(plan["counts"].values()) == len(_state(models[0]))
    assert sorted(tmp_path.rglob("*")) == before


def _state(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mrege"], "did you mean 'merge'"),
        (["merge", "a", "b"], "where to?"),
        (["merge", "a", "b", "-o", "x", "--weights", "one,two"], "no list of numbers"),
        (["merge", "a", "b", "-o", "x", "--option", "alpha"], "not KEY=VALUE"),
        (["merge", "none.yaml", "-o", "x"], "unreadable"),
        (["verify", "nowhere"], "provenance.json"),
        (["inspect", "nowhere"], "no such folder"),
        (["collect", "nowhere", "--data", "nothing.jsonl"], "nothing.jsonl"),
    ],
)
def test_mistakes_exit_with_2(arguments: list[str], message: str, capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert message in err and out == ""
    assert list(tmp_path.iterdir()) == []
