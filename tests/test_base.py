"""The base model: nothing of courier in what it reads, an agent that is always right, and a directory that loads."""

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from torch.testing import assert_close

from minitau import checkpoint
from minitau.base import pretrain, words
from minitau.base.talk import draw_conversation
from minitau.chat import call_text, load_chat
from minitau.envs.courier import words as courier
from minitau.envs.courier.tools import POLICY, TOOLS
from minitau.episode import BadInput
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
        heard = "\n".join(m.content for m in talk.opening.messages)
        for message in talk.messages:
            for call in message.calls:
                calls += 1
                assert list(call.arguments) == takes[call.name]
                assert all(str(value) in heard for value in call.arguments.values())
            heard += "\n" + message.content
    assert calls > 3000


def test_the_agent_says_no_in_the_words_of_the_policy():
    refused = 0
    for talk in conversations(1500):
        for message in talk.messages:
            reason = re.fullmatch(r"(?:I am afraid not|That is ruled out|No): (.*)\.", message.content)
            if reason and message.role == "assistant":
                refused += 1
                assert f'"{reason[1]}"' in talk.opening.policy
    assert refused > 150


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


def test_pretraining_writes_a_model_with_its_curve_and_scores(tmp_path, capsys):
    out = tmp_path / "base"
    small = "--steps 4 --batch-tokens 2048 --vocab 2700 --layers 1 --hidden 32 --heads 2 --scored 2 --workers 1"
    pretrain.main(["--out", str(out), *small.split()])
    printed = capsys.readouterr().out
    record = json.loads((out / "pretraining.json").read_text())
    assert [line["step"] for line in record["curve"]] == [1, 2, 3, 4]
    assert record["settings"]["hidden"] == 32 and set(record["held_out"]) == {"loss", "copied_ids", "calls", "speech"}
    assert printed.count("loss") >= 4 and "held-out" in printed
    assert checkpoint.load_model(out).cfg.hidden_size == 32
    with pytest.raises(BadInput, match="holds a model already"):
        pretrain.main(["--out", str(out), *small.split()])


# -- the model in the repository -------------------------------------------------------------------------


def test_the_base_model_is_small_and_in_bfloat16():
    weights = BASE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    header = weights.read_bytes()[8:4096].decode("latin1")
    assert '"dtype":"BF16"' in header and "F32" not in header


def test_the_base_model_is_the_same_in_transformers():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    chat, ours = load_chat(BASE, "native"), checkpoint.load_model(BASE)
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
