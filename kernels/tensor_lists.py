"""Lists of tensors that one kernel sweeps together, as `asga.kernels.sam` takes them.

A kernel finds its tensor in two tables on the device. One holds the pointers of all operands, the sizes and the scales:
int64 ``[operands + 2, tensors]``. The other says for each program which chunk of which tensor it works on: int32
``[programs, 2]``. Triton has no arrays as kernel arguments, so the tables are made on the host and copied, from pinned
memory and without waiting; they are kept for as long as the same pointers come back on a stream, and that is every
step of a training loop whose allocations repeat.

Limits, all of them absent from the CUDA kernels: a table is looked up by the pointers of all tensors, about 0.1 us
each; new pointers cost a copy of a few kilobytes; a tensor that lies in memory otherwise than its parameter is copied
before and, where it is written, after; and one pointer off a 16-byte boundary takes the vectors from the whole list. A
table that is made while a graph is captured stays for good, since replays copy from its pinned memory, and serves that
graph alone: nothing else may count on its replays.
"""

import struct
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from asga.kernels.layout import NUM_WARPS, dense_like

TILE = 1024
# Tiles of a chunk, at least; more where there would be more than so many chunks, up to what a float32 sum bears.
_SHORTEST, _LONGEST, _CHUNKS_AIMED_AT = 4 * TILE, 128 * TILE, 8192
_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
_TABLES_KEPT = 64


class Operand(NamedTuple):
    """A list by its name in the schema. `optional`: the list, or an entry of it, may be empty."""

    name: str
    tensors: Sequence[Tensor]
    written: bool = False
    optional: bool = False
    is_gradient: bool = False


class TensorLists:
    """The lists of one call, checked and cut into chunks.

    Attributes:
        programs: Of a sweep; none if there is nothing to sweep over.
        entries: The numbers of the parameters that take part.
    """

    def __init__(
        self, params: Sequence[Tensor], operands: Sequence[Operand], rho_scales: Sequence[float | None] = ()
    ) -> None:
        """Those with elements and, where `rho_scales` are given, with one that is not None, take part.

        Raises:
            RuntimeError: The lists do not fit together, or hold a dtype without a kernel.
        """
        _check(params, operands)
        self.entries = [
            i for i, param in enumerate(params) if param.numel() > 0 and (not rho_scales or rho_scales[i] is not None)
        ]
        self._device = params[0].device
        self._written: list[tuple[Tensor, Tensor]] = []
        # Tensors that only this call holds must live until it has launched.
        self._copies: list[Tensor] = []
        sizes = [params[i].numel() for i in self.entries]
        rows = [self._pointers(params, operand) for operand in operands]
        values = [pointer for row in rows for pointer in row] + sizes
        values += [bits_of(rho_scales[i]) if rho_scales else 0 for i in self.entries]
        self._table = _on_device(tuple(values), torch.int64, self._device)
        chunk = triton.cdiv(triton.cdiv(sum(sizes), _CHUNKS_AIMED_AT), _SHORTEST) * _SHORTEST
        self._chunk = min(max(chunk, _SHORTEST), _LONGEST)
        chunks = [(entry, k) for entry, size in enumerate(sizes) for k in range(triton.cdiv(size, self._chunk))]
        self.programs = len(chunks)
        self._chunks = _on_device(tuple(number for pair in chunks for number in pair), torch.int32, self._device)
        gradient = next((t for o in operands if o.is_gradient for t in o.tensors if t.numel() > 0), params[0])
        self._options = dict(
            DTYPE=_DTYPES[params[0].dtype],
            COMPUTE=tl.float64 if params[0].dtype == torch.float64 else tl.float32,
            GRAD_DTYPE=_DTYPES[gradient.dtype],
            OPERANDS=len(operands),
            ALIGNED=all(pointer % 16 == 0 for row in rows for pointer in row),
            CHUNK=self._chunk,
            TILE=TILE,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )

    def launch(self, kernel: object, *args: object, **options: object) -> None:
        """Run a kernel over all chunks, and bring what it wrote to where it belongs."""
        if self.programs > 0:
            with torch.cuda.device_of(self._table):
                kernel[(self.programs,)](
                    self._table, self._chunks, len(self.entries), *args, **self._options, **options
                )
        for target, copy in self._written:
            target.copy_(copy)

    def _pointers(self, params: Sequence[Tensor], operand: Operand) -> list[int]:
        """Addresses in the memory order of the parameters; 0 where there is no tensor."""
        if not operand.tensors:
            return [0] * len(self.entries)
        pointers = []
        for i in self.entries:
            tensor, param = operand.tensors[i], params[i]
            if tensor.numel() == 0:
                pointers.append(0)
                continue
            if not (tensor.is_contiguous() and param.is_contiguous()):
                copy = dense_like(tensor, torch.empty_like(param))
                if copy is not tensor:
                    self._copies.append(copy)
                    if operand.written:
                        self._written.append((tensor, copy))
                tensor = copy
            pointers.append(tensor.data_ptr())
        return pointers


