"""Some of a study's runs, trained on their own: exactly those that the study asks for."""

from __future__ import annotations

from typer.testing import CliRunner

from lori_nb import cli
from lori_nb.lab.runs import Store, done_of
from lori_nb.study.conduct import planned
from lori_nb.study.plans import plan_lori
from lori_nb.study.profiles import load_settings
from lori_nb.study.selection import selected


def invoke(*words: str):
    return CliRunner().invoke(cli.app, words)


def test_a_cell_of_the_papers_study_is_planned_without_weights(home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cell = ("--notebooks", "01_lori", "--task", "gsm8k", "--method", "lori-s", "--seed", "0")
    result = invoke("train", "--profile", "paper", *cell, "--plan")
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "gsm8k" in line]
    calibration, chosen = lines  # what it builds on is trained with it
    assert calibration.startswith("lori-d · gsm8k ·") and " 44,040,192 " in calibration
    assert chosen.startswith("lori-s 0.9 · gsm8k ·") and " 4,404,019 " in chosen


def test_selection_takes_part_of_the_plan_and_none_takes_all(home):
    plan = planned(load_settings("paper"), ["01_lori", "03_ortho_lora"])
    assert selected(plan) == plan
    lora = selected(plan, ["lora"], ["gsm8k"])
    assert {spec.tasks for spec in lora} == {("gsm8k",)} and {spec.seed for spec in lora} == {0, 1, 2}
    assert set(selected(plan, seeds=[1])) == {spec for spec in plan if spec.seed == 1}
    joint = selected(plan, ["ortho-lora"])
    assert {spec.tasks for spec in joint} == {("boolq", "gsm8k", "refusal")}
    assert selected(plan, ["ortho-lora"], ["gsm8k"]) == []  # trained on more than that


def test_what_is_trained_so_is_what_the_study_finds_done(tiny_decoder, home):
    cell = ("--profile", "smoke", "--base", str(tiny_decoder), "--notebooks", "01_lori", "--task", "chain_sum")
    result = invoke("train", *cell, "--method", "lori-s")
    assert result.exit_code == 0, result.output
    assert f"done: 1 runs and those they build on, in {home / 'runs'}" in result.stdout
    done, missing = done_of(plan_lori(load_settings("smoke", base=str(tiny_decoder))), Store())
    assert {(spec.method, spec.tasks) for spec in done} == {("lori-d", ("chain_sum",)), ("lori-s", ("chain_sum",))}
    assert missing
