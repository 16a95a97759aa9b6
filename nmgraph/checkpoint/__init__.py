"""Floor 4: files that hold a model, and what may be loaded from them."""
