"""The tree against ``pyproject.toml``, imports against the pipeline's order, and its page against the passes."""

import ast
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tilelink.backend.passes import PASSES

ROOT = Path(__file__).parents[2]
LINKED = ("frontend", "backend", "schedules")

# A module imports from its own row and the rows above. It belongs to the row with the longest
# prefix of its name, so `tilelink` and `tilelink.backend` take whatever no other row names.
LAYERS = (
    ("tilelink.errors", "tilelink.knobs"),
    ("tilelink.ir",),
    ("tilelink.device",),
    ("tilelink.language",),
    ("tilelink.frontend",),
    ("tilelink.schedules",),
    (
        "tilelink.backend.passes",
        "tilelink.backend.accuracy",
        "tilelink.backend.division",
        "tilelink.backend.dtypes",
        "tilelink.backend.expand",
        "tilelink.backend.expand_rows",
        "tilelink.backend.expand_walk",
        "tilelink.backend.copying",
        "tilelink.backend.endless",
        "tilelink.backend.product",
        "tilelink.backend.reference",
        "tilelink.backend.reference_moves",
        "tilelink.backend.reference_ops",
        "tilelink.backend.reference_plan",
        "tilelink.backend.reference_tilings",
        "tilelink.backend.tile_ops",
    ),
    ("tilelink.backend.verify",),
    ("tilelink.backend.pipeline", "tilelink.backend.graph"),
    ("tilelink.backend.simulate", "tilelink.backend.emit"),
    ("tilelink.backend.runtime",),
    ("tilelink.backend",),
    ("tilelink.kernel", "tilelink.signature", "tilelink.untraced"),
    ("tilelink",),
    # What a user could write: it sees the package from outside.
    ("tilelink.kernels",),
    ("tilelink.ops",),
    ("tilelink.tuning",),
    ("tilelink.cli",),
    ("tilelink.__main__",),
)
# An absolute path of somebody's machine; a path below something else is preceded by its parent.
MACHINE_PATH = re.compile(
    r"(?<![\w.\-}~/])(?:/(?:home|mnt|opt|root|tmp|work|workspace|Users)/\w|[A-Z]:\\\\?\w)"
)
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}


def walk_sources() -> Iterator[tuple[Path, list[str]]]:
    """Each folder of the package, through the links, with its Python files."""
    for folder, _, files in os.walk(ROOT / "tilelink", followlinks=True):
        sources = sorted(name for name in files if name.endswith(".py"))
        if sources:
            yield Path(folder).relative_to(ROOT), sources


def walk_texts() -> Iterator[tuple[Path, str]]:
    """Every text file that belongs to the project; folders with a dot are somebody's own, but .ci.

    So is the file ``.git`` of a worktree.
    """
    for folder, inner, files in os.walk(ROOT):
        inner[:] = sorted(
            name
            for name in inner
            if (name == ".ci" or not name.startswith("."))
            and name not in ("__pycache__", "build", "dist")
            and not name.endswith(".egg-info")
        )
        for name in sorted(set(files) - {".git"}):
            path = Path(folder) / name
            try:
                yield path.relative_to(ROOT), path.read_text()
            except UnicodeDecodeError:
                continue


def read_modules() -> dict[str, str]:
    """The source of every module by its dotted name; a package goes by ``name.__init__``."""
    return {
        ".".join((*folder.parts, name.removesuffix(".py"))): (ROOT / folder / name).read_text()
        for folder, names in walk_sources()
        for name in names
    }


def row_of(module: str) -> int:
    """The row of ``LAYERS`` that ``module`` belongs to."""
    prefix = module
    while prefix not in ROW:
        prefix = prefix.rpartition(".")[0]
    return ROW[prefix]


def executed_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node below ``tree`` except the bodies of ``if TYPE_CHECKING:``."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for node in child.orelse:
                yield node
                yield from executed_nodes(node)
        else:
            yield child
            yield from executed_nodes(child)


