"""suite=... of scripts/compare.py: every rung on one page, resumable, missing data as a line."""

import json

import pytest

from fgtrain.errors import DataError
from fgtrain.runs.build import build
from fgtrain.runs.messages import USER_ERRORS
from fgtrain.studies.compare import parse
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.compare.suite import SUITES, read_suite
from tests.commands import run_compare

pytestmark = pytest.mark.slow

SUITE = """
- name: a plain one
  goal: backprop's loss
  methods: [backprop]
  budget: 3steps
- name: data that are not there
  methods: [backprop]
  overrides: [data=mnist, data.root=nowhere]
- name: refused by all
  methods: [highway]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mine.yaml").write_text(SUITE)
    return tmp_path


def test_a_suite_is_one_page_and_continues(folder):
    command = ["suite=mine.yaml", "seeds=1", "out=here"]
    out, err = run_compare(folder, *command)
    page = (folder / "here" / "page.md").read_text()
    assert "here/page.md" in out
    assert "a plain one: backprop seed 0" in err
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## a plain one",
        "## data that are not there",
        "## refused by all",
    ]
    assert "Goal: backprop's loss." in page
    assert "Not run: " in page.split("## data that are not there")[1].split("## ")[0]
    assert "Not run: highway: MLP has no residual block" in page.split("## refused by all")[1]
    (row,) = json.loads((folder / "here" / "a-plain-one" / "table.json").read_text())["rows"]
    assert f"| {row['method']} | {row['lr']:g} | {100 * row['accuracy_mean']:.1f}" in page
    assert "![loss and error against steps and time](a-plain-one/curves.png)" in page
    assert (folder / "here" / "a-plain-one" / "curves.png").exists()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")}
    assert len(kept) == 1
    run_compare(folder, *command)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("results.json")} == kept


def test_the_command_of_a_rung_runs_it_alone(folder):
    for name in ("ladder", "quick"):
        for rung in read_suite([f"suite={name}", "seeds=2", "out=here"])[1]:
            assert parse(rung.command) == rung.plan
            assert rung.plan.seeds == 2


@pytest.mark.parametrize("name", sorted(path.stem for path in SUITES.glob("*.yaml")))
def test_every_method_of_a_rung_can_be_built(name):
    for rung in read_suite([f"suite={name}"])[1]:
        for variant in rung.plan.variants:
            cfg, _ = compose_run(rung.plan.overrides, *variant.overrides, "run_dir=.")
            try:
                build(cfg)
            except Exception as error:  # the weights that another run makes
                if not isinstance(error.__cause__, DataError):
                    raise


BAD = [
    ("suite=nope", SUITE, "suite: there is no nope; give ladder, quick or a YAML file of your own"),
    ("suite=mine.yaml", "methods: [backprop]", "mine.yaml must be a list of rungs, each with a name"),
    ("suite=mine.yaml", "- {name: a, methods: [nope]}", "methods: there is no nope"),
    ("suite=mine.yaml", "- {name: a, methods: [backprop], data: mnist}", "the rung a has data; arguments of train.py"),
    ("suite=mine.yaml", "", "must be a list of rungs"),
    ("suite=mine.yaml", "[]", "must be a list of rungs"),
    ("suite=mine.yaml", "- {name: null, methods: [backprop]}", "must be a list of rungs, each with a name"),
    ("suite=mine.yaml", "- name: [a", "mine.yaml cannot be read: while parsing"),
    ("suite=mine.yaml", "- {name: a, 1: b}", "the rung a has 1;"),
    ("suite=mine.yaml", "- {name: a, out: b, methods: [backprop]}", "the rung a has out;"),
    (
        "suite=mine.yaml",
        "- {name: a, methods: backprop}",
        "methods of the rung a must be a list of words, got backprop",
    ),
    ("suite=mine.yaml", "- {name: a, methods: [backprop], overrides: null}", "overrides of the rung a must be a list"),
    ("suite=mine.yaml", "- {name: a, methods: [backprop], seeds: x}", "the rung a: seeds must be an integer, got 'x'"),
    ("suite=mine.yaml", "- {name: A b, methods: [mezo]}\n- {name: a-b, methods: [mezo]}", "A b and a-b would share"),
    ("suite=mine.yaml", "- {name: 1, methods: [mezo], overrides: [logger=csv]}", "the rung 1: .*; leave logger="),
    ("suite=mine.yaml methods=mezo", SUITE, r"methods takes a list in brackets: methods=\[mezo\]"),
    ("suite=mine.yaml seeds=0", SUITE, "seeds must be at least 1, got 0"),
]


@pytest.mark.parametrize(("arguments", "text", "message"), BAD, ids=[message for *_, message in BAD])
def test_mistakes_are_told_before_anything_runs(arguments, text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(USER_ERRORS, match=message):
        run_compare(tmp_path, *arguments.split())
    assert not list(tmp_path.rglob("results.json"))
