"""Floor 0: N:M sparsity of tensors. No modules, graphs, files or logging.

Legend of shape suffixes: O output channels, S kernel positions, C reduction axis (input channels),
G blocks along C, M weights in a block, B bytes.
"""
