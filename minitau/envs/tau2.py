"""The tau2-bench domains: the official environment, user simulator and grader behind our protocols.

An episode runs in its caller's thread and blocks while the customer's model answers. This file
knows nothing of tokens, policies, rollouts or training, and works with one commit of tau2-bench
only. tau2 is imported when a `Tau2` is made, so that everything else runs without it.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import re
import threading
import time
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minitau import episode
from minitau.episode import Action, BadInput, Call, Check, EnvError, Message, Observation, Stop, Task, UserError

COMMIT = "337326e62d8e0ca74c353b004a9c5d748e0ba914"
SOURCE = "https://github.com/sierra-research/tau2-bench"
INSTALL = (
    f'pip install "tau2 @ git+{SOURCE}@{COMMIT}" and set TAU2_DATA_DIR to the data folder of a clone of '
    "that commit; or, with the clone alone, set PYTHONPATH=<clone>/src and TAU2_DATA_DIR=<clone>/data"
)
DOMAINS = ("airline", "retail", "telecom", "mock")
# tau2's grader scores these ends, and gives 0 to any other.
ENDS = {Stop.USER_STOP: "user_stop", Stop.TRANSFER: "user_stop", Stop.AGENT_STOP: "agent_stop"}
# tau2's calculator would hold the interpreter, and so all other episodes, for hours over 9**9**9.
# It gets one power at most, with a plain exponent below 100.
HUGE_POWER = re.compile(r"\*\*.*\*\*|\*\*(?!\s*\d{1,2}(?!\d))", re.DOTALL)

_load_lock = threading.Lock()  # one thread reads a domain's files, the others wait for it
# Building and grading are pure Python on two or three copies of a database: side by side they would
# be no faster, only hold more memory.
_database_lock = threading.Lock()


class Tau2Error(BadInput):
    """tau2-bench is missing, is something else, or has no data: one line that says what to do."""


class Tau2:
    """The World of tau2-bench: domains airline, retail, telecom and mock.

    user_model        what plays the customer, as litellm names it ("openai/my-model", "gpt-4.1");
                      needed for `env`, not for `tasks` and `demonstrate`
    user_api_base     an OpenAI-compatible endpoint, if it is not the provider's own
    user_temperature  of the customer: keep it the same in runs that are compared
    user_timeout      seconds one request may take
    user_retries      how often a failed request is made again, after growing pauses
    max_user_calls    calls of its own tools the customer may make before it speaks (telecom)
    max_tool_chars    cut what the agent reads of a tool's output; the grader always gets all of it

    litellm reads API keys from the environment; they are neither kept nor logged here.
    Raises Tau2Error if the supported tau2-bench cannot be loaded.
    """

    def __init__(
        self,
        *,
        user_model: str | None = None,
        user_api_base: str | None = None,
        user_temperature: float = 0.0,
        user_timeout: float = 60,
        user_retries: int = 3,
        max_user_calls: int = 30,
        max_tool_chars: int | None = None,
    ):
        _tau2()  # slow, and better here, once, than in the first episode of every thread
        if user_model:
            _check_tools()
        self.user_model, self.user_retries = user_model, user_retries
        self.max_user_calls, self.max_tool_chars = max_user_calls, max_tool_chars
        # No retries of litellm's own: they multiply (7 requests for "3") and come without a pause.
        self.user_args: dict[str, Any] = {"temperature": user_temperature, "timeout": user_timeout}
        self.user_args["num_retries"] = 0
        if user_api_base:
            self.user_args["api_base"] = user_api_base
            if str(user_model).startswith("openai/") and not os.environ.get("OPENAI_API_KEY"):
                self.user_args["api_key"] = "none"  # the client insists on one; a local server does not

    def tasks(self, domain: str, split: str) -> list[Task]:
        """The tasks of a split, in tau2's order: train, test, base; telecom also has small and full;
        mock only base. Raises BadInput on another name, Tau2Error if the domain's files are bad."""
        splits = _domain(domain).splits
        if split not in splits:
            raise BadInput(f"unknown split {split!r}: {domain} has {', '.join(splits)}")
        return [Task(domain, split, id) for id in splits[split]]

    def env(self) -> Tau2Env:
        """One episode with the simulated customer. Raises BadInput without a user_model."""
        if not self.user_model:
            raise BadInput("Tau2 needs a user_model: the model that plays the customer")
        return Tau2Env(self)

    def demonstrate(self, task: Task, agent: str, seed: str) -> episode.Demonstration:
        """Play `task` with a script, through the same Env and grader but without any model.

        gold      does the reference actions, has the customer do its own, says what must be said
        refuse    says at once that it cannot help
        transfer  hands the customer to a human at once

        The customer reads its scenario aloud, does as it is told and leaves. Scripts draw nothing,
        so `seed` changes nothing. Raises BadInput on another agent or an unknown task; EnvError.
        """
        actions, lines = _script(task, agent)
        env = Tau2Env(self, _Reader(lines))
        opening, messages, stop = env.reset(task, seed), [], None
        for action in actions:
            seen = env.step(action)
            messages += [Message("assistant", action.text, action.calls), *seen.messages]
            stop = seen.stop
        return episode.Demonstration(task, opening, tuple(messages), env.evaluate(stop), stop)


