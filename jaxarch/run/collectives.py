"""What a compiled program sends between devices, read from its optimised HLO text (`compiled.as_text()`).

A compiler adds collectives, joins them, moves them out of loops and replaces some by others (XLA:CPU writes a sum in
bfloat16 as one in float32), so only its own text says what is sent. All bytes are those of one device.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
    """operands: type and bytes of each.
    groups: the devices that exchange with one another; of a collective-permute, pairs of source and target.
    times: how often a run of the program runs it; None: in a loop whose turns the program does not say.
    name: where it comes from, in the words of the traced program; the compiler's own may have none.
    """

    kind: str
    operands: tuple[tuple[str, int], ...]
    groups: Groups
    times: int | None
    name: str

    @property
    def size(self) -> int:
        """Devices of a group."""
        return len(self.groups[0])

    @property
    def operand_bytes(self) -> int:
        return sum(bytes_ for _, bytes_ in self.operands)

    @property
    def result_bytes(self) -> int:
        if self.kind == "all-gather":
            return self.operand_bytes * self.size
        return self.operand_bytes // self.size if self.kind == "reduce-scatter" else self.operand_bytes

    @property
    def bytes(self) -> int:
        """The larger of what goes in and what comes out: an all-gather's result, else the operands."""
        return max(self.operand_bytes, self.result_bytes)

    @property
    def wire_bytes(self) -> float:
        """What a device sends in a run, as `ring_bytes`."""
        if all(len(set(group)) == 1 for group in self.groups):
            return 0.0
        return ring_bytes(self.kind, self.bytes, self.size)


def ring_bytes(kind: str, bytes_: int | float, size: int) -> float:
    """What each of `size` devices sends in a ring, which is the least for each kind (Patarasuk & Yuan 2009, sec. 3).

    bytes_: as `Collective.bytes`.
    """
    if kind in ("collective-permute", "collective-broadcast"):
        return float(bytes_)
    return (2 if kind == "all-reduce" else 1) * (size - 1) / size * bytes_


def collectives(text: str) -> list[Collective]:
    """All that the program runs, in its order; an asynchronous one stands where it starts.

    The body of a loop counts as often as it turns. Of a conditional only the branch that sends most is there.
    """
    program = _Program(text)
    return program.found(program.entry)


def totals(found: Iterable[Collective], wire: bool = False, turns: int | None = None) -> dict[str, float]:
    """Bytes by kind, each as often as it is run: of `bytes`, or of `wire_bytes`.

    turns: of a loop whose turns are not known, as they depend on the data. Raises ValueError where it has a
        collective and they are not given.
    """
    sums: dict[str, float] = {}
    for one in found:
        times = turns if one.times is None else one.times
        if times is None:
            raise ValueError(f"the {one.kind} {one.name} is in a loop whose turns the program does not say.")
        sums[one.kind] = sums.get(one.kind, 0.0) + times * (one.wire_bytes if wire else one.bytes)
    return sums


