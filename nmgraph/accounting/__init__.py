"""Floor 3: what a pattern costs and saves, layer by layer."""
