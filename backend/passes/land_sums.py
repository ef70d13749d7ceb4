"""``land-sums``: a ring of their own for the parts of sums that a launch with roles adds to products."""

from __future__ import annotations

from tilelink.backend.copying import copies_of
from tilelink.backend.passes.bind_emitter import Product, landing_stages, split_product
from tilelink.ir import DTYPES, Op
from tilelink.schedules.roles import TURNS, landing_slots


def land_sums(program: Op) -> Op:
    """Give the launches whose warp groups take turns a ring that the parts of their sums land in.

    Before::

        launch @f {emitter = "gluon", roles = "turns", stages = 5, …} do {
          stage @C.own {…} do (%m: tile, %n: tile) {… %s = load_sum @C.parts[…] (%c) {via = "tma"} …}
        }

    After::

        launch @f {emitter = "gluon", landing = 2, roles = "turns", stages = 5, …} do { … }

    ``landing``: the boxes of that ring, as many as shared memory has room for beside the ring of the product
    (:func:`tilelink.schedules.roles.landing_slots`). A fetcher waits for the parts and fills it. Without
    ``landing`` the loader does, behind all steps of the tile, in the ring of the product: whatever comes next
    in that ring waits for the peers too. So it does where sums that go on to other ranks are made in several
    stages: groups have no registers for that and for a second ring. Invariants: no stage changes; a second run
    changes nothing.
    """
    return program.with_ops(
        tuple(
            op.with_attrs(landing=_landing(program, op) or None) if op.name == "launch" else op
            for op in program.body
        )
    )


def _landing(program: Op, launch: Op) -> int:
    """The boxes of the ring that parts of the sums of ``launch`` land in; 0 where it has none."""
    run = landing_stages(launch) if launch.get("roles") == TURNS else []
    if not run or (len(run) > 1 and any(op.name == "notify" for op in run[0][0].walk())):
        return 0
    stage, product = run[0]
    rows, columns = (int(n) for n in stage["tile"])
    tile = rows, columns, int(product.loop["tile"][0])
    dtype = product.loads[0].results[0].type.dtype
    stages = (op for op in launch.body if op.name == "stage" and not copies_of(op))
    parts = [(op, split_product(op)) for op in stages]
    extra = max(_laid_out(program, *part, dtype) for part in parts)
    return landing_slots(int(launch["stages"]), tile, len(product.loads) - 1, DTYPES[dtype], extra)


def _laid_out(program: Op, stage: Op, product: Product, dtype: str) -> int:
    """Bytes of shared memory in which what an epilogue loads or stores by addresses changes its layout.

    Behind a sum these are pieces of a tile; so is what leaves as elements of another type than ``dtype``, for
    which there is no room.
    """
    elements = int(stage["tile"][0]) * int(stage["tile"][1])
    if product.landed is not None:
        elements = int(stage["tile"][0]) * int(product.loop["tile"][0])
    found = 0
    for op in (o for top in product.epilogue for o in top.walk()):
        if op.name not in ("load", "store") or op.ref is None:
            continue
        value = op.operands[0] if op.name == "store" else op.results[0]
        declared = str(program.declared(op.symbol)["dtype"])
        leaves = op.name == "store" and op.get("via") == "tma" and declared == dtype
        if len(value.type.shape) > 1 and not leaves:
            found = max(found, elements * DTYPES[declared])
    return found
