# Owner(s): ["oncall: jit"]

"""docs/limits.md: each of its programs is refused in the words that follow it, and no refusal of the
package's sources is left out."""

import ast
import functools
import importlib.util
import inspect
import keyword
import linecache
import re
import unittest
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_lazy_ext
from torch_lazy_ext import _moving, _replay, extract_compiled_graph

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "limits.md"
PACKAGE = ROOT / "torch_lazy_ext"
FAMILIES = 5
FILE = "model.py"

# A refusal that no program of the page shows, by the begin of its text, and why.
NOT_SHOWN = {
    # Python
    "the program puts another evaluator of frames, or a profile function, in place": "which of the "
    "two is seen depends on the release of Python: a profile function up to 3.10, and an evaluator, "
    "which only C code can put in place, since",
    "what the backend ": "code that fails halfway in a later call: test_backend_errors plants it",
    " in a lowered graph is no operator of PyTorch's": "a graph that another tool has changed",
    # C++
    " gets a tensor of another capture (at ": "two captures at once, in two threads",
    " gets , which a graph cannot hold (at ): convert it to a dense tensor before": "a tensor that "
    "an operator's own C++ code makes",
    " wants the memory of a tensor, and there is none while it is captured (at ": "operators of "
    "Inductor's own graphs: test_mutation",
    "the result has another shape than the tensor that it is put in.": "eager raises there, too, in "
    "words of its own",
    " writes to its argument where functionalization cannot follow it": "an operator in C++ that "
    "transforms tensors itself",
}
# Places that raise what another place has worded, or in words that are no refusal of a program.
WORDED_ELSEWHERE = {
    ("_record.py", "_refusal"): "makes the error for what its callers word",
    ("_record.py", "_check_refusal"): "raises once more what the program has caught",
    ("_moving.py", "refuse"): "asks what `call` has worded",
}
# Checks in C++ that are no reasons of a refusal.
EAGERS_OWN = ("Expected total_length to be at least", "torch.Tensor.view is not supported for ")


@dataclass
class Section:
    family: str
    title: str
    program: str
    error: str  # with one space for any white space
    prose: str


def unspaced(text: str) -> str:
    return " ".join(text.split())


def read(text: str) -> tuple[str, list[Section]]:
    """What stands before each program, and the sections."""
    head, *families = re.split(r"^## ", text, flags=re.MULTILINE)
    (before,) = re.findall(r"^```python\n(.*?)^```", head, re.MULTILINE | re.DOTALL)
    sections = []
    for family in families:
        name, *parts = re.split(r"^### ", family, flags=re.MULTILINE)
        for part in parts:
            found = re.fullmatch(
                r"(.*?)\n\n```python\n(.*?)^```\n\n```text\n(.*?)^```\n\n(.*)",
                part,
                re.MULTILINE | re.DOTALL,
            )
            if found is None:
                raise AssertionError(f"not a heading, a program, an error and prose: {part}")
            title, program, error, prose = found.groups()
            family_name = name.partition("\n")[0]
            sections.append(Section(family_name, title, program, unspaced(error), prose.strip()))
    return before, sections


BEFORE, SECTIONS = read(PAGE.read_text())


def outcome(section: Section) -> str:
    """The error of a section's program, as the page shows it."""
    namespace: dict[str, Any] = {"__name__": "model"}
    of_keyword = {**vars(keyword)}  # where some of the programs keep things
    # For what looks at the source.
    lines = section.program.splitlines(keepends=True)
    linecache.cache[FILE] = (len(section.program), None, lines, FILE)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            exec(BEFORE, namespace)
            exec(compile(section.program, FILE, "exec"), namespace)
    except Exception as e:
        name = "" if type(e) is torch_lazy_ext.UnsupportedError else f"{type(e).__name__}: "
        return unspaced(name + str(e))
    finally:
        del linecache.cache[FILE]
        vars(keyword).clear()
        vars(keyword).update(of_keyword)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return "nothing"


# ------------------------------------------------------------------------ what the sources refuse


Scopes = tuple[ast.AST, ...]
Words = list[str]  # literal parts, with any text between


