"""The code of your own network is part of the model: its files have an md5, are kept with the model, and are loaded from there.

The files are the module's own and those that it imports, as far as they are not installed packages: those have versions. Kept files are
imported under a private name, and so are their imports of each other. So a model predicts what it predicted, whatever became of the code.
"""

import ast
import hashlib
import importlib.util
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from tlpipeline.errors import BackboneError

NONE = "none"
FOLDER = "network"  # of a model folder, with the kept files
_PRIVATE = "_tlpipeline_network_"
_INSTALLED = tuple(Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib"))


@dataclass(frozen=True)
class Code:
    """The files of a network's code.

    Attributes:
        files: by their names, such as "nets.py" or "package/blocks.py"; empty for an installed package.
        md5: of all names and contents, "none" without files.
    """

    files: Mapping[str, Path]
    md5: str

    def keep(self, folder: Path) -> None:
        """Copy the files into a folder."""
        for name, path in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def of_module(module: str) -> Code:
    """Return the code of a module that can be imported now, without importing it (its packages are).

    Raises:
        ModuleNotFoundError: there is no such module.
        BackboneError: a file of it is no Python.
    """
    base = base_of(module)
    return of_files(_imported(module, base)) if base else Code({}, NONE)


def base_of(module: str) -> Path | None:
    """Return the folder from which a module's full name leads to its file; None if it is installed, or was made in memory.

    Raises:
        ModuleNotFoundError: there is no such module.
    """
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # made in memory
        return None
    if spec is None:
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)
    origin = Path(spec.origin or "")
    if not origin.is_file() or origin.suffix != ".py" or _is_installed(origin):
        return None
    return origin.parents[module.count(".") + (origin.name == "__init__.py")]


def of_folder(folder: Path) -> Code:
    """Return the code, or the configuration, that is kept in a folder."""
    paths = [path for kind in ("*.py", "*.json") for path in folder.rglob(kind)] if folder.is_dir() else []
    return of_files({path.relative_to(folder).as_posix(): path for path in paths})


def of_files(files: Mapping[str, Path]) -> Code:
    """Return files as code; their names are those under which they are kept."""
    if not files:
        return Code({}, NONE)
    digest = hashlib.md5(usedforsecurity=False)
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return Code(dict(sorted(files.items())), digest.hexdigest())


def _is_installed(path: Path) -> bool:
    return any(path.resolve().is_relative_to(place) for place in _INSTALLED) or "site-packages" in path.parts


def _imported(module: str, base: Path) -> dict[str, Path]:
    """Return the files of a module and of those that it imports from the same folder, by their names relative to it."""
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] == "tlpipeline":
            continue
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b first
            place = base.joinpath(*parts[:depth])
            for path in (place / "__init__.py", place.with_suffix(".py")):
                relative = path.relative_to(base).as_posix()
                if relative not in files and path.is_file() and not _is_installed(path):
                    files[relative] = path
                    package = ".".join(parts[:depth] if path.name == "__init__.py" else parts[: depth - 1])
                    waiting += _named(path, package)
    return files


def _named(path: Path, package: str) -> list[str]:
    """Return the full names of all modules that a file may import; `from a import b` may mean the module a.b."""
    names = []
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            names += [source, *(f"{source}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.strip(".") == name and name]


def _parsed(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise BackboneError(f"expected Python code in {path}, but: {error}. Mend it, and run again.") from error


# --- importing kept files -------------------------------------------------------------------------------------------------------------


def load(code: Code, module: str, folder: Path) -> ModuleType:
    """Import a module from a folder of kept files under a private name.

    Raises:
        BackboneError: it cannot be imported, as where it needs a package that is not installed.
    """
    private = f"{_PRIVATE}{code.md5}"
    _Finder.folders[private] = folder.resolve()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())  # before the one of paths, which would find the files, too
    try:
        return importlib.import_module(f"{private}.{module}")
    except Exception as error:  # whatever the code raises
        raise BackboneError(
            f"Cannot import {module} from the code that is kept with the model in {folder}: {type(error).__name__}: {error}. It may need a package, or a "
            "version of one, that is not installed here."
        ) from error


class _Finder(MetaPathFinder):
    """Finds modules of kept code by their private names."""

    folders: dict[str, Path] = {}  # noqa: RUF012  (one for the process, as sys.modules is)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        private, _, rest = name.partition(".")
        if private not in self.folders:
            return None
        place = self.folders[private].joinpath(*rest.split(".")) if rest else self.folders[private]
        for file, below in ((place / "__init__.py", [str(place)]), (place.with_suffix(".py"), None)):
            if rest and file.is_file():
                loader = _Loader(name, str(file))
                return importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=below)
        if not place.is_dir():
            return None
        spec = ModuleSpec(name, None, is_package=True)  # a folder without __init__.py
        spec.submodule_search_locations = [str(place)]
        return spec


class _Loader(SourceFileLoader):
    """Runs kept code, whose imports of other kept code lead to the kept files."""

    def get_code(self, fullname: str) -> CodeType:
        """Compile anew: nothing is written beside the kept files, and no compiled file is taken for them."""
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data: Any, path: Any, *_: Any, **__: Any) -> CodeType:  # type: ignore[override]
        private = self.name.partition(".")[0]
        tree = _Redirect(private, _Finder.folders[private]).visit(ast.parse(data, str(path)))
        compiled: CodeType = compile(ast.fix_missing_locations(tree), str(path), "exec", dont_inherit=True)
        return compiled


class _Redirect(ast.NodeTransformer):
    """Rewrites `import a.b` and `from a import b` where `a` is kept; relative imports lead to kept code by themselves."""

    def __init__(self, private: str, folder: Path) -> None:
        self.private, self.folder = private, folder

    def _is_kept(self, name: str) -> bool:
        top = name.partition(".")[0]
        return (self.folder / top).is_dir() or (self.folder / f"{top}.py").is_file()

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        if not node.level and node.module and self._is_kept(node.module):
            return ast.copy_location(ast.ImportFrom(module=f"{self.private}.{node.module}", names=node.names, level=0), node)
        return node

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        written: list[ast.stmt] = []
        for alias in node.names:
            if not self._is_kept(alias.name):
                written.append(ast.Import(names=[alias]))
                continue
            # `import a.b` loads a.b and binds a; `import a.b as c` binds a.b.
            written.append(ast.Import(names=[ast.alias(name=f"{self.private}.{alias.name}", asname="_kept")]))
            name = alias.name if alias.asname else alias.name.partition(".")[0]
            package, _, last = f"{self.private}.{name}".rpartition(".")
            written.append(ast.ImportFrom(module=package, names=[ast.alias(name=last, asname=alias.asname or last)], level=0))
        return [ast.copy_location(statement, node) for statement in written]
