# Owner(s): ["module: ci"]

"""The conformance report: what workers survive, what is kept, and the page in a real browser."""

import html.parser
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tools  # noqa: E402, F401

del sys.path[0]  # `tools` is found, and an installed package is not hidden by its sources.

from tools.conformance import page, run  # noqa: E402
from tools.conformance.items import SELF, Item  # noqa: E402
from tools.conformance.run import Results  # noqa: E402

REPORT = ROOT / "tools" / "conformance" / "report.py"
BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WORKER = """
    import json, os, sys, time

    for line in sys.stdin:
        name = json.loads(line)["name"]
        if name == "crash":
            os.abort()
        if name == "hang":
            open("HANGS", "w").close()
            time.sleep(100_000)
        print(json.dumps(dict(outcome="equal", reason=str(os.getpid()), line="")), flush=True)
"""


class FakeTimer:
    """Goes off once the worker says that it hangs, and not by a clock."""

    def __init__(self, hangs, seconds, function):
        assert seconds == 1.0
        self._hangs, self._function = hangs, function
        self._cancelled = threading.Event()

    def start(self):
        threading.Thread(target=self._wait, daemon=True).start()

    def cancel(self):
        self._cancelled.set()

    def _wait(self):
        while not self._cancelled.wait(0.01):
            if self._hangs.exists():
                self._hangs.unlink()
                self._function()
                return


class Folder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class RunTest(Folder):
    def run_items(self, names, results):
        worker = self.folder / "worker.py"
        hangs = self.folder / "hangs"
        worker.write_text(textwrap.dedent(WORKER.replace("HANGS", str(hangs))))
        items = [Item("operator", name, "float32", SELF) for name in names]
        ran = []
        timer = mock.patch.object(
            run.threading, "Timer", lambda seconds, function: FakeTimer(hangs, seconds, function)
        )
        with mock.patch.object(run, "WORKER", worker), timer:
            run.run(items, results, 1, 1.0, lambda item, _: ran.append(item.name))
        return ran, [results.by_key[item.key] for item in items]

    def test_crash_and_hang(self):
        results = Results(self.folder / "results.jsonl", "state")
        names = ["a", "crash", "b", "hang", "c"]
        ran, found = self.run_items(names, results)
        self.assertEqual(ran, names)
        outcomes = [r["outcome"] for r in found]
        self.assertEqual(outcomes, ["equal", "crashed", "equal", "timed out", "equal"])
        self.assertEqual(found[1]["reason"], "killed by SIGABRT")
        self.assertNotEqual(found[0]["reason"], found[2]["reason"])  # Another process.

    def test_goes_on_where_it_was_stopped(self):
        path = self.folder / "results.jsonl"
        self.run_items(["a", "b"], Results(path, "state"))
        with path.open("a") as file:
            file.write('{"item": {"kind": "oper')  # Stopped in the middle of a line.
        ran, _ = self.run_items(["a", "b", "c"], Results(path, "state"))
        self.assertEqual(ran, ["c"])
        ran, _ = self.run_items(["a", "b", "c"], Results(path, "state"))
        self.assertEqual(ran, [])
        ran, _ = self.run_items(["a"], Results(path, "other sources"))
        self.assertEqual(ran, ["a"])


class ReportTest(Folder):
    def report(self, *options, output="all"):
        command = [sys.executable, str(REPORT), *options, "--output", str(self.folder / output)]
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_shards_of_all_kinds(self):
        names = ("-k", "add", "-k", "to_sparse", "-k", "nn.Linear", "-k", "nn.Linear eval")
        chosen = (*names, "-k", "ALBERT", "--dtypes", "float32", "--jobs", "1")
        self.report("--shard", "1", "2", *chosen, output="one")
        self.report("--shard", "2", "2", *chosen, output="two")
        printed = self.report("--merge", str(self.folder / "one"), str(self.folder / "two"))
        self.assertIn(f"{SELF}, 2 operators: 1 equal, 1 refused", printed)
        data = json.loads((self.folder / "all" / "report.json").read_text())
        by_name = {r["name"]: r for r in data["results"]}
        self.assertEqual(by_name.keys(), {"add", "to_sparse", "nn.Linear eval", "ALBERT"})
        self.assertRegex(by_name["to_sparse"]["reason"], "Sparse")
        self.assertRegex(by_name["to_sparse"]["line"], r"opinfo\.py:\d+")
        model = by_name["ALBERT"]
        self.assertEqual((model["outcome"], model["variants"]), ("equal", 1))
        for number in ("nodes", "extraction", "call", "eager"):
            self.assertGreater(model[number], 0)
        self.assertGreater(by_name["nn.Linear eval"]["nodes"], 0)

    @unittest.skipUnless(os.getenv("PYTORCH_TEST_WITH_SLOW") == "1", "slow")
    def test_compare(self):
        printed = self.report("--compare", "-k", "add", "--dtypes", "float32")
        for contestant in (SELF, "torch._lazy", "jit.trace", "export", "compile"):
            self.assertIn(f"{contestant}, 1 operators: 1 equal", printed)


