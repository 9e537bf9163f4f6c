"""Calls of the compiled pass, made again from a file: what instructions.py counts. Run as a script, it imports no torch and no
numpy: under valgrind torch alone would take a minute.
"""

import ctypes
import importlib.util
import json
import mmap
import os
import sys


class _Tensor(ctypes.Structure):  # DLTensor of dlpack.h
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # null: row-major
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):  # DLManagedTensor; nothing is freed, so no deleter
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_CPU = (1, 0)
_alive = []


def _array(base: int, at: int, shape: list[int], kind: list[int]):
    """A DLPack capsule of the array `at` bytes behind `base`; kind: DLPack's code and bits."""
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    managed = _Managed(_Tensor(base + at, _CPU, len(shape), *kind, 1, sizes, None, 0), None, None)
    _alive.append((sizes, managed))
    return _capsule(ctypes.addressof(managed), b"dltensor", None)


def _load(path: str):
    spec = importlib.util.spec_from_file_location("_native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _given(argument, native, base: int):
    """An argument as it was: an array, a list of them, the scan's options; the instruction set becomes the best here."""
    if isinstance(argument, list):
        return [_given(x, native, base) for x in argument]
    if isinstance(argument, str):
        return native.instruction_sets()[-1]
    if not isinstance(argument, dict):
        return argument
    if "shape" in argument:
        return _array(base, **argument)
    options = native.ScanOptions()
    for name, value in argument.items():
        setattr(options, name, value)
    return options


def main(path: str, calls: str, arrays: str) -> None:
    native = _load(path)
    with open(arrays, "rb") as file, open(calls) as listed:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # begins at a page, so every array lies as it did before
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        ready = [(getattr(native, name), _given(given, native, base)) for name, given in json.load(listed)]
    for function, arguments in ready:
        os.getppid()  # the mark between two counts
        function(*arguments)
    os.getppid()
    print(native.instruction_sets()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
