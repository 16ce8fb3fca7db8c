"""docs/systems.md names tests, modules and benchmark presets that exist, and has every row."""

import ast
import re
from pathlib import Path

import statescan.modules
from statescan.bench.ops import OPS

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "systems.md"


def rows():
    lines = DOCUMENT.read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row for row in cells if re.fullmatch(r"R\d\d", row[0])}


def defined_tests():
    trees = [ast.parse(path.read_text()) for path in HERE.glob("test_*.py")]
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in nodes if node.name.startswith("test_r")}


def test_every_system_has_its_row():
    assert list(rows()) == [f"R{n:02d}" for n in range(1, 49)]


def test_every_test_has_its_row_and_every_row_its_test():
    named = {name: set(re.findall(r"test_r\w+", row[4])) for name, row in rows().items()}
    assert set().union(*named.values()) == defined_tests()
    without = {name for name, tests in named.items() if not tests}
    assert without == {"R13", "R18", "R28", "R29", "R31", "R37", "R47"}
    for name, tests in named.items():
        for test in tests:
            assert name.lower() in test.split("_"), f"{test} in the row of {name}"


def test_shapes_are_presets():
    for name, row in rows().items():
        for op, preset in re.findall(r"(\w+)/([\w-]+)", row[5]):
            assert preset in OPS[op].presets, f"{name}: {op} has no preset {preset}"


def test_modules_exist():
    names = {n for row in rows().values() for n in re.findall(r"`([A-Z]\w+)[(.`]", row[3])}
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    here = {n for n in names if f"class {n}(" in tests}
    assert {"SS2D", "Hydra", "RoutedSS2D"} <= names
    for name in names - here:
        assert hasattr(statescan.modules, name), name
