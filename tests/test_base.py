"""The base model: nothing of courier in what it reads, an agent that is always right, and a directory that loads."""

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from minitau.base import pretrain, words
from minitau.base.domains import draw_domain
from minitau.base.talk import YES, Talk, draw_conversation
from minitau.chat import call_text, load_chat
from minitau.envs.courier import words as courier
from minitau.envs.courier.tools import POLICY, TOOLS
from minitau.episode import BadInput
from minitau.pretrained import load_model
from minitau.sft import to_trajectory

BASE = Path(__file__).resolve().parent.parent / "models" / "base"
COURIER_IDS = courier.PHONES + courier.PINS + courier.PARCELS + courier.RECEIPTS + courier.LOCKERS
COURIER_WORDS = set(COURIER_IDS) | set(courier.DAYS) | set(courier.STREETS) | set(courier.NAMES) | set(TOOLS)
COURIER_SENTENCES = {
    sentence for policy in POLICY.values() for sentence in re.split(r"[.;:\n]\s*", policy) if sentence.count(" ") > 1
}


def conversations(n, held_out=False, seed="test"):
    return [draw_conversation(Random(f"{seed}:{i}"), held_out) for i in range(n)]


def text_of(talk):
    """All that a model would read of a conversation."""
    lines = [talk.opening.policy, json.dumps(talk.opening.tools)]
    for message in (*talk.opening.messages, *talk.messages):
        lines += [message.content, *map(call_text, message.calls)]
    return "\n".join(lines)


def leaks(text):
    """What of courier is in a text: its tools, ids, days, streets and names as words, and its policy's sentences."""
    found = COURIER_WORDS & set(re.findall(r"[A-Za-z]+|\d+", text.replace("_", " ")))
    found |= COURIER_WORDS & set(re.findall(r"\w+", text))
    return found | {sentence for sentence in COURIER_SENTENCES if sentence in text}


@pytest.mark.parametrize("held_out", [False, True])
def test_nothing_of_courier_is_in_the_training_data(held_out):
    for talk in conversations(4000, held_out):
        assert not leaks(text_of(talk))


def test_a_leak_would_be_seen():
    assert len(COURIER_SENTENCES) > 10 and len(COURIER_WORDS) > 200
    planted = ("look(parcel)", '{"parcel": "787"}', "on Friday", "to 3 Elm", "owner Ada", "cancel_bike", POLICY["desk"])
    for text in planted:
        assert leaks(text), text
    assert not leaks("please looking 78 78778 fridays")


@pytest.mark.parametrize("held_out", [False, True])
def test_the_agent_calls_tools_that_there_are_with_what_it_has_heard(held_out):
    calls = 0
    for talk in conversations(1500, held_out):
        takes = {t["function"]["name"]: t["function"]["parameters"]["required"] for t in talk.opening.tools}
        assert len(takes) == len(talk.opening.tools)
        heard = "\n".join(m.content for m in talk.opening.messages)
        for message in talk.messages:
            for call in message.calls:
                calls += 1
                assert list(call.arguments) == takes[call.name]
                assert all(re.search(rf"\b{value}\b", heard) for value in call.arguments.values())
            heard += "\n" + message.content
    assert calls > 3000


def faults(domain, talk):
    """What the agent of a conversation did against its policy, by another reading of the rules than the generator's."""
    out, record, act, before = [], {}, None, ("", "")
    wants = {want.id: want for want in talk.wants}
    for position, message in enumerate(talk.messages):
        later = [m.content for m in talk.messages[position + 1 :]]
        foreign = bool(domain.holder) and record.get(domain.holder, talk.name) != talk.name
        broken = [
            rule for rule in domain.rules if record and act and rule.verb in ("", act.verb) and is_broken(rule, record)
        ]
        fix = next((fix for fix in domain.fixes if re.search(rf"\b{fix.code}\b", before[1])), None)
        said_no = re.fullmatch(r"(?:I am afraid not|That is ruled out|No): (.*)\.", message.content)
        if message.role == "assistant" and said_no:
            allowed = [domain.holder_reason] * foreign + [rule.reason for rule in broken]
            out += [] if said_no[1] in allowed else ["a reason that does not apply"]
        for call in message.calls:
            if call.name == domain.lookup:
                want = wants[call.arguments[domain.thing]]
                record, act = want.record, want.act
            elif call.name == domain.hand_over:
                failed = before[1].startswith("Error")
                due = failed or (fix and not fix.move) or any(not r.reason and not r.instead for r in broken)
                out += [] if due else ["handed over for nothing"]
            elif call.name != domain.login:
                if domain.fixes:
                    out += [] if any(f.tool == call.name for f in domain.fixes) else ["a tool for no code"]
                else:
                    instead = [rule.instead.tool for rule in broken if rule.instead]
                    right = instead if broken else [act.tool]
                    out += [] if call.name in right and not foreign else ["an act that a rule is against"]
                if domain.confirm and not (before[0].endswith("?") and before[1] in YES):
                    out.append("no yes")
                receipt = re.search(r"\d+", later[0]) if domain.receipt else None
                out += ["the receipt was not told"] if receipt and receipt[0] not in later[1] else []
        before = (before[1], message.content)
    return out


