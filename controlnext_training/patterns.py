"""Regular expressions that take linear time in the searched text, whatever the expression.

Python's `re` tries alternatives one after the other, and some expressions of twenty letters keep it busy for ever, with
the interpreter's lock held. Here all alternatives are tried simultaneously (K. Thompson, "Regular Expression Search
Algorithm", CACM 11(6), 1968). Matches are those of `re.search`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MAX_LETTERS = 200
MAX_STATES = 2000
MAX_REMEMBERED = 20_000
"""Largest number of cached steps; the cache makes names with a common start fast."""

Test = Callable[[str], bool]
Node = (
    tuple  # ("test", Test), ("join", [Node]), ("either", [Node]), ("repeat", Node, least, most), ("start",), ("end",)
)

CLASSES: dict[str, Test] = {
    "d": str.isdecimal,
    "w": lambda letter: letter.isalnum() or letter == "_",
    "s": str.isspace,
    "D": lambda letter: not letter.isdecimal(),
    "W": lambda letter: not (letter.isalnum() or letter == "_"),
    "S": lambda letter: not letter.isspace(),
}
COUNTS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class PatternError(ValueError):
    """Error for an expression that cannot be used. The message says what is wrong with it."""


class Pattern:
    """A compiled expression: letters, . \\d \\w \\s [abc] [^a-z] ( | ) (?: ) * + ? {2,3} ^ $ and \\ before a sign."""

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LETTERS:
            raise PatternError(f"it has {len(text):,} letters, and no more than {MAX_LETTERS} are taken")
        self._machine = _Machine(_Parser(text).parse())

    def search(self, text: str) -> bool:
        """True: the expression matches somewhere in the text. False: it does not."""
        return self._machine.search(text)


class _Parser:
    """Parser from text to a tree."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def parse(self) -> Node:
        tree = self._either()
        if self.at < len(self.text):
            raise PatternError("a ) has no ( before it")
        return tree

    def _next(self) -> str:
        """Next letter, without consuming it; empty at the end."""
        return self.text[self.at : self.at + 1]

    def _take(self) -> str:
        letter = self._next()
        if not letter:
            raise PatternError("it ends too soon")
        self.at += 1
        return letter

    def _took(self, what: str) -> bool:
        found = self.text.startswith(what, self.at)
        self.at += len(what) if found else 0
        return found

    def _either(self) -> Node:
        ways = [self._join()]
        while self._took("|"):
            ways.append(self._join())
        return ways[0] if len(ways) == 1 else ("either", ways)

    def _join(self) -> Node:
        parts = []
        while self._next() and self._next() not in "|)":
            parts.append(self._repeated())
        return ("join", parts)

    def _repeated(self) -> Node:
        part = self._single()
        counts = self._counts()
        if counts is None:
            return part
        self._took("?")  # to match as little as possible finds the same names
        if self._next() and self._next() in "*+?{":
            raise PatternError("two repetitions stand side by side")
        if part[0] in ("start", "end"):
            raise PatternError("^ and $ cannot be repeated")
        return ("repeat", part, *counts)

    def _counts(self) -> tuple[int, int | None] | None:
        if self._next() and self._next() in "*+?":
            return COUNTS[self._take()]
        if not self._took("{"):
            return None
        inside, closed, _ = self.text[self.at :].partition("}")
        low, comma, high = inside.partition(",")
        if not closed or not all(part.isdecimal() or not part for part in (low, high)) or not inside.strip(","):
            raise PatternError("a { begins no count such as {2} or {2,3}; write \\{ for the sign")
        self.at += len(inside) + 1
        least = int(low or 0)
        most = (int(high) if high else None) if comma else least
        if max(least, most or 0) > MAX_STATES or (most is not None and most < least):
            raise PatternError(f"{{{inside}}} is not a count: the lower limit comes first, {MAX_STATES} is the most")
        return least, most

    def _single(self) -> Node:
        letter = self._take()
        if letter == "(":
            return self._group()
        if letter == "[":
            return ("test", self._set())
        if letter in "*+?{":
            raise PatternError(f"nothing stands before {letter}")
        if letter in "^$":
            return ("start",) if letter == "^" else ("end",)
        if letter == ".":
            return ("test", lambda found: found != "\n")
        return ("test", self._escaped() if letter == "\\" else letter.__eq__)

    def _group(self) -> Node:
        if self._took("?") and not self._took(":"):
            raise PatternError("(? begins something that is not supported; ( ) and (?: ) are")
        inside = self._either()
        if not self._took(")"):
            raise PatternError("a ( has no ) behind it")
        return inside

    def _escaped(self) -> Test:
        letter = self._take()
        if letter in CLASSES:
            return CLASSES[letter]
        if letter.isalnum():
            raise PatternError(f"\\{letter} is not supported")
        return letter.__eq__

    def _set(self) -> Test:
        negative = self._took("^")
        tests: list[Test] = []
        while not tests or not self._took("]"):
            tests.append(self._range())
        return lambda letter: any(test(letter) for test in tests) != negative

    def _range(self) -> Test:
        first = self._take()
        if first == "\\":
            return self._escaped()
        if self._next() != "-" or self.text[self.at + 1 : self.at + 2] in ("]", ""):
            return first.__eq__
        self.at += 1
        last = self._take()
        if last == "\\" or last < first:
            raise PatternError(f"{first}-{last} is not a range")
        return lambda letter: first <= letter <= last


