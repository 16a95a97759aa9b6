"""Floor 5: trainers that own the loop, each a few lines over ``nmgraph.attach``; their packages are optional."""
