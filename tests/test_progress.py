"""What stands on standard error."""

import pytest

from deltacome.progress import bar, print_warning


def test_a_warning_has_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with bar("working", 3) as advance:
        advance(1)
        print_warning("look out")
        advance(2)
    lines = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    assert lines[0] == "warning: look out" and lines[1].startswith("working: 100%")
