"""Pickles of torch read as data: a small machine that knows torch's tensors and plain containers, and runs nothing.

`pickle.Unpickler` imports and calls what a file names. Here a name stays a name: GLOBAL pushes a `Name`, nothing is
imported, and the only functions that REDUCE and its kin reach are the few of `rebuild.BUILDERS`. Every other
object (Lightning callbacks, numpy scalars, a virus) becomes `Dropped`, swallows whatever is done to it, and is named
in the result. The standard library's `pickletools.genops` parses the opcodes; it builds nothing either.

PyTorch's own `torch.load(weights_only=True)` with inert stand-ins for foreign classes was tried in its place (2.14): it
hangs on "doubled tuples as a key" of the attack tests, and refuses the tensors beside half of the payloads as well.
"""

from __future__ import annotations

import pickletools
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from minisd.checkpoints.files.entries import TORCH_DTYPES, Entry, Malformed
from minisd.checkpoints.files.rebuild import (
    BUILDERS,
    MAX_INDEX,
    Dropped,
    LazyTensor,
    Name,
    ParameterDict,
    Storage,
    is_key,
    storage_dtype,
)

MAX_OPCODES = 5_000_000  # a full SD checkpoint with its optimiser has about 200,000
MAX_BYTES = 256 << 20
MAX_COPIED = 32 << 20  # values or characters that constructors copy; one list may be named any number of times
MAX_VALUES = 400_000  # shared lists of shared lists can stand for 2^n values; real files have some 20,000
MAX_DEPTH = 64


def unpickle(stream: BinaryIO) -> Machine:
    """Run one pickle up to its STOP. Malformed for whatever is not a pickle of torch or goes beyond the limits."""
    machine = Machine()
    try:
        machine.run(stream)
    except Malformed:
        raise
    except Exception as error:  # damaged bytes can fail in any way; all of them mean the same
        raise Malformed(f"its pickle is damaged ({type(error).__name__}: {str(error)[:200]})") from error
    return machine


class Machine:
    """The pickle machine: a stack, marks and a memo. Afterwards `.value`, `.storages` by key and `.dropped` names."""

    def __init__(self):
        self.value: Any = None
        self.storages: dict[str, Storage] = {}
        self.dropped: set[str] = set()
        self._stack: list[Any] = []
        self._marked: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def run(self, stream: BinaryIO) -> None:
        first = stream.tell()
        for count, (opcode, arg, position) in enumerate(pickletools.genops(stream)):
            if count > MAX_OPCODES or position - first > MAX_BYTES:
                raise Malformed(f"its pickle goes beyond {MAX_OPCODES:,} opcodes or {MAX_BYTES >> 20} MiB")
            self._step(opcode.name, arg)
        self.value = self._stack.pop()

    def _step(self, opcode: str, arg: Any) -> None:
        stack = self._stack
        match opcode:
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self._memo[_index(arg)] = stack[-1]
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self._memo[arg])
            case _ if opcode in _LITERALS:
                stack.append(arg)
            case "MARK":
                self._marked.append(stack)
                self._stack = []
            case "TUPLE":
                self._push(tuple(self._since_mark()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._take(int(opcode[-1]))))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[opcode])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "LIST" | "FROZENSET":
                self._push(self._since_mark())
            case "DICT":
                items = self._since_mark()
                self._stack.append({})
                self._set_items(items)
            case "SETITEM":
                self._set_items(self._take(2))
            case "SETITEMS":
                self._set_items(self._since_mark())
            case "APPEND":
                self._append(self._take(1))
            case "APPENDS" | "ADDITEMS":
                self._append(self._since_mark())
            case "GLOBAL":
                stack.append(_name(*arg.split(" ", 1)))
            case "STACK_GLOBAL":
                stack.append(_name(*self._take(2)))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                function, args = self._take(2)
                stack.append(self._call(function, args))
            case "NEWOBJ_EX":
                function, args, _ = self._take(3)
                stack.append(self._call(function, args))
            case "OBJ":
                function, *args = self._since_mark()
                self._stack.append(self._call(function, args))
            case "INST":
                args = self._since_mark()
                self._stack.append(self._call(_name(*arg.split(" ", 1)), args))
            case "BUILD":
                self._build(stack.pop())
            case "POP":
                # POP right after MARK removes the mark
                stack.pop() if stack else self._since_mark()
            case "POP_MARK":
                self._since_mark()
            case "DUP":
                stack.append(stack[-1])
            case "EXT1" | "EXT2" | "EXT4":
                stack.append(Name("copyreg extension", str(arg)))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:
                raise Malformed(f"its pickle uses {opcode}, which torch never writes")

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marked.pop()
        return items

    def _take(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise Malformed("its pickle is damaged (stack underflow)")
        items = self._stack[-count:]
        del self._stack[-count:]
        return items

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Dropped | Name):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Malformed(f"its pickle is damaged (items set on {type(target).__name__})")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if is_key(key):
                target[key] = value
            else:
                self.dropped.add(_describe(key))

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Dropped | Name):
            raise Malformed(f"its pickle is damaged (append to {type(target).__name__})")

    def _build(self, state: Any) -> None:
        """State for an object: read for a ParameterDict, meaningless for everything else that we build."""
        target = self._stack[-1]
        if isinstance(target, ParameterDict) and isinstance(state, dict):
            parameters = state.get("_parameters") or {}
            self._spend([parameters])
            target.update(parameters)

    def _call(self, function: Any, args: Any) -> Any:
        builder = BUILDERS.get(str(function)) if isinstance(function, Name) else None
        if builder is None:
            self.dropped.add(_describe(function))
            return Dropped(_describe(function))
        self._spend(args)
        return builder(*args)

    def _spend(self, args: Any) -> None:
        self._copied += sum(len(arg) for arg in args if hasattr(arg, "__len__"))
        if self._copied > MAX_COPIED:
            raise Malformed(f"its pickle copies more than {MAX_COPIED:,} values")

    def _persistent(self, pid: Any) -> Any:
        match pid:
            case ("storage", Name() as kind, str(key), _, int(numel), *view):
                if any(view):
                    raise Malformed("a storage is a view of another one (torch before 0.4): save the file again")
                dtype = storage_dtype(kind)
                if dtype is None:
                    self.dropped.add(str(kind))
                    return Dropped(str(kind))
                if not 0 <= numel < 1 << 60:
                    raise Malformed(f"storage {key} has an impossible size")
                storage = Storage(key, dtype, numel * dtype.itemsize)
                if self.storages.setdefault(key, storage) != storage:
                    raise Malformed(f"storage {key} is described in two ways")
                return storage
            case ("module", Name() as name, *_):
                return name  # legacy files carry the source of pickled modules; the class is dropped anyway
            case _:
                raise Malformed("its pickle refers to something else than storages")


