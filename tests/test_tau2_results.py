"""RUN/tau2: what tau2-bench's own code makes of our evaluations. All of it skips where tau2-bench is not installed."""

import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import eval as script
from minitau import config, tau2_results
from minitau.episode import Call, Evaluation, Message, Stop, Trajectory, Turn
from minitau.estimators import mean_over_tasks, pass_hat_k
from minitau.report import tallies
from minitau.script import run_script

DOMAINS = ("airline", "retail", "telecom")
# What plays each trial of the first tasks of a domain that do not pay for refusing: 4, 2 and 1 successes of 4.
MIXTURE = (("gold",) * 4, ("refuse", "gold", "transfer", "gold"), ("transfer", "refuse", "refuse", "gold"))


@pytest.fixture(scope="module")
def played(world):
    """Four trials of two or three tasks of each domain: each script's episode once, dealt out as MIXTURE says."""
    found = []
    for domain in DOMAINS:
        tasks = iter(world.tasks(domain, "test"))
        for agents in MIXTURE[:2] if domain == "airline" else MIXTURE:
            refused = ((task, world.demonstrate(task, "refuse", "0")) for task in tasks)
            task, refusal = next((task, told) for task, told in refused if told.evaluation.reward == 0)
            once = {agent: world.demonstrate(task, agent, "0") for agent in sorted(set(agents) - {"refuse"})}
            once["refuse"] = refusal
            for sample, agent in enumerate(agents):
                told = once[agent]
                messages = [*told.opening.messages, *told.messages]
                found.append(Trajectory(task, sample, messages=messages, stop=told.stop, evaluation=told.evaluation))
    return found


CFG = config.Evaluation(env="tau2", agent="policy", model="m", num_trials=4, user_model="gpt-x", seed=5)


def loaded(folder, played):
    """tau2's Results of each domain, and what we make of the same episodes: (results, tallies)."""
    from tau2.data_model.simulation import Results

    paths = tau2_results.write(folder, played, CFG)
    return {
        path.stem: (Results.load(path), list(tallies([t for t in played if t.task.domain == path.stem]).values()))
        for path in paths
    }


def test_tau2_computes_the_same_pass_hat_k(played, tmp_path):
    from tau2.metrics.agent_metrics import compute_metrics

    by_domain = loaded(tmp_path, played)
    assert tuple(by_domain) == DOMAINS
    seen = set()
    for results, pairs in by_domain.values():
        metrics = compute_metrics(results)
        ours = {k: mean_over_tasks(pairs, pass_hat_k, k) for k in (1, 2, 3, 4)}
        assert metrics.pass_hat_ks == pytest.approx(ours)
        assert metrics.avg_reward == pytest.approx(ours[1])
        seen.add(tuple(ours.values()))
    assert all(1 > each[0] > each[3] > 0 for each in seen), "a mixture, of which every k says something else"


def test_what_broke_on_our_side_is_not_tau2s_failure(played, tmp_path):
    """A task lost one trial: tau2 goes as far as the trials that all tasks have, and agrees that far."""
    from tau2.metrics.agent_metrics import compute_metrics

    broken = [
        dataclasses.replace(t, stop=Stop.USER_ERROR, evaluation=None)
        if t.task.id == played[0].task.id and t.sample == 1
        else t
        for t in played
    ]
    results, pairs = loaded(tmp_path, broken)["airline"]
    assert sorted(n for n, _ in pairs) == [3, 4] and len(results.simulations) == 7
    hats = compute_metrics(results).pass_hat_ks
    assert hats == pytest.approx({k: mean_over_tasks(pairs, pass_hat_k, k) for k in (1, 2, 3)})
    all_broken = [dataclasses.replace(t, stop=Stop.ENV_ERROR, evaluation=None) for t in played]
    assert tau2_results.write(tmp_path / "none", all_broken, CFG) == []


def test_verdicts_are_the_graders_and_can_be_given_again(played, tmp_path):
    """tau2's grader, on what was written: the same checks and rewards, but in telecom, where the customer acts."""
    from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation

    for domain, (results, _) in loaded(tmp_path, played).items():
        specs = {task.id: task for task in results.tasks}
        graded = set()
        for sim in results.simulations:
            spec, info = specs[sim.task_id], sim.reward_info
            product = 1.0
            for part in info.reward_breakdown.values():
                product *= part
            assert info.reward == product and set(info.reward_breakdown) == set(spec.evaluation_criteria.reward_basis)
            assert [check.action for check in info.action_checks] == (spec.evaluation_criteria.actions or [])
            if domain == "telecom" or (sim.task_id, sim.reward_info.reward) in graded:
                continue
            graded.add((sim.task_id, sim.reward_info.reward))
            again = evaluate_simulation(
                simulation=copy.deepcopy(sim),
                task=copy.deepcopy(spec),
                evaluation_type=EvaluationType.ALL,
                solo_mode=False,
                domain=domain,
            )
            assert again.reward == info.reward and again.reward_breakdown == info.reward_breakdown
            assert again.db_check == info.db_check and (again.action_checks or []) == info.action_checks
            assert [c.met for c in again.communicate_checks or ()] == [c.met for c in info.communicate_checks]
        assert domain == "telecom" or len(graded) >= 3


