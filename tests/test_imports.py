"""Calls go one way: no two files of the package import each other, not even where they are first needed."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "agd_fast").rglob("*.py"))
}


def imported(module):
    """(module, name) of every import in it, wherever it stands; name is None where a whole module is meant."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def home(module, name):
    """The file that a name is taken from, behind packages that only hand it on."""
    if f"{module}.{name}" in FILES:
        return f"{module}.{name}"
    if FILES[module].name == "__init__.py":
        handed_on = [where for where, other in imported(module) if other == name and where in FILES]
        return home(handed_on[0], name) if handed_on else module
    return module


def test_no_two_files_import_each_other():
    needs = {module: {home(*one) for one in imported(module) if one[0] in FILES} - {module} for module in FILES}
    assert needs["agd_fast.pipelines.teacher"] >= {"agd_fast.pipelines.runs", "agd_fast.attaching.wrapping", "agd_fast.teacher"}
    TopologicalSorter(needs).prepare()  # names the circle that it finds
