"""Floor 3: understand a model by its graph, then rewrite as little of it as possible."""