class Tau2Env:
    """One episode: an Env. `customer` takes the place of the simulated one in demonstrations."""

    def __init__(self, world: Tau2, customer: _Reader | None = None):
        self._world = world
        self._customer = customer
        self._record: list[Any] = []  # tau2's own messages, whole and raw, as the grader replays them

    def reset(self, task: Task, seed: str) -> episode.Opening:
        """Start `task`. Raises UserError, EnvError; BadInput if there is no such task."""
        tau2, domain, spec = _tau2(), _domain(task.domain), _find(task)
        self._task = task
        try:
            self._environment, history = _start(task)
            self._record = history or [copy.deepcopy(tau2.orchestrator.DEFAULT_FIRST_AGENT_MESSAGE)]
            *before, said = self._record
            if said.role != "assistant" or said.is_tool_call():
                raise ValueError("its history does not end with the agent's words")
            if self._customer is None:
                tools = self._environment.get_user_tools() if self._environment.user_tools else None
                args = {**self._world.user_args, "seed": zlib.crc32(seed.encode()) & 0x7FFFFFFF}
                self._customer = tau2.simulator.UserSimulator(
                    tools, str(spec.user_scenario), self._world.user_model, args
                )
            heard = [message for message in before if tau2.user.is_valid_user_history_message(message)]
            self._state = self._customer.get_init_state(heard)
        except Exception as error:
            raise EnvError(f"{task.key} does not start: {_line(error)}") from error
        if _stop(self._listen(said)):
            raise UserError("the customer left before the agent spoke")
        return episode.Opening(domain.policy, domain.tools, self._visible(self._record))

    def step(self, action: Action) -> Observation:
        """Speak to the customer, call tools, or end. Text beside calls is a thought: tau2 allows
        one or the other, so it is not recorded. Raises UserError, EnvError."""
        message = _tau2().message
        if action.done:
            return Observation(stop=Stop.AGENT_STOP)
        if action.calls:
            # The requestor is ours to say: a call marked "user" would run the customer's own tools.
            calls = [
                message.ToolCall(
                    id=f"call_{len(self._record)}_{i}",
                    name=call.name,
                    arguments=copy.deepcopy(call.arguments),
                    requestor="assistant",
                )
                for i, call in enumerate(action.calls)
            ]
            # The grader replays what is recorded, so a call that would freeze it is answered apart. It
            # reads and changes nothing: to the verdict it is as if it had not been made.
            safe = [call for call in calls if not _freezes(call)]
            results = self._run(safe) if safe else []
            if safe:
                self._record += [message.AssistantMessage(role="assistant", tool_calls=safe), *results]
            answers = {call.id: result for call, result in zip(safe, results)}
            refused = Message("tool", "Error: the calculator does not take powers of that size")
            return Observation(
                tuple(self._visible([answers[call.id]])[0] if call.id in answers else refused for call in calls)
            )
        if not action.text.strip():
            raise EnvError("an action must speak, call a tool, or end")
        self._record.append(message.AssistantMessage(role="assistant", content=action.text))
        words = self._listen(self._record[-1])
        return Observation((Message("user", words),), _stop(words))

    def evaluate(self, stop: Stop) -> episode.Evaluation:
        """The official grader's verdict, from a replay of the whole episode; it calls no model.

        Some checks do not count for the reward: each task names the kinds it is graded on. Do not
        shape on `db` in telecom: most reference solutions fail it. An episode that was cut short
        has reward 0 and no checks. One that cannot be replayed has reward 0 and a note: a bill in
        telecom can get a random number. Raises EnvError if the grader cannot read its files.
        """
        tau2, task = _tau2(), self._task
        try:
            run = tau2.simulation.SimulationRun(
                id=task.key, task_id=task.id, start_time="", end_time="", duration=0.0,
                termination_reason=ENDS.get(stop, "max_steps"), messages=self._record,
            )  # fmt: skip
            with _database_lock:
                verdict = tau2.evaluator.evaluate_simulation(
                    simulation=run,
                    task=copy.deepcopy(_find(task)),
                    evaluation_type=tau2.evaluator.EvaluationType.ALL,
                    solo_mode=False,
                    domain=task.domain,
                )
        except OSError as error:
            raise EnvError(f"the grader failed: {_line(error)}") from error
        except Exception as error:
            return episode.Evaluation(0.0, (), f"the grader failed: {_line(error)}")
        checks = (
            *(Check("action", seen.action.name, seen.action_match) for seen in verdict.action_checks or ()),
            *(Check("communicate", seen.info, seen.met) for seen in verdict.communicate_checks or ()),
            *(Check("env", seen.env_assertion.func_name, seen.met) for seen in verdict.env_assertions or ()),
            *((Check("db", "database", verdict.db_check.db_match),) if verdict.db_check else ()),
        )
        return episode.Evaluation(float(verdict.reward), checks)

    def _run(self, calls: list[Any]) -> list[Any]:
        """Run tool calls of either side. A tool may keep or change its arguments: it gets a copy."""
        try:
            results = [self._environment.get_response(call.model_copy(deep=True)) for call in calls]
            self._environment.sync_tools()  # as tau2 does once a turn, also after a call that failed
        except Exception as error:
            raise EnvError(f"{calls[0].name} failed: {_line(error)}") from error
        return results

    def _listen(self, heard: Any) -> str:
        """What the customer says next. It may first use its own tools, which the agent never sees."""
        calls = 0
        while True:
            said = self._ask(heard)
            self._record.append(said)
            if not said.is_tool_call():
                return said.content
            calls += len(said.tool_calls)
            if calls > self._world.max_user_calls:
                raise UserError(f"the customer made {calls} calls of its own tools without a word")
            results = self._run(said.tool_calls)
            self._record += results
            heard = _tau2().message.MultiToolMessage(role="tool", tool_messages=results)

    def _ask(self, heard: Any) -> Any:
        """One message of the customer's. A provider's error is told by its name and status alone, as
        its text may repeat a key or an address. Raises UserError after the last attempt."""
        known = len(self._state.messages)
        for attempt in range(self._world.user_retries + 1):
            if attempt:
                time.sleep(min(0.25 * 2**attempt, 10.0))
            try:
                said, self._state = self._customer.generate_next_message(heard, self._state)
                if said.is_tool_call() or said.has_text_content():
                    return said
                reason = "its message was empty"
            except Exception as error:
                status = getattr(error, "status_code", None)
                reason = f"{type(error).__name__} (status {status})" if status else _line(error)
                if status and 400 <= status < 500 and status not in (408, 409, 429):
                    break  # asking again cannot help: no key, no such model, too long
            del self._state.messages[known:]  # tau2 has noted the question, and will do so again
        raise UserError(f"the customer, {self._world.user_model}, did not answer: {reason}")

    def _visible(self, record: list[Any]) -> tuple[Message, ...]:
        """tau2's messages as the agent sees them: without the customer's own calls and their results."""
        seen, limit = [], self._world.max_tool_chars
        for message in record:
            text = message.content or ""
            if message.role == "tool" and message.requestor == "assistant":
                if limit is not None and len(text) > limit:
                    text = f"{text[:limit]} [{len(text) - limit} more characters]"
                seen.append(Message("tool", text))
            elif message.role == "assistant":
                calls = tuple(Call(call.name, call.arguments) for call in message.tool_calls or ())
                seen.append(Message("assistant", text, calls))
            elif message.role == "user" and not message.is_tool_call():
                seen.append(Message("user", text))
        return tuple(seen)


