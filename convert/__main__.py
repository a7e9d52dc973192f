"""The command line: `python -m convert SRC DST`."""

import sys

from sparsesam_jax.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
