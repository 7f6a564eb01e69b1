"""What --env tau2 takes from the command line and from the published pipeline's environment variables."""

import json
import os

import pytest
from test_cli import refused

import eval as evaluation
import train
from minitau import cli, config, parallel
from minitau.envs import open_world
from minitau.envs.tau2 import Tau2, read_policies
from minitau.episode import BadInput

VARIABLES = {
    "TAU2_USER_MODEL": ("user_model", "gpt-4.1", "gpt-4.1"),
    "TAU2_USER_API_BASE": ("user_api_base", "http://far:1/v1", "http://far:1/v1"),
    "TAU2_USER_TEMPERATURE": ("user_temperature", "0", 0.0),
    "TAU2_MAX_STEPS": ("max_steps", "55", 55),
    "TAU2_REWARD_ALPHA": ("alpha", "0.5", 0.5),
    "TAU2_USE_CURRICULUM": ("curriculum", "0", False),
}
GRPO = ["--stage", "grpo", "--model", "m", "--out", "o"]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def grpo(*words):
    return cli.parse_stage([*GRPO, *words])[1]


def evaluate(*words):
    return cli.parse(config.Evaluation, "eval.py", "", list(words))


def test_without_variables_the_published_defaults_hold():
    cfg = grpo("--env", "tau2")
    assert (cfg.user_model, cfg.user_api_base) == ("openai/Qwen/Qwen3-4B-Instruct-2507", "http://127.0.0.1:30001/v1")
    assert (cfg.user_temperature, cfg.max_steps, cfg.alpha, cfg.curriculum) == (0.7, 100, 0.25, True)
    cfg = evaluate("--env", "tau2")
    assert (cfg.user_model, cfg.user_api_base, cfg.user_temperature) == ("gpt-4.1-mini", "", 0.7)
    assert cfg.user_max_tokens == 0, "an evaluation's customer is tau2's own"


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_variable_gives_the_default_and_a_flag_wins(variable, monkeypatch):
    name, text, value = VARIABLES[variable]
    default = getattr(grpo("--env", "tau2"), name)
    monkeypatch.setenv(variable, f" {text} ")
    assert value != default and getattr(grpo("--env", "tau2"), name) == value
    assert getattr(grpo("--preset", "tau2-4b"), name) == value
    assert getattr(grpo(), name) == getattr(config.GRPO(), name), "courier has nothing to do with it"
    flag = "--" + name.replace("_", "-")
    typed = ["--curriculum"] if value is False else [flag, str(default)]
    assert getattr(grpo("--env", "tau2", *typed), name) == default


def test_a_variable_wins_over_a_preset(monkeypatch):
    monkeypatch.setitem(config.PRESETS["tau2-4b"], "grpo", {**config.PRESETS["tau2-4b"]["grpo"], "alpha": 0.9})
    assert grpo("--preset", "tau2-4b").alpha == 0.9
    monkeypatch.setenv("TAU2_REWARD_ALPHA", "0.1")
    assert grpo("--preset", "tau2-4b").alpha == 0.1


def test_an_empty_endpoint_is_the_providers_own(monkeypatch):
    monkeypatch.setenv("TAU2_USER_API_BASE", "")
    assert grpo("--env", "tau2").user_api_base == ""


@pytest.mark.parametrize(
    "variable, text, said",
    [
        ("TAU2_USER_MODEL", "", "must not be empty"),
        ("TAU2_USER_TEMPERATURE", "warm", "must be a number"),
        ("TAU2_USER_TEMPERATURE", "-1", "from 0 up"),
        ("TAU2_USER_TEMPERATURE", "nan", "from 0 up"),
        ("TAU2_MAX_STEPS", "", "must be a whole number"),
        ("TAU2_MAX_STEPS", "1.5", "must be a whole number"),
        ("TAU2_MAX_STEPS", "0", "at least 1"),
        ("TAU2_REWARD_ALPHA", "0,25", "must be a number"),
        ("TAU2_REWARD_ALPHA", "inf", "from 0 up"),
        ("TAU2_USE_CURRICULUM", "true", "must be 0 or 1"),  # published, it would mean no
    ],
)
def test_a_malformed_variable_is_one_line_that_names_it(capsys, monkeypatch, variable, text, said):
    monkeypatch.setenv(variable, text)
    line = refused(capsys, train.main, *GRPO, "--env", "tau2")
    assert variable in line and repr(text) in line and said in line
    grpo()  # courier does not read it
    name = VARIABLES[variable][0].replace("_", "-")
    grpo("--env", "tau2", *(["--no-curriculum"] if "curriculum" in name else [f"--{name}", "1"]))  # nor is it needed


