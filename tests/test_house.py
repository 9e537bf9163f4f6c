"""The rules of the house, read off the sources: imports run downwards, functions are short, docstrings are sentences, and what is
cited exists.

docs/architecture.md says what stands where. An exception is named below with its reason; one that is no longer needed fails too.
"""

import ast
import re
import tokenize
from collections import Counter
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import side_by_side

ROOT = Path(__file__).parents[1]
PACKAGES = ("gear_kernels", "gear_trainer", "benchmarks")

# Floors from the ground up: a module imports from its own floor and those below. A name is a folder or a file of the package, and
# each of them stands on one floor.
FLOORS = {
    "gear_kernels": (
        ("errors",),
        ("parallel", "records", "reference"),
        ("rules",),
        ("methods",),
        ("backends", "triton"),
        ("tiling",),
        ("sparse",),
        ("ops",),
        ("model_head",),
        ("stats",),
        ("credit", "losses", "head", "top_k"),
        ("integrations",),
        ("__init__",),
    ),
    "gear_trainer": (
        ("__init__", "errors", "config", "user_code", "launcher"),
        ("sandbox",),
        ("tasks",),
        ("rollout",),
        ("hints", "runs"),
        ("recipe",),
        ("policy",),
        ("evaluation",),
        ("train",),
        ("audit",),
        ("preflight",),
        ("report", "demo"),
        ("build",),
        ("cli",),
        ("__main__", "run"),
    ),
}
COMPILED = ("gear_kernels._native",)  # modules without a Python file
LONGEST = {"gear_kernels/triton": 80}  # lines of a function, where not 60
MOST_ARGUMENTS = 12
MOST_TRAINER = 6000  # lines of code
# What has a page and a command of its own, and stands beside the trainer or before its start.
BESIDE_THE_TRAINER = (
    "tasks/", "report/", "audit/", "evaluation/", "sandbox/", "demo/", "preflight/", "cli.py", "runs/study.py",
    "runs/launches.py",
)  # fmt: skip

# --- exceptions, each with its reason -------------------------------------------------------------------------------------------
# A key names one offence as the test prints it, or begins several. `python tests/test_house.py` prints all that there are.

MOVING = "not rebuilt yet"
EXCEPTIONS = {
    "circles": {},
    "upwards": {},
    "long functions": {},
    "many arguments": {},
    "citations": {},
    "wall time": {},
    "fragments": {},
}


# --- reading --------------------------------------------------------------------------------------------------------------------


def files(package):
    return sorted((ROOT / package).rglob("*.py"))


@cache
def tree(path):
    return ast.parse(path.read_text())


def name(path):
    return path.relative_to(ROOT).as_posix()


def module_file(dotted):
    """The file of a module of the project; None of another's, or of a name within a module."""
    path = ROOT.joinpath(*dotted.split("."))
    return next((p for p in (path / "__init__.py", path.with_suffix(".py")) if p.is_file()), None)