class _Rows(html.parser.HTMLParser):
    """The texts of the cells in each row of each table's body, and of #errors and #shown."""

    def __init__(self):
        super().__init__()
        self.tables, self.texts = {}, {}
        self._table = self._id = None
        self._in_head = False

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "table":
            self._table = self.tables.setdefault(attrs.get("id"), [])
        elif tag == "thead":
            self._in_head = True
        elif tag == "tbody":
            self._in_head = False
        elif tag == "tr" and self._table is not None and not self._in_head:
            self._table.append([])
        elif tag == "td" and self._table:
            self._table[-1].append("")
        if "id" in attrs:
            self._id = attrs["id"]
            self.texts.setdefault(self._id, "")

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        if tag in ("div", "span", "p"):
            self._id = None

    def handle_data(self, data):
        if self._table and self._table[-1] and not self._in_head:
            self._table[-1][-1] += data
        if self._id in ("errors", "shown"):
            self.texts[self._id] += data


@unittest.skipIf(BROWSER is None, "needs a Chromium")
class PageTest(Folder):
    def setUp(self):
        super().setUp()

        def result(kind, name, dtype, contestant, outcome, reason="", line="", **more):
            item = dict(kind=kind, name=name, dtype=dtype, contestant=contestant)
            return dict(item=item, outcome=outcome, reason=reason, line=line, seconds=0.1, **more)

        model = dict(variants=1, nodes=10, extraction=0.01, call=2e-4, eager=4e-4)
        other = "torch._lazy"
        results = [
            result("operator", "add", "float32", SELF, "equal"),
            result("operator", "add", "int64", SELF, "wrong", "values differ"),
            result("operator", "add", "float32", other, "crashed", "killed by SIGSEGV"),
            result("operator", "sub", "float32", SELF, "equal"),
            result("operator", "to_sparse", "float32", SELF, "refused", "</script> <b>", "a.py:7"),
            result("model", "BERT", "", SELF, "equal", **model),
            result("model", "DETR", "", SELF, "refused", "keeps a result"),
            result("module", "nn.Linear eval", "", SELF, "variants", variants=2, nodes=3),
        ]
        self.html = page.render(page.report_data(results))

    def look(self, address="", script=""):
        """The page as the browser shows it, after a script of its reader."""
        path = self.folder / "report.html"
        path.write_text(f"{self.html}<script>{script}</script>")
        command = [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={self.folder / 'profile'}"),
            *("--virtual-time-budget=2000", "--dump-dom", f"{path.as_uri()}{address}"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertNotIn("CONSOLE", result.stderr)
        rows = _Rows()
        rows.feed(result.stdout)
        self.assertEqual(rows.texts["errors"].strip(), "")
        return rows

    def names(self, rows, table):
        return [row[0] for row in rows.tables[table]]

    def test_loads(self):
        rows = self.look()
        self.assertEqual(self.names(rows, "operators"), ["add", "sub", "to_sparse"])
        self.assertEqual(self.names(rows, "modules"), ["nn.Linear eval"])
        self.assertEqual(rows.texts["shown"], "6 of 6 programs")
        # The share of dtypes, for either contestant.
        self.assertEqual(rows.tables["operators"][0][-2:], ["1/2", "0/1"])
        bert, detr = rows.tables["models"]
        expected = ["BERT", "equal", "yes", "1", "10", "10.0", "200", "400", "2.00x", "", ""]
        self.assertEqual(bert, expected)
        self.assertEqual(detr[:3], ["DETR", "refused", "no"])
        self.assertIn(
            ["operator to_sparse", "float32", "refused", "a.py:7", "</script> <b>"],
            rows.tables["problems"],
        )

    def test_filters(self):
        rows = self.look("#q=ad,bert")
        self.assertEqual(self.names(rows, "operators"), ["add"])
        self.assertEqual(self.names(rows, "models"), ["BERT"])
        rows = self.look("#outcome=refused")
        self.assertEqual(self.names(rows, "operators"), ["to_sparse"])
        self.assertEqual(self.names(rows, "models"), ["DETR"])
        self.assertEqual(self.names(rows, "modules"), [])
        self.assertEqual(self.names(self.look("#dtype=int64"), "operators"), ["add"])
        rows = self.look("#contestant=torch._lazy")
        self.assertEqual(self.names(rows, "operators"), ["add"])
        self.assertEqual(self.names(rows, "problems"), ["operator add"])

    def test_typing_and_clicking(self):
        script = """
            document.getElementById("q").value = "add";
            document.getElementById("q").dispatchEvent(new Event("input"));
            document.querySelectorAll("#operators button")[1].click();
            document.getElementById("shown").append(document.getElementById("detail").textContent,
                location.hash);
        """
        rows = self.look(script=script)
        self.assertEqual(self.names(rows, "operators"), ["add"])
        self.assertIn("add int64: wrong\nvalues differ", rows.texts["shown"])
        self.assertIn("#q=add", rows.texts["shown"])

    def test_an_error_would_show(self):
        with self.assertRaises(AssertionError):
            self.look(script="no_such_function()")


if __name__ == "__main__":
    unittest.main()
