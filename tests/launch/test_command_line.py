"""No flag, default or command changes unseen."""

from freeze_command_line import FROZEN, command_line


def test_the_command_line_is_the_one_that_is_written_down():
    assert command_line() == FROZEN.read_text(encoding="utf-8"), (
        "meant? python tests/launch/freeze_command_line.py"
    )
