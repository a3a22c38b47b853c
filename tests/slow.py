"""Write slow.txt, the tests that ``pytest -m "not slow"`` leaves out, from the durations of a whole run:

pytest --durations=0 --durations-min=0.005 | python tests/slow.py
"""

import re
import sys
from collections import defaultdict
from pathlib import Path

LIST = Path(__file__).with_name("slow.txt")
BUDGET = 50  # seconds of all that is left, on one core: under two minutes on two, with the start of both workers


def key(node: str) -> str:
    """The test's file and function, without folders and parameters: doctests lie elsewhere once installed.

    Example:
        >>> key("tests/explain/test_cp.py::TestFit::test_rank[2]")
        'test_cp.py::TestFit::test_rank'
    """
    return node.split("[")[0].rpartition("/")[2]


def slowest(lines, budget: float) -> list[str]:
    """The tests to leave out, the slowest first, so that the others take no more than the budget.

    Example:
        >>> slowest(["2.0s call a.py::x", "1.0s setup a.py::y[1]", "2.5s call a.py::y[2]"], budget=2)
        ['a.py::y']
    """
    seconds: dict[str, float] = defaultdict(float)
    for line in lines:
        if match := re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S+)", line):
            seconds[key(match[2])] += float(match[1])
    order, left = sorted(seconds, key=lambda name: -seconds[name]), sum(seconds.values())
    chosen = []
    while left > budget:
        chosen.append(order[len(chosen)])
        left -= seconds[chosen[-1]]
    return chosen


if __name__ == "__main__":
    LIST.write_text("\n".join(sorted(slowest(sys.stdin, BUDGET))) + "\n", encoding="utf-8")
