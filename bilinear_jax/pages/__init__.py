"""Feature pages: a static site that says what a feature does, and why from the weights."""
