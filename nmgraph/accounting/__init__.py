"""What sparsity costs and saves: multiply-accumulates of a training run, state of methods."""