def is_broken(rule, record):
    value = record[rule.field]
    return value >= rule.value + 1 if rule.over else value == rule.value


@pytest.mark.parametrize("held_out", [False, True])
def test_the_agent_goes_by_the_policy(held_out):
    for i in range(3000):
        rng = Random(f"right:{i}")
        domain = draw_domain(rng, held_out)
        assert not faults(domain, Talk(domain, rng)), i


@pytest.mark.parametrize(
    "change",
    [
        lambda domain: {"confirm": True},
        lambda domain: {"rules": tuple(replace(r, value=r.value - 1) if r.over else r for r in domain.rules)},
        lambda domain: {"rules": tuple(replace(r, reason="never heard of") for r in domain.rules)},
    ],
    ids=["consent", "limits", "reasons"],
)
def test_a_fault_of_the_agent_would_be_seen(change):
    """Conversations by one policy, read by another."""
    seen = 0
    for i in range(900):
        rng = Random(f"right:{i}")
        domain = draw_domain(rng)
        talk = Talk(domain, rng)
        other = replace(domain, **change(domain))
        seen += bool(faults(other, talk))
    assert seen > 15


def test_held_out_domains_have_things_and_ids_of_their_own():
    numbers = {n for talk in conversations(500, held_out=True) for n in re.findall(r"\b\d{3}\b", text_of(talk))}
    assert numbers & set(words.HELD_OUT_IDS) and not numbers & {n for n in words.TRAINED_IDS if int(n) >= 300}
    trained = {n for talk in conversations(500) for n in re.findall(r"\b\d{3}\b", text_of(talk))}
    assert trained & set(words.TRAINED_IDS) and not trained & set(words.HELD_OUT_IDS)
    assert not set(words.HELD_OUT_THINGS) & set(words.THINGS)


def test_a_conversation_is_encoded_as_a_rollout_would_have_made_it():
    chat = load_chat(BASE, "native")
    for talk in conversations(60):
        ids, said = pretrain.encode(chat, talk)
        trajectory = to_trajectory(talk, chat)
        n = len(trajectory.ids)
        assert ids[:n] == trajectory.ids and said[:n] == list(trajectory.said) and not any(said[n:])


def test_batches_do_not_depend_on_who_draws_them():
    cfg = pretrain.Pretrain(steps=4, batch_tokens=3000)
    one, other = pretrain.Batches(cfg, BASE), pretrain.Batches(cfg, BASE)
    other[3], other[0]  # (asked in another order)
    for a, b in zip(one[2], other[2]):
        assert torch.equal(a, b)
    ids, said, bounds = one[2]
    assert len(ids) == len(said) == bounds[-1] <= 3000 and bounds[0] == 0 and 0.1 < said.float().mean() < 0.5
    assert not torch.equal(one[2][0], pretrain.Batches(replace(cfg, seed=1), BASE)[2][0])


