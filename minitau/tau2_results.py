"""An evaluation in tau2-bench's own results format, a file a domain: its metrics and its viewer read them.

    tau2 view --dir RUN/tau2
    python -m tau2.metrics.agent_metrics --results RUN/tau2/retail.json

What tau2 computes from them and what eval.py prints is the same, with these bounds:

* Episodes that broke on our side are left out: tau2 would count them as failures. It gives pass^k up to the
  smallest number of trials that a task has; eval.py goes on, over the tasks that have k. Its average reward is over
  episodes, pass@1 over tasks: they differ where tasks differ in trials.
* The conversation is what the agent saw. In telecom the customer's calls of its own tools, and what they
  answered, are not in it, so telecom's conversations cannot be graded again from these files; those of the other
  domains can, unless the calculator was asked for a power that would take it hours. The verdict in `reward_info` was
  given by tau2's grader when the episode ended.
* Replies that could not be parsed, and our answers to them, stand as system messages: neither the customer nor
  tau2's environment ever got them.
* Costs and times of messages are not known, and absent.

tau2 is imported only when something is written. This file knows nothing of policies or training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitau import config
from minitau.envs.tau2.domain import open_domain, read_policies
from minitau.envs.tau2.install import COMMIT
from minitau.envs.tau2.world import MAX_ERRORS
from minitau.episode import Message, Stop, Trajectory
from minitau.files import written_whole

# tau2 knows fewer reasons to end. It scores the first two, and gives 0 to any other.
REASONS = {
    Stop.USER_STOP: "user_stop",
    Stop.TRANSFER: "user_stop",
    Stop.AGENT_STOP: "agent_stop",
    Stop.MAX_TURNS: "max_steps",
    Stop.MAX_TOKENS: "max_steps",
    Stop.BAD_CALLS: "too_many_errors",
}


def write(folder: Path, played: Sequence[Trajectory], cfg: config.Evaluation) -> list[Path]:
    """Write FOLDER/DOMAIN.json for each domain in which an episode has a verdict; the files, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for domain in sorted({t.task.domain for t in played if not t.stop.ours}):
        of_domain = sorted((t for t in played if t.task.domain == domain), key=lambda t: (t.task.id, t.sample))
        path = folder / f"{domain}.json"
        with written_whole(path) as scratch:
            scratch.write_text(results(domain, of_domain, cfg).model_dump_json(indent=1), encoding="utf-8")
        paths.append(path)
    return paths


def results(domain: str, played: Sequence[Trajectory], cfg: config.Evaluation) -> Any:
    """tau2's Results of one domain's episodes."""
    from tau2.data_model import simulation

    wanted = {t.task.id for t in played}
    specs = {id: spec for id, spec in open_domain(domain).specs.items() if id in wanted}
    environment = open_domain(domain).environment().get_info()
    environment.policy = read_policies(cfg.policy, cfg.domains).get(domain, environment.policy)
    by_policy = cfg.agent == "policy"
    agent = simulation.AgentInfo(
        implementation=f"minitau {cfg.agent}",
        llm=cfg.model or None,
        llm_args={"temperature": cfg.temperature} if by_policy else None,
    )
    simulated = by_policy and cfg.user_model != config.SCRIPTED
    asked: dict[str, Any] = {"temperature": cfg.user_temperature}
    if cfg.user_max_tokens:
        asked["max_tokens"] = cfg.user_max_tokens
    user = simulation.UserInfo(
        implementation="user_simulator" if simulated else "minitau script",
        llm=cfg.user_model if simulated else None,
        llm_args=asked if simulated else None,
    )
    return simulation.Results(
        info=simulation.Info(
            git_commit=COMMIT,
            num_trials=cfg.num_trials,
            max_steps=cfg.max_steps,
            max_errors=MAX_ERRORS,
            user_info=user,
            agent_info=agent,
            environment_info=environment,
            seed=cfg.seed,
        ),
        tasks=list(specs.values()),
        simulations=[run(t, specs[t.task.id], cfg.seed) for t in played if not t.stop.ours],
    )


