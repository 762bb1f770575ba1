"""The bar of prepare labels its two times."""

import io
import re

from rich.console import Console

from eagle_train.data.prepare import Progress
from eagle_train.watching.progress import prepare_progress


def test_times_have_names():
    console = Console(file=io.StringIO(), width=120, force_terminal=True, no_color=True)
    with prepare_progress(console) as show:
        show(Progress("rows", 3, 10, 0, 1))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert re.search(r"3/10 1 bad elapsed \d:\d\d:\d\d left [-\d]:[-\d]{2}:[-\d]{2}", shown)
