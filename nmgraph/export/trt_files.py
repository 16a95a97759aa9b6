"""Names of what ``--trt`` writes into an export's directory."""

ENGINE = "model.plan"
MACHINE = "model.plan.json"
LOG = "model.plan.log"
LAYERS = "model.plan.layers.json"
CACHE = "model.timing-cache"
FILES = (ENGINE, MACHINE, LOG, LAYERS, CACHE)
