"""Processes that share a window, and DTensors.

Parameters are replicated, the same in all processes, or sharded: DTensors, each process with a
part. Without a process group there is one process, which has everything.
"""

import contextlib
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

if TYPE_CHECKING:  # torch may be built without, and to import DTensor takes a second
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

__all__ = ["Ranks", "find_process_group", "or_default"]


class Ranks:
    """The processes of a group, each of which keeps some columns of the window. Without a group
    this one alone.

    Example:
        >>> Ranks().part(torch.arange(3))  # all of it, as there are no others
        tensor([0, 1, 2])
    """

    def __init__(self, group: "ProcessGroup | None" = None):
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group is not None else (0, 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the x of all ranks, on each of them, to the same bits. May change x."""
        if self.size > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def sum_of_present(self, x: Tensor, present: bool = True) -> Tensor:
        """`sum` of x (n, m), in one message with who is present, that is, has something to add. On
        CUDA nobody waits for that: the sum is NaN, and those that are absent raise.

        Raises:
            ValueError: some ranks are present and some are not.
        """
        if self.size == 1:
            return x
        total = self.sum(pad(x, (0, 1), value=float(not present)))
        absent = total[:, -1:]
        if not (present and x.is_cuda) and 0 < int(absent[0]) < self.size:
            raise ValueError(
                f"{int(absent[0])} of {self.size} processes that share a window have no gradients "
                "at all; let each compute a loss of its own batch, or none of them"
            )
        return total[:, :-1].where(absent == 0, torch.nan)

    def check_same(self, params: Sequence[Tensor], device: torch.device) -> None:
        """Raises ValueError if ranks differ in the shapes of the parameters, or in the numbers of
        those that all have. `device` is that of the message."""
        if self.size == 1:
            return
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
        shapes = zlib.crc32(repr([tuple(p.shape) for p in params]).encode())
        own = torch.tensor([shapes, 0], device=device)
        for i, p in enumerate(params):
            if sharded_dim(p) is None:
                x = local(p).detach()
                own[1] += (i + 1) * x.view(bits[x.element_size()]).sum().to(device)
        found = self.gather(own)
        if not bool((found == own).all()):
            raise ValueError(
                "The processes that share a window have parameters of different shapes or values; "
                "give all of them the same ones, as DDP does, or leave process_group out"
            )

    def all(self, holds: Tensor) -> bool:
        """Whether it holds for all entries, in all ranks."""
        return not bool(self.sum((~holds).sum()))

    def norm(self, x: Tensor) -> Tensor:
        """The norm, in float64, of the vector of which each rank has the part x (n,)."""
        return self.sum(x.square().sum(dtype=torch.float64)).sqrt()

    def gather(self, x: Tensor) -> Tensor:
        """The x (n,) of all ranks, on each of them: (size, n)."""
        if self.size == 1:
            return x[None]
        gathered = x.new_empty(self.size, len(x))
        dist.all_gather(list(gathered.unbind()), x.contiguous(), group=self.group)
        return gathered

    def exchange(self, rows: Tensor, counts: Sequence[int], chunk: int) -> Tensor:
        """This rank's `chunk` of the columns of the rows that all ranks have, from the rows (n, d)
        of each, of which there are as many as `counts` says; columns beyond d are zero."""
        if self.size == 1:
            return rows
        n, d = rows.shape
        sent = pad(rows, (0, self.size * chunk - d)).view(n, self.size, chunk)
        received = rows.new_empty(sum(counts), chunk)
        dist.all_to_all_single(
            received,
            sent.transpose(0, 1).reshape(-1, chunk),
            list(counts),
            [n] * self.size,
            group=self.group,
        )
        return received

    @contextlib.contextmanager
    def agreed(self) -> Iterator[None]:
        """A ValueError inside, in any rank, is one in all of them."""
        if self.size == 1:
            yield
            return
        error: str | None = None
        errors: list[str | None] = [None] * self.size
        try:
            yield
        except ValueError as raised:
            error = str(raised)
        dist.all_gather_object(errors, error, group=self.group)
        for error in filter(None, errors):
            raise ValueError(error)

    def part(self, x: Tensor, dim: int = 0) -> Tensor:
        """This rank's part of x: `chunk` entries along `dim`, the last ranks what is left."""
        chunk, length = self.chunk(x.shape[dim]), x.shape[dim]
        start = min(self.rank * chunk, length)
        return x.narrow(dim, start, min(chunk, length - start))

    def chunk(self, length: int) -> int:
        """How many of `length` entries a rank has, at most."""
        return -(-length // self.size)

    def as_saved(self, x: Tensor, dim: int, length: int | None = None) -> Tensor:
        """x, or, if other ranks have more of it, the DTensor of which it is a part along `dim`, all
        ranks having `length` together. None: each part is filled up to the longest, with zeros."""
        if self.size == 1:
            return x
        from torch.distributed.tensor import DeviceMesh, Shard

        if length is None:  # DTensors have parts of one length
            lengths = self.gather(torch.tensor([x.shape[-1]], device=x.device))
            x = padded(x, int(lengths.max()))
            length = self.size * x.shape[-1]
        shape = list(x.shape)
        shape[dim] = length
        mesh = DeviceMesh.from_group(cast("ProcessGroup", self.group), x.device.type)
        return as_dtensor(x, shape, mesh, [Shard(dim)])

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of what was saved, in parts along `dim` or complete."""
        return local(x) if is_dtensor(x) else self.part(x, dim)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self


# --- DTensors -------------------------------------------------------------------------------------


def or_default(given: "ProcessGroup | bool | None") -> "ProcessGroup | bool | None":
    """The given group; for None the default group, if there is one.

    Example:
        >>> or_default(None) is None  # there is no other process here
        True
    """
    there = given is None and dist.is_available() and dist.is_initialized()
    return dist.group.WORLD if there else given or None


def find_process_group(
    params: list[Tensor], given: "ProcessGroup | bool | None"
) -> "ProcessGroup | None":
    """The group that shares a window of these parameters: the `given` one, or that of DTensors;
    None if there is none, or it is one process.

    Raises:
        ValueError: for a DTensor that is sharded in another way, or over another group, and for
            flat parameters of FSDP1.

    Example:
        >>> find_process_group([torch.zeros(3)], None) is None  # there is no other process here
        True
    """
    if not dist.is_available():
        return None
    if not (given is None or given is False or isinstance(given, dist.ProcessGroup)):
        raise ValueError(
            f"Invalid process_group: {given!r}; it must be a process group, such as "
            "torch.distributed.group.WORLD, or None for a window of each process's own"
        )
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(
            "These parameters are flat shards of FullyShardedDataParallel (FSDP1), which hide "
            "their shapes; MFAC takes those of torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    groups = {}
    for p in filter(is_dtensor, params):
        shards = [i for i, x in enumerate(p.placements) if x.is_shard()]
        if len(shards) > 1 or any(x.is_partial() for x in p.placements):
            raise ValueError(
                f"A parameter of shape {tuple(p.shape)} is placed as {p.placements}; MFAC takes "
                "parameters that are sharded along one dimension of the device mesh"
            )
        for i in shards:
            group = p.device_mesh.get_group(i)
            if group.size() > 1:
                groups[tuple(dist.get_process_group_ranks(group))] = group
    if given:
        groups[tuple(dist.get_process_group_ranks(given))] = given
    if len(groups) > 1 or (groups and given is False):
        raise ValueError(
            f"Parameters are sharded over the processes {list(groups)}, process_group being "
            f"{given}; all must be of one group: leave process_group out"
        )
    shared = next(iter(groups.values()), None)
    return shared if shared is not None and shared.size() > 1 else None


def is_dtensor(x: Tensor) -> "TypeGuard[DTensor]":
    return hasattr(x, "to_local")  # to import its class takes a second


def local(x: Tensor) -> Tensor:
    """What this process has of x."""
    return x.to_local() if is_dtensor(x) else x


def sharded_dim(p: Tensor) -> int | None:
    """The dimension along which processes have a part of p each; None if they have all of it."""
    placements: Sequence[Any] = p.placements if is_dtensor(p) else ()
    return next((x.dim for x in placements if x.is_shard()), None)


def as_dtensor(local: Tensor, shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Any:
    """The DTensor of this shape that has `local` here."""
    from torch.distributed.tensor import DTensor

    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    size = torch.Size(shape)
    if local.storage_offset():  # which deep copies of DTensors do not know
        local = torch.from_dlpack(local.detach())
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=size, stride=tuple(stride)
    )


def placed_as(p: Tensor, value: Tensor) -> Tensor:
    """A copy of `value`, of the shape of p, where p is and sharded like it."""
    if is_dtensor(p) and not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None).clone()
    return value.to(p.device, copy=True)


def dtensor_like(p: Tensor, here: Tensor) -> Tensor:
    """`here`, or, where p is a DTensor, the one placed like p that has it here, by reference.

    Example:
        >>> dtensor_like(torch.zeros(2), torch.ones(2))
        tensor([1., 1.])
    """
    return as_dtensor(here, p.shape, p.device_mesh, p.placements) if is_dtensor(p) else here


def padded(x: Tensor, length: int) -> Tensor:
    """x, with zeros at the end of its last dimension up to `length`."""
    return x if x.shape[-1] == length else pad(x, (0, length - x.shape[-1]))