def axes(one: Collective, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of the mesh (`mesh.shape`) along which it sends."""
    places = [np.array(np.unravel_index(group, tuple(mesh.values()))) for group in one.groups]
    crossed = np.any([(place != place[:, :1]).any(axis=1) for place in places], axis=0)
    return tuple(name for name, across in zip(mesh, crossed, strict=True) if across)


# --- the text -----------------------------------------------------------------------------------

COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+).*\{$")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")
ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")


class _Instruction(NamedTuple):
    shape: str
    opcode: str
    arguments: str  # what stands in its brackets
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, *names: str) -> list[str]:
        """The computations that these attributes name."""
        given = re.findall(rf"\b(?:{'|'.join(names)})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return [name for value in given for name in re.findall(r"%([\w.\-]+)", value)]


Computation = dict[str, _Instruction]


class _Program:
    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry, self.devices = "", 1
        for line in text.splitlines():
            if line.startswith("HloModule"):
                counts = re.findall(r"(?:num_partitions|replica_count)=(\d+)", line)
                self.devices = math.prod(map(int, counts))
            elif (instruction := INSTRUCTION.match(line)) and self.computations:
                root, name, rest = instruction.groups()
                next(reversed(self.computations.values()))[name] = _instruction(rest, bool(root))
            elif computation := COMPUTATION.match(line):
                entry, name = computation.groups()
                self.computations[name] = {}
                self.entry = name if entry else self.entry
        self._known: dict[str, list[Collective]] = {}

    def found(self, name: str) -> list[Collective]:
        """Of one run of a computation."""
        if name not in self._known:
            computation = self.computations[name]
            self._known[name] = [one for each in computation.values() for one in self._of(each, computation)]
        return self._known[name]

    def _of(self, instruction: _Instruction, scope: Computation) -> list[Collective]:
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            return [self._collective(kind, instruction, scope)]
        if instruction.opcode == "while":
            turns = self._turns(instruction, scope)
            (body,), (condition,) = instruction.called("body"), instruction.called("condition")
            tests = None if turns is None else turns + 1
            return _repeated(self.found(body), turns) + _repeated(self.found(condition), tests)
        if instruction.opcode == "conditional":
            names = instruction.called("branch_computations", "true_computation", "false_computation")
            return max((self.found(name) for name in names), key=_sent)
        if instruction.opcode.endswith(("-done", "-update")):  # names again what was started
            return []
        names = instruction.called("calls", "to_apply", "called_computations")
        return [one for name in names for one in self.found(name)]

    def _collective(self, kind: str, instruction: _Instruction, scope: Computation) -> Collective:
        arrays = [array for name in instruction.operands for array in _arrays(scope[name].shape)]
        name = re.search(r'op_name="([^"]*)"', instruction.attributes)
        pairs = kind == "collective-permute"
        given = re.search(r"(?:source_target_pairs|replica_groups)=(.*)", instruction.attributes)
        groups = _groups(given.group(1), pairs) if given else ()
        return Collective(
            kind, tuple(arrays), groups or (tuple(range(self.devices)),), 1, name.group(1) if name else ""
        )

    def _turns(self, loop: _Instruction, scope: Computation) -> int | None:
        """As the compiler noted, else read from a counter that is compared with a constant; None: not known."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted.group(1))
        (body,), (condition,) = loop.called("body"), loop.called("condition")
        test, compared = self._root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.attributes or len(compared) != 2:
            return None
        counter, end = compared[0], _constant(compared[1])
        place = re.search(r"\bindex=(\d+)", counter.attributes)
        start = scope[loop.operands[0]]
        if counter.opcode != "get-tuple-element" or place is None or end is None or start.opcode != "tuple":
            return None
        index = int(place.group(1))
        first = _constant(_uncopied(scope[start.operands[index]], scope))
        added, terms = self._root(body, index)
        steps = [value for value in map(_constant, terms) if value is not None]
        if first is None or added.opcode != "add" or len(steps) != 1 or steps[0] < 1:
            return None
        return max(0, -(-(end - first) // steps[0]))

    def _root(self, name: str, element: int | None = None) -> tuple[_Instruction, list[_Instruction]]:
        """A computation's result (or an element of it) and its operands, looked at through a fusion."""
        scope = self.computations[name]
        root = next(each for each in scope.values() if each.root)
        if element is not None:
            root = scope[root.operands[element]]
        root = _uncopied(root, scope)
        given = [_uncopied(scope[operand], scope) for operand in root.operands]
        if root.opcode != "fusion":
            return root, given
        (called,) = root.called("calls")
        root, inner = self._root(called)
        return root, [given[int(each.arguments)] if each.opcode == "parameter" else each for each in inner]


def _instruction(text: str, root: bool) -> _Instruction:
    """Of `shape opcode(arguments), attributes`; the shape may be a tuple, in brackets of its own."""
    end = _closing(text, 0) if text.startswith("(") else text.index(" ")
    opening = text.index("(", end)
    closing = _closing(text, opening)
    return _Instruction(text[:end], text[end:opening].strip(), text[opening + 1 : closing - 1], text[closing:], root)


def _closing(text: str, opening: int) -> int:
    """Behind the bracket that closes the one at `opening`."""
    depth = 0
    for bracket in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if bracket.group() == "(" else -1
        if depth == 0:
            return bracket.end()
    raise ValueError(f"a bracket is not closed in the line: {text}")


def _arrays(shape: str) -> list[tuple[str, int]]:
    """Type and bytes of each array of a shape; tokens and the like have none."""
    arrays = []
    for dtype, sizes in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        numbers = math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size)
        arrays.append((dtype, -(-numbers * bits // 8)))
    return arrays


def _groups(text: str, pairs: bool) -> Groups:
    """Of the notations `{{0,1},{2,3}}`, `[2,2]<=[4]` and `mesh['x'=2,'y'=2] {'y'}`. Empty where all devices are one."""
    if text.startswith("{"):
        listed = re.match(r"\{((?:\{[\d,]*\},?)*)\}", text)
        found = re.findall(r"\{([\d,]*)\}", listed.group(1)) if listed else []
        return tuple(tuple(int(device) for device in group.split(",")) for group in found if group)
    if pairs or text.startswith("["):
        return tuple(map(tuple, _iota(text).tolist()))
    mesh = re.match(r"@?mesh[\[<](.*?)[\]>](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", text)
    if mesh is None:
        raise ValueError(f"not known as groups of devices: {text}")
    shape, order, named = mesh.groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',]+?)'?=(\d+)", shape)}
    devices = np.arange(math.prod(sizes.values())) if order is None else _order(order)
    # A part of an axis is written as name:(what is before it)its size, so each axis is cut at all of these.
    cuts: dict[str, set[int]] = {name: {1, size} for name, size in sizes.items()}
    wanted: dict[str, tuple[int, int]] = {}
    for name, before, size in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", named):
        first = int(before or 1)
        wanted[f"{name}/{first}"] = first, first * int(size or sizes[name])
        cuts[name] |= set(wanted[f"{name}/{first}"])
    parts, across = [], []
    for name, places in cuts.items():
        ordered = sorted(places)
        for low, high in itertools.pairwise(ordered):
            inside = any(key.rsplit("/", 1)[0] == name and a <= low and high <= b for key, (a, b) in wanted.items())
            across.append(inside)
            parts.append(high // low)
    array = devices.reshape(parts)
    kept = [axis for axis, inside in enumerate(across) if not inside]
    moved = array.transpose(kept + [axis for axis, inside in enumerate(across) if inside])
    size = math.prod(part for part, inside in zip(parts, across, strict=True) if inside)
    return tuple(map(tuple, moved.reshape(-1, size).tolist()))


def _iota(text: str) -> np.ndarray:
    """`[2,4]<=[4,2]T(1,0)`: the numbers from 0 on in the latter shape, turned, in the former shape."""
    found = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    if found is None:
        raise ValueError(f"not known as groups of devices: {text}")
    shape, source, turned = ([int(n) for n in (part or "").split(",") if n] for part in found.groups())
    numbers = np.arange(math.prod(shape)).reshape(source or shape)
    return (numbers.transpose(turned) if turned else numbers).reshape(shape)


def _order(text: str) -> np.ndarray:
    """The devices of a mesh in its order: `[2,4]T(1,0)`, or one by one."""
    if not text.startswith("["):
        return np.array([int(device) for device in text.split(",")])
    shape, turned = re.match(r"\[([\d,]+)\](.*)", text).groups()  # type: ignore[union-attr]
    return _iota(f"[{math.prod(int(n) for n in shape.split(','))}]<=[{shape}]{turned}")


def _uncopied(instruction: _Instruction, scope: Computation) -> _Instruction:
    while instruction.opcode in ("copy", "bitcast"):
        instruction = scope[instruction.operands[0]]
    return instruction


def _constant(instruction: _Instruction) -> int | None:
    whole = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.arguments)
    return int(instruction.arguments) if whole else None


def _repeated(found: list[Collective], times: int | None) -> list[Collective]:
    both = [None if times is None or one.times is None else times * one.times for one in found]
    return [one._replace(times=number) for one, number in zip(found, both, strict=True) if number != 0]


def _sent(found: list[Collective]) -> float:
    return sum(math.inf if one.times is None else one.times * one.wire_bytes for one in found)
