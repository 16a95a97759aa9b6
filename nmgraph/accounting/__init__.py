"""What sparsity costs and saves: operations of a training run, state of methods, patterns under a budget."""
