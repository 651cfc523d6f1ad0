"""Runs the PTX that Triton compiles, on NumPy: the threads of one block in lockstep.

Enough of PTX for the programs of ``gradsketch.kernels``; any other instruction is an error. What a GPU does in silence
is an error here too: a memory access outside the tensors that were passed, or one that is not aligned; a branch that
the threads do not take together; two threads that use one word of shared memory, one of them writing, with no barrier
between. Threads of different warps need ``bar.sync`` between them, those of one warp ``bar.warp.sync``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np

__all__ = ["Memory", "Program", "PtxError"]

WARP = 32
TYPES = {
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (16, 32, 64)},
    "f32": np.dtype("f4"),
    "pred": np.dtype(bool),
}
COMPARISONS = {
    "lt": np.less,
    "gt": np.greater,
    "eq": np.equal,
    "ne": np.not_equal,
    "ge": np.greater_equal,
    "le": np.less_equal,
}


class PtxError(AssertionError):
    """What a GPU would do in silence, or never finish."""


class Memory:
    """The arrays that a program was given, at addresses of its own choice."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []
        self.starts: list[int] = []
        self._free = 1 << 32

    def place(self, array: np.ndarray, misalignment: int = 0) -> int:
        """Add an array of bytes and return its address."""
        self.arrays.append(array)
        self.starts.append(self._free + misalignment)
        self._free += (len(array) + 4096) // 1024 * 1024
        return self.starts[-1]

    def find(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the array that all these addresses lie in, and where."""
        index = int(np.searchsorted(self.starts, int(address.min()), side="right")) - 1
        offset = address.astype(np.int64) - self.starts[max(index, 0)]
        if index < 0 or offset.min() < 0 or offset.max() + size > len(self.arrays[index]):
            raise PtxError("an access outside the tensors")
        if (address % size).any():
            raise PtxError("an access that is not aligned")
        return self.arrays[index], offset


@dataclass(frozen=True)
class Instruction:
    """One line: ``@!%p1 opcode operands``."""

    text: str
    unless: bool
    predicate: str | None
    opcode: list[str]
    operands: list[str]


@dataclass(frozen=True)
class Program:
    """A kernel's PTX, read once."""

    text: str
    instructions: list[Instruction] = field(init=False)
    labels: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        body = self.text[self.text.index("{", self.text.index(".entry")) + 1 :].split(".section")[0]
        body = re.sub(r"//[^\n]*", "", body)
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in map(str.strip, body.splitlines()):
            if label := re.match(r"^(\$[\w$]+):$", line):
                labels[label.group(1)] = len(instructions)
                continue
            parts = filter(None, map(str.strip, line.split(";")))
            instructions.extend(_read(part) for part in parts if part[0] not in ".{}")
        object.__setattr__(self, "instructions", instructions)
        object.__setattr__(self, "labels", labels)

    @cached_property
    def threads(self) -> int:
        return int(re.search(r"\.reqntid (\d+)", self.text).group(1))

    def run(self, grid: tuple[int, int], parameters: Sequence[int], memory: Memory) -> None:
        """Run every block of a grid, in an order that no result may depend on: the last one first."""
        for y in reversed(range(grid[1])):
            for x in reversed(range(grid[0])):
                Block(self, parameters, memory, (x, y)).run()


def _read(part: str) -> Instruction:
    match = re.match(r"^(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)$", part)
    assert match, part
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", match.group(4))
    return Instruction(
        part, bool(match.group(1)), match.group(2), match.group(3).split("."), [o.strip() for o in operands]
    )


class SharedMemory:
    """Bytes that the threads of a block share, and who used each word last."""

    def __init__(self, threads: int, size: int = 1 << 15) -> None:
        self.bytes = np.zeros(size, np.uint8)
        self.warp = np.arange(threads) // WARP
        self.barriers = self.warp_barriers = 0
        # Of the last write of a word: thread and barriers before it. Of its reads since a barrier: thread, or several.
        self.writer, self.written, self.written_in_warp = (np.full(size // 4, -1) for _ in range(3))
        self.reader, self.read, self.read_in_warp = (np.full(size // 4, -1) for _ in range(3))

    def use(self, address: np.ndarray, thread: np.ndarray, *, write: bool) -> None:
        """Note that threads use words, and fail where another one may do so at the same time."""
        word = address >> 2
        bad = self._apart(self.writer[word], self.written[word], self.written_in_warp[word], thread)
        if write:
            bad |= self._apart(self.reader[word], self.read[word], self.read_in_warp[word], thread)
        if bad.any():
            raise PtxError("a race in shared memory")
        if write:
            self.writer[word], self.written[word], self.written_in_warp[word] = (
                thread,
                self.barriers,
                self.warp_barriers,
            )
        else:
            fresh = self.read[word] != self.barriers
            several = ~fresh & (self.warp[self.reader[word]] != self.warp[thread])
            self.reader[word] = np.where(several, -2, thread)
            self.read[word], self.read_in_warp[word] = self.barriers, self.warp_barriers

    def _apart(
        self, other: np.ndarray, barriers: np.ndarray, warp_barriers: np.ndarray, thread: np.ndarray
    ) -> np.ndarray:
        """Which words another thread used and no barrier lies between."""
        same_warp = (other >= 0) & (self.warp[other] == self.warp[thread])
        between = (barriers != self.barriers) | (same_warp & (warp_barriers != self.warp_barriers))
        return (other != -1) & (other != thread) & ~between


class Block:
    """The threads of one block: their registers, and where they are."""

    def __init__(self, program: Program, parameters: Sequence[int], memory: Memory, index: tuple[int, int]) -> None:
        self.program, self.parameters, self.memory = program, parameters, memory
        self.thread = np.arange(program.threads)
        self.everyone = np.ones(program.threads, bool)
        self.constants: dict[tuple[str, str], np.ndarray] = {}
        self.special = {
            "bar": self._barrier,
            "ld": self._load,
            "st": self._store,
            "ldmatrix": partial(self._matrix, write=False),
            "stmatrix": partial(self._matrix, write=True),
        }
        self.shared = SharedMemory(program.threads)
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": self.thread.astype(np.uint32),
            "%ctaid.x": self._all(index[0], "u32"),
            "%ctaid.y": self._all(index[1], "u32"),
        }

    def run(self) -> None:
        position: int | None = 0
        with np.errstate(over="ignore", invalid="ignore"):
            while position is not None:
                position = self._step(position)

    def _step(self, position: int) -> int | None:
        instruction = self.program.instructions[position]
        active = self._active(instruction)
        name = instruction.opcode[0]
        if name in ("ret", "bra"):
            if active.any() and not active.all():
                raise PtxError("threads that part at a branch")
            if not active.any():
                return position + 1
            return None if name == "ret" else self.program.labels[instruction.operands[-1]]
        if active is self.everyone or active.any():
            self._execute(instruction, active)
        return position + 1

    def _active(self, instruction: Instruction) -> np.ndarray:
        if instruction.predicate is None:
            return self.everyone
        return self.registers[instruction.predicate] ^ instruction.unless

    def _execute(self, instruction: Instruction, active: np.ndarray) -> None:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode[0] in self.special:
            self.special[opcode[0]](opcode, operands, active)
        elif opcode[0] == "mov" and "{" in operands[0] + operands[1]:
            self._repack(int(opcode[1][1:]), operands, active)
        else:
            self._put(operands[0], self._value(opcode, operands[1:]), active)

    # Registers

    def _all(self, value: int, kind: str) -> np.ndarray:
        bits = TYPES[kind].itemsize * 8
        return np.full(len(self.thread), value & ((1 << bits) - 1), f"u{bits // 8}").view(TYPES[kind])

    def _get(self, operand: str, kind: str) -> np.ndarray:
        if operand in self.registers:
            value = self.registers[operand]
            return value if kind == "pred" else value.view(TYPES[kind])
        if (operand, kind) not in self.constants:
            self.constants[operand, kind] = self._all(_number(operand), kind)
        return self.constants[operand, kind]

    def _put(self, register: str, value: np.ndarray, active: np.ndarray) -> None:
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
        if active is not self.everyone and not active.all():
            value = np.where(active, value, self.registers.get(register, np.zeros_like(value)))
        self.registers[register] = value

    def _repack(self, bits: int, operands: list[str], active: np.ndarray) -> None:
        """Join two registers in one of ``bits`` bits, or part one."""
        parts = [part.strip() for part in (operands[0] + operands[1]).split("{")[1].split("}")[0].split(",")]
        half = f"u{bits // 2}"
        if "{" in operands[0]:
            pairs = self.registers[operands[1]].view(TYPES[half]).reshape(-1, 2)
            for part, value in zip(parts, pairs.T, strict=True):
                if part != "_":
                    self._put(part, value.copy(), active)
        else:
            pairs = np.stack([self._get(part, half) for part in parts], 1)
            self._put(operands[0], pairs.reshape(-1).view(TYPES[f"u{bits}"]), active)

    # Memory

    def _barrier(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        if "warp" in opcode:
            self.shared.warp_barriers += 1
        else:
            self.shared.barriers += 1

    def _address(self, operand: str) -> np.ndarray:
        base, offset = re.match(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
        value = self._get(base, "u64") if base == "global_smem" else self.registers[base]
        return value.astype(np.uint64).view(np.int64) + int(offset or "0", 0)

    def _load(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        kind = opcode[-1]
        if opcode[1] == "param":
            number = int(re.search(r"param_(\d+)", operands[1]).group(1))
            return self._put(operands[0], self._all(self.parameters[number], kind), active)
        size = TYPES[kind].itemsize
        names = [name.strip() for name in operands[0].strip("{}").split(",")]
        cells = self._cells(opcode, operands[1], size, len(names), active, write=False)
        for name, column in zip(names, cells, strict=True):
            value = np.zeros(len(self.thread), TYPES[kind])
            value[active] = column
            self._put(name, value, active)
        return None

    def _store(self, opcode: list[str], operands: list[str], active: np.ndarray) -> None:
        kind = opcode[-1]
        names = [name.strip() for name in operands[1].strip("{}").split(",")]
        values = [self._get(name, kind)[active] for name in names]
        self._cells(opcode, operands[0], TYPES[kind].itemsize, len(names), active, write=True, values=values)

    def _cells(
        self, opcode: list[str], operand: str, size: int, count: int, active: np.ndarray, *, write: bool, values=()
    ) -> list[np.ndarray]:
        """Read or write ``count`` neighbours a thread."""
        address = self._address(operand)[active]
        if (address % (size * count)).any():
            raise PtxError("an access that is not aligned")
        found = []
        for k in range(count):
            here = address + k * size
            if "shared" in opcode:
                for word in range(0, size, 4):
                    self.shared.use(here + word, self.thread[active], write=write)
                memory, offset = self.shared.bytes, here
            else:
                memory, offset = self.memory.find(here, size)
            cells = offset[:, None] + np.arange(size)
            if write:
                memory[cells] = values[k].reshape(-1, 1).view(np.uint8)
            else:
                found.append(memory[cells].reshape(-1).view(f"u{size}"))
        return found

    def _matrix(self, opcode: list[str], operands: list[str], active: np.ndarray, *, write: bool) -> None:
        """Exchange 8 × 8 matrices of 16 bits: lane l holds pair l mod 4 of row l div 4, lane 8j + row its address."""
        assert active.all()
        names = [name.strip() for name in operands[1 if write else 0].strip("{}").split(",")]
        address = self._address(operands[0 if write else 1])
        lane, first = self.thread % WARP, self.thread // WARP * WARP
        words = self.shared.bytes.view(np.uint32)
        for j, name in enumerate(names):
            here = address[first + 8 * j + lane // 4] + lane % 4 * 4
            self.shared.use(here, self.thread, write=write)
            if write:
                words[here // 4] = self._get(name, "u32")
            else:
                self._put(name, words[here // 4], active)

    # Arithmetic

    def _value(self, opcode: list[str], operands: list[str]) -> np.ndarray:
        name, kind = opcode[0], opcode[-1]
        if name == "cvt":
            return self._converted(opcode[-2], self._source(operands[0], kind), kind)
        if name == "selp":
            return np.where(self.registers[operands[2]], self._get(operands[0], kind), self._get(operands[1], kind))
        if name == "setp":
            return COMPARISONS[opcode[1]](self._get(operands[0], kind), self._get(operands[1], kind))
        if name in ("shl", "shr"):
            return self._shifted(name, self._get(operands[0], kind), self._get(operands[1], "u32"))
        if name == "shfl":
            assert opcode[2] == "bfly"
            return self._get(operands[0], kind)[self.thread ^ int(operands[1], 0)]
        if len(opcode) > 2 and opcode[1] in ("wide", "hi"):
            return self._wide(opcode, operands)
        values = [self._get(operand, kind) for operand in operands]
        if name not in ARITHMETIC:
            raise NotImplementedError(".".join(opcode))
        return ARITHMETIC[name](*values)

    def _source(self, operand: str, kind: str) -> np.ndarray:
        return self._get(operand, "u16" if kind in ("f16", "bf16") else kind)

    def _converted(self, target: str, value: np.ndarray, kind: str) -> np.ndarray:
        if kind == "bf16":
            return (value.astype(np.uint32) << np.uint32(16)).view(np.float32)
        if kind == "f16":
            return value.view(np.float16).astype(np.float32)
        return value.astype(TYPES[target])

    def _shifted(self, name: str, value: np.ndarray, by: np.ndarray) -> np.ndarray:
        bits = value.dtype.itemsize * 8
        within = np.minimum(by, bits - 1).astype(value.dtype)
        if name == "shl":
            return np.where(by < bits, value << within, 0).astype(value.dtype)
        signed = value.dtype.kind == "i"
        return np.where((by < bits) | signed, value >> within, 0).astype(value.dtype)

    def _wide(self, opcode: list[str], operands: list[str]) -> np.ndarray:
        """Products of 32 bits in 64, or their upper half."""
        kind = opcode[-1]
        wide = "s64" if kind == "s32" else "u64"
        product = self._get(operands[0], kind).astype(TYPES[wide]) * self._get(operands[1], kind).astype(TYPES[wide])
        if opcode[1] == "hi":
            return (product >> 32).astype(TYPES[kind])
        return product + self._get(operands[2], wide) if opcode[0] == "mad" else product


def _number(operand: str) -> int:
    """Return the bits of a constant; shared memory begins at 0."""
    if operand == "global_smem":
        return 0
    return int(operand[2:], 16) if operand.startswith("0f") else int(operand.removesuffix("U"), 0)


def _toward_zero(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.int64), b.astype(np.int64)
    return (np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)).astype(np.int32)


def _field(value: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = (value.view(np.uint32) >> start.view(np.uint32)) & ((np.uint32(1) << length.view(np.uint32)) - np.uint32(1))
    if value.dtype.kind == "u":
        return bits
    top = np.int64(1) << (length.astype(np.int64) - 1)
    return ((bits.astype(np.int64) ^ top) - top).astype(np.int32)


def _permuted(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    octets = np.concatenate([a[:, None].view(np.uint8), b[:, None].view(np.uint8)], 1)
    chosen = [octets[np.arange(len(a)), (selector >> (4 * k)) & 7] for k in range(4)]
    assert not (selector & 0x8888).any()
    return np.stack(chosen, 1).reshape(-1).view(np.uint32)


ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": np.copy,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "neg": np.negative,
    "div": _toward_zero,
    "rem": lambda a, b: (a.astype(np.int64) - _toward_zero(a, b).astype(np.int64) * b).astype(np.int32),
    "bfe": _field,
    "prmt": _permuted,
}
