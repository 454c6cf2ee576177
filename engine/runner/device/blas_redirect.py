"""Point MLX's matrix products at OpenBLAS after MLX is loaded, on Linux.

``scipy-openblas32`` is the one OpenBLAS that pip can bring to any machine, but its symbols carry a
prefix, so loading it first does not put it in place of the slow reference BLAS in MLX's CPU wheel.
The calls of ``libmlx.so`` go through a table of addresses (its procedure linkage table's slots);
this module writes OpenBLAS's addresses there. Every step is checked first, and undone if a product
comes out wrong; nothing on disk changes.
"""

import ctypes
import platform
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FUNCTIONS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_JUMP_SLOT = {"x86_64": 7, "aarch64": 1026}
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL, _DT_PLTRELSZ = 5, 6, 23, 2
_SLOT = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Mapping:
    """One line of ``/proc/self/maps``."""

    start: int
    end: int
    writable: bool
    offset: int
    path: str


def redirect(library: ctypes.CDLL, prefix: str = "", maps: Path = Path("/proc/self/maps")) -> bool:
    """Make the loaded ``libmlx.so`` call ``library`` for matrix products. False where that cannot be done safely."""
    functions = {name: _address(library, prefix + name) for name in FUNCTIONS}
    mappings = [line for line in _read_maps(maps) if Path(line.path).name == "libmlx.so"]
    kind = _JUMP_SLOT.get(platform.machine())
    if not mappings or kind is None or None in functions.values():
        return False
    base = next((line.start for line in mappings if line.offset == 0), None)
    slots = dict(_call_slots(Path(mappings[0].path), kind))
    if base is None or not set(FUNCTIONS) <= set(slots):
        return False
    places = {name: base + slots[name] for name in FUNCTIONS}
    if not all(any(line.writable and line.start <= at < line.end for line in mappings) for at in places.values()):
        return False
    before = {name: ctypes.c_uint64.from_address(at).value for name, at in places.items()}
    _write(places, {name: address or 0 for name, address in functions.items()})
    if _products_are_right():
        return True
    _write(places, before)
    return False


def _write(places: dict[str, int], values: dict[str, int]) -> None:
    for name, at in places.items():
        ctypes.c_uint64.from_address(at).value = values[name]


def _address(library: ctypes.CDLL, name: str) -> int | None:
    try:
        return ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    except AttributeError:
        return None


def _read_maps(maps: Path) -> Iterator[Mapping]:
    for line in maps.read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6:
            start, end = (int(part, 16) for part in fields[0].split("-"))
            yield Mapping(start, end, "w" in fields[1], int(fields[2], 16), fields[5])


def _call_slots(path: Path, kind: int) -> Iterator[tuple[str, int]]:
    """Imported functions of a shared library and where (from its base) their addresses are kept."""
    data = path.read_bytes()
    if not data.startswith(_ELF64_LITTLE):
        return
    header_offset, header_size, header_count = _program_headers(data)
    headers = [
        struct.unpack_from("<IIQQQQQQ", data, header_offset + index * header_size) for index in range(header_count)
    ]
    loads = [(virtual, offset, size) for kind_, _, offset, virtual, _, size, _, _ in headers if kind_ == _PT_LOAD]

    def file_offset(address: int) -> int:
        virtual, offset, _ = next(load for load in loads if 0 <= address - load[0] < load[2])
        return int(offset + address - virtual)

    table: dict[int, int] = {}
    for kind_, _, offset, _, _, size, _, _ in headers:
        if kind_ == _PT_DYNAMIC:
            table = dict(struct.iter_unpack("<QQ", data[offset : offset + size]))
    symbols, strings, calls = (file_offset(table[tag]) for tag in (_DT_SYMTAB, _DT_STRTAB, _DT_JMPREL))
    for slot, info, _ in struct.iter_unpack("<QQq", data[calls : calls + table[_DT_PLTRELSZ]]):
        if info & 0xFFFFFFFF == kind:
            (name_at,) = struct.unpack_from("<I", data, symbols + (info >> 32) * 24)
            start = strings + name_at
            yield data[start : data.index(b"\0", start)].decode(), slot


def _program_headers(data: bytes) -> tuple[int, int, int]:
    """Offset, entry size and number of an ELF file's program headers."""
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    return int(offset), int(size), int(count)


def _products_are_right() -> bool:
    """Whether MLX multiplies matrices of whole numbers exactly, plain and transposed."""
    import mlx.core as mx

    left, right = mx.arange(6 * 40, dtype=mx.float32).reshape(6, 40), mx.arange(40 * 7, dtype=mx.float32).reshape(40, 7)
    exact = (left[:, :, None] * right[None]).sum(1)
    with mx.stream(mx.cpu):
        plain = left @ right
        transposed = (right.T @ left.T).T
        return bool(mx.array_equal(plain, exact).item()) and bool(mx.array_equal(transposed, exact).item())
