"""Tuning SAM: data in memory, prompts and losses on the device, runs that can be continued.

`sparsesam tune` is `run.tune`; its parts are usable alone. The extra `tune` brings what this room
needs beside the package: optax and orbax.
"""
