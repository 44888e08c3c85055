"""The command line as a text: `python tests/launch/freeze_command_line.py` writes command_line.txt.

Every flag with its other names, its default in each preset, what a preset changes on other data,
and every command with what it takes. A change to it is then seen in review.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FROZEN = Path(__file__).with_name("command_line.txt")
sys.path.insert(0, str(ROOT))

from launch.commands import COMMANDS, build_command_parser  # noqa: E402
from launch.parser import build_parser  # noqa: E402
from launch.presets import PRESETS, PRESETS_ON  # noqa: E402


def command_line():
    """The text."""
    parsers = {preset: build_parser(preset) for preset in PRESETS}
    lines = [f"# flag, other names: default of {', '.join(PRESETS)} (one where all are equal)", ""]
    for group in next(iter(parsers.values()))._action_groups:
        actions = [a for a in group._group_actions if not isinstance(a, argparse._HelpAction)]
        lines += [f"[{group.title}]"] if actions else []
        for action in actions:
            defaults = [repr(parser.get_default(action.dest)) for parser in parsers.values()]
            shown = defaults[:1] if len(set(defaults)) == 1 else defaults
            lines.append(f"{' '.join(action.option_strings)}: {', '.join(shown)}")
        lines += [""] if actions else []
    lines.append("[what a preset changes on other data]")
    for (preset, dataset), changed in PRESETS_ON.items():
        lines.append(f"{preset} on {dataset}: {changed}")
    for name in COMMANDS:
        lines += ["", f"[{name}]"]
        for action in build_command_parser(name)._actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(" ".join(action.option_strings) or action.metavar)
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FROZEN.write_text(command_line(), encoding="utf-8")
