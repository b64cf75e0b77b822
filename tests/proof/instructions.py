"""Do kernels execute more instructions than they did? Counted by callgrind, so no clock and no noise is involved.

    python tests/proof/instructions.py build/cpp-tests/rnp_instructions            compare with the committed budget
    python tests/proof/instructions.py build/cpp-tests/rnp_instructions --record   write what is measured as the budget

Every case of csrc/tests/instructions.cpp runs on the AVX2 and the portable path (valgrind knows no AVX-512). What
counts is instructions inside the program, without libc's: those depend on the machine.

The rule: a case fails above its budget times 1.01. The margin is for a compiler's point releases; one kernel, one
compiler and one input give the same count every time. Other compilers generate other code: with one that the budget was
not recorded for, the comparison is skipped, and says so. After a change that is worth more instructions (or needs
fewer), record, and let the commit say why.

Exit status: 0 kept or skipped with a reason, 1 exceeded, 2 cannot run although RNP_REQUIRE_PROOF=1 asks for it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BUDGET = Path(__file__).with_name("instructions.json")
MARGIN = 1.01
PATHS = ("avx2", "portable")


def own_instructions(profile: str, program: str) -> int:
    """Instructions of the functions of ``program``, themselves, in a callgrind profile."""
    objects: dict[str, str] = {}
    total, ours, skip = 0, False, False
    for line in profile.splitlines():
        if found := re.match(r"(c?)ob=(\(\d+\))(?: (.*))?$", line):
            called, number, name = found.groups()
            if name:  # the first time; later only the number stands there
                objects[number] = name
            if not called:
                ours = objects[number].endswith(program)
        elif line.startswith("calls="):
            skip = True  # the next line is what the callee cost, which is listed under the callee
        elif cost := re.match(r"[+\-*\d]\d* (\d+)$", line):
            total += int(cost[1]) if ours and not skip else 0
            skip = False
    return total


def measure(driver: Path, isa: str, case: str) -> int:
    """Instructions of one call."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "profile"
        command = [
            "valgrind", "-q", "--tool=callgrind", "--collect-atstart=no", "--toggle-collect=rnp_measured_call",
            f"--callgrind-out-file={out}", str(driver), isa, case,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
        count = own_instructions(out.read_text(), f"/{driver.name}")
    if count == 0:
        raise SystemExit(f"{isa} {case}: callgrind counted nothing: is rnp_measured_call still called?")
    return count


def compare(budget: dict[str, int], measured: dict[str, int]) -> list[str]:
    """What is wrong, case by case; empty if the budget is kept."""
    wrong = [f"{name}: no budget; record it" for name in measured.keys() - budget.keys()]
    wrong += [f"{name}: in the budget, but no case" for name in budget.keys() - measured.keys()]
    for name in measured.keys() & budget.keys():
        if measured[name] > budget[name] * MARGIN:
            growth = 100 * (measured[name] / budget[name] - 1)
            wrong.append(f"{name}: {measured[name]:,} instructions, {growth:.1f} % above the budget {budget[name]:,}")
    return sorted(wrong)


def cannot_run(driver: Path) -> str | None:
    """Why nothing can be measured here; None if it can."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    if not driver.is_file():
        return f"{driver} is not built"
    if os.uname().machine != "x86_64":
        return f"the budget is for x86_64, this is {os.uname().machine}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("driver", type=Path, help="the program rnp_instructions")
    parser.add_argument("--record", action="store_true", help="write the budget instead of comparing")
    options = parser.parse_args()
    driver = options.driver.resolve()
    if reason := cannot_run(driver):
        required = options.record or os.environ.get("RNP_REQUIRE_PROOF") == "1"
        print(f"instruction counts: {'cannot run' if required else 'SKIPPED'}: {reason}")
        return 2 if required else 0
    budgets = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    compiler = subprocess.run([driver, "--compiler"], capture_output=True, text=True, check=True).stdout.strip()
    if compiler not in budgets and not options.record:
        print(f"instruction counts: SKIPPED: recorded for {', '.join(budgets)}, this build is by {compiler}")
        return 0
    cases = subprocess.run([driver, "--list"], capture_output=True, text=True, check=True).stdout.split()
    measured = {f"{isa} {case}": measure(driver, isa, case) for isa in PATHS for case in cases}
    budget = budgets.get(compiler, {})
    for name, count in measured.items():
        change = f"{100 * (count / budget[name] - 1):+6.2f} %" if name in budget else "new"
        print(f"{name:32} {count:14,}  {change}")
    if options.record:
        budgets[compiler] = measured
        BUDGET.write_text(json.dumps(budgets, indent=1) + "\n")
        print(f"written: {BUDGET.name}, {compiler}")
        return 0
    wrong = compare(budget, measured)
    print("\n".join(wrong) if wrong else f"instruction counts: {len(measured)} within {MARGIN:.2f} of the budget")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
