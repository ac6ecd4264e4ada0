"""A run as data: a recipe is a YAML file, its stages are functions from model to model."""

from jopt.recipe._load import RecipeError as RecipeError
from jopt.recipe._load import built_in as built_in
from jopt.recipe._load import find as find
from jopt.recipe._load import load as load
from jopt.recipe._profile import products as products
from jopt.recipe._profile import profile as profile
from jopt.recipe._run import Result as Result
from jopt.recipe._run import run as run
from jopt.recipe._schema import Recipe as Recipe
from jopt.train import TrainingDiverged as TrainingDiverged
