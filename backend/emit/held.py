"""A notify that a worker, or a group of its warps, holds back until its next tile is stored."""

from __future__ import annotations

from dataclasses import dataclass

from tilelink.backend.emit import access, body
from tilelink.backend.emit.scope import Scope, refuse
from tilelink.ir import Expr, Op, Ref


@dataclass(frozen=True, slots=True)
class Held:
    """A notify that waits for the next tile: what it needs of its tile, in variables of the loop.

    ``kept`` are these variables and the values that they take, the word first; ``fixed`` are arguments
    that are the same for every tile.
    """

    call: str
    kept: tuple[tuple[str, Expr], ...]
    fixed: tuple[str, ...]

    @staticmethod
    def of(scope: Scope, notify: Op) -> Held:
        """The variables for ``notify``, or for a loop in which it tells all ranks."""
        everyone = notify if notify.blocks else None
        if everyone is not None:
            (notify,) = everyone.body
            at_once = everyone.with_ops((notify.with_attrs(delay=None),))
            if not body.tells_everyone(scope, at_once) or notify.get("if") is not None:
                raise refuse(
                    everyone, "a loop of notifies that are held back and do not tell all ranks"
                )
        body.plain_notify(scope.program, notify)
        if not notify.get("drain"):
            raise refuse(notify, "a notify that is held back and drains nothing")
        assert notify.ref is not None

        def word(ref: Ref) -> Expr:
            return body.word_of(scope, ref.symbol, body.element(notify, ref.index))

        kept = [("pending", word(notify.ref))]
        fixed: list[str] = []
        count = notify.get("count", 1)
        if everyone is not None and count == 1:
            call = "delayed_all_notify"
        elif everyone is not None:
            call, through = "delayed_counted_all_notify", notify["through"]
            first = Ref(through.symbol, (Expr.const(0), *through.index[1:]))
            kept.append(("pending_through", word(first)))
            number = scope.program.constant(count)
            if number is None:
                kept.append(("pending_count", count))
            else:
                fixed = [str(number)]
            fixed.append(scope.expr(access.strides(scope, through.symbol)[0]))
        elif scope.program.symbols[notify.symbol].name == "counter":
            call, fixed = "delayed_tile_notify", body.reach(notify)
        else:
            call = "delayed_peer_notify"
            kept.append(("pending_peer", Expr.of(notify["peer"])))
            if count != 1:
                call = "delayed_counted_notify"
                kept.append(("pending_through", word(notify["through"])))
                number = scope.program.constant(count)
                if number is None:
                    kept.append(("pending_count", count))
                else:
                    fixed = [str(number)]
        named = tuple((scope.fresh(name), value) for name, value in kept)
        return Held(call, named, tuple(fixed))

    def begin(self, scope: Scope) -> None:
        """Nothing is held back yet: a word below 0."""
        for number, (name, _) in enumerate(self.kept):
            scope.writer.line(f"{name} = tl.cast({0 if number else -1}, tl.int32)")

    def forget(self, scope: Scope) -> None:
        """Nothing is held back any more."""
        scope.writer.line(f"{self.kept[0][0]} = tl.cast(-1, tl.int32)")

    def keep(self, scope: Scope) -> None:
        """Note the notify of this tile."""
        for name, value in self.kept:
            scope.writer.line(f"{name} = {scope.expr(value)}")

    def release(self, scope: Scope, module: str = "device") -> None:
        """The last tile's notify, held back until its stores have long completed; by ``module``."""
        args = ["ctx", *(name for name, _ in self.kept), *self.fixed]
        scope.writer.call(f"{module}.{self.call}(", args)
