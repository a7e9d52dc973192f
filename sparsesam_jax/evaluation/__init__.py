"""What sparsity costs: quality of masks on photos with ground truth, per image and per method.

`sparsesam evaluate` is `runner.run`; its parts are usable alone: `metrics` compare masks,
`datasets` finds and reads photos, `prompts` takes prompts from ground truth, `protocols` says how
an image gets into the model and a mask out of it.
"""
