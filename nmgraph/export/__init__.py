"""Floor 4: write the finished model for others to run, and prove what was written."""
