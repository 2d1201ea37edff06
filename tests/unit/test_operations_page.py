"""The page on operations names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from support import ROOT

from actpipe import errors
from actpipe.metrics import KNOWN
from actpipe.metrics_server import PREFIX

PAGE = (ROOT / "docs" / "operations.md").read_text()


def test_every_metric_is_on_the_page_under_the_name_that_is_served():
    served = {PREFIX + name + ("_total" if kind == "counter" else "") for name, (kind, _) in KNOWN.items()}

    assert served - set(re.findall(r"`(actpipe_\w+)`", PAGE)) == set()


def test_every_event_is_on_the_page_and_no_other():
    sources = "".join(Path(ROOT / "actpipe" / name).read_text() for name in ("telemetry.py", "status.py"))
    table = PAGE[PAGE.index("| event |") : PAGE.index("```bash\njq")]
    named = set(re.findall(r"^\| `([a-z ]+)`", table, re.MULTILINE))

    assert {event for event in named if f'"{event}"' not in sources} == set()
    assert set(re.findall(r'event\("([a-z ]+)"', sources)) <= named


def test_every_exit_code_is_on_the_page():
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    table = PAGE[PAGE.index("| code |") : PAGE.index("After any of them")]

    assert codes <= set(map(int, re.findall(r"^\| (\d+) \|", table, re.MULTILINE)))
