"""Floor 2: modules that multiply by a masked weight, and keep a method's state."""
