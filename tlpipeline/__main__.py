"""`python -m tlpipeline`, as dvc.yaml calls it."""

import os
import sys

# `-m` puts the working folder first on the path, so a random.py in a workspace would run. The command `tlpipeline` does not put it there.
if not sys.flags.safe_path and sys.path[:1] == [os.getcwd()]:
    del sys.path[0]

from tlpipeline.cli import main

if __name__ == "__main__":
    main()
