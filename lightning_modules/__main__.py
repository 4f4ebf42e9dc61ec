"""`python -m penstock.lightning_modules`, and `python -m lightning_modules` in a checkout: the `penstock` program.

`python -m` puts the working folder first on the import path, the command `penstock` does not. It is taken off, so that
folders such as `kernels` of a checkout, or of the user, shadow nothing of the environment; what should be imported from
the working folder is named by `PYTHONPATH=.`, the same for both.
"""

import os
import sys

if not sys.flags.safe_path and sys.path[0] == os.getcwd():
    del sys.path[0]

from penstock.lightning_modules.cli import main

if __name__ == "__main__":
    sys.exit(main())
