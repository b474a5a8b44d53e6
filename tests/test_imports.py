"""Who may import whom: the package reads in one direction."""

import ast
import configparser
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hf_kvcompress"
# A module may import from its own line and from the lines below it.
LAYERS = [
    {"__init__", "__main__", "cli", "strategies", "commands", "scoring", "analysis", "integrations", "tuning", "cpac"}
    | {"hierarchical", "policy_strategies", "harness", "experiments", "monitoring"}
    | {"training", "calibrating"},
    {"paging"},
    {"prefix"},
    {"cache", "stats"},
    {"portable"},
    {"saving"},
    {"chains", "restoring"},
    {"snapshots"},
    {"enable", "attention"},
    {"packed_attention", "fused_decode"},
    {"hybrid_layer"},
    {"layer", "dense_reading", "cropping", "stepping"},
    {"chunk"},
    {"reading", "masks", "handles", "mass", "watching"},
    {"storage"},
    {"storage_parts"},
    {"eviction", "observation"},
    {"tables"},
    {"merging", "tiers"},
    {"exact_copies", "host_tier"},
    {"compaction"},
    {"clustered"},
    {"planner", "plans", "shares"},
    {"contexts"},
    {"calibration"},
    {"footprint", "shapes", "entries", "pages", "lanes", "blocks", "lane_statistics", "lane_reading"}
    | {"positions", "window", "observers", "queries", "sealing_error", "guard", "rotary"},
    {"fingerprints"},
    {"config", "environment"},
    {"codecs", "policies"},
    {"ops", "measure", "shards", "showing", "softmax"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Absolute names of everything a file imports, at any depth."""
    inside = path.relative_to(PACKAGE.parent).with_suffix("").parts
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(inside[: len(inside) - node.level]) + "." if node.level else ""
            names += [f"{start}{node.module or ''}".rstrip(".") + f".{alias.name}" for alias in node.names]
    return names


def unit(name: str) -> str:
    """The file or folder of the package that a dotted name is in."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in RANK else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no place in LAYERS"
    for name in imports(path):
        if name.startswith("hf_kvcompress"):
            assert RANK[unit(name)] >= RANK[own], f"{own} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_outside_packages_stay_in_their_place(path):
    place = str(path.relative_to(PACKAGE))
    for name in imports(path):
        root = name.split(".")[0]
        if name.startswith("transformers.cache_utils"):
            assert place in ("cache.py", "hybrid_layer.py", "layer.py")
        if root == "transformers":
            assert not place.startswith(("codecs", "policies", "ops"))
        if root == "cupy":
            assert place.startswith("ops")


@pytest.mark.parametrize("folder", ["codecs", "policies"])
def test_codecs_and_policies_do_not_import_each_other(folder):
    for path in sorted((PACKAGE / folder).glob("*.py")):
        if path.stem in ("registry", "settings", "__init__"):
            continue
        for name in imports(path):
            if name.startswith(f"hf_kvcompress.{folder}."):
                shared = ("base", "channel_bits", "equalised", "integer", "rotated", "learned")
                assert name.split(".")[2] in shared, f"{path.name} imports {name}"


def test_base_install_imports_without_extras():
    extras = ["cupy", "datasets", "evaluate", "lm_eval", "gguf", "matplotlib", "rich", "typer", "optimum", "redis"]
    block = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    subprocess.run(
        [sys.executable, "-c", f"{block}; import hf_kvcompress; hf_kvcompress.CompressedCache()"], check=True
    )


def test_setup_names_every_package():
    found = {".".join(path.parent.relative_to(PACKAGE.parent).parts) for path in PACKAGE.rglob("__init__.py")}
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    assert set(setup["options"]["packages"].split()) == found | {"hf_kvcompress.cuda"}