class _Reader:
    """A customer that reads its lines, and says what its own tools showed it. It has the two methods
    of tau2's user simulator that an episode calls."""

    def __init__(self, lines: list[dict[str, Any]]):
        self._lines = iter(lines)

    def get_init_state(self, heard: list[Any]) -> Any:
        return SimpleNamespace(messages=heard)

    def generate_next_message(self, heard: Any, state: Any) -> tuple[Any, Any]:
        if heard.role == "tool":
            line = {"content": f"I did that. It says: {heard.tool_messages[0].content}"}
        else:
            line = next(self._lines)
        return _tau2().message.UserMessage(role="user", **line), state


def _script(task: Task, agent: str) -> tuple[list[Action], list[dict[str, Any]]]:
    """What the agent does, turn by turn, and what the customer answers to its words."""
    spec, told = _find(task), _find(task).user_scenario.instructions
    plea = told if isinstance(told, str) else f"{told.reason_for_call}\n{told.known_info or ''}"
    lines: list[dict[str, Any]] = [{"content": plea}]
    transfer = Call("transfer_to_human_agents", {"summary": "This customer needs a human agent."})
    if agent == "refuse":
        return [Action("I am sorry, I cannot help you with that.")], [*lines, {"content": "###STOP###"}]
    if agent == "transfer":
        goodbye = Action("You are being transferred to a human agent.")
        return [Action(calls=(transfer,)), goodbye], [*lines, {"content": "###TRANSFER###"}]
    if agent != "gold":
        raise BadInput(f"unknown agent {agent!r}: tau2 has gold, refuse, transfer")

    actions, criteria = [], spec.evaluation_criteria
    rehearsal, _ = _start(task)
    for gold in copy.deepcopy(criteria.actions or []):
        call = _tau2().message.ToolCall(**gold.model_dump(include={"name", "arguments", "requestor"}))
        if rehearsal.get_response(call.model_copy(deep=True)).error:
            continue  # some references read what does not exist: nothing to learn from
        if gold.requestor == "user":
            actions.append(Action(f"Please do this on your side: {gold.get_func_format()}."))
            lines.append({"tool_calls": [call]})
        else:
            actions.append(Action(calls=(Call(gold.name, gold.arguments),)))
    facts = criteria.communicate_info or ()
    actions.append(Action("\n".join(["That is done.", *facts])))
    handed_over = transfer.name in [call.name for action in actions for call in action.calls]
    return actions, [*lines, {"content": "###TRANSFER###" if handed_over else "###STOP###"}]


