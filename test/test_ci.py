# Owner(s): ["module: ci"]

"""What CI is made of, as far as it can be looked at without GitHub."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

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
