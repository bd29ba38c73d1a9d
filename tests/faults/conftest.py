"""Every test here is a fault: marked `faults`, and written into a record with --record FILE."""

import os
from pathlib import Path

import pytest
from fault_runs import Undisturbed, make_place, undisturbed, write_record
from runs import fork_server

HERE = Path(__file__).parent
RECORD: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--record", metavar="FILE", help="write each fault and its end to this file")


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.faults)


def pytest_runtest_logreport(report):
    """On the controller, for the reports of all workers."""
    if report.when != "call" or "tests/faults/" not in report.nodeid or report.skipped:
        return
    properties = dict(report.user_properties)
    fault = {"test": report.nodeid.split("tests/faults/")[1], "survived": report.passed}
    RECORD.append(fault | properties | {"seconds": round(report.duration, 1)})


def pytest_sessionfinish(session):
    path = session.config.getoption("--record", default=None)
    if path and not hasattr(session.config, "workerinput"):
        faults = sorted(RECORD, key=lambda f: f["test"])
        level = f"REFLUX_FAULTS={os.environ.get('REFLUX_FAULTS', 'short')}"
        write_record(Path(path), faults, [level, "pytest", *session.config.invocation_params.args])


def pytest_terminal_summary(terminalreporter):
    lost = sum(not fault["survived"] for fault in RECORD)
    if RECORD:
        terminalreporter.write_line(f"faults: {len(RECORD)} tried, {lost} lost")


@pytest.fixture(scope="session")
def server():
    return fork_server()


@pytest.fixture(scope="session")
def whole(server, talkers, tmp_path_factory):
    """whole(phase, name, **tables): the undisturbed run, made once."""
    made: dict[str, Undisturbed] = {}

    def get(phase: str, name: str = "", **over) -> Undisturbed:
        key = name or phase
        if key not in made:
            directory = tmp_path_factory.mktemp("whole") / key
            made[key] = undisturbed(make_place(server, talkers, directory, phase, **over))
        return made[key]

    return get
