"""Optimised programs in XLA's text: instructions, sizes, loops, and where each comes from."""

from collections import defaultdict
import dataclasses
from functools import cached_property
import math
import re
from typing import TypeAlias

WIDTHS = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
WIDTHS |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
ARRAY = re.compile(r"\b(" + "|".join(WIDTHS) + r")\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*->.*\{$")
TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")

Shape: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: of its result.
        result: its type, such as `f32[2,3]{1,0}` or a tuple of those.
        kind: such as fusion.
        operands: the names of what it takes.
        line: all of it.
    """

    name: str
    result: str
    kind: str
    operands: tuple[str, ...]
    line: str

    @classmethod
    def read(cls, line: str) -> "Instruction | None":
        """The instruction of a line, if it is one."""
        match = INSTRUCTION.match(line)
        if not match:
            return None
        _, name, result, kind, rest = match.groups()
        taken = rest[: _closing(rest)]
        return cls(name, result, kind, tuple(re.findall(r"%([\w.\-]+)", taken)), line)

    def field(self, pattern: str) -> str | None:
        """What the first group of a regular expression finds in the line."""
        match = re.search(pattern, self.line)
        return match[1] if match else None

    @property
    def op_name(self) -> str:
        """The scopes and transformations it was traced in; empty if the compiler made it."""
        return self.field(r'op_name="([^"]*)"') or ""

    @property
    def target(self) -> str:
        """The library function that a custom call calls."""
        return self.field(r'custom_call_target="([^"]*)"') or ""

    @property
    def called(self) -> list[str]:
        """The computations it calls, of a loop its body alone."""
        one = r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)"
        several = self.field(r"branch_computations=\{([^}]*)\}") or ""
        return re.findall(one, self.line) + re.findall(r"%?([\w.\-]+)", several)

    @property
    def rounds(self) -> int | None:
        """How often a loop runs; None if the program does not tell."""
        count = self.field(r'"known_trip_count":\{"n":"(\d+)"')
        return int(count) if count else None


def _closing(text: str) -> int:
    """Where the bracket closes that was opened before the text."""
    depth = 1
    for place, sign in enumerate(text):
        depth += {"(": 1, ")": -1}.get(sign, 0)
        if depth == 0:
            return place
    return len(text)


def arrays(types: str) -> list[tuple[str, Shape]]:
    """Element type and shape of every array in a type."""
    return [
        (kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in ARRAY.findall(types)
    ]


def size(types: str) -> int:
    """Bytes of the arrays in a type."""
    return sum(WIDTHS[kind] * math.prod(shape) for kind, shape in arrays(types))


class Program:
    """The computations of a program.

    Attributes:
        bodies: the instructions of each computation.
        entry: the name of the one that runs.
    """

    def __init__(self, text: str):
        self.bodies: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = defaultdict(dict)
        section = ""
        body: list[Instruction] = []
        for line in text.splitlines():
            if line in TABLES:
                section = line
            elif header := COMPUTATION.match(line):
                section = ""
                body = self.bodies.setdefault(header[2], [])
                self.entry = header[2] if header[1] else self.entry
            elif section and (row := re.match(r"(\d+) (.*)", line)):
                self._tables[section][int(row[1])] = row[2].strip('"')
            elif instruction := Instruction.read(line):
                body.append(instruction)

    @cached_property
    def types(self) -> dict[tuple[str, str], str]:
        """The type of a computation's instruction: by the names of both."""
        return {
            (name, instruction.name): instruction.result
            for name, body in self.bodies.items()
            for instruction in body
        }

    def operands(self, body: str, instruction: Instruction) -> list[str]:
        """The types of what an instruction of a computation takes."""
        return [self.types.get((body, name), "") for name in instruction.operands]

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """The instructions of a fusion; none of any other."""
        if instruction.kind != "fusion":
            return []
        return [row for name in instruction.called for row in self.bodies.get(name, [])]

    def source(self, instruction: Instruction, package: str) -> str | None:
        """The innermost line of a package that made an instruction, as `folder/file.py:12`.

        Args:
            instruction: of this program.
            package: the package's folder, ending in a slash.
        """
        for row in (instruction, *reversed(self.inside(instruction))):
            number = row.field(r"stack_frame_id=(\d+)")
            if number and (found := self._in_package(int(number), package)):
                return found
        return None

    def _in_package(self, frame: int, package: str) -> str | None:
        while frame:
            fields = _fields(self._tables["StackFrames"][frame])
            place = _fields(self._tables["FileLocations"][fields["file_location_id"]])
            file = self._tables["FileNames"][place["file_name_id"]]
            if file.startswith(package):
                return f"{file.removeprefix(package)}:{place.get('line', 0)}"
            # The text has 1 for "no parent", and each frame's number is one more than it is here.
            frame = fields.get("parent_frame_id", 1) - 1
        return None


def _fields(row: str) -> dict[str, int]:
    return {key: int(value) for key, value in re.findall(r"(\w+)=(\d+)", row)}
