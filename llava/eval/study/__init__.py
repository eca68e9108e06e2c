"""Studies: variants of a recipe, each trained with several seeds, scored, and compared with a baseline."""
