"""The `drorae` command on the fake graph, as a program: `python -m fake_graph run ...`."""

import sys

from fake_graph import stages
from pipelines.cli import main

if __name__ == "__main__":
    stages.install()
    sys.exit(main(sys.argv[1:]))
