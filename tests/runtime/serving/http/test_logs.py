"""The number of log lines is bounded, and they hold the right fields."""

from __future__ import annotations

import json
import logging

from ditf.runtime.serving.http import logs


def test_repeated_lines_are_counted_and_lines_about_requests_are_not(capsys):
    with logs.logging_to_stderr("json", logging.INFO):
        for number in range(100):
            logging.getLogger(logs.LOGGER).info("request")
            logging.getLogger("asyncio").error(f"accept failed, {number}")
            logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    events = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    assert events.count("request") == 100
    assert sum(event.startswith("accept failed") for event in events) == logs.BURST + 1
    assert events[-2:] == ["accept failed, 0 (repeated)", "Invalid HTTP request received. (repeated)"]


def test_another_kind_of_error_at_the_same_place_is_written(capsys):
    def fail(error):
        try:
            raise error
        except Exception as caught:
            logging.getLogger("asyncio").error("failed", exc_info=caught)

    with logs.logging_to_stderr("text", logging.INFO):
        for _ in range(50):
            fail(OSError("no descriptor"))
        fail(ValueError("another"))
    err = capsys.readouterr().err
    assert err.count("no descriptor") == logs.BURST
    assert err.count("another") == 1
    assert "failed (repeated) times=30" in err
