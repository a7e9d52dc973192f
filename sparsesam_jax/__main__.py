"""`python -m sparsesam_jax`: the command line without its installed name."""

import sys

from sparsesam_jax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
