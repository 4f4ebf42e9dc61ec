"""`python -m penstock.lightning_modules`, and `python -m lightning_modules` in a checkout: the `penstock` program."""

import sys

from penstock.lightning_modules.cli import main

if __name__ == "__main__":
    sys.exit(main())
