"""What became of a model, as one HTML file to look at: what was gained, and what is proved."""
