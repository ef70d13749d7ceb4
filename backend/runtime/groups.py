"""Process groups made from a store alone: no other rank of the world has to take part.

``torch.distributed.new_group`` and the splitting of communicators wait for ranks that may be dead.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

_successors: dict[Any, Any] = {}
# What was found out about groups, by the group and more, and holds until one has a successor.
found: dict[tuple[Any, ...], Any] = {}


def store_of(group: Any, world: int) -> Any:
    """The store of a process group; None for a group of one rank."""
    if world == 1:
        return None
    from torch.distributed import distributed_c10d

    known = distributed_c10d._world.pg_map.get(group)
    if known is not None and known[1] is not None:
        return known[1]
    return group.get_group_store()


def standing_for(group: Any) -> Any:
    """The newest generation of a group with the same members: the group itself unless it was recovered."""
    while group in _successors:
        group = _successors[group]
    return group


def generations(group: Any) -> list[Any]:
    """A group and those that stand for it since, each the successor of the one before."""
    found = [group]
    while found[-1] in _successors:
        found.append(_successors[found[-1]])
    return found


def registry_of(group: Any) -> Any:
    """What torch.distributed has ``group`` in until it is destroyed; None for one that it does not know."""
    if group is None:
        return None
    from torch.distributed import distributed_c10d

    known = distributed_c10d._world.pg_map
    return known if group in known else None


def prune() -> None:
    """Has no calls go to successors that were destroyed."""
    for group, new in list(_successors.items()):
        if registry_of(new) is None:
            del _successors[group]
            found.clear()


def succeed(group: Any, new: Any) -> None:
    """Has calls on ``group`` go to ``new``, which has the same ranks in the same order."""
    _successors[group] = new
    found.clear()


def make_group(
    store: Any,
    name: str,
    rank: int,
    world: int,
    device: str,
    timeout: float,
    world_ranks: list[int],
) -> Any:
    """A ``ProcessGroup`` called ``name`` of the ranks that call this with the same fresh ``store``.

    ``device``: ``cuda`` (NCCL, whose communicator is made when a collective first needs it) or ``cpu``
    (gloo). ``world_ranks``: the rank of each member in the default group. ``timeout``: seconds, of the
    group's collectives.
    """
    import torch
    from torch._C._distributed_c10d import _register_process_group
    from torch.distributed import (  # type: ignore[attr-defined]
        PrefixStore,
        ProcessGroup,
        distributed_c10d,
    )

    limit = timedelta(seconds=timeout)
    group: Any = ProcessGroup(PrefixStore("group", store), rank, world)
    inner = PrefixStore("backend", store)
    if device == "cuda":
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = limit
        backend: Any = ProcessGroupNCCL(inner, rank, world, options)
        kind = ProcessGroup.BackendType.NCCL
    else:
        from torch.distributed import ProcessGroupGloo

        backend = ProcessGroupGloo(inner, rank, world, timeout=limit)
        kind = ProcessGroup.BackendType.GLOO
    backend._set_sequence_number_for_group()
    group._set_default_backend(kind)
    group._register_backend(torch.device(device), kind, backend)
    group._set_group_name(name)
    # So that torch.distributed knows it: ranks, collectives by name, destroy_process_group.
    known: Any = distributed_c10d._world
    register: Any = _register_process_group
    register(name, group)
    known.pg_map[group] = ("nccl" if device == "cuda" else "gloo", store)
    known.pg_names[group] = name
    known.pg_group_ranks[group] = {r: i for i, r in enumerate(world_ranks)}
    known.pg_to_tag[group] = ""
    known.tags_to_pg.setdefault("", []).append(group)
    known.pg_backend_config[group] = f"{device}:{'nccl' if device == 'cuda' else 'gloo'}"
    return group
