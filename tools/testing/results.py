"""What became of tests, and how that is told: the end of a run, and JUnit XML."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

OUTCOMES = ("passed", "failed", "skipped")
SLOWEST = 10
"""How many of the slowest tests the end of a run shows."""


@dataclasses.dataclass
class TestResult:
    """What became of one test."""

    file: str  # "lazy/test_state"
    test: str  # unittest's id, "module.Class.method", or what happened outside any test
    outcome: str  # one of OUTCOMES
    seconds: float = 0.0
    message: str = ""  # tracebacks, or the reason of a skip
    note: str = ""  # how the process ended, where the test took it down
    output: str = ""  # what the test printed
    failures: list[TestResult] = dataclasses.field(default_factory=list)  # before this run

    @property
    def flaky(self) -> bool:
        """Whether the test failed, and passed when it ran again."""
        return self.outcome == "passed" and bool(self.failures)

    @property
    def name(self) -> str | None:
        """The test's name for unittest's command line, "Class.method"; None if it is no test."""
        found = re.fullmatch(rf"{re.escape(Path(self.file).name)}\.(\w+\.\w+)", self.test)
        return found[1] if found else None


@dataclasses.dataclass
class FileResult:
    """The results of a file's tests, or of a part of them."""

    file: str
    tests: list[TestResult]
    seconds: float
    not_run: list[str] = dataclasses.field(default_factory=list)  # ids of tests that never began


def duration(seconds: float) -> str:
    """How long, for people: "48 s", "12 min 5 s"."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def counts(results: list[TestResult]) -> str:
    """The line people and tools read: "N passed, N failed, N skipped"."""
    outcomes = [r.outcome for r in results]
    return ", ".join(f"{outcomes.count(o)} {o}" for o in OUTCOMES)


def rerun_command(result: TestResult, slow: bool) -> str:
    """The command that runs one test again."""
    command = ["python", "test/run_test.py", "-i", result.file]
    if slow:
        command.append("--slow")
    if result.name is not None:
        command += ["--", result.name]
    return shlex.join(command)


def _title(result: TestResult) -> str:
    return f"{result.file}: {result.test}" + (f" ({result.note})" if result.note else "")


def describe_failure(result: TestResult) -> str:
    """All that is known about why a test failed, for people."""
    parts = [f"====== {_title(result)}"]
    if result.output.strip():
        parts += ["------ printed", result.output.rstrip()]
    if result.message.strip():
        parts += ["------ raised", result.message.rstrip()]
    return "\n".join(parts) + "\n"


def summary(results: list[TestResult], slow: bool, remarks: Sequence[str] = ()) -> str:
    """The end of a run: slowest tests, flaky and failed ones, remarks, and the counts at last."""
    lines = []
    slowest = sorted(results, key=lambda r: -r.seconds)[:SLOWEST]
    if slowest and slowest[0].seconds >= 1:
        lines.append("slowest tests:")
        lines += [f"{r.seconds:8.1f} s  {r.file}: {r.test}" for r in slowest if r.seconds >= 1]
    for r in results:
        if r.flaky:
            lines.append(
                f"FLAKY {_title(r)}: failed {len(r.failures)} of {len(r.failures) + 1} runs"
            )
    for r in results:
        if r.outcome == "failed":
            lines += [f"FAILED {_title(r)}", f"    {rerun_command(r, slow)}"]
    return "\n".join([*lines, *remarks, counts(results)])


# What XML 1.0 cannot hold, however it is escaped.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _text(element: ElementTree.Element, tag: str, text: str, **attributes: str) -> None:
    child = ElementTree.SubElement(element, tag, attributes)
    child.text = _NO_XML.sub("?", text)


def junit_xml(file: FileResult) -> bytes:
    """The results of a file as JUnit XML; a flaky test holds a `flakyFailure` for each failure."""
    outcomes = [r.outcome for r in file.tests]
    suite = ElementTree.Element(
        "testsuite",
        name=file.file,
        tests=str(len(outcomes)),
        failures=str(outcomes.count("failed")),
        skipped=str(outcomes.count("skipped")),
        time=f"{file.seconds:.3f}",
    )
    for r in file.tests:
        parent, _, method = (r.name or r.test).rpartition(".")
        case = ElementTree.SubElement(
            suite, "testcase", classname=parent, name=method, file=r.file, time=f"{r.seconds:.3f}"
        )
        if r.outcome == "skipped":
            _text(case, "skipped", "", message=_NO_XML.sub("?", r.message))
        elif r.outcome == "failed":
            _text(case, "failure", r.message, message=r.note)
            _text(case, "system-out", r.output)
        for failure in r.failures if r.flaky else []:
            _text(case, "flakyFailure", failure.message, message=failure.note)
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)


def save_xml(folder: Path, files: list[FileResult], suffix: str) -> None:
    """Write the last of `files` as JUnit XML; `suffix` tells shards apart."""
    folder.mkdir(parents=True, exist_ok=True)
    part = sum(other.file == files[-1].file for other in files[:-1])
    name = files[-1].file.replace("/", ".") + (f"-part{part}" if part else "")
    (folder / f"{name}{suffix}.xml").write_bytes(junit_xml(files[-1]))
