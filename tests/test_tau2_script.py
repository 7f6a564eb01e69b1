"""tau2-bench with a scripted customer, `--user-model script`: its lines, its limits, and training without a server."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import rft_on_tau2
from tau2_world import MOCK, PATH, ROOT, shell

import eval as evaluation
from minitau import sft, tiny
from minitau.envs.tau2 import Tau2, scripts
from minitau.envs.tau2.scripts import Reader, script
from minitau.episode import Action, Call, Demonstration, Message, Stop
from minitau.files import whole_lines
from minitau.script import run_script

DOMAINS = ("airline", "retail", "telecom")
SCRIPT = ("--env", "tau2", "--user-model", "script")


@pytest.fixture(scope="module")
def scripted(world):
    return Tau2(user_model="script", user_api_base="http://127.0.0.1:9/v1")  # where nobody listens


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A tiny random model that fits conversations of retail."""
    cfg = tiny.Tiny(
        out=str(tmp_path_factory.mktemp("base") / "model"), env="tau2", vocab=3000, layers=1, hidden=64, heads=2,
        max_tokens=32_768,
    )  # fmt: skip
    rows = (sft.to_row(world.demonstrate(task, "gold", "0")) for task in world.tasks("retail", "train")[:3])
    return str(tiny.make(cfg, map(json.dumps, rows)))


def play(env, task, actions):
    """The episode up to its end, as a Demonstration, and the actions that it did not come to."""
    opening, messages, left = env.reset(task, "0"), [], list(actions)
    stop = None
    while left and stop is None:
        action = left.pop(0)
        seen = env.step(action)
        messages += [Message("assistant", action.text, action.calls), *seen.messages]
        stop = seen.stop
    return Demonstration(task, opening, tuple(messages), env.evaluate(stop or Stop.MAX_TURNS), stop), left


def with_own_calls(world):
    """A task of telecom whose customer is to use several tools of its own."""
    tasks = world.tasks("telecom", "train")
    return next(task for task in tasks if sum("tool_calls" in said for said in script(task, "gold")[1]) > 2)


def with_changes(world):
    """A task of retail whose customer is asked several times."""
    return next(task for task in world.tasks("retail", "train") if len(script(task, "gold")[1]) > 4)


# --- the customer ---


def test_who_does_as_the_gold_agent_does_earns_what_it_earns(world, scripted):
    tasks = [task for domain in DOMAINS for task in world.tasks(domain, "train")[::15]]
    tasks += [MOCK, with_own_calls(world), with_changes(world)]
    for task in tasks:
        shown, left = play(scripted.env(), task, script(task, "gold")[0])
        assert shown == world.demonstrate(task, "gold", "0") and not left, task.key
        assert shown.evaluation.reward == 1.0, task.key


def test_who_keeps_asking_hears_all_lines_in_their_order(world, scripted):
    for task in (with_changes(world), with_own_calls(world)):
        lines = script(task, "gold")[1]
        shown, left = play(scripted.env(), task, [Action("And then?")] * (len(lines) + 5))
        assert len(left) == 6 and shown.stop == Stop.USER_STOP, "the first line was said before the agent spoke"
        assert task.domain == "telecom" or shown.evaluation.reward == 0.0, "a phone is repaired unasked"
        heard = [shown.opening.messages[-1], *(message for message in shown.messages if message.role == "user")]
        assert len(heard) == len(lines)
        for message, line in zip(heard, lines):
            if "tool_calls" in line:
                assert message.content.startswith("I did that. It says: ")
            else:
                assert message.content == line["content"]


def test_the_last_line_never_ends(world):
    reader = Reader([{"content": "Hi."}, {"content": "###STOP###"}])
    said = [reader.generate_next_message(Message("assistant", "So?"), None)[0].content for _ in range(4)]
    assert said == ["Hi.", *["###STOP###"] * 3]


def test_it_asks_no_model(world, monkeypatch):
    import litellm

    def asked(*args, **kwargs):
        raise AssertionError("nobody asks litellm")

    monkeypatch.setattr(litellm, "completion", asked)
    monkeypatch.setattr("tau2.user.user_simulator.generate", asked)
    monkeypatch.setattr("minitau.envs.tau2.world.without_price", asked)
    opening = Tau2(user_model="script").env().reset(MOCK, "0")
    assert opening.messages[-1].content == script(MOCK, "gold")[1][0]["content"]
    with pytest.raises(AssertionError, match="nobody asks litellm"):
        Tau2(user_model="openai/script")  # is a model like any other


