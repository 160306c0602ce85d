# Owner(s): ["module: ci"]

"""What CI is made of, as far as it can be looked at without GitHub."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted([*ROOT.glob(".github/workflows/*.yml"), *ROOT.glob(".github/actions/*/*.yml")])


def run(*command, **variables):
    """A process in the top folder."""
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )


class WorkflowTest(unittest.TestCase):
    def test_actions_are_pinned(self):
        """By commit, for a tag can be moved; which release that is stands beside it."""
        used = [
            line.partition("uses:")[2].strip()
            for path in WORKFLOWS
            for line in path.read_text().splitlines()
            if re.match(r"\s*(- )?uses:", line)
        ]
        self.assertGreater(len(used), 10)
        for action in used:
            if not action.startswith("./"):
                self.assertRegex(action, r"^[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")

    def test_commands_are_shell(self):
        """Each step's command, as bash reads it."""
        try:
            import yaml
        except ModuleNotFoundError:
            self.skipTest("needs PyYAML")
        commands = []
        for path in WORKFLOWS:
            data = yaml.safe_load(path.read_text())
            for job in [*data.get("jobs", {}).values(), data.get("runs", {})]:
                commands += [s["run"] for s in job.get("steps", []) if "run" in s]
        self.assertGreater(len(commands), 10)
        for command in commands:
            with self.subTest(command):
                plain = re.sub(r"\$\{\{.*?\}\}", "value", command)
                parsed = run("bash", "-n", "-c", plain)
                self.assertEqual((parsed.returncode, parsed.stderr), (0, ""))

    def test_test_files_are_there(self):
        """Those that steps name."""
        for path in WORKFLOWS:
            for options in re.findall(r"\.ci/shard .* -i ([^-\n]+)", path.read_text()):
                for name in options.split():
                    self.assertTrue((ROOT / "test" / f"{name}.py").exists(), f"{path.name}: {name}")


class CompilersTest(unittest.TestCase):
    """How many compilers a build starts."""

    @classmethod
    def setUpClass(cls):
        arguments = mock.patch.object(sys, "argv", ["setup.py", "--version"])
        with arguments, contextlib.redirect_stdout(io.StringIO()):
            cls.compilers = staticmethod(runpy.run_path(str(ROOT / "setup.py"))["compilers"])

    def count(self, cores, free, limit=None, used=0):
        files = {"/proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {int(free * 2**20)} kB\n"}
        if limit is not None:
            files["/sys/fs/cgroup/memory.max"] = limit
            files["/sys/fs/cgroup/memory.current"] = str(int(used * 2**30))

        def read_text(path):
            if str(path) not in files:
                raise FileNotFoundError(path)
            return files[str(path)]

        affinity = mock.patch.object(os, "sched_getaffinity", lambda _: set(range(cores)))
        with affinity, mock.patch.object(Path, "read_text", read_text):
            return self.compilers()

    def test_one_for_each_core(self):
        self.assertEqual([self.count(cores, 64) for cores in (1, 2, 16)], [1, 2, 16])

    def test_as_far_as_the_memory_goes(self):
        """In GiB: 1.2 for each, and one at least."""
        self.assertEqual([self.count(16, free) for free in (0.5, 2.5, 6.1)], [1, 2, 5])

    def test_memory_of_a_container(self):
        self.assertEqual(self.count(16, 64, str(4 * 2**30), used=1), 2)
        self.assertEqual(self.count(16, 64, "max\n", used=1), 16)


class ReleaseTest(unittest.TestCase):
    def version(self):
        return re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]

    def test_tag(self):
        self.assertEqual(run(".ci/check-tag", f"v{self.version()}").returncode, 0)
        for tag in ("v0.0.0", self.version(), f"v{self.version()}.post1"):
            refused = run(".ci/check-tag", tag)
            self.assertEqual(refused.returncode, 1)
            self.assertIn(f"the tag is {tag}, and pyproject.toml has version", refused.stderr)

    def test_source_distribution_is_whole(self):
        listed = run("git", "ls-files") if (ROOT / ".git").exists() else None
        if listed is None or listed.returncode != 0:
            self.skipTest("needs a git checkout, and git")
        with tempfile.TemporaryDirectory() as folder:
            command = ("setup.py", "-q", "sdist", "-d", folder, "egg_info", "--egg-base", folder)
            made = run(sys.executable, *command)
            self.assertEqual(made.returncode, 0, made.stderr)
            (path,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(path) as archive:
                names = {name.partition("/")[2] for name in archive.getnames()}
        for name in listed.stdout.splitlines():
            if (ROOT / name).exists():
                self.assertIn(name, names)
        self.assertFalse([n for n in names if n.endswith((".so", ".pyc", ".torch"))])


if __name__ == "__main__":
    unittest.main()