def imported(path):
    """Files of the project that a file imports, at its top or inside a function; what stands under TYPE_CHECKING is no import."""
    package = name(path).removesuffix(".py").split("/")[:-1]
    found = set()
    for node in _statements(tree(path)):
        if isinstance(node, ast.Import):
            found |= {module_file(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            dotted = ".".join([*base, *([node.module] if node.module else [])])
            inside = [f"{dotted}.{alias.name}" for alias in node.names]
            found |= {module_file(full) or module_file(dotted) for full in inside if full not in COMPILED}
    return found - {None, path}


def _statements(node):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _statements(child)


def functions(path):
    """Every function with its dotted name within the file, nested ones too."""

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            scoped = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            called = f"{inside}{child.name}." if scoped else inside
            if scoped and not isinstance(child, ast.ClassDef):
                yield called[:-1], child
            yield from walk(child, called)

    yield from walk(tree(path), "")


def offences(found, exceptions):
    """A line for each thing found that is no exception, and for each exception that excuses nothing."""
    lines = [f"{what}: {why}" for what, why in sorted(found.items()) if not what.startswith(tuple(exceptions))]
    return lines + [f"{key}: no exception is needed any more" for key in exceptions if not any(w.startswith(key) for w in found)]


# --- imports --------------------------------------------------------------------------------------------------------------------


def circles(package):
    """A way round for each group of files that import one another."""
    arrows = {path: {p for p in imported(path) if p.is_relative_to(ROOT / package)} for path in files(package)}
    found, done = {}, set()
    for start in arrows:
        back = next((way for way in _ways(arrows, start) if start in arrows[way[-1]]), None)
        if back and not done & set(back):
            done |= set(back)
            found[" -> ".join(map(name, (*back, start)))] = "a circle of imports: move what both need below them"
    return found


def _ways(arrows, start):
    """The shortest way to every file that `start` reaches."""
    ways, seen = [(start,)], {start}
    for way in ways:
        yield way
        ways += [(*way, after) for after in sorted(arrows[way[-1]] - seen)]
        seen |= arrows[way[-1]]


def floor(package, path):
    part = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
    return next((height for height, parts in enumerate(FLOORS[package]) if part in parts), None)


def upwards():
    found = {}
    for package in FLOORS:
        for path in files(package):
            for other in imported(path):
                heights = floor(package, path), floor(package, other) if other.is_relative_to(ROOT / package) else None
                if None not in heights and heights[0] < heights[1]:
                    found[f"{name(path)} -> {name(other)}"] = "upwards, by the order in tests/test_house.py"
    return found


@pytest.mark.parametrize("package", FLOORS)
def test_each_file_stands_on_a_floor(package):
    missing = [name(path) for path in files(package) if floor(package, path) is None]
    assert not missing, f"not in FLOORS: {missing}"


def test_the_operators_know_no_trainer_and_neither_knows_the_benchmarks():
    above = {
        "gear_kernels": ("gear_trainer", "benchmarks", "tests"),
        "gear_trainer": ("benchmarks", "tests"),
        "benchmarks": ("tests",),
    }
    for package, others in above.items():
        for path in files(package):
            assert not [name(p) for p in imported(path) if name(p).split("/")[0] in others], name(path)


# --- functions ------------------------------------------------------------------------------------------------------------------


def sources():
    return (path for package in PACKAGES for path in files(package))


def long_functions():
    found = {}
    for path in sources():
        most = next((limit for folder, limit in LONGEST.items() if name(path).startswith(folder)), 60)
        for called, function in functions(path):
            if (lines := function.end_lineno - function.lineno + 1) > most:
                found[f"{name(path)}:{called}"] = f"{lines} lines, at most {most}"
    return found


def many_arguments():
    found = {}
    for path in sources():
        for called, function in functions(path):
            a = function.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
            if count > MOST_ARGUMENTS:
                found[f"{name(path)}:{called}"] = f"{count} arguments, at most {MOST_ARGUMENTS}"
    return found


# --- size -----------------------------------------------------------------------------------------------------------------------


def code_lines(path):
    """The numbers of a file's lines that hold code: a token that is no comment, and that no docstring is."""
    held, silent = set(), {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(StringIO(path.read_text()).readline):
        if token.type not in silent:
            held |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        scoped = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if scoped and ast.get_docstring(node, clean=False) is not None:
            held -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return held


def test_a_line_of_code_is_neither_blank_nor_a_comment_nor_a_docstring(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        '"""Of it.\n\nMore."""\n\n# why\nx = (\n    1,  # one\n\n    """two\n    lines""",\n)\n\n\ndef f():\n    """It."""\n'
    )
    assert code_lines(file) == {6, 7, 9, 10, 11, 14}


def test_the_trainer_stays_small():
    """What a step goes through, from its configuration to its checkpoint; a new room counts until it is named as one beside."""
    counts = {name(path).removeprefix("gear_trainer/"): len(code_lines(path)) for path in files("gear_trainer")}
    unknown = [part for part in BESIDE_THE_TRAINER if not any(file.startswith(part) for file in counts)]
    assert not unknown, f"no such files: {unknown}"
    rooms = Counter()
    for file, count in counts.items():
        if not file.startswith(BESIDE_THE_TRAINER):
            rooms[file.partition("/")[0]] += count
    assert rooms.total() < MOST_TRAINER, f"{rooms.total()} lines of code, below {MOST_TRAINER}: {dict(rooms.most_common())}"


# --- docstrings -----------------------------------------------------------------------------------------------------------------

OPENINGS = ("Of ", "What ", "Whether ", "Which ", "How ")


def fragment(text):
    """What keeps a docstring's first paragraph from being a sentence; "" where it is one."""
    first = " ".join(text.split("\n\n")[0].split())
    word = first.split()[0]
    if not (
        word[0].isupper() or any(c.isdigit() or c.isupper() or c in "_.()[]=`" for c in word)
    ):  # vLLM, torch.library, token_stats
        return "begins without a capital letter"
    if opening := next((word for word in OPENINGS if first.startswith(word)), ""):
        return f"opens with {opening.strip()!r}: name the thing in a whole sentence"
    return "" if ". " in first or first[-1] in ".:" else "no full stop in the first paragraph"


def documented(path):
    """The file itself, and its public functions, classes and their public methods, each with its docstring."""
    yield "", ast.get_docstring(tree(path))

    def walk(node, inside):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                yield f"{inside}{child.name}", ast.get_docstring(child)
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{inside}{child.name}.")

    yield from walk(tree(path), "")


def fragments():
    found = {}
    for path in sources():
        for called, text in documented(path):
            if text and (why := fragment(text)):
                found[f"{name(path)}:{called}"] = why
    return found


def test_every_file_says_what_it_is_for():
    silent = [name(path) for path in sources() if not ast.get_docstring(tree(path))]
    assert not silent, silent


# --- citations ------------------------------------------------------------------------------------------------------------------


def citations():
    """Sources name no page that is not in the repository, and pages no file of it that is not there."""
    found = {}
    cites = re.compile(r"[\w./-]*\w\.md\b|\b(?:METHOD|DESIGN)\b(?=[' ,]s? ?[a-z])")  # or the plan, as in "DESIGN's limit"
    for path in (*sources(), *sorted((ROOT / "tests").glob("*.py"))):
        if path == Path(__file__):
            continue
        for cited in cites.findall(path.read_text()):
            if not any(
                (folder / cited).is_file() for folder in (ROOT, ROOT / "docs", ROOT / "benchmarks" / "results", path.parent)
            ):
                found[f"{name(path)}: {cited}"] = "names a page that is not in the repository"
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        text = re.sub(r"https?://\S+", "", page.read_text())  # other people's pages
        for cited in re.findall(r"\b(?:gear_kernels|gear_trainer|benchmarks|tests|docs|requirements)/[\w./*-]*\w", text):
            if not any(ROOT.glob(cited)) and not any(ROOT.glob(f"{cited}.*")):
                found[f"{name(page)}: {cited}"] = "names a file that is not there"
    return found


# --- tests ----------------------------------------------------------------------------------------------------------------------


def wall_time():
    """No test asserts how long something took: another process may hold the cores. A deadline is a net under hangs."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.walk(tree(path)):
            text = ast.unparse(node.test) if isinstance(node, ast.Assert) else ""
            if re.search(r"(perf_counter|monotonic|time\.time)\(\)", text) and "deadline" not in text:
                found[f"{name(path)}: {text}"] = "asserts wall time"
    return found


# --- the rules ------------------------------------------------------------------------------------------------------------------

RULES = {
    "circles": lambda: {way: why for package in PACKAGES for way, why in circles(package).items()},
    "upwards": upwards,
    "long functions": long_functions,
    "many arguments": many_arguments,
    "fragments": fragments,
    "citations": citations,
    "wall time": wall_time,
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rules_hold_but_for_the_exceptions(rule):
    """Whatever else is found fails, and so does an exception that excuses nothing."""
    lines = offences(RULES[rule](), EXCEPTIONS[rule])
    assert not lines, "\n".join(["", *lines])


def test_the_lists_of_files_that_run_first_or_are_slow_name_files():
    missing = [file for file in (*side_by_side.LONGEST, *side_by_side.SLOW) if not (ROOT / "tests" / file).is_file()]
    assert not missing, f"tests/side_by_side.py names {missing}"


def test_no_file_of_the_tests_arms_a_timer_where_it_is_imported():
    """A script of ranks ends itself when it hangs; a test that imports it would end its own process too, minutes later, mute."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        inside = {node for function in functions for node in ast.walk(function)}
        armed = {node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr == "dump_traceback_later"}
        assert armed <= inside, path.name


def test_the_reader_of_docstrings_tells_sentences_from_fragments():
    assert fragment("Of an installed package, without importing it.") and fragment("lower case.") and fragment("No full stop")
    assert not fragment("The version of an installed package, without importing it.") and not fragment("Numbers: one a row.")


def test_the_reader_of_imports_finds_a_circle_and_its_way(tmp_path, monkeypatch):
    """Planted: a imports b inside a function, b imports c, c imports a; d imports a and is in no circle."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "pack").mkdir()
    sources = {"__init__": "", "a": "def f():\n    from .b import x\n", "b": "from . import c\n", "c": "import pack.a\n"}
    sources["d"] = "from typing import TYPE_CHECKING\nfrom pack import a\nif TYPE_CHECKING:\n    from pack import e\n"
    sources["e"] = "from . import d\n"
    for module, text in sources.items():
        (tmp_path / "pack" / f"{module}.py").write_text(text)
    assert list(circles("pack")) == ["pack/a.py -> pack/b.py -> pack/c.py -> pack/a.py"]


if __name__ == "__main__":
    for rule, look in RULES.items():
        print(f"{rule}: {len(found := look())}", *(f"  {what}: {why}" for what, why in sorted(found.items())), sep="\n")
