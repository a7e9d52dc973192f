"""`python -m convert` in a clone; elsewhere `sparsesam convert` and `sparsesam_jax.checkpoints`."""