class Python:
    """The errors that a module makes."""

    ERRORS = (
        *("UnsupportedError", "ExtractionError", "GuardError", "FallbackError", "WrongOutputs"),
        *("refusal", "_refusal"),
    )

    def __init__(self, path: Path, modules: "dict[str, Python]") -> None:
        self.path = path
        self.tree = ast.parse(path.read_text())
        self.modules = modules
        self.worded: list[Words] = []
        self.unworded: list[tuple[str, str]] = []
        modules[path.stem] = self

    def collect(self) -> None:
        self._visit(self.tree, ())

    def _visit(self, node: ast.AST, scopes: Scopes) -> None:
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            scopes = (*scopes, node)
        if isinstance(node, ast.Call) and self._name(node.func) in self.ERRORS:
            found = [w for a in node.args for w in self._words(a, scopes)]
            if found:
                self.worded += found
            else:
                inner = [s.name for s in scopes if isinstance(s, ast.FunctionDef)]
                self.unworded.append((self.path.name, inner[-1] if inner else "<module>"))
        for child in ast.iter_child_nodes(node):
            self._visit(child, scopes)

    @staticmethod
    def _name(function: ast.AST) -> str:
        if isinstance(function, ast.Attribute):
            return function.attr
        return function.id if isinstance(function, ast.Name) else ""

    def _words(self, value: ast.AST, scopes: Scopes) -> list[Words]:
        """What a message can be; nothing if it cannot be told from the source."""
        if isinstance(value, ast.Constant):
            return [[value.value]] if isinstance(value.value, str) else []
        if isinstance(value, ast.JoinedStr):
            parts = [""]
            for part in value.values:
                if isinstance(part, ast.Constant):
                    parts[-1] += part.value
                else:
                    parts.append("")
            return [parts]
        if isinstance(value, ast.Name):
            for scope in (*reversed(scopes), self.tree):
                found = [
                    words
                    for node in (ast.walk(scope) if scope is not self.tree else self.tree.body)
                    if isinstance(node, ast.Assign)
                    and any(isinstance(t, ast.Name) and t.id == value.id for t in node.targets)
                    for words in self._words(node.value, ())
                ]
                if found:
                    return found
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            module = self.modules.get(value.value.id)
            return [] if module is None else module._words(ast.Name(value.attr), ())
        if isinstance(value, ast.Call):
            return [
                words
                for node in ast.walk(self.tree)
                if isinstance(node, ast.FunctionDef) and node.name == self._name(value.func)
                for returned in ast.walk(node)
                if isinstance(returned, ast.Return) and returned.value is not None
                for words in self._words(returned.value, (node,))
            ]
        return []


def arguments(source: str, begin: int) -> Iterator[str]:
    """The arguments, as text, of a call in C++ whose opening parenthesis is before `begin`."""
    depth, start = 0, begin
    for found in re.compile(r'"(?:[^"\\]|\\.)*"|[(){},]|//[^\n]*').finditer(source, begin):
        token = found.group()
        if token == "," and depth == 0:
            yield source[start : found.start()]
            start = found.end()
        elif token in ("(", "{"):
            depth += 1
        elif token in (")", "}"):
            depth -= 1
            if depth < 0:
                yield source[start : found.start()]
                return


LITERAL = re.compile(r'"((?:[^"\\]|\\.)*)"')


def literal(argument: str) -> str | None:
    """The text of an argument that is a string, perhaps in several pieces."""
    argument = re.sub(r"//[^\n]*", "", argument).strip()
    if not re.fullmatch(r'("(?:[^"\\]|\\.)*"\s*)+', argument):
        return None
    return "".join(ast.literal_eval(f'"{piece}"') for piece in LITERAL.findall(argument))


def joined(pieces: list[str | None]) -> Words:
    parts = [""]
    for piece in pieces:
        if piece is None:
            parts.append("")
        else:
            parts[-1] += piece
    return parts


def cpp_words(source: str) -> Iterator[Words]:
    """The texts of `throw Unsupported(...)`, and of the checks that `cannot be recorded` quotes."""
    constants = {
        name: literal(value)
        for name, value in re.findall(r"constexpr const char\* (\w+) =\s*([^;]*);", source)
    }
    for found in re.finditer(r"\b(?:throw|return) Unsupported\(", source):
        given = list(arguments(source, found.end()))
        if given[0].strip().startswith("c10::str("):
            given = list(arguments(source, source.index("c10::str(", found.end()) + 9))
        if any("row." in g for g in given):
            table = source.index("{", source.index("inexpressible[] ="))
            for row in arguments(source, table + 1):
                if "{" in row:
                    cells = list(arguments(row, row.index("{") + 1))
                    does, instead = (constants.get(c.strip()) or literal(c) for c in cells[1:])
                    yield joined([None, f" {does} (at ", None, f"): {instead}"])
        else:
            yield joined([literal(g) for g in given])


def cpp_checks(source: str) -> Iterator[Words]:
    for found in re.finditer(r"\bTORCH_CHECK\(", source):
        _condition, *given = arguments(source, found.end())
        if given and not (literal(given[0]) or "").startswith(EAGERS_OWN):
            yield joined([literal(g) for g in given])


@functools.cache
def refusals() -> tuple[list[Words], list[tuple[str, str]]]:
    """What the sources can say, and where they raise what cannot be told."""
    modules: dict[str, Python] = {}
    for path in sorted(PACKAGE.glob("*.py")):
        if path.name != "__init__.py":  # what the import refuses: test_versions
            Python(path, modules)
    worded, unworded = [], []
    for module in modules.values():
        module.collect()
        worded += module.worded
        unworded += module.unworded
    for path in sorted(PACKAGE.glob("csrc/*.cpp")):
        source = path.read_text()
        worded += cpp_words(source)
        if path.name in ("dispatch.cpp", "views.cpp"):
            worded += cpp_checks(source)
    return worded, unworded


