"""Processes that share a window, and DTensors.

Parameters are replicated or sharded. Replicated ones are the same in all processes. Sharded ones
are DTensors, and each process has a part. Without a process group, the only process has everything.
"""

import contextlib
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from checks import require

if TYPE_CHECKING:  # torch may lack torch.distributed, and importing DTensor takes a second
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


class Ranks:
    """The processes of a group. Each keeps some columns of the window. Without a group, there is
    only this process."""

    def __init__(self, group: "ProcessGroup | None" = None):
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, with the same bits on each of them. May change x."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def check_same(self, params: Sequence[Tensor], device: torch.device) -> None:
        """Raises ValueError if ranks differ in the shapes of the parameters, or in the values of
        replicated ones. Their sums are exchanged on `device`."""
        if self.size == 1:
            return
        shapes = zlib.crc32(repr([tuple(p.shape) for p in params]).encode())
        own = torch.tensor([shapes, 0], device=device)
        for i, p in enumerate(params):
            if sharded_dim(p) is None:  # the sum of its bits, as the sum of numbers is rounded
                own[1] += (i + 1) * local(p).detach().flatten().view(torch.int16).sum().to(device)
        found = self.gather(own)
        if not bool((found == own).all()):
            raise ValueError(
                "The processes that share a window have parameters of different shapes or values; "
                "make them the same in all processes, as DDP does, or leave out process_group"
            )

    def all(self, holds: Tensor) -> bool:
        """Whether all entries of `holds` are True in all ranks."""
        return not bool(self.sum((~holds).sum()))

    def norm(self, x: Tensor) -> Tensor:
        """The norm, in float64, of the vector whose parts are the x (n,) of all ranks."""
        return self.sum(x.square().sum(dtype=torch.float64)).sqrt()

    def gather(self, x: Tensor) -> Tensor:
        """The x (n,) of all ranks as (size, n), on each of them."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size, len(x))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        return gathered

    def exchange(self, rows: Tensor, counts: Sequence[int], chunk: int) -> Tensor:
        """Transposes the distribution: each rank gives rows (n, d) and gets its `chunk` of the
        columns of all rows. `counts` has each rank's number of rows. Columns beyond d are zero."""
        if self.size == 1:
            return rows
        sent = padded(rows, self.size * chunk).view(len(rows), self.size, chunk).transpose(0, 1)
        received, sizes = rows.new_empty(sum(counts), chunk), [len(rows)] * self.size
        sent = sent.reshape(-1, chunk)
        dist.all_to_all_single(received, sent, list(counts), sizes, group=self.group)
        return received

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A ValueError inside, in any rank, is raised in all of them."""
        if self.size == 1:
            yield
            return
        own: str | None = None
        messages: list[Any] = [None] * self.size
        try:
            yield
        except ValueError as error:
            own = str(error)
        dist.all_gather_object(messages, own, group=self.group)
        for message in filter(None, messages):
            raise ValueError(message)

    def chunk(self, length: int) -> int:
        """The largest number of `length` entries that a rank has."""
        return -(-length // self.size)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of x, whole or a DTensor: `chunk` entries along `dim`, or the rest."""
        if is_dtensor(x):
            return local(x)
        chunk, length = self.chunk(x.shape[dim]), x.shape[dim]
        start = min(self.rank * chunk, length)
        return x.narrow(dim, start, min(chunk, length - start))

    def as_sharded(self, x: Tensor, dim: int, length: int | None = None) -> Tensor:
        """x, or, with several ranks, the DTensor whose parts along `dim` are the x of all ranks.
        `length` is the total along `dim`. With None, zeros pad all parts to the longest one."""
        if self.size == 1:
            return x
        from torch.distributed.tensor import DeviceMesh, Shard

        if length is None:  # the parts of a DTensor have equal lengths
            lengths = self.gather(torch.tensor([x.shape[-1]], device=x.device))
            x = padded(x, int(lengths.max()))
            length = self.size * x.shape[-1]
        shape = [*x.shape[:dim], length, *x.shape[dim + 1 :]]
        mesh = DeviceMesh.from_group(cast("ProcessGroup", self.group), x.device.type)
        return as_dtensor(x, shape, mesh, [Shard(dim)])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # process groups can't be copied


# --- process groups and DTensors ------------------------------------------------------------------


def or_default(given: "ProcessGroup | bool | None") -> "ProcessGroup | None":
    """The given group; for None the default group, if there is one; for False none."""
    there = given is None and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if there else cast("ProcessGroup | None", given or None)


def find_process_group(params: list[Tensor], given: "ProcessGroup | None") -> "ProcessGroup | None":
    """The group that shares a window of these parameters: the `given` one, or the group of
    DTensors. None if there is no group, or if it has one process.

    Raises:
        ValueError: a DTensor is sharded along several dimensions or over another group, or
            parameters are flat ones of FSDP1.
    """
    if not dist.is_available():
        return None
    wanted = "torch.distributed.group.WORLD, another group, or None for windows of each process"
    require(given is None or isinstance(given, dist.ProcessGroup), "process_group", given, wanted)
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "These parameters are flat shards of FullyShardedDataParallel (FSDP1), which hide "
            "their shapes; use torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    found = [] if given is None else [given]
    for p in filter(is_dtensor, params):
        shards = [i for i, x in enumerate(p.placements) if x.is_shard()]
        if len(shards) > 1 or any(x.is_partial() for x in p.placements):
            raise ValueError(
                f"A parameter of shape {tuple(p.shape)} has the placements {p.placements}; it "
                "must be sharded along one dimension of the device mesh at most"
            )
        found += [p.device_mesh.get_group(i) for i in shards]
    groups = {tuple(dist.get_process_group_ranks(x)): x for x in found if x.size() > 1}
    if len(groups) > 1:
        raise ValueError(
            f"Parameters are sharded over the processes {list(groups)}, and process_group is "
            f"{given}; all must share one group: leave out process_group"
        )
    return next(iter(groups.values()), None)


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(x, "to_local")  # importing the class takes a second


def local(x: Tensor) -> Tensor:
    """The part of x in this process."""
    return x.to_local() if is_dtensor(x) else x


def sharded_dim(p: Tensor) -> int | None:
    """The dimension along which p is sharded; None if each process has all of it."""
    placements: Sequence[Any] = p.placements if is_dtensor(p) else ()
    return next((x.dim for x in placements if x.is_shard()), None)


def as_dtensor(local: Tensor, shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Any:
    """The DTensor of this shape whose part in this process is `local`."""
    from torch.distributed.tensor import DTensor

    if local.storage_offset():  # deep copies of DTensors ignore it
        local = torch.from_dlpack(local.detach())
    size, stride = torch.Size(shape), torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def placed_as(p: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device of p, laid out and sharded like p if it has its shape."""
    if value.shape != p.shape:
        return value.to(p.device, copy=True)
    if is_dtensor(p) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).clone()
    return torch.empty_like(p, dtype=value.dtype).copy_(value)


def padded(x: Tensor, length: int) -> Tensor:
    """x, with zeros at the end of its last dimension up to `length`."""
    return x if x.shape[-1] == length else pad(x, (0, length - x.shape[-1]))