def _freezes(call: Any) -> bool:
    return call.name == "calculate" and bool(HUGE_POWER.search(str(call.arguments.get("expression"))))


def _stop(words: str) -> Stop | None:
    """How the customer's words end the conversation, if they do."""
    user = _tau2().user
    if user.TRANSFER in words:
        return Stop.TRANSFER
    return Stop.USER_STOP if user.STOP in words or user.OUT_OF_SCOPE in words else None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _start(task: Task) -> tuple[Any, list[Any]]:
    """A new environment at the start of `task`, and the messages that came before it.

    To make databases cheaper, register another constructor with tau2: the grader asks it, too.
    """
    start = copy.deepcopy(_find(task).initial_state)
    data = actions = history = None
    if start:
        data, actions = start.initialization_data, start.initialization_actions
        history = start.message_history
    with _database_lock:
        environment = _tau2().registry.get_env_constructor(task.domain)()
        environment.set_state(data, actions, history or [])
    return environment, history or []


def _find(task: Task) -> Any:
    """tau2's own record of a task. It is shared: nobody changes it."""
    spec = _domain(task.domain).specs.get(task.id)
    if spec is None:
        raise BadInput(f"unknown task {task.id!r}: {task.domain} has no such id")
    return spec


def _domain(name: str) -> SimpleNamespace:
    """What all episodes of a domain share. Raises BadInput, Tau2Error."""
    if name not in DOMAINS:
        raise BadInput(f"unknown domain {name!r}: tau2 has {', '.join(DOMAINS)}")
    with _load_lock:
        return _read_domain(name)


