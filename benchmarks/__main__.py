"""`python -m benchmarks`. It only calls the command line; child processes import this file too."""

import sys

from benchmarks.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
