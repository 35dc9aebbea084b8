"""docs/reference/metrics.md has the series of a real server, all of them and no others."""

import re
from pathlib import Path

import httpx

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"


def test_every_series_is_on_the_page_and_the_other_way_round(http: httpx.Client) -> None:
    told = dict(re.findall(r"^\| `([\w:]+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))
    shown = dict(re.findall(r"^# TYPE (\S+) (\w+)$", http.get("/metrics").text, re.MULTILINE))
    # When a series began, which the client library adds to each that counts.
    assert {name: kind for name, kind in shown.items() if not name.endswith("_created")} == told