def imported_names(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of each thing of ``tilelink`` that ``module`` imports."""
    for node in executed_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "tilelink":
                yield node.lineno, name


def find_upward_imports(modules: Mapping[str, str]) -> list[str]:
    """Imports of what comes later in the pipeline, as ``module:line imports name``."""
    return [
        f"{module}:{line} imports {name}"
        for module, source in sorted(modules.items())
        for line, name in imported_names(module, source)
        if row_of(name) > row_of(module.removesuffix(".__init__"))
    ]


def test_packages_are_the_folders_of_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    found = [".".join(folder.parts) for folder, _ in walk_sources()]
    assert sorted(listed) == sorted(found)


def test_every_package_has_an_init_file() -> None:
    assert [folder for folder, names in walk_sources() if "__init__.py" not in names] == []


def test_links_and_package_dir_name_the_same_folders() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    links = {
        f"tilelink.{path.name}": os.readlink(path)
        for path in (ROOT / "tilelink").iterdir()
        if path.is_symlink()
    }
    assert links == {f"tilelink.{name}": f"../{name}" for name in LINKED}
    folders = {name: target.removeprefix("../") for name, target in links.items()}
    assert project["tool"]["setuptools"]["package-dir"] == {"tilelink": "tilelink", **folders}


def test_modules_import_only_from_earlier_stages() -> None:
    assert find_upward_imports(read_modules()) == []


def test_scan_sees_every_form_of_import() -> None:
    modules = {
        "tilelink.ir.node": "def f():\n    from tilelink.cli.main import main",
        "tilelink.frontend.__init__": "from .. import kernel, errors",
        "tilelink.backend.passes.waits": "import tilelink.backend.verify.cover as cover",
        "tilelink.backend.verify.cover": "from ..simulate import clock\nfrom . import match",
        "tilelink.device.wait": "from tilelink import errors, kernel\nfrom .notify import peer",
        "tilelink.errors": "from tilelink import Kernel",
    }
    assert find_upward_imports(modules) == [
        "tilelink.backend.passes.waits:1 imports tilelink.backend.verify.cover",
        "tilelink.backend.verify.cover:1 imports tilelink.backend.simulate.clock",
        "tilelink.device.wait:1 imports tilelink.kernel",
        "tilelink.errors:1 imports tilelink.Kernel",
        "tilelink.frontend.__init__:1 imports tilelink.kernel",
        "tilelink.ir.node:2 imports tilelink.cli.main.main",
    ]


def test_scan_skips_imports_for_type_checkers_only() -> None:
    guarded = "if TYPE_CHECKING:\n    import tilelink.cli\nelse:\n    import tilelink.kernel"
    assert find_upward_imports({"tilelink.ir.node": guarded}) == [
        "tilelink.ir.node:4 imports tilelink.kernel"
    ]


def test_unlisted_modules_fall_to_the_enclosing_row() -> None:
    assert row_of("tilelink.backend.passes.order_tiles") == ROW["tilelink.backend.passes"]
    assert row_of("tilelink.backend.unlisted") == ROW["tilelink.backend"]
    assert row_of("tilelink.kernels.ag_gemm") == ROW["tilelink.kernels"]
    assert row_of("tilelink.torch") == ROW["tilelink"]


def test_no_file_names_a_path_of_one_machine() -> None:
    seen = dict(walk_texts())
    assert {Path("Makefile"), Path(".ci/run"), Path("backend/pipeline.py")} <= set(seen)
    assert [
        f"{path}:{number}: {line.strip()}"
        for path, text in seen.items()
        for number, line in enumerate(text.splitlines(), 1)
        if MACHINE_PATH.search(line)
    ] == []


def test_scan_sees_machine_paths_and_not_relative_ones() -> None:
    somebody = "/".join(("", "home", "somebody"))
    for text in (somebody, f"cd {somebody}/x", f'"{somebody}"', "C:" + "\\Users"):
        assert MACHINE_PATH.search(text)
    for text in (f"docs{somebody}", f"~{somebody}", f"$ROOT{somebody}", "M / work", "16 B: a"):
        assert not MACHINE_PATH.search(text)


def test_the_page_lists_the_passes_in_their_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    _, _, table = page.partition("| pass | what it does |\n|---|---|\n")
    rows = table.partition("\n\n")[0].splitlines()
    assert [row.split("`")[1] for row in rows] == [name for name, _ in PASSES]