def pattern(words: Words) -> "re.Pattern[str]":
    return re.compile(".*".join(re.escape(re.sub(r"\s+", " ", part)) for part in words))


def left_out(sections: list[Section]) -> list[str]:
    """The refusals of the sources that are neither met by a section nor in the table."""
    worded, _unworded = refusals()
    errors = [s.error for s in sections]
    return [
        " ".join(words)
        for words in worded
        if not any(pattern(words).search(e) for e in errors)
        and not any("".join(words).startswith(begin) for begin in NOT_SHOWN)
    ]


class LimitsTest(unittest.TestCase):
    """One test for each section, which `_add_sections` adds, and what is true of all."""

    maxDiff = None

    def test_everything_is_there(self) -> None:
        self.assertEqual(left_out(SECTIONS), [])

    def test_a_section_that_is_missing_is_noticed(self) -> None:
        for word in ("version counter", "another memory format in place", "FallbackError"):
            rest = [s for s in SECTIONS if word not in s.error]
            self.assertEqual(len(rest), len(SECTIONS) - 1)
            self.assertEqual(len(left_out(rest)), 1, word)

    def test_sections_are_of_the_package(self) -> None:
        worded, _unworded = refusals()
        others = [
            s.error for s in SECTIONS if not any(pattern(words).search(s.error) for words in worded)
        ]
        self.assertEqual(others, [])

    def test_no_error_is_worded_out_of_sight(self) -> None:
        _worded, unworded = refusals()
        self.assertEqual({*unworded}, {*WORDED_ELSEWHERE})

    def test_table_has_nothing_that_is_gone(self) -> None:
        worded = ["".join(words) for words in refusals()[0]]
        for begin in NOT_SHOWN:
            self.assertTrue(any(w.startswith(begin) for w in worded), begin)

    def test_words_tell_refusals_apart(self) -> None:
        """Or a section about one thing would do for another."""
        for words in refusals()[0]:
            self.assertGreater(len("".join(words)), 20, words)

    def test_names_are_there(self) -> None:
        """What a section says of several things has all of them."""
        text = unspaced(PAGE.read_text())
        reasons = re.findall(r'return "(.+)"', inspect.getsource(_replay._no_derivatives))
        self.assertGreater(len(reasons), 4)
        for reason in reasons:
            self.assertIn(reason.split(",")[0], text)
        for _module, cls, _what in _moving._CLASSES:
            self.assertIn(NAMED.get(cls, cls), text)
        for module, name, _what in _moving._FUNCTIONS:
            self.assertIn(NAMED.get(name, NAMED.get(module, name)), text)

    def test_readme(self) -> None:
        """README has the families, with links that lead somewhere."""
        text = (ROOT / "README.md").read_text()
        limits = text.partition("## Known limits")[2].partition("\n## ")[0]
        links = re.findall(r"\(docs/limits\.md#([^)]*)\)", limits)
        families = [*dict.fromkeys(s.family for s in SECTIONS)][:FAMILIES]
        self.assertEqual(links, [anchor(f) for f in families])
        self.assertLessEqual(len(re.findall(r"^\* ", limits, re.MULTILINE)), FAMILIES)

    def test_padding_mask_is_none(self) -> None:
        """The nested tensors that the page takes out."""
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        mask = torch.tensor([[False, False, True], [False, True, True]])
        x = torch.randn(2, 3, 8)
        with torch.no_grad():
            graph = extract_compiled_graph(encoder, (x,), {"src_key_padding_mask": mask})
            actual = graph(x, src_key_padding_mask=mask)
            torch.testing.assert_close(actual, encoder(x, src_key_padding_mask=mask))


# What the page calls it.
NAMED = {
    "IOBase": "files", "Queue": "queues", "SimpleQueue": "queues", "Connection": "connections",
    "time": "time.time()", "urandom": "os.urandom()", "_urandom": "os.urandom()",
    "_generate_time_safe": "`uuid`", "builtins": "open()", "load": "torch.load()",
    "input": "input()", "open": "open()", "pathlib": "open()", "Random.seed": "torch.seed()",
}  # fmt: skip


def anchor(heading: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _add_sections() -> None:
    for section in SECTIONS:

        def test(self: LimitsTest, section: Section = section) -> None:
            if "import numpy" in section.program and importlib.util.find_spec("numpy") is None:
                self.skipTest("needs numpy")
            self.assertEqual(outcome(section), section.error)

        name = "test_" + re.sub(r"\W+", "_", section.title.lower()).strip("_")
        if hasattr(LimitsTest, name):
            raise AssertionError(f"two sections have the name {section.title}")
        setattr(LimitsTest, name, test)


_add_sections()


if __name__ == "__main__":
    unittest.main()