@functools.cache
def _read_domain(name: str) -> SimpleNamespace:
    tau2 = _tau2()
    try:
        specs = {spec.id: spec for spec in tau2.registry.get_tasks_loader(name)(None)}
        load_splits = tau2.registry.get_task_splits_loader(name)  # None for mock
        splits = load_splits() if load_splits else {"base": list(specs)}
        environment = tau2.registry.get_env_constructor(name)()
    except (OSError, ValueError) as error:
        raise Tau2Error(f"tau2's data for {name} cannot be read: {_line(error)}") from error
    prompt, instruction = tau2.agent.SYSTEM_PROMPT, tau2.agent.AGENT_INSTRUCTION
    return SimpleNamespace(
        specs=specs,
        splits={split: [id for id in specs if id in ids] for split, ids in splits.items()},
        policy=prompt.format(agent_instruction=instruction, domain_policy=environment.get_policy()),
        tools=tuple(tool.openai_schema for tool in environment.get_tools()),
    )


@functools.cache
def _tau2() -> SimpleNamespace:
    """The modules of tau2 that we use, imported once. Raises Tau2Error."""
    root = _package()
    # Before the import: no price list from the network, and no line of log for every message.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
    try:
        from loguru import logger

        logger.disable("tau2")
        import litellm
        from tau2.agent import llm_agent
        from tau2.data_model import message, simulation
        from tau2.evaluator import evaluator
        from tau2.orchestrator import orchestrator
        from tau2.registry import registry
        from tau2.user import base, user_simulator
        from tau2.utils import DATA_DIR
    except ImportError as error:
        raise Tau2Error(f"tau2-bench at {root} lacks a module ({_line(error)}): {INSTALL}") from error
    litellm.suppress_debug_info = True
    if not (DATA_DIR / "tau2" / "user_simulator").is_dir():
        raise Tau2Error(f"tau2-bench has no data at {DATA_DIR}: set TAU2_DATA_DIR=<clone of {SOURCE}>/data")
    return SimpleNamespace(
        agent=llm_agent, message=message, simulation=simulation, evaluator=evaluator,
        orchestrator=orchestrator, registry=registry, user=base, simulator=user_simulator,
    )  # fmt: skip


def _check_tools() -> None:
    """Load what litellm would load with its first request that offers tools. Raises Tau2Error."""
    try:
        import litellm.responses.mcp.chat_completions_handler  # noqa: F401
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("litellm"):  # an older litellm has no such file, and no such need
            fix = 'litellm needs it to offer the customer tools: pip install "litellm[mcp]"'
            raise Tau2Error(f"the package {error.name} is missing; {fix}") from error


def _package() -> Path:
    """Where the supported tau2-bench lies, found without running any of it. Raises Tau2Error."""
    spec = importlib.util.find_spec("tau2")
    if spec is None:
        raise Tau2Error(f"tau2-bench is not installed: {INSTALL}")
    root = Path(next(iter(spec.submodule_search_locations or ()), None) or spec.origin)
    if not (root / "registry.py").is_file():
        raise Tau2Error(
            f"the package tau2 at {root} is not tau2-bench (the one on PyPI computes magnetic relaxation "
            f"rates): pip uninstall tau2, then {INSTALL}"
        )
    if not (root / "agent" / "base.py").is_file():  # a folder since 1.0
        raise Tau2Error(f"the tau2-bench at {root} is not the supported {COMMIT[:7]}: {INSTALL}")
    return root
