"""Recipes: complete settings of each pipeline, as YAML files of the trainer's flags."""