def bits_of(value: float) -> int:
    """A float64 as an int64: Triton would pass a float as float32. `as_double` turns it back."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """Their addresses on their device, int64."""
    return _on_device(tuple(tensor.data_ptr() for tensor in tensors), torch.int64, tensors[0].device)


class _Kept(NamedTuple):
    """`pinned` is what the copy to `table` reads, maybe later."""

    table: Tensor
    pinned: Tensor


_kept: OrderedDict[tuple[object, ...], _Kept] = OrderedDict()
_kept_for_graphs: list[_Kept] = []


def _on_device(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of some numbers; outside of graphs the same one for the same numbers on the same stream."""
    on_gpu = device.type == "cuda"
    if on_gpu and torch.cuda.is_current_stream_capturing():
        _kept_for_graphs.append(_copied(values, dtype, device))
        return _kept_for_graphs[-1].table
    # Another stream could read a table before this one's copy has filled it.
    key = (values, dtype, device, torch.cuda.current_stream(device).cuda_stream if on_gpu else None)
    kept = _kept.get(key)
    if kept is None:
        kept = _kept[key] = _copied(values, dtype, device)
        while len(_kept) > _TABLES_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return kept.table


def _copied(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> _Kept:
    # On the CPU whatever torch's default device is.
    pinned = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return _Kept(pinned.to(device, non_blocking=True), pinned)


def _check(params: Sequence[Tensor], operands: Sequence[Operand]) -> None:
    """Refuse what the kernels would read or write beyond its end."""
    if not params:
        raise RuntimeError("params is empty; at least one tensor is needed")
    if any(param.dtype != params[0].dtype for param in params):
        raise RuntimeError("params holds several dtypes")
    gradients: set[torch.dtype] = set()
    for name, tensors, _, optional, is_gradient in operands:
        if optional and not tensors:
            continue
        if len(tensors) != len(params):
            raise RuntimeError(f"{name} has {len(tensors)} tensors, but params {len(params)}")
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if optional and tensor.numel() == 0:
                continue
            if tensor.shape != param.shape:
                raise RuntimeError(f"{name}[{i}] does not have the shape of its parameter")
            if tensor.dtype not in _DTYPES:
                raise RuntimeError(
                    f"{name} holds a {tensor.dtype}; float32, bfloat16, float16 and float64 are supported"
                )
            if tensor.device != params[0].device:
                raise RuntimeError(f"{name}[{i}] is on {tensor.device}, but params on {params[0].device}")
            if tensor.numel() == 0:
                continue
            if is_gradient:
                gradients.add(tensor.dtype)
            elif tensor.dtype != params[0].dtype:
                raise RuntimeError(f"{name}[{i}] does not have the dtype of params")
    if len(gradients) > 1:
        raise RuntimeError(f"the gradients have several dtypes: {', '.join(sorted(map(str, gradients)))}")


@triton.jit
def as_double(bits):
    """The float64 of `bits_of`, from an integer of any width."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def part_of(table_ptr, chunks_ptr, tensors, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """Entry, first value and number of values of this program, and its entry's `rho_scale`."""
    part = tl.program_id(0).to(tl.int64)
    entry = tl.load(chunks_ptr + 2 * part)
    start = tl.load(chunks_ptr + 2 * part + 1).to(tl.int64) * CHUNK
    size = tl.load(table_ptr + OPERANDS * tensors + entry)
    rho_scale = as_double(tl.load(table_ptr + (OPERANDS + 1) * tensors + entry))
    return entry, start, tl.minimum(size - start, CHUNK), rho_scale


@triton.jit
def pointer_of(table_ptr, operand: tl.constexpr, tensors, entry, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where this program's part of an operand begins."""
    pointer = tl.load(table_ptr + operand * tensors + entry).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start


@triton.jit
def is_there(table_ptr, operand: tl.constexpr, tensors, entry):
    """Whether an entry has this operand."""
    return tl.load(table_ptr + operand * tensors + entry) != 0
