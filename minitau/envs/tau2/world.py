"""The World of tau2-bench, and its Env: one episode, with the official tools and the official grader.

An episode runs in its caller's thread and blocks while the customer's model answers.
"""

from __future__ import annotations

import ast
import copy
import itertools
import operator
import os
import zlib
from collections.abc import Mapping
from typing import Any

from minitau import episode
from minitau.envs.tau2.customer import Customer, certificates, how_it_ends, without_price
from minitau.envs.tau2.domain import find, open_domain, start
from minitau.envs.tau2.install import check_tools, line, load
from minitau.envs.tau2.scripts import Reader, gold_lines, script
from minitau.episode import Action, BadInput, Call, Check, EnvError, Message, Observation, Stop, Task

SCRIPTED = "script"  # the user_model that is none: the gold script's customer
# tau2's grader scores these ends, and gives 0 to any other.
ENDS = {Stop.USER_STOP: "user_stop", Stop.TRANSFER: "user_stop", Stop.AGENT_STOP: "agent_stop"}
MAX_ERRORS = 10  # failed calls of both sides that end an episode, as tau2 has it
HUGE = 100_000  # bits: a larger power would keep tau2's calculator, and all other episodes with it, too long
ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class Tau2:
    """The World of tau2-bench: domains airline, retail, telecom and mock.

    user_model        what plays the customer, as litellm names it ("openai/my-model", "gpt-4.1"), or "script":
                      no model, but the customer of the gold script; needed for `env`, not for `tasks` and
                      `demonstrate`
    user_api_base     an OpenAI-compatible endpoint, if it is not the provider's own; or several, with commas between:
                      episodes take them in turn, and keep to one, which then has the conversation cached
    user_temperature  of the customer: keep it the same in runs that are compared
    user_max_tokens   of one reply at most; 0 for whatever its server allows
    user_timeout      seconds one request may take
    user_retries      how often a failed request is made again, after growing pauses
    max_steps         of an episode, as tau2's orchestrator counts them; `demonstrate` has no limit
    max_tool_chars    cut what the agent reads of a tool's output; the grader always gets all of it
    policies          domain -> text that replaces its policy, inside tau2's own instructions

    litellm reads API keys from the environment; they are neither kept nor logged here.
    Raises Tau2Error if the supported tau2-bench cannot be loaded.
    """

    def __init__(
        self,
        *,
        user_model: str | None = None,
        user_api_base: str | None = None,
        user_temperature: float = 0.0,
        user_max_tokens: int = 0,
        user_timeout: float = 60,
        user_retries: int = 3,
        max_steps: int = 100,
        max_tool_chars: int | None = None,
        policies: Mapping[str, str] | None = None,
    ):
        load()  # slow, and better here, once, than in the first episode of every thread
        if user_model and user_model != SCRIPTED:
            check_tools()
            certificates()
            without_price(user_model)
        self.user_model, self.user_retries = user_model, user_retries
        self.max_steps, self.max_tool_chars = max_steps, max_tool_chars
        self.policies = dict(policies or {})
        # No retries of litellm's own: they multiply (7 requests for "3") and come without a pause.
        self.user_args: dict[str, Any] = {"temperature": user_temperature, "timeout": user_timeout}
        self.user_args["num_retries"] = 0
        if user_max_tokens:
            self.user_args["max_tokens"] = user_max_tokens
        self.user_api_bases = itertools.cycle(user_api_base.split(",") if user_api_base else [None])
        if user_api_base and str(user_model).startswith("openai/") and not os.environ.get("OPENAI_API_KEY"):
            self.user_args["api_key"] = "none"  # the client insists on one; a local server does not

    def tasks(self, domain: str, split: str) -> list[Task]:
        """The tasks of a split, in tau2's order: train, test, base; telecom also has small and full;
        mock only base. Raises BadInput on another name, Tau2Error if the domain's files are bad."""
        splits = open_domain(domain).splits
        if split not in splits:
            raise BadInput(f"unknown split {split!r}: {domain} has {', '.join(splits)}")
        return [Task(domain, split, id) for id in splits[split]]

    def instructions(self, domain: str) -> str:
        """The agent's system message: tau2's own, with the domain's policy or its replacement."""
        agent = load().agent
        policy = self.policies.get(domain) or open_domain(domain).policy
        return agent.SYSTEM_PROMPT.format(agent_instruction=agent.AGENT_INSTRUCTION, domain_policy=policy)

    def env(self) -> Tau2Env:
        """One episode with the simulated customer. Raises BadInput without a user_model."""
        if not self.user_model:
            raise BadInput("Tau2 needs a user_model: the model that plays the customer")
        return Tau2Env(self)

    def player(self, task: Task, seed: str) -> Any:
        """Who plays the customer in an episode of `task`: tau2's simulator, or what has its two methods."""
        if self.user_model == SCRIPTED:
            return Reader(gold_lines(task))
        args = {**self.user_args, "seed": zlib.crc32(seed.encode()) & 0x7FFFFFFF}
        if address := next(self.user_api_bases):
            args["api_base"] = address
        scenario, tools = str(find(task).user_scenario), open_domain(task.domain).user_tools
        return load().simulator.UserSimulator(tools, scenario, self.user_model, args)

    def demonstrate(self, task: Task, agent: str, seed: str) -> episode.Demonstration:
        """Play `task` with a script, through the same Env and grader but without any model.

        gold      does the reference actions: looks up what they need, asks before a change (see gold.py)
        refuse    says at once that it cannot help
        transfer  hands the customer to a human at once

        The customer reads its scenario aloud, agrees, does as it is told and leaves. Scripts draw nothing,
        so `seed` changes nothing. Raises BadInput on another agent or an unknown task; EnvError.
        """
        actions, lines = script(task, agent)
        env = Tau2Env(self, Reader(lines), limited=False)
        opening, messages, stop = env.reset(task, seed), [], None
        for action in actions:
            seen = env.step(action)
            messages += [Message("assistant", action.text, action.calls), *seen.messages]
            stop = seen.stop
        return episode.Demonstration(task, opening, tuple(messages), env.evaluate(stop), stop)


