"""Training: data, the one fit loop, and a recipe each for language models and SAEs."""