def test_it_needs_nothing_of_a_models(world):
    code = (
        "import sys; sys.modules['mcp'] = None\n"
        "from minitau.envs.tau2 import Tau2; from minitau.episode import Task\n"
        "print(len(Tau2(user_model='script').env().reset(Task('mock', 'base', 'create_task_1'), '0').messages))"
    )
    done = shell(code, *PATH)
    assert done.stdout.strip() == "2", done.stderr


# --- its limits ---


def test_an_episode_has_its_limits(world):
    task = with_changes(world)
    actions = script(task, "gold")[0]
    assert Tau2(max_steps=4).demonstrate(task, "gold", "0").evaluation.reward == 1.0, "unlike a demonstration"
    shown, left = play(Tau2(user_model="script", max_steps=4).env(), task, actions)
    assert shown.stop == Stop.MAX_TURNS and left and shown.evaluation.reward == 0.0
    fails = [Action(calls=(Call("get_order_details", {"order_id": "none"}),))] * 30
    shown, left = play(Tau2(user_model="script").env(), task, fails)
    assert shown.stop == Stop.BAD_CALLS and len(left) == 20


# --- its lines are searched for once ---


def test_the_episodes_of_one_task_share_one_search(world, scripted, monkeypatch):
    task, searched, gold = with_own_calls(world), [], scripts.gold
    wanted, actions = world.demonstrate(task, "gold", "0"), script(task, "gold")[0]
    monkeypatch.setattr(scripts, "gold", lambda *args: (searched.append(args), gold(*args))[1])
    scripts.gold_lines.cache_clear()
    first = play(scripted.env(), task, actions)[0]
    with ThreadPoolExecutor(8) as pool:
        played = list(pool.map(lambda _: play(scripted.env(), task, actions)[0], range(16)))
    assert len(searched) == 1 and all(each == wanted for each in [first, *played])


def test_an_episode_cannot_change_the_lines_of_the_next(world, scripted):
    task = with_own_calls(world)
    actions = script(task, "gold")[0]
    env = scripted.env()
    before, _ = play(env, task, actions)
    for said in (message for message in env._record if message.role == "user"):
        said.content = "changed"
        for call in said.tool_calls or ():
            call.name, call.arguments["changed"] = "changed", True
    assert play(scripted.env(), task, actions)[0] == before


# --- the whole pipeline ---


def test_a_step_of_grpo_needs_no_server(base, tmp_path):
    """A random model solves nothing; every episode must still have a verdict."""
    out = tmp_path / "run"
    flags = (
        f"--stage grpo --env tau2 --model {base} --out {out} --domains retail --no-screen --steps 1 --tasks 2 "
        "--tasks-per-step 2 --group-size 2 --max-rounds 1 --max-new-tokens 16 --max-turns 3 --lr 1e-3"
    )
    variables = {**os.environ, "TAU2_USER_MODEL": "script", "TAU2_USER_API_BASE": "http://127.0.0.1:9/v1"}
    command = [sys.executable, "train.py", *flags.split()]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [json.loads(line) for line in whole_lines(out / "metrics.jsonl")]
    assert sum(line["stops"].values()) == line["episodes"] == 4 and not any("error" in stop for stop in line["stops"])
    assert json.loads((out / "config.json").read_text())["user_model"] == "script"


def test_an_evaluation_says_that_the_customer_was_a_script(base, tmp_path, capsys):
    from tau2.data_model.simulation import Results

    flags = "--domains retail --tasks 1 --num-trials 1 --no-floors --max-turns 2 --max-new-tokens 16"
    words = [*SCRIPT, *flags.split(), "--model", base, "--out", str(tmp_path / "eval")]
    assert run_script("eval.py", evaluation.main, words) == 0
    assert "customer script." in " ".join(capsys.readouterr().out.split())
    row = json.loads((tmp_path / "eval" / "results.json").read_text())[0]
    assert (row["user_model"], row["user_temperature"], row["errors"]) == ("script", None, 0)
    user = Results.load(tmp_path / "eval" / "tau2" / "retail.json").info.user_info
    assert (user.implementation, user.llm, user.llm_args) == ("minitau script", None, None)


def test_rft_keeps_what_was_solved_with_it(base, tmp_path):
    flags = "--stage rft --domains retail --tasks 2 --samples 2 --round-tasks 2 --epochs 1 --lr 1e-3"
    rft_on_tau2.main([*SCRIPT, *flags.split(), "--model", base, "--out", str(tmp_path / "rft")])
    row = json.loads((tmp_path / "rft" / "rft_report.json").read_text())[-1]
    assert row["solved"] >= 1 and row["attempts"] == 4 and not row["attempts_broken"]