def run(t: Trajectory, spec: Any, seed: int) -> Any:
    """tau2's SimulationRun of an episode with a verdict."""
    from tau2.data_model.simulation import SimulationRun

    return SimulationRun(
        id=f"{t.task.key}/{t.sample}",
        task_id=t.task.id,
        start_time="",  # when it was played is not kept, only how long it took
        end_time="",
        duration=sum(t.seconds.values()),
        termination_reason=REASONS[t.stop],
        reward_info=reward_info(t, spec),
        messages=messages(t),
        trial=t.sample,
        seed=seed,
    )


def messages(t: Trajectory) -> list[Any]:
    """The conversation as the agent saw it, in tau2's records."""
    from tau2.data_model import message as tau2

    errors = {i: t.turns[turn].error for i, turn in t.turn_of().items() if t.turns[turn].error}
    written: list[Any] = []
    open_calls: list[str] = []  # ids of calls whose results come next

    def system(text: str) -> Any:
        return tau2.SystemMessage(role="system", content=text, turn_idx=i, timestamp=None)

    for i, each in enumerate(t.messages):
        at = {"role": each.role, "turn_idx": i, "timestamp": None}
        if each.role == "user":
            written.append(tau2.UserMessage(content=each.content, **at))
        elif each.role == "tool" and open_calls:
            error = each.content.startswith("Error")
            written.append(tau2.ToolMessage(id=open_calls.pop(0), content=each.content, error=error, **at))
        elif each.role == "tool":
            written.append(system(f"Answered: {each.content}"))
        elif i in errors:
            written.append(system(f"The agent wrote what could not be parsed: {each.content}"))
        else:
            calls = tool_calls(each, i)
            open_calls = [call.id for call in calls]
            written.append(tau2.AssistantMessage(content=each.content or None, tool_calls=calls or None, **at))
    return written


def tool_calls(message: Message, i: int) -> list[Any]:
    from tau2.data_model.message import ToolCall

    return [
        ToolCall(id=f"call_{i}_{j}", name=call.name, arguments=call.arguments, requestor="assistant")
        for j, call in enumerate(message.calls)
    ]


def reward_info(t: Trajectory, spec: Any) -> Any:
    """The verdict, in tau2's record: our checks come in the order of the task's own criteria.

    An episode that was cut short has no checks. The reward is the product of its parts, each 0 or 1; a part is 1
    if all of its checks passed, or the whole is 1: a check may be stricter than the grader.
    """
    from tau2.data_model import simulation

    passed = {kind: [c.passed for c in t.evaluation.checks if c.kind == kind] for kind in ("action", "env", "db")}
    said = [c for c in t.evaluation.checks if c.kind == "communicate"]
    criteria = spec.evaluation_criteria
    actions = paired(criteria and criteria.actions, passed["action"])
    assertions = paired(criteria and criteria.env_assertions, passed["env"])
    parts = {"ACTION": passed["action"], "ENV_ASSERTION": passed["env"], "DB": passed["db"]}
    parts["COMMUNICATE"] = [c.passed for c in said]
    basis = criteria.reward_basis if criteria else None
    breakdown = {
        kind: float(t.success or all(parts.get(kind.value, ()))) for kind in basis or () if t.evaluation.checks
    }
    return simulation.RewardInfo(
        reward=t.reward,
        db_check=simulation.DBCheck(db_match=passed["db"][0], db_reward=float(passed["db"][0]))
        if passed["db"]
        else None,
        env_assertions=[
            simulation.EnvAssertionCheck(env_assertion=each, met=ok, reward=float(ok)) for each, ok in assertions
        ],
        action_checks=[
            simulation.ActionCheck(action=each, action_match=ok, action_reward=float(ok)) for each, ok in actions
        ],
        communicate_checks=[simulation.CommunicateCheck(info=c.name, met=c.passed, justification="") for c in said],
        reward_basis=basis,
        reward_breakdown=breakdown,
        info={"ended by": t.stop.value} | ({"note": t.evaluation.note} if t.evaluation.note else {}),
    )


def paired(criteria: Sequence[Any] | None, passed: Sequence[bool]) -> list[tuple[Any, bool]]:
    """Criteria with their outcomes; none if the grader did not look at each of them."""
    return list(zip(criteria or (), passed)) if len(criteria or ()) == len(passed) else []
