"""Which variables a piece of Python assigns, and which it reads before it assigns them."""

from __future__ import annotations

import ast


def assigned_names(body: list[ast.stmt]) -> list[str]:
    """The names that ``body`` assigns, loop targets included, in order of first assignment."""
    found: dict[str, None] = {}
    for statement in body:
        for node in _ordered(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.setdefault(node.id)
    return list(found)


def _ordered(node: ast.AST) -> list[ast.AST]:
    result = [node]
    for child in ast.iter_child_nodes(node):
        result += _ordered(child)
    return result


def exposed_names(body: list[ast.stmt]) -> set[str]:
    """The names that ``body`` may read before it has assigned them."""
    return _scan(body, set())[0]


def _scan(body: list[ast.stmt], assigned: set[str]) -> tuple[set[str], set[str]]:
    """(names read before surely assigned, names surely assigned after ``body``)."""
    exposed: set[str] = set()
    for node in body:
        if isinstance(node, ast.For):
            exposed |= _reads(node.iter) - assigned
            inner = assigned | set(assigned_names([ast.Assign([node.target], ast.Constant(0))]))
            exposed |= _scan(node.body, inner)[0]
        elif isinstance(node, ast.If):
            exposed |= _reads(node.test) - assigned
            first, after = _scan(node.body, set(assigned))
            second, otherwise = _scan(node.orelse, set(assigned))
            exposed |= first | second
            assigned = after & otherwise
        else:
            exposed |= _reads(node) - assigned
            assigned = assigned | set(assigned_names([node]))
    return exposed, assigned


def _reads(node: ast.AST) -> set[str]:
    names = {
        n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
    }
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        names.add(node.target.id)
    return names
