"""Floor 3: drive the methods from an optimizer's steps. Never imports passes: a hand-built sparse layer trains too."""