def settle(value: Any, starts: Mapping[str, int], dropped: set[str]) -> Any:
    """Plain dicts, lists, tuples and values, with every tensor as its `Entry`; starts: storage key -> byte in the file.

    What is not plain is left out and named in `dropped`; None if that is all there is.
    """
    budget = [MAX_VALUES]

    def walk(value: Any, depth: int) -> Any:
        budget[0] -= 1
        if budget[0] < 0 or depth > MAX_DEPTH:
            raise Malformed(f"its pickle is nested more than {MAX_DEPTH} deep or has over {MAX_VALUES:,} values")
        if value is None or type(value) in _PLAIN:
            return value
        match value:
            case LazyTensor(storage, dtype, offset, shape, stride, nbytes):
                return Entry(dtype, shape, stride, starts[storage.key] + offset, nbytes)
            case dict():
                walked = [(key, walk(item, depth + 1)) for key, item in value.items()]
                return {key: item for key, item in walked if item is not _NOTHING}
            case list() | tuple():
                return type(value)([item for item in (walk(item, depth + 1) for item in value) if item is not _NOTHING])
            case Name(module="torch") if value.attribute in TORCH_DTYPES:
                return TORCH_DTYPES[value.attribute]
            case _:
                dropped.add(_describe(value))
                return _NOTHING

    plain = walk(value, 0)
    return None if plain is _NOTHING else plain


_NOTHING = object()
_PLAIN = {bool, int, float, str, bytes, torch.dtype}


def _describe(value: Any) -> str:
    match value:
        case Name():
            return str(value)
        case Dropped(name):
            return name
        case Storage():
            return "a storage without a tensor"
        case _:
            return f"a {type(value).__name__}"


def _name(module: Any, attribute: Any) -> Name:
    if not isinstance(module, str) or not isinstance(attribute, str) or len(module) + len(attribute) > 1000:
        raise Malformed("its pickle is damaged (a global without a name)")
    return Name(module, attribute)


def _index(arg: int) -> int:
    if not 0 <= arg < MAX_INDEX:
        raise Malformed(f"its pickle is damaged (memo index {arg})")
    return arg


_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
