"""The answer to whether joining pays, for a person."""

from fedllm.planning import measured_ways as module
from fedllm.planning.measured_ways import (
    ALONE,
    CLIENT,
    JOINT,
    NO_PRIVACY,
    THEN_PERSONAL,
)
from fedllm.planning.way_lines import way_lines, ways_plan
from tests.helpers.ways import KNOWN, way


def test_the_text_names_each_way_the_verdict_and_what_was_not_measured(monkeypatch):
    monkeypatch.setattr(module, "measured_ways", lambda: tuple(KNOWN))

    lines = "\n".join(way_lines(ways_plan(20, 243, 8.0)))

    assert f"{ALONE}: 2.45 (2.40 to 2.50); make" in lines
    assert f"{NO_PRIVACY}: not measured" in lines
    assert f"joining pays: {JOINT}{THEN_PERSONAL} is 0.15 below alone" in lines
    assert f"100 clients of 48 rows at epsilon 8: {CLIENT}: 2.50, alone 2.60" in lines
    lines = "\n".join(way_lines(ways_plan(100, 48, 8.0)))
    assert f"joining pays: {CLIENT} is 0.10 below alone" in lines
    monkeypatch.setattr(
        module, "measured_ways", lambda: (KNOWN[0], way(CLIENT, 20, 243, 8.0, 2.75))
    )
    lines = "\n".join(way_lines(ways_plan(20, 243, 8.0)))
    assert f"joining does not pay: {CLIENT} is 0.30 above alone" in lines
    lines = "\n".join(way_lines(ways_plan(7, 9, 8.0)))
    assert "whether joining pays: not measured for these numbers" in lines
