"""What happens before step 1: flags, checks, loading, the plan."""

import sys

if sys.platform == "win32":  # before anything is imported that is not there
    print("main.py: error: Windows has no fcntl, which locks a run's directory, and no SIGALRM, "
          "which times rewards out; use WSL2", file=sys.stderr)  # fmt: skip
    sys.exit(2)
