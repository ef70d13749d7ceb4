"""The passes, in the order in which they run. A pass is a file, a name and a pure function."""

from collections.abc import Callable

from tilelink.backend.passes.bind_emitter import bind_emitter
from tilelink.backend.passes.bind_resources import bind_resources
from tilelink.backend.passes.choose_channels import choose_channels
from tilelink.backend.passes.choose_emitter import choose_emitter
from tilelink.backend.passes.choose_shots import choose_shots
from tilelink.backend.passes.common import UnsupportedProgram
from tilelink.backend.passes.fold_head import fold_head
from tilelink.backend.passes.fold_sums import fold_sums
from tilelink.backend.passes.land_sums import land_sums
from tilelink.backend.passes.lay_out_memory import lay_out_memory
from tilelink.backend.passes.order_memory import order_memory
from tilelink.backend.passes.order_tiles import order_tiles
from tilelink.backend.passes.place_notifies import place_notifies
from tilelink.backend.passes.place_waits import place_waits
from tilelink.backend.passes.plan_buffers import plan_buffers
from tilelink.backend.passes.share_workers import share_workers
from tilelink.backend.passes.split_depth import split_depth
from tilelink.backend.passes.split_tail import split_tail
from tilelink.ir import Op

PASSES: tuple[tuple[str, Callable[[Op], Op]], ...] = (
    ("split-depth", split_depth),
    ("choose-shots", choose_shots),
    ("order-tiles", order_tiles),
    ("fold-sums", fold_sums),
    ("split-tail", split_tail),
    ("choose-emitter", choose_emitter),
    ("choose-channels", choose_channels),
    ("share-workers", share_workers),
    ("place-waits", place_waits),
    ("place-notifies", place_notifies),
    ("plan-buffers", plan_buffers),
    ("bind-resources", bind_resources),
    ("bind-emitter", bind_emitter),
    ("order-memory", order_memory),
    ("land-sums", land_sums),
    ("fold-head", fold_head),
    ("lay-out-memory", lay_out_memory),
)

__all__ = ["PASSES", "UnsupportedProgram"]
