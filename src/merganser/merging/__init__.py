"""From a recipe to a plan to a merged folder with its provenance."""

from merganser.checkpoints.sources import Source
from merganser.merging.extract import extract
from merganser.merging.memory import RunSettings
from merganser.merging.merge import MergeResult, carry_out, merge, prepare
from merganser.merging.plan import AdapterForm, Plan, Step
from merganser.merging.planning import make_plan
from merganser.merging.recipe import Contributor, Recipe, load_recipe, make_recipe
from merganser.merging.verification import Verification, reproduce, verify

__all__ = [
    "AdapterForm",
    "Contributor",
    "MergeResult",
    "Plan",
    "Recipe",
    "RunSettings",
    "Source",
    "Step",
    "Verification",
    "carry_out",
    "extract",
    "load_recipe",
    "make_plan",
    "make_recipe",
    "merge",
    "prepare",
    "reproduce",
    "verify",
]