@dataclass(slots=True)
class _State:
    """State of the automaton. With a test, a matching letter leads to `after`; without one, the transition is free."""

    test: Test | None = None
    after: list[int] = field(default_factory=list)
    only_at: str = ""
    """`start` or `end`: the transition is free only there; '' everywhere."""


class _Machine:
    """Automaton that follows all states of an expression simultaneously."""

    def __init__(self, tree: Node) -> None:
        self.states: list[_State] = []
        self.end = self._state()
        self.start = self._add(tree, self.end)
        self._steps: dict[tuple[frozenset[int], str, bool], frozenset[int]] = {}

    def _state(self, test: Test | None = None, after: Iterable[int] = (), only_at: str = "") -> int:
        if len(self.states) >= MAX_STATES:
            raise PatternError("its repetitions make it too long")
        self.states.append(_State(test, list(after), only_at))
        return len(self.states) - 1

    def _add(self, node: Node, after: int) -> int:
        """Add the states of a part that continues at `after`; returns the first of them."""
        kind = node[0]
        if kind == "test":
            return self._state(node[1], [after])
        if kind in ("start", "end"):
            return self._state(None, [after], kind)
        if kind == "either":
            return self._state(None, [self._add(way, after) for way in node[1]])
        if kind == "join":
            for part in reversed(node[1]):
                after = self._add(part, after)
            return after
        return self._add_repeat(node[1], node[2], node[3], after)

    def _add_repeat(self, part: Node, least: int, most: int | None, after: int) -> int:
        if most is None:
            again = self._state()
            self.states[again].after = [self._add(part, again), after]
            first = again
        else:
            first = after
            for _ in range(most - least):
                first = self._state(None, [self._add(part, first), after])
        for _ in range(least):
            first = self._add(part, first)
        return first

    def _reach(self, found: Iterable[int], at_start: bool, at_end: bool) -> frozenset[int]:
        """These states and all that free transitions reach from them."""
        reached, todo = set[int](), list(found)
        while todo:
            number = todo.pop()
            if number in reached:
                continue
            reached.add(number)
            state = self.states[number]
            if state.test is None and (not state.only_at or (at_start if state.only_at == "start" else at_end)):
                todo += state.after
        return frozenset(reached)

    def search(self, text: str) -> bool:
        here = self._reach([self.start], True, not text)
        for place, letter in enumerate(text):
            if self.end in here:
                return True
            here = self._step(here, letter, place + 1 == len(text))
        return self.end in here

    def _step(self, here: frozenset[int], letter: str, at_end: bool) -> frozenset[int]:
        key = (here, letter, at_end)
        if key not in self._steps:
            if len(self._steps) >= MAX_REMEMBERED:
                self._steps.clear()
            states = (self.states[number] for number in here)
            found = [state.after[0] for state in states if state.test is not None and state.test(letter)]
            self._steps[key] = self._reach([*found, self.start], False, at_end)
        return self._steps[key]
