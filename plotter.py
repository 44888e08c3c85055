"""`python plotter.py RUN ...`: the same as `python main.py plot RUN ...`."""

import sys

from launch.commands import main

if __name__ == "__main__":
    sys.exit(main(["plot", *sys.argv[1:]]))
