"""The documentation runs as it stands, and its links lead somewhere.

Each python block of a page is run in the order of the page, in one namespace that starts empty: a page imports what it uses.
A block that needs a package which is not installed is skipped.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from arsam import ARSAM

ROOT = Path(__file__).parents[1]
# deploy.md holds whole programs, which tests/tools/test_deploy.py runs by themselves.
PAGES = sorted(page for page in (ROOT / "docs").glob("*.md") if page.name != "deploy.md")
BLOCKS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}
MARKDOWN = sorted(path for path in ROOT.rglob("*.md") if not {".venv", ".venv-mmpose", "runs", "build"} & set(path.parts))
FRAMEWORKS = {"accelerate", "lightning", "mmengine", "timm", "transformers"}
_NAMESPACES: dict[str, tuple[int, dict[str, Any]]] = {}  # page -> blocks that have run, names


def imported(code: str) -> set[str]:
    """Top-level names of the packages that a block imports; our integrations import the framework they are named after."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names |= {m.split(".")[0] for m in modules}
        names |= {m.split(".")[-1] for m in modules if m.startswith("arsam.integrations.")}
    return names


def frameworks(page: str, index: int) -> set[str]:
    """The frameworks that a block uses: imported by it, or by a block before it and named in it."""
    seen = set().union(*(imported(code) for code in BLOCKS[page][: index + 1])) & FRAMEWORKS
    code = BLOCKS[page][index]
    return {name for name in seen if name in imported(code) or f"{name}." in code}


def missing(page: str, index: int) -> set[str]:
    """The frameworks that a block uses and that are not installed."""
    return {name for name in frameworks(page, index) if importlib.util.find_spec(name) is None}


def unused_port() -> int:
    """A port that nobody listens to at the moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_block(page: str, index: int, names: dict[str, Any]) -> None:
    """Run one block, as torchrun would run it on one rank."""
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port())}
    code = compile(BLOCKS[page][index], f"{page}, block {index}", "exec", dont_inherit=True)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        if frameworks(page, index):
            warnings.simplefilter("default")  # theirs
        for name, value in rank.items() if "init_process_group(" in BLOCKS[page][index] else ():
            patch.setenv(name, value)
        exec(code, names)
    if "accelerate.state" in sys.modules:  # accelerate keeps its settings in classes
        for kind in ("AcceleratorState", "GradientState", "PartialState"):
            getattr(sys.modules["accelerate.state"], kind)._reset_state()


def run(page: str, index: int) -> dict[str, Any]:
    """Run a page up to and including a block, each block once; blocks before it that cannot run are left out."""
    done, names = _NAMESPACES.get(page, (0, {}))
    for i in range(done, index + 1):
        if not missing(page, i):
            run_block(page, i, names)
        _NAMESPACES[page] = i + 1, names
    return names


@pytest.mark.parametrize(("page", "index"), [(page, i) for page, blocks in BLOCKS.items() for i in range(len(blocks))])
def test_blocks_run(page: str, index: int) -> None:
    """And train with ascents. Kills: an example that no longer fits, or that needs what the page does not import."""
    lacking = missing(page, index)
    if lacking:
        pytest.skip(f"{', '.join(sorted(lacking))} not installed")
    names = run(page, index)
    if re.search(r"(optimizer\.step|scaled_step|scaler\.step|\.fit|\.train)\(", BLOCKS[page][index]):
        optimizers = [getattr(x, "optimizer", x) for x in names.values()]
        assert any(x.stats["ascents"] > 0 for x in optimizers if isinstance(x, ARSAM))


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.+?) *$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    """To a file of the project, and to a heading that is there. Kills: a page that was moved or renamed."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path if not file else (path.parent / file).resolve()
        assert target.exists(), f"{link} leads nowhere"
        assert not anchor or anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_every_page_has_been_found() -> None:
    """Kills: a folder that has moved, so that nothing is checked."""
    assert len(BLOCKS["loops.md"]) > 20 and len(MARKDOWN) > 8