def test_help_shows_what_is_used(capsys, monkeypatch):
    monkeypatch.setenv("TAU2_REWARD_ALPHA", "0.125")
    with pytest.raises(SystemExit):
        cli.parse_stage(["--stage", "grpo", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "$TAU2_REWARD_ALPHA, now '0.125'" in shown and "$TAU2_MAX_STEPS)" in shown


def test_a_run_records_what_it_used(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TAU2_USER_MODEL", "openai/from-the-environment")
    monkeypatch.setenv("TAU2_MAX_STEPS", "7")
    out = tmp_path / "run"
    flags = f"--agent refuse --env tau2 --domains telecom --tasks 1 --num-trials 1 --user-temperature 0.1 --out {out}"
    evaluation.main(flags.split())
    recorded = json.loads((out / "config.json").read_text())
    assert (recorded["user_model"], recorded["max_steps"]) == ("openai/from-the-environment", 7)
    assert recorded["user_temperature"] == 0.1
    assert not [name for name in os.listdir(out) if "key" in name]


def test_a_password_does_not_belong_into_an_address(capsys):
    line = refused(capsys, train.main, *GRPO, "--env", "tau2", "--user-api-base", "http://me:secret@host/v1")
    assert "OPENAI_API_KEY" in line and "secret" not in line


def test_each_rank_begins_with_another_endpoint(world, monkeypatch):
    addresses = [f"http://127.0.0.1:{port}/v1" for port in (1, 2, 3)]
    cfg = evaluate("--env", "tau2", "--user-api-base", ",".join(addresses))
    for rank in range(4):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        asked = open_world(cfg).user_api_bases
        assert [next(asked) for _ in range(4)] == [addresses[(rank + i) % 3] for i in range(4)]


# --- --policy ---


def test_the_agents_instructions_are_tau2s_own(world):
    from tau2.agent.llm_agent import LLMAgent
    from tau2.registry import registry

    for domain in ("airline", "retail", "telecom", "mock"):
        environment = registry.get_env_constructor(domain)()
        theirs = LLMAgent(environment.get_tools(), environment.get_policy(), llm="x").system_prompt
        assert world.instructions(domain) == theirs
        shown = world.demonstrate(world.tasks(domain, "base")[0], "refuse", "0")
        assert shown.opening.policy == theirs
        assert list(shown.opening.tools) == [tool.openai_schema for tool in environment.get_tools()]


def test_a_policy_replaces_the_domains_and_nothing_else(world, tmp_path):
    from tau2.agent.llm_agent import LLMAgent

    text = "Be {kind} to 100% of them.\n</policy>\n"
    (tmp_path / "kind.md").write_text(text)
    cfg = evaluate("--env", "tau2", "--domains", "retail", "--policy", str(tmp_path / "kind.md"))
    other = open_world(cfg)
    assert other.instructions("retail") == LLMAgent([], text, llm="x").system_prompt
    task = world.tasks("retail", "base")[0]
    shown, before = (each.demonstrate(task, "gold", "0") for each in (other, world))
    assert text in shown.opening.policy and shown.opening.policy != before.opening.policy
    assert (shown.opening.tools, shown.messages, shown.evaluation) == (
        before.opening.tools,
        before.messages,
        before.evaluation,
    )
    assert other.instructions("airline") == world.instructions("airline")
    assert Tau2().instructions("retail") == world.instructions("retail")


def test_a_policy_for_each_domain(tmp_path):
    for name in ("a", "r"):
        (tmp_path / name).write_text(f"policy {name}")
    named = (f"retail={tmp_path}/r", f"airline={tmp_path}/a")
    assert read_policies(named, ("retail", "airline", "telecom")) == {"retail": "policy r", "airline": "policy a"}
    assert read_policies((), ("retail",)) == {}
    cfg = evaluate("--env", "tau2", "--policy", ",".join(named))
    assert cfg.policy == named


@pytest.mark.parametrize(
    "named, domains, said",
    [
        (("{dir}/nowhere.md",), ("retail",), "nowhere.md cannot be read .No such file"),
        (("retail={dir}/nowhere.md",), ("retail", "airline"), "No such file"),
        (("{dir}/empty",), ("retail",), "is empty"),
        (("{dir}/bytes",), ("retail",), "not UTF-8"),
        (("{dir}",), ("retail",), "cannot be read"),
        (("banking={dir}/good",), ("retail", "airline"), "'banking' is not one of --domains retail,airline"),
        (("{dir}/good",), ("retail", "airline"), "say for which domain: --policy DOMAIN="),
        (("{dir}/good", "{dir}/good"), ("retail",), "say for which domain"),
        (("retail={dir}/good", "retail={dir}/good"), ("retail",), "has a policy already"),
        (("",), ("retail",), "cannot be read"),
        (("retail=",), ("retail",), "cannot be read"),
    ],
)
def test_a_policy_that_cannot_be_used_is_one_line(tmp_path, named, domains, said):
    (tmp_path / "good").write_text("Be kind.")
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(BadInput, match=said) as caught:
        read_policies([each.replace("{dir}", str(tmp_path)) for each in named], domains)
    assert "\n" not in str(caught.value) and "--policy" in str(caught.value)


def test_courier_takes_no_policy(capsys, tmp_path):
    (tmp_path / "kind.md").write_text("Be kind.")
    line = refused(
        capsys, evaluation.main, "--agent", "gold", "--policy", tmp_path / "kind.md", "--out", tmp_path / "o"
    )
    assert "--policy is for --env tau2" in line