class Tau2Env:
    """One episode: an Env. `player` takes the place of the world's own; demonstrations are not `limited`."""

    def __init__(self, world: Tau2, player: Reader | None = None, limited: bool = True):
        self._world, self._player, self._limited = world, player, limited
        self._record: list[Any] = []  # tau2's own messages, whole and raw, as the grader replays them

    def reset(self, task: Task, seed: str) -> episode.Opening:
        """Start `task`. Raises UserError, EnvError; BadInput if there is no such task."""
        tau2, world, domain = load(), self._world, open_domain(task.domain)
        find(task)  # here, where no such task is the caller's error
        self._task = task
        try:
            self._environment, history = start(task)
            self._record = history or [copy.deepcopy(tau2.orchestrator.DEFAULT_FIRST_AGENT_MESSAGE)]
            *before, said = self._record
            self._before = len(self._record)
            if said.role != "assistant" or said.is_tool_call():
                raise ValueError("its history does not end with the agent's words")
            player = self._player or world.player(task, seed)
            heard = [message for message in before if tau2.user.is_valid_user_history_message(message)]
            self._customer = Customer(player, heard, name=str(world.user_model), retries=world.user_retries)
        except Exception as error:
            raise EnvError(f"{task.key} does not start: {line(error)}") from error
        words = self._listen(said)
        return episode.Opening(
            world.instructions(task.domain),
            domain.tools,
            self._visible(self._record),
            self._customer.seconds,
            stop=self._over() or how_it_ends(words),
            answers_any_call=True,
        )

    def step(self, action: Action) -> Observation:
        """Speak to the customer, call tools, or end. Text beside calls does not reach the customer, but tau2's grader
        reads it for what should be communicated. Raises UserError, EnvError."""
        message = load().message
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
                said = message.AssistantMessage(role="assistant", content=action.text or None, tool_calls=safe)
                self._record += [said, *results]
            answers = {call.id: result for call, result in zip(safe, results)}
            refused = Message("tool", "Error: the calculator does not take powers of that size")
            return Observation(
                tuple(self._visible([answers[call.id]])[0] if call.id in answers else refused for call in calls),
                self._over(),
            )
        if not action.text.strip():
            raise EnvError("an action must speak, call a tool, or end")
        self._record.append(message.AssistantMessage(role="assistant", content=action.text))
        before = self._customer.seconds
        words = self._listen(self._record[-1])
        heard = (Message("user", words),) if words else ()
        return Observation(heard, self._over() or how_it_ends(words), self._customer.seconds - before)

    def evaluate(self, stop: Stop) -> episode.Evaluation:
        """The official grader's verdict, from a replay of the whole episode; it calls no model.

        Some checks do not count for the reward: each task names the kinds it is graded on. Do not
        shape on `db` in telecom: most reference solutions fail it. The checks of actions are
        stricter than the grader's where a call failed. An episode that was cut short
        has reward 0 and no checks. One that cannot be replayed has reward 0 and a note: a bill in
        telecom can get a random number. Raises EnvError if the grader cannot read its files.
        """
        tau2, task = load(), self._task
        try:
            run = tau2.simulation.SimulationRun(
                id=task.key, task_id=task.id, start_time="", end_time="", duration=0.0,
                termination_reason=ENDS.get(stop, "max_steps"), messages=self._record,
            )  # fmt: skip
            verdict = tau2.evaluator.evaluate_simulation(
                simulation=run,
                task=copy.deepcopy(find(task)),
                evaluation_type=tau2.evaluator.EvaluationType.ALL,
                solo_mode=False,
                domain=open_domain(task.domain).constructor,  # all that it does with the name is to ask for this
            )
        except OSError as error:
            raise EnvError(f"the grader failed: {line(error)}") from error
        except Exception as error:
            return episode.Evaluation(0.0, (), f"the grader failed: {line(error)}")
        checks = (
            *(Check("action", seen.action.name, self._done(seen)) for seen in verdict.action_checks or ()),
            *(Check("communicate", seen.info, seen.met) for seen in verdict.communicate_checks or ()),
            *(Check("env", seen.env_assertion.func_name, seen.met) for seen in verdict.env_assertions or ()),
            *((Check("db", "database", verdict.db_check.db_match),) if verdict.db_check else ()),
        )
        return episode.Evaluation(float(verdict.reward), checks)

    def _done(self, seen: Any) -> bool:
        """Whether a reference action was really done. To the grader a call without arguments is any call of that
        name, even one that failed; here a call that failed must at least be the reference's own."""
        calls = [
            (call, result)
            for at, message in enumerate(self._record, 1)
            if message.role != "tool" and message.tool_calls
            for call, result in zip(message.tool_calls, self._record[at:])
        ]
        return seen.action_match and any(
            seen.action.compare_with_tool_call(call) and (not result.error or call.arguments == seen.action.arguments)
            for call, result in calls
        )

    def _run(self, calls: list[Any]) -> list[Any]:
        """Run tool calls of either side. A tool may keep or change its arguments: it gets a copy."""
        try:
            results = [self._environment.get_response(call.model_copy(deep=True)) for call in calls]
            self._environment.sync_tools()  # as tau2 does once a turn, also after a call that failed
        except Exception as error:
            raise EnvError(f"{calls[0].name} failed: {line(error)}") from error
        return results

    def _listen(self, heard: Any) -> str:
        """What the customer says next; nothing if the episode is over. It may first use its own tools, which the
        agent never sees."""
        while not self._over():
            said = self._customer.answer(heard)
            self._record.append(said)
            if not said.is_tool_call():
                return said.content
            results = self._run(said.tool_calls)
            self._record += results
            heard = load().message.MultiToolMessage(role="tool", tool_messages=results)
        return ""

    def _over(self) -> Stop | None:
        """How tau2's orchestrator would end the episode here, if it would. It counts every message, results that come
        together as one, and failed calls, of both sides."""
        if not self._limited:
            return None
        new = list(itertools.pairwise(self._record[self._before - 1 :]))
        if sum(message.role == "tool" and message.error for _, message in new) >= MAX_ERRORS:
            return Stop.BAD_CALLS
        steps = sum(message.role != "tool" or last.role != "tool" for last, message in new)
        return Stop.MAX_TURNS if steps >= self._world.max_steps else None

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


def _freezes(call: Any) -> bool:
    """Whether a call asks the calculator, which evaluates what it is given, for something like 9**9**9: hours."""
    expression = str(call.arguments.get("expression")).strip()
    if call.name != "calculate" or "**" not in expression:
        return False
    try:
        _evaluated(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError):
        return False  # the calculator finds the same, as soon
    except Exception:  # something huge, or who knows what
        return True
    return False


class _Huge(Exception):
    """A number of more than HUGE bits."""


def _evaluated(node: ast.expr) -> Any:
    """The number that the calculator would make of it. Raises _Huge instead of making a huge one, and ValueError for
    what is no arithmetic: it can call a number, and evaluates the arguments first."""
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.UnaryOp():
            return ARITHMETIC[type(node.op)](_evaluated(node.operand))
        case ast.BinOp(op=ast.Pow()):
            base, exponent = _evaluated(node.left), _evaluated(node.right)
            whole = isinstance(base, int) and isinstance(exponent, int) and abs(base) > 1
            if whole and base.bit_length() * exponent > HUGE:
                raise _Huge
            return base**exponent
        case ast.BinOp():
            return ARITHMETIC[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError
