"""The real main of every method against its page: rows, coefficients, rates, what is asked for."""

import importlib

import pytest
import torch
from conftest import run_script
from pages import kit

import common
from results.methods import METHODS

# All methods but bridge, whose page is test_bridge.py's reference.
NAMES = ["grpo", "dapo", "sft", "bread", "luffy", "srft", "relift", "prefix_rft", "uft", "chord"]
NAMES += ["hpt", "trapo", "iw_sft"]
PAGES = {name: importlib.import_module(f"pages.{name}") for name in NAMES}
CASES = [
    (name, scenario, world)
    for name in NAMES
    for scenario in PAGES[name].SCENARIOS
    for world in getattr(PAGES[name], "WORLDS", ("mixed", "hints"))
]
SAMPLING = [name for name in NAMES if not hasattr(PAGES[name], "WORLDS")]
CASES += [(name, next(iter(PAGES[name].SCENARIOS)), world) for name in SAMPLING for world in ("fail", "solve")]


ON_RANKS = [case for case in CASES if case[2] == "mixed"][::3]


def check(name: str, scenario: str, script: str, world: common.World) -> None:
    """The page against main, in micro-batches of a few rows."""
    flags = PAGES[name].SCENARIOS[scenario] | {"tokens_per_microbatch": 60}
    kit.assert_page(name, PAGES[name].page, flags, script, world)


def test_every_method_has_a_page():
    assert {*NAMES, "bridge"} == {method.name for method in METHODS}


@pytest.mark.parametrize(("name", "scenario", "script"), CASES)
def test_page(name, scenario, script, world):
    """Every scenario of the page, with a policy of mixed success and one that hints help."""
    check(name, scenario, script, world)


def updates() -> dict[str, str]:
    """A third of the cases on this rank, as update_worker.py runs them: the complaint of each."""
    rank, size, found = torch.distributed.get_rank(), torch.distributed.get_world_size(), {}
    for case in ON_RANKS:
        found[" ".join(case)] = ""
        try:
            check(*case, common.World(rank, size, torch.device("cpu")))
        except AssertionError as error:
            found[" ".join(case)] = str(error) or "failed"
    return found


def test_two_ranks(world, tmp_path):
    """Two ranks together do what the page says, which knows nothing of ranks."""
    run_script("tests/update_worker.py", "test_pages", str(tmp_path / "found.pt"), nproc=2, timeout=400)
    found = torch.load(tmp_path / "found.pt")
    assert {case: said for case, said in found.items() if said} == {} and len(found) == len(ON_RANKS)
