"""Everything that trains: recipes, stages, objectives, data and evaluation."""
