"""The model and what one process needs to run it."""
