"""train.py's two parts are as its docstring says."""

from __future__ import annotations

import ast
import re

from conftest import ROOT

SOURCE = (ROOT / "train.py").read_text(encoding="utf-8")
LINES_OF_THE_METHOD = 1000


def test_the_table_of_contents_names_the_sections_in_order() -> None:
    part_one, part_two = re.split(r"^# =+ .+\n", SOURCE, flags=re.MULTILINE)
    docstring = ast.get_docstring(ast.parse(SOURCE))
    contents = docstring.split("Part one: the method\n")[1].split("Part two: the machinery\n")
    for part, table in zip((part_one, part_two), contents, strict=True):
        rulers = re.findall(r"^# -{4,} (.+)$", part, flags=re.MULTILINE)
        assert rulers
        assert re.findall(r"^    (\S.*?)  +\S", table, flags=re.MULTILINE) == rulers


def test_the_method_stays_short() -> None:
    assert SOURCE[: SOURCE.index("\n# ====")].count("\n") <= LINES_OF_THE_METHOD