SMALL = "--steps 10 --batch-tokens 1024 --vocab 2700 --layers 1 --hidden 32 --heads 2 --scored 2 --workers 1"


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A whole pretraining at its smallest: its folder, what it printed, and what `redraw` was called with."""
    out, drawn, redraw = tmp_path_factory.mktemp("pretrained") / "base", [], pretrain.redraw

    def recorded(weight, chosen, known, generator):
        drawn.append((chosen, known))
        redraw(weight, chosen, known, generator)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(pretrain, "redraw", recorded)
        pretrain.main(["--out", str(out), "--forget-every", "2", *SMALL.split()])
    return SimpleNamespace(out=out, printed=printed.getvalue(), drawn=drawn)


def test_pretraining_writes_a_model_with_its_curve_and_scores(pretrained):
    record = json.loads((pretrained.out / "pretraining.json").read_text())
    assert [line["step"] for line in record["curve"]] == list(range(1, 11))
    assert record["settings"]["hidden"] == 32 and set(record["held_out"]) == {"loss", "copied_ids", "calls", "speech"}
    assert pretrained.printed.count("loss") >= 10 and "held-out" in pretrained.printed
    assert load_model(pretrained.out).cfg.hidden_size == 32
    with pytest.raises(BadInput, match="holds a model already"):
        pretrain.main(["--out", str(pretrained.out), *SMALL.split()])


@pytest.mark.parametrize("flag", ["--batch-tokens 100", "--heads 3", "--workers -1", "--steps 0", "--layers 0"])
def test_settings_that_cannot_work_are_one_line(tmp_path, flag):
    with pytest.raises(BadInput, match="--"):
        pretrain.main(["--out", str(tmp_path / "base"), *flag.split()])
    assert not (tmp_path / "base").exists()


def test_redrawn_embeddings_are_like_the_known_ones():
    generator = torch.Generator().manual_seed(0)
    shape = torch.tensor([[2.0, 0.5], [0.0, 0.3]])
    weight = torch.cat([torch.randn(400, 2, generator=generator) @ shape + 5, torch.zeros(4000, 2)])
    known, chosen = torch.arange(4400) < 400, torch.arange(4400) >= 500
    before = weight.clone()
    pretrain.redraw(weight, chosen, known, generator)
    assert torch.equal(weight[:500], before[:500])
    assert_close(weight[500:].mean(0), before[:400].mean(0), atol=0.15, rtol=0)
    assert_close(weight[500:].T.cov(), before[:400].T.cov(), atol=0.3, rtol=0)


def test_ids_are_forgotten_in_the_first_part_of_the_training(pretrained):
    drawn, ids = pretrained.drawn, pretrain.three_digits(load_chat(pretrained.out, "native"))
    assert ids.sum() == 900 and len(drawn) == 3 + 2  # after steps 2, 4 and 6; at the end the unseen of both kinds
    for chosen, known in drawn[:3]:
        assert not chosen[~ids].any() and 350 < chosen.sum() < 550 and not known[~ids].any()
    assert drawn[3][0].sum() >= 200 and not (drawn[3][0] & drawn[3][1]).any()


# -- the model in the repository -------------------------------------------------------------------------


def test_the_base_model_is_small_and_in_bfloat16():
    weights = BASE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    header = weights.read_bytes()[8:4096].decode("latin1")
    assert '"dtype":"BF16"' in header and "F32" not in header


def test_the_base_model_is_the_same_in_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    chat, ours = load_chat(BASE, "native"), load_model(BASE)
    talk = conversations(1)[0]
    ids, _ = pretrain.encode(chat, talk)
    messages = [{"role": "system", "content": talk.opening.policy}]
    messages += [chat.as_dict(m) for m in (*talk.opening.messages, *talk.messages)]
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    text = tokenizer.apply_chat_template(messages, tools=list(talk.opening.tools), tokenize=False)
    assert tokenizer.encode(text)[: len(ids)] == ids
    ids_T = torch.tensor(ids)
    attend = pretrain.packed_attention([0, len(ids)], "cpu", torch.float32)
    with torch.no_grad():
        mine = ours.logits(ours.hidden(ids_T, torch.arange(len(ids)), attend))
        assert_close(mine, theirs(ids_T[None]).logits[0], atol=2e-3, rtol=1e-3)


def test_an_id_of_courier_is_one_token_wherever_it_stands():
    chat = load_chat(BASE, "native")
    for word in courier.ID_WORDS:
        for text in (word, f" {word}", f'"{word}"', f'{{"parcel": "{word}"}}', f"({word}).", f"is {word}, and"):
            assert word in chat.tokenizer.convert_ids_to_tokens(chat.encode(text)), text
