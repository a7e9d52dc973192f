"""The command line. Its modules start fast: commands import JAX when they run."""
