"""Where a grid's models come from: the zoo's filters, models of one's own, models that must be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from merganser.errors import UserError
from merganser.lab.grid.cells import ModelSpec, expand
from merganser.lab.grid.compute import cell_id
from merganser.lab.grid.config import ExperimentConfig, localised
from merganser.lab.grid.models import Models
from merganser.lab.grid.run import run_experiment
from merganser.lab.zoo import Zoo, id_of

Trial = Callable[..., ExperimentConfig]


def test_models_that_must_be_there_and_are_not(tmp_path: Path, trial: Trial) -> None:
    config = trial(seeds=[1], default_model_args={"load_from_zoo": "yes"}, contributors=["one", "two"])
    done = run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")
    assert done.cells == 0 and done.failures
    assert all("the zoo holds no model of" in failure.error for failure in done.failures)
    assert "load_from_zoo: maybe" in done.failures[0].error


def test_a_filter_takes_the_zoos_model_of_other_settings(tmp_path: Path, trial: Trial) -> None:
    zoo, spec = Zoo(tmp_path / "zoo"), ModelSpec("one", "one", 1)
    longer = Models(trial(training={"epochs": 3, "learning_rate": 5e-3, "max_length": 16}), zoo).model(spec)
    args = {"load_from_zoo": "yes", "zoo_filter": {"training.epochs": 3}}
    config = trial(contributors={"one": args, "two": {}, "three": {}})
    assert Models(config, zoo).model(spec).id == longer.id
    nothing = trial(contributors={"one": {**args, "zoo_filter": {"training.epochs": 9}}, "two": {}})
    with pytest.raises(UserError, match=r"(?s)no model of one.*nothing has training\.epochs=9.*there is.*3"):
        Models(nothing, zoo).model(spec)
    own = Models(trial(), zoo).model(spec)  # the one of these settings is there now, and is not what was asked for
    with pytest.raises(UserError, match="no model of one"):
        Models(nothing, zoo).model(spec)
    maybe = trial(contributors={"one": {"zoo_filter": {"training.epochs": 9}}, "two": {}})
    assert Models(maybe, zoo).model(spec).id == own.id
    misspelt = trial(contributors={"one": {**args, "zoo_filter": {"training.epoch": 3}}, "two": {}})
    with pytest.raises(UserError, match=r"(?s)no key has the name.*did you mean 'training\.epochs'"):
        Models(misspelt, zoo).model(spec)


def test_hyper_parameters_are_the_published_ones_with_the_configurations_changes(tmp_path: Path, trial: Trial) -> None:
    base = {"model": "nowhere", "title": "x", "architecture": "roberta"}
    config = trial(
        pretrained=base, training={"epochs": 2}, contributors={"one": {"training": {"batch_size": 4}}, "two": {}}
    )
    settings = Models(config, Zoo(tmp_path)).settings(config.contributors["one"])
    assert (settings.epochs, settings.batch_size, settings.learning_rate) == (2, 4, 1e-5)
    assert settings.schedule == "polynomial" and settings.warmup == 0.06 and settings.best_epoch
    with pytest.raises(UserError, match="epoch"):
        Models(trial(training={"epochz": 1}), Zoo(tmp_path)).settings()


def test_a_model_of_ones_own_with_another_label_space(
    tmp_path: Path, trial: Trial, save_ready: Callable[..., Path]
) -> None:
    """Two contributors with different label spaces where one is needed: it is said which, before any work."""
    foreign = save_ready("foreign", "bert", 3, num_labels=5)
    config = trial(
        seeds=[1], contributors={"one": {}, "two": {"checkpoint": str(foreign)}}, methods=["simple"], comparators=[]
    )
    with pytest.raises(UserError, match=r"two.*checkpoint.* labels"):
        run_experiment(config, results=tmp_path / "r", zoo=tmp_path / "zoo")


def test_multi_task_training_is_the_same_whatever_seeds_the_single_models_have(tmp_path: Path, trial: Trial) -> None:
    config = trial(heads=["same", "different"], comparators=["multitask"], seeds=[1, 2])
    models = Models(config, Zoo(tmp_path / "zoo"))
    cells = [cell for cell in expand(config) if cell.kind == "multitask"]
    assert len(cells) == 12
    assert len({id_of(models.multitask_key(cell)) for cell in cells}) == 6
    assert len({cell_id(models, cell) for cell in cells}) == 12


def test_a_base_is_found_by_its_name_in_the_resources(tmp_path: Path, trial: Trial) -> None:
    usual = trial()
    resources = tmp_path / "resources"
    (resources / "org").mkdir(parents=True)
    for place in (resources / "roberta-base", resources / "org" / "other"):
        place.symlink_to(usual.pretrained.model)
    for name, found in (("FacebookAI/roberta-base@main", "roberta-base"), ("org/other", "org/other")):
        pretrained = {**usual.pretrained.model_dump(), "model": name}
        config = trial(pretrained=pretrained, resources_dir=str(resources))
        assert localised(config).pretrained.model == str((resources / found).resolve())
    absent = trial(pretrained={**usual.pretrained.model_dump(), "model": "org/none"}, resources_dir=str(resources))
    assert localised(absent).pretrained.model == "org/none"
