"""Every method, and its options that take another way through the code, with phases that fit into a few steps."""

from nmgraph.methods import METHODS

IN_SHORT = {
    "asp": {"recompute_at": 0.5},
    "bame": {"interval": 2},
    "bimask": {"interval": 2, "candidates": 3},
    "gradual": {"interval": 2},
    "rigl": {"interval": 2},
    "tmask": {"interval": 2, "decay": 2e-4},
}
VARIANTS = {name: (name, IN_SHORT.get(name, {})) for name in METHODS} | {
    "bame, averaging": ("bame", {"interval": 2, "score_steps": 2, "gain": "adam", "changes": "candidate"}),
    "bame, bidirectional": ("bame", {"interval": 2, "bidirectional": True, "candidates": 3}),
    "bimask by gradient": ("bimask", {"interval": 2, "candidates": 3, "criterion": "gradient", "objective": "kept"}),
    "bimask by lot": ("bimask", {"interval": 2, "candidates": 3, "criterion": "multinomial"}),
    "decaying-mask, dense gradient": ("decaying-mask", {"gradient_flow": "dense", "curve": "linear"}),
    "gradual srste": ("gradual", {"interval": 2, "base": "srste", "curve": "linear"}),
    "lbc by gradient": ("lbc", {"criterion": "gradient"}),
    "srste, gradual": ("srste", {"t_i": 0.25, "t_f": 0.75}),
}
