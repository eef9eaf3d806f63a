"""The command line: help, plan, router, and that quiet means quiet."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from tests.conftest import Family
from upit_merge.cli.main import main
from upit_merge.config.recipe import parse_recipe_text
from upit_merge.demo.run import RECIPE

ROOT = Path(__file__).parents[2]


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["run", "plan", "router", "demo"])
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    example = re.search(r"Example:\n  (upit-merge .*)\n", result.output)
    assert example
    assert example.group(1).split()[1] == command
    for option in re.findall(r"(--[a-z-]+)", example.group(1)):
        assert option in result.output.split("Example:")[0]


def test_run_takes_the_options_of_mergekit() -> None:
    from mergekit.options import MergeOptions

    context = click.Context(main.commands["run"])
    names = {param.name for param in main.commands["run"].get_params(context)}
    assert set(MergeOptions.model_fields) <= names
    output = invoke("run", "--help").output
    assert "--out-shard-size SIZE" in output
    assert "in bytes" in output
    assert "--async-write" not in output  # accepted, but it can have no effect


def test_plan_shows_everything_and_writes_nothing(family: Family) -> None:
    recipe = family.write_recipe(
        family.recipe(parameters={"num_experts": 5}, router={"data": str(family.seed_file())})
    )
    before = tree(family.root)
    result = invoke("plan", recipe, "--quiet")
    assert result.exit_code == 0, result.output
    assert tree(family.root) == before
    assert "experts 0 and 2" in result.output
    assert "3 checkpoints and 2 children make 5 experts" in result.output
    assert "24 samples" in result.output
    size = re.search(r"Output: ([\d,]+) parameters", result.output)
    assert re.search(
        r"Memory: about [\d.]+ GiB for the merge, about [\d.]+ GiB for the router; this \w+ has",
        result.output,
    )
    run = invoke("run", recipe, family.root / "out", "--quiet")
    assert run.exit_code == 0, run.output
    from tests.support.naive import load_model

    written = load_model(family.root / "out")
    assert int(size.group(1).replace(",", "")) == sum(t.numel() for t in written.values())


def test_plan_and_run_agree_on_the_lineage(shared_family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    document = shared_family.recipe(parameters={"num_experts": 6, "parents": "random", "seed": 4})
    recipe.write_text(yaml.safe_dump(document))
    planned = invoke("plan", recipe, "--quiet").output
    assert invoke("run", recipe, tmp_path / "out", "--quiet").exit_code == 0
    report = yaml.safe_load((tmp_path / "out" / "upit_report.json").read_text())
    for index, expert in enumerate(report["lineage"]["experts"]):
        if expert["parents"]:
            first, second = expert["parents"]
            row = rf"│ {index}\s+│ experts {first} and {second}\s+│ {expert['alpha']:.3f}"
            assert re.search(row, planned)


def test_quiet_says_nothing_at_all(shared_family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    router = {"data": str(shared_family.seed_file()), "objective": "ridge"}
    document = shared_family.recipe(parameters={"num_experts": 4}, router=router)
    recipe.write_text(yaml.safe_dump(document))
    result = invoke("run", recipe, tmp_path / "quiet", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    loud = invoke("run", recipe, tmp_path / "loud")
    for stage in ("comparing checkpoints", "writing experts", "losses of the experts", "fitting"):
        assert stage in loud.stderr
    assert "Seed samples by expert" in loud.stdout


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["nowhere", "--data", "x"], "The folder nowhere does not exist"),
        (["FAMILY/base", "--data", "SEED"], "has model_type 'llama'; the router needs a Mixtral"),
        (["OUT", "--data", "missing.jsonl"], "missing.jsonl"),
        (
            ["OUT", "--data", "SEED", "--sample", "many"],
            "--sample is 'many', expected a whole number of samples, or a fraction",
        ),
        (["OUT", "--data", "SEED", "--sample", "0"], "--sample is 0"),
        (["OUT", "--data", "SEED", "--max-length", "1"], "--max-length is 1"),
        (["OUT", "--data", "SEED", "--temperature", "0"], "--temperature is 0"),
        (["OUT", "--data", "SEED", "--device", "tpu"], "'tpu'"),
    ],
)
def test_router_mistakes_are_one_sentence(family, merge, options, sentence) -> None:
    out = merge(family.recipe())
    places = {"FAMILY": str(family.root), "OUT": str(out), "SEED": str(family.seed_file())}
    before = tree(out)
    arguments = [
        re.sub("FAMILY|OUT|SEED", lambda match: places[match.group()], text) for text in options
    ]
    result = invoke("router", *arguments)
    assert result.exit_code in (1, 2)
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.output
    assert tree(out) == before


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yml")), ids=lambda path: path.name)
def test_recipes_are_valid_and_say_how_to_run_them(path: Path) -> None:
    text = path.read_text()
    parse_recipe_text(text, str(path))
    comment = text.split("merge_method")[0]
    assert comment.startswith("# ")
    assert "#   " in comment
    assert "mergekit-yaml" in comment


def test_demo_recipe_is_the_one_in_recipes() -> None:
    assert (ROOT / "recipes" / "demo.yml").read_text() == RECIPE


def test_readme_recipe_is_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        parse_recipe_text(block)


def test_demo_refuses_a_folder_in_use(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    result = invoke("demo", tmp_path)
    assert result.exit_code == 1
    assert "is not empty" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
