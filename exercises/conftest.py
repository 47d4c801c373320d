"""Shows each exercise as one line, a sentence instead of a traceback."""

import textwrap

import pytest

LINES = []


def pytest_configure(config):
    config.option.tbstyle, config.option.reportchars = "no", "N"  # no tracebacks, no summary


@pytest.fixture
def your():
    from exercises import stubs  # here, so that a syntax error becomes a line, too
    return stubs


def pytest_runtest_makereport(item, call):
    text, error = "right", call.excinfo
    if error:
        written = not error.errisinstance(NotImplementedError)
        text = error.exconly().removeprefix("Failed: ") if written else "not written yet"
        lines = [entry.lineno + 1 for entry in error.traceback if entry.path.name == "stubs.py"]
        text += f" (exercises/stubs.py:{lines[-1]})" if lines else ""
    if error or call.when == "call":
        line = f"{item.name.removeprefix('test_').replace('_', ' '):26} {text}"
        LINES.append(textwrap.fill(line, 100, subsequent_indent=" " * 27))


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line("\n".join(LINES))
