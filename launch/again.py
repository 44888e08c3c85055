"""Whether main.py is running; if it is, Python starts again as soon as this is imported.

That is for the C allocator (see utils.keep_freed_memory), and comes first: what is imported before
has to be imported twice.
"""

import sys
from pathlib import Path

from utils import keep_freed_memory

MAIN = Path(__file__).parent.parent / "main.py"


def is_running():
    """Whether main.py is the program, and not a module of another one."""
    program = getattr(sys.modules["__main__"], "__file__", None)
    return program is not None and Path(program).resolve() == MAIN.resolve()


if is_running():
    keep_freed_memory()
