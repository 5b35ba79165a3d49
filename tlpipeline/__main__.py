"""`python -m tlpipeline`, as dvc.yaml calls it."""

from tlpipeline.cli import main

if __name__ == "__main__":
    main()
