"""The budget of instructions: the profile is read right, and growth is noticed (tests/proof/instructions.py)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "proof" / "instructions.py"
spec = importlib.util.spec_from_file_location("rnp_instructions_budget", SCRIPT)
instructions = importlib.util.module_from_spec(spec)
spec.loader.exec_module(instructions)

PROFILE = """\
events: Ir

ob=(1) /somewhere/rnp_instructions
fn=(1) kernel
0 100
+3 20
cob=(2) /lib/libc.so.6
cfn=(2) memcpy
calls=4 0
* 7000
-2 3

ob=(2)
fn=(2)
0 7000

ob=(1)
fn=(3) driver
12 5
"""


def test_only_the_programs_own_instructions_count():
    assert instructions.own_instructions(PROFILE, "/rnp_instructions") == 100 + 20 + 3 + 5
    assert instructions.own_instructions(PROFILE, "/libc.so.6") == 7000
    assert instructions.own_instructions(PROFILE, "/another") == 0


def test_growth_is_noticed_and_noise_is_not():
    budget = {"avx2 a": 1000, "avx2 b": 1000, "avx2 c": 1000}
    assert instructions.compare(budget, {"avx2 a": 1010, "avx2 b": 400, "avx2 c": 1000}) == []
    wrong = instructions.compare(budget, {"avx2 a": 1011, "avx2 b": 1000, "avx2 d": 5})
    assert wrong == [
        "avx2 a: 1,011 instructions, 1.1 % above the budget 1,000",
        "avx2 c: in the budget, but no case",
        "avx2 d: no budget; record it",
    ]


def test_every_budget_has_both_paths_of_every_case():
    for compiler, budget in json.loads(instructions.BUDGET.read_text()).items():
        cases = {
            path: {name.split()[1] for name in budget if name.startswith(f"{path} ")} for path in instructions.PATHS
        }
        assert cases["avx2"] == cases["portable"] != set(), compiler


def test_what_is_missing_is_said_and_fails_only_where_it_is_required(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["instructions.py", str(tmp_path / "not-built")])
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    monkeypatch.delenv("RNP_REQUIRE_PROOF", raising=False)
    assert instructions.main() == 0
    assert "SKIPPED: valgrind is not installed" in capsys.readouterr().out
    monkeypatch.setenv("RNP_REQUIRE_PROOF", "1")
    assert instructions.main() == 2
