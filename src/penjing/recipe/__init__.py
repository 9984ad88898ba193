"""Step, Plan and Recipe: instructions as plain values, what they decide, and their YAML and JSON."""

from penjing.recipe.context import Context
from penjing.recipe.plans import Plan, Reason
from penjing.recipe.recipes import Recipe
from penjing.recipe.steps import STEPS, Step, matches, step

__all__ = ["STEPS", "Context", "Plan", "Reason", "Recipe", "Step", "matches", "step"]