def test_the_parts_of_a_reward_are_not_at_odds_with_it(played):
    solved, failed = (next(t for t in played if t.success == wanted) for wanted in (True, False))
    (spec,) = tau2_results.results(solved.task.domain, [solved], CFG).tasks
    strict = dataclasses.replace(
        solved.evaluation, checks=tuple(dataclasses.replace(c, passed=False) for c in solved.evaluation.checks)
    )
    info = tau2_results.reward_info(dataclasses.replace(solved, evaluation=strict), spec)
    assert info.reward == 1.0 and set(info.reward_breakdown.values()) == {1.0} and not info.db_check.db_match
    (spec,) = tau2_results.results(failed.task.domain, [failed], CFG).tasks
    assert 0.0 in tau2_results.reward_info(failed, spec).reward_breakdown.values()


def test_it_says_who_played(played, tmp_path):
    results, _ = loaded(tmp_path, played)["retail"]
    info = results.info
    assert info.agent_info.llm == "m" and info.user_info.llm == "gpt-x" and info.num_trials == 4 and info.seed == 5
    assert info.user_info.llm_args == {"temperature": CFG.user_temperature}
    cut = dataclasses.replace(CFG, user_max_tokens=9)
    assert tau2_results.results("retail", [], cut).info.user_info.llm_args["max_tokens"] == 9
    assert info.git_commit in (Path(__file__).parent.parent / "requirements-gpu.txt").read_text()
    assert info.environment_info.domain_name == "retail" and "retail" in info.environment_info.policy.lower()
    assert {(sim.task_id, sim.trial) for sim in results.simulations} == {
        (t.task.id, t.sample) for t in played if t.task.domain == "retail"
    }
    assert len({sim.id for sim in results.simulations}) == 12 and len(results.tasks) == 3


def test_it_has_the_policy_that_was_played(played, tmp_path):
    mine = tmp_path / "mine.md"
    mine.write_text("Be brief.")
    of_retail = [t for t in played if t.task.domain == "retail"][:1]
    cfg = dataclasses.replace(CFG, domains=("retail",), policy=(str(mine),))
    assert tau2_results.results("retail", of_retail, cfg).info.environment_info.policy == "Be brief."


def test_every_kind_of_reply_has_its_place(world):
    """Malformed replies and our answers are nobody's, results belong to their calls."""
    from tau2.metrics.agent_metrics import is_successful

    task = world.tasks("retail", "test")[0]
    call = Call("get_user_details", {"user_id": "u"})
    messages = [
        Message("assistant", "Hi! How can I help you today?"),
        Message("user", "Hello"),
        Message("assistant", "<tool_call>{", ()),
        Message("tool", "Error: not JSON"),
        Message("assistant", "I look twice", (call, call)),
        Message("tool", "Error: User not found"),
        Message("tool", "found"),
        Message("assistant", ""),
    ]
    turns = [Turn(0, 1, 0, "not JSON"), Turn(1, 2, 0), Turn(2, 3, 0)]
    for stop in (stop for stop in Stop if not stop.ours):
        t = Trajectory(task, 2, messages=messages, turns=turns, stop=stop, evaluation=Evaluation(0.0), seconds={"a": 2})
        sim = tau2_results.results("retail", [t], CFG).simulations[0]
        assert (sim.termination_reason.value in ("user_stop", "agent_stop")) == (
            stop in (Stop.USER_STOP, Stop.TRANSFER, Stop.AGENT_STOP)
        )
        assert not is_successful(sim.reward_info.reward) and sim.reward_info.info == {"ended by": stop.value}
    roles = " ".join(message.role for message in sim.messages)
    assert roles == "assistant user system system assistant tool tool assistant"
    assert "<tool_call>{" in sim.messages[2].content and "not JSON" in sim.messages[3].content
    asked, first, second, end = sim.messages[4:]
    assert asked.content == "I look twice", "beside the calls, as in tau2"
    assert [c.id for c in asked.tool_calls] == [first.id, second.id] and first.id != second.id
    assert first.error and not second.error and second.content == "found" and sim.duration == 2
    assert end.content is None and end.tool_calls is None
    assert [m.turn_idx for m in sim.messages] == list(range(8)) and not any(m.timestamp for m in sim.messages)


def test_eval_writes_it_and_tau2s_viewer_shows_it(world, tmp_path):
    out = tmp_path / "out"
    flags = f"--agent gold --env tau2 --domains retail,telecom --tasks 1 --num-trials 2 --out {out}"
    assert run_script("eval.py", script.main, flags.split()) == 0
    assert sorted(path.name for path in (out / "tau2").iterdir()) == ["retail.json", "telecom.json"]
    rows = {row["domain"]: row for row in json.loads((out / "results.json").read_text())}
    assert rows["retail"]["user_model"] == "" and rows["all"]["pass^2"] == 1.0
    pytest.importorskip("gymnasium", reason="tau2's command line imports its gym")
    # Choose the first file, its metrics, its first conversation with no note on it, and leave.
    answers = "1\n1\n2\n3\n1\n\n5\n"
    command = [sys.executable, "-m", "tau2.cli", "view", "--dir", str(out / "tau2")]
    done = subprocess.run(command, input=answers, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = done.stdout
    assert "Loaded 2 simulations from retail.json" in shown and "k=2: 1.000" in shown and "Error" not in shown
    assert "###STOP###" in shown and "find_user_id_by_name_zip" in shown
