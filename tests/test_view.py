"""What people look at after a run: what training leaves of it, the list, one episode, and the page in a browser."""

import json
import re
from pathlib import Path
from random import Random

import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import trajectory

import train
from minitau import batch, catalogue, page, view
from minitau.catalogue import COLUMNS, Entry
from minitau.episode import BadInput, Call, Check, Evaluation, Message, Stop, Task, Trajectory, Turn
from minitau.files import whole_lines
from minitau.script import run_script

SETTINGS = {"stage": "grpo", "importance_cap": 2.0, "sequence_low": 0.5, "sequence_high": 2.0}
SCRIPT = "<script>document.title = 'broken'</script><img src=x onerror=\"document.title = 'broken'\">"
STEER = "\x1b[2J\x1b]0;title\x07\x9b31m"  # clears a terminal, names its window, and paints it red


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """What is shown is as wide as the terminal; this one is the tests' own."""
    monkeypatch.setenv("COLUMNS", "120")


# -- what training leaves --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_dir, tmp_path_factory):
    """A GRPO run of one step that is split into two updates."""
    out = tmp_path_factory.mktemp("run") / "grpo"
    flags = (
        f"--stage grpo --model {tiny_dir} --out {out} --steps 1 --tasks 3 --tasks-per-step 3 --group-size 2 --kl 0 "
        "--no-dynamic-sampling --no-screen --updates-per-step 2 --lr 0 --max-new-tokens 12 --max-turns 2"
    )
    train.main(flags.split())
    return out


def test_a_run_keeps_what_the_trainer_thought_of_every_token(run):
    """Its drift is that of the metrics, which were made from the same numbers by another way."""
    entries, settings = catalogue.catalogue(run), catalogue.settings_of(run)
    assert len(entries) == 6 and [entry.number for entry in entries] == [1, 2, 3, 4, 5, 6]
    (metrics,) = (json.loads(line) for line in whole_lines(run / "metrics.jsonl"))
    of_update = [[], []]
    for entry in entries:
        record = catalogue.read(entry)
        tokens = [token for reply in catalogue.tokens_by_turn(record, settings) for token in reply]
        said = [i for i, says in zip(record.trajectory.ids, record.trajectory.said) if says]
        assert [token.id for token in tokens] == said and entry.advantage is not None
        assert all(token.weight == pytest.approx(1, abs=1e-4) for token in tokens)
        of_update[entry.number in (3, 4)] += [abs(token.drift) for token in tokens]  # tasks 1 and 3, then 2
    means = [sum(each) / len(each) for each in of_update]
    assert sum(means) / 2 == pytest.approx(metrics["drift"], rel=1e-3) and 0 < metrics["drift"] < 1e-4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_find_their_way_back_from_every_rank(world_size):
    """A number for each token goes through packing and back to the token that it belongs to."""
    lengths = [5, 9, 3, 12, 4]
    episodes = [trajectory(range(n), [t > 0 and (t + n) % 3 > 0 for t in range(n)]) for n in lengths]
    for n, episode in zip(lengths, episodes):
        episode.logprobs = [-float(100 * n + t) for t in range(n)]
    for samples in ([batch.Sample(t) for t in episodes], [batch.Sample(episodes[0])]):
        found = {}
        for rank in range(world_size):
            mbs = batch.micro_batches(samples, budget=16, rank=rank, world_size=world_size, device="cpu")
            left = iter([*(mb.rollout_N for mb in mbs), torch.tensor([7.0])])
            found |= batch.by_sample(samples, left, budget=16, rank=rank, world_size=world_size)
            assert [float(each) for each in next(left)] == [7.0], "what comes after is not taken"
        for i, sample in enumerate(samples):
            t = sample.trajectory
            assert found[i] == [p for p, says in zip(t.logprobs, t.said) if says]


# -- a run made by hand ------------------------------------------------------------------------------------------


def row(number, *, task="0", domain="desk", reward=1.0, step=1, stop=Stop.USER_STOP, words=("Hi", "Hello"), **more):
    """A line of a run's trajectories: a customer's words, a call, its result, and the agent's answer."""
    t = Trajectory(Task(domain, "train", task), number, stop=stop, detail="it fell" if stop.ours else "")
    t.messages = [Message("assistant", "Welcome."), Message("user", words[0])]
    t.hear(list(range(10, 20)))
    for ids, message, heard, error in (
        ([5, 6], Message("assistant", "let me see", (Call("look", {"parcel": words[1]}),)), "found", ""),
        ([7], Message("assistant", words[1]), "Error: no JSON", "no JSON"),
    ):
        t.turns.append(Turn(len(t.ids), len(t.ids) + len(ids), 3, error))
        t.ids += ids
        t.said += [True] * len(ids)
        t.logprobs += [-0.5] * len(ids)
        t.messages += [message, Message("tool", heard)]
        t.hear([1, 2])
    checks = (Check("action", "look(1)", False), Check("db", "database", True))
    t.evaluation = None if stop.ours else Evaluation(reward, checks)
    return {"step": step, "advantage": 0.5, "old_logprobs": [-0.4, -2.5, -0.1], "trajectory": t.to_json(), **more}


@pytest.fixture
def write(tmp_path):
    def write(*rows, **settings):
        (tmp_path / "trajectories").mkdir(exist_ok=True)
        (tmp_path / "config.json").write_text(json.dumps({**SETTINGS, **settings}))
        text = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in rows)
        (tmp_path / "trajectories" / "step-000001.jsonl").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def shown(capsys, *flags):
    """What the command prints."""
    assert run_script("view", view.main, [str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


def refused(capsys, *flags):
    assert run_script("view", view.main, [str(flag) for flag in flags]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Traceback" not in err
    return err


MIXED = [
    row(0, task="a1", reward=0.0),
    row(1, task="a1", reward=1.0, step=2),
    row(0, task="b2", domain="claims", reward=0.5, step=2, advantage=None, old_logprobs=None),
    row(1, task="b2", domain="claims", stop=Stop.USER_ERROR, step=3),
]
# Conditions by column, and the numbers of the episodes that meet them.
CONDITIONS = [
    ({}, [1, 2, 3, 4]),
    ({"reward": "<1"}, [1, 3]),
    ({"reward": "1"}, [2]),
    ({"reward": " >= 0.5 "}, [2, 3]),
    ({"reward": "0.5.."}, [2, 3]),
    ({"reward": "..0.5"}, [1, 3]),
    ({"reward": ".4..0.6"}, [3]),
    ({"step": "2", "domain": "DES"}, [2]),
    ({"step": ">1", "domain": "!desk"}, [3, 4]),
    ({"stop": "!error"}, [1, 2, 3]),
    ({"task": "b"}, [3, 4]),
    ({"advantage": "=0.5"}, [1, 2, 4]),
    ({"advantage": "-1..1", "attempt": "<=0"}, [1]),
    ({"turns": "3.."}, []),
    ({"tokens": "17"}, [1, 2, 3, 4]),
]


@pytest.mark.parametrize("conditions, numbers", CONDITIONS)
def test_a_list_holds_what_was_asked_for(write, conditions, numbers):
    entries = catalogue.catalogue(write(*MIXED))
    assert [entry.number for entry in catalogue.chosen(entries, conditions)] == numbers


def test_a_list_is_sorted_by_any_column(write):
    entries = catalogue.catalogue(write(*MIXED))

    def order(column, descending=False):
        return [entry.number for entry in catalogue.chosen(entries, {}, column, descending)]

    assert order("reward") == [1, 3, 2, 4] and order("reward", True) == [2, 3, 1, 4], "without one it comes last"
    assert order("domain") == [3, 4, 1, 2] and order("attempt") == [1, 3, 2, 4]
    assert order("step", True) == [4, 2, 3, 1] and order("", True) == [4, 3, 2, 1]
    assert all(sorted(order(column)) == [1, 2, 3, 4] for column in COLUMNS)


def test_the_list(write, capsys):
    folder = write(*MIXED)
    with open(folder / "trajectories" / "step-000001.jsonl", "a") as file:
        file.write('{"step": 3, "advan')  # being written, or cut by a crash
    lines = shown(capsys, folder, "--sort", "reward").splitlines()
    assert lines[0] == f"{folder} (stage grpo): 4 of 4 episodes"
    assert lines[2].split() == ["#", *COLUMNS]
    assert lines[3].split() == ["1", "1", "desk", "a1", "0", "0.00", "+0.50", "user_stop", "2", "17"]
    assert lines[4].split() == ["3", "2", "claims", "b2", "0", "0.50", "-", "user_stop", "2", "17"]
    assert lines[6].split() == ["4", "3", "claims", "b2", "1", "-", "+0.50", "user_error", "2", "17"]
    lines = shown(capsys, folder, "--domain", "desk", "--limit", "1", "--descending").splitlines()
    assert "2 of 4 episodes; 1 are shown" in lines[0] and lines[3].split()[0] == "2" and len(lines) == 4


def test_rounds_of_rft_and_evaluations_are_listed_too(tmp_path, capsys):
    lines = [json.dumps(each["trajectory"]) + "\n" for each in MIXED]
    (tmp_path / "rft" / "collected").mkdir(parents=True)
    (tmp_path / "rft" / "collected" / "round-0002.jsonl").write_text(lines[0])
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "episodes-0.jsonl").write_text(lines[0])
    (tmp_path / "eval" / "episodes-1.jsonl").write_text(lines[1] + lines[2])
    assert shown(capsys, tmp_path / "rft").splitlines()[3].split()[:2] == ["1", "2"]
    assert [line.split()[:2] for line in shown(capsys, tmp_path / "eval").splitlines()[3:]] == [
        [str(i), "-"] for i in (1, 2, 3)
    ]
    text = shown(capsys, tmp_path / "eval", "--show", "3", "--each-token")
    assert re.search(r"'<5>' +-0.5000 +- +- +-\n", text), "no trainer has seen them: a dash each"
    assert "these in it do: eval, rft" in refused(capsys, tmp_path)


def test_one_episode(write, capsys):
    folder = write(*MIXED)
    text = shown(capsys, folder, "--show", "1")
    lines = text.splitlines()
    assert lines[0] == "1: step 1, desk/train/a1, attempt 0"
    assert "reward 0.00, advantage +0.500, ended by user_stop, 2 turns, 17 tokens of which it said 3" in lines[1]
    assert "failed    action: look(1)" in lines and "passed    db: database" in lines
    order = [
        "policy    folded away, with the tools 10 tokens",
        "agent     Welcome.",
        "customer  Hi",
        "thought   let me see",
    ]
    order += [
        'call      look({"parcel": "Hello"})',
        "result    found",
        "agent     Hello",
        "failed    no JSON",
        "result    Err",
    ]
    places = [next(i for i, line in enumerate(lines) if line.startswith(start)) for start in order]
    assert places == sorted(places)
    assert "logprob" not in text and "no verdict: it fell" in shown(capsys, folder, "--show", "4")


def test_every_token(write, capsys, tiny_dir):
    """Numbers by hand: drift is the trainer's minus the sampler's, the weight its exponential up to the cap."""
    folder = write(*MIXED)
    text = shown(capsys, folder, "--show", "1", "--each-token")
    assert text.count("weights of step 3") == 2
    numbers = [line.split()[1:] for line in text.splitlines() if re.match(r" +'<\d>'", line)]
    assert numbers == [
        ["-0.5000", "+0.500", "1.1052", "+1.00e-01"],
        ["-0.5000", "+0.500", "0.1353", "-2.00e+00"],
        ["-0.5000", "+0.500", "1.4918", "+4.00e-01"],
    ]
    masked = shown(capsys, write(*MIXED, sequence_low=0.9), "--show", "1", "--each-token")
    assert masked.count(" 0.0000 ") == 3, "the mean ratio is exp(-0.5): all of the trajectory is masked"
    words = shown(capsys, folder, "--show", "1", "--each-token", "--unfold", "--tokenizer", tiny_dir)
    assert "'<" not in words and "--tokenizer" not in words
    assert "--tokenizer" in shown(capsys, folder, "--show", "1", "--unfold")
    assert "no tokenizer.json" in refused(capsys, folder, "--show", "1", "--tokenizer", folder)


def test_two_side_by_side(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "130")
    lines = shown(capsys, write(*MIXED), "--show", "1,2").splitlines()
    left, _, right = lines[0].partition(" | ")
    assert left.strip() == "1: step 1, desk/train/a1, attempt 0" and right == "2: step 2, desk/train/a1, attempt 1"
    assert re.match(r"failed action: look\(1\) +\| failed action", lines[-1])


def test_what_was_said_does_no_harm_to_a_terminal(write, capsys):
    hostile = row(0, task=f"t{STEER}", words=(STEER + "x" * 1_000_000, f"{STEER}y"))
    folder = write(hostile, row(1, task=f"t{STEER}"))
    for flags in ((), ("--show", "1", "--each-token", "--unfold"), ("--show", "1,2")):
        text = shown(capsys, folder, *flags)
        assert all(c.isprintable() or c == "\n" for c in text)
        assert len(text) < 20_000 and ("[... " in text) == bool(flags)
    assert len(shown(capsys, folder, "--show", "1", "--full")) > 1_000_000


def test_colours_are_for_terminals_only(write, monkeypatch, capsys):
    folder = write(*MIXED)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[31mfailed    action: look(1)\x1b[0m\n" in shown(capsys, folder, "--show", "1")
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b" not in shown(capsys, folder, "--show", "1")


def test_bad_input_is_one_line(write, tmp_path, capsys):
    assert "which run?" in refused(capsys) and "which run?" in refused(capsys, "--sort", "step")
    assert "no such folder" in refused(capsys, tmp_path / "nowhere")
    assert "holds no episodes" in refused(capsys, tmp_path)
    folder = write(*MIXED)
    assert "--reward 'high' is not a number, <1" in refused(capsys, folder, "--reward", "high")
    assert "numbers 1 to 4" in refused(capsys, folder, "--show", "5")
    assert "numbers 1 to 4" in refused(capsys, folder, "--show", "x")
    assert "of two to compare" in refused(capsys, folder, "--show", "1,2,3")
    assert "--limit is -1" in refused(capsys, folder, "--limit", "-1")
    path = folder / "trajectories" / "step-000002.jsonl"
    path.write_text('{"step": 1}\n')
    assert f"{path}, line 1: no episode" in refused(capsys, folder)
    for change in ({"step": "x"}, {"advantage": "x"}):
        path.write_text(json.dumps({**row(1), **change}) + "\n")
        assert f"{path}, line 1: no episode" in refused(capsys, folder)
    for change in ({"ids": None}, {"ids": [1]}, {"task": []}, {"task": {"domain": "desk", "split": "train", "id": 5}}):
        path.write_text(json.dumps({**row(1), "trajectory": {**row(1)["trajectory"], **change}}) + "\n")
        assert f"{path}, line 1: no episode" in refused(capsys, folder)
    assert "leave one out" in refused(capsys, folder, "--show", "1", "--html", tmp_path / "x.html")
    for name in (tmp_path, tmp_path / "nowhere" / "x.html"):
        assert "name a file, in a folder that is there" in refused(capsys, folder, "--html", name)
    for text in ("", "..", "1..2..3", "<", "< <1", "1e5", "nan"):
        with pytest.raises(BadInput):
            catalogue.condition("reward", text)


# -- the page ------------------------------------------------------------------------------------------------------

browsed = pytest.mark.skipif(not CHROMIUM, reason="no chromium is installed; on Debian: apt install chromium")
PICTURES = Path(__file__).parent.parent / "outputs" / "inspector"  # what the pages looked like when they were tested


def write_page(folder, capsys, *flags):
    out = folder / "page.html"
    assert "MB" in shown(capsys, folder, "--html", out, *flags)
    return out


def test_the_page_holds_nothing_that_anybody_said_as_markup(write, capsys):
    folder = write(row(0, task=SCRIPT, domain="</script><b>", words=(SCRIPT, SCRIPT)), model=SCRIPT)
    text = write_page(folder, capsys).read_text()
    assert text.count("<script") == text.count("</script>") == 3 and "<img" not in text and "<b>" not in text
    assert not re.search(r"<[^>]*(src|href)=|https?://|@import|url\(", text), "nothing that could be fetched"
    assert "default-src 'none'" in text


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.scheme("light")
        yield browser


@pytest.fixture
def clean(tab):
    """The tab, which must not have met an error or asked anybody for anything."""
    tab.events.clear()
    yield tab
    tab.run("0")  # so that all events before it are here
    methods = [event["method"] for event in tab.events]
    assert "Runtime.exceptionThrown" not in methods, tab.events
    asked = [e["params"]["request"]["url"] for e in tab.events if e["method"] == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "blob:", "data:")) for url in asked), asked


@browsed
def test_the_page_is_read_with_keys_and_mouse(write, capsys, clean, tiny_dir):
    many = [
        row(
            i % 3,
            task=f"t{i // 3}",
            reward=float(i % 3 == 1),
            step=1 + i // 30,
            words=("Hi", "Bye" if i % 3 == 2 else "Hello"),
        )
        for i in range(300)
    ]
    folder = write(*many)
    clean.open(f"file://{write_page(folder, capsys, '--tokenizer', tiny_dir)}")
    assert clean.texts("#count") == ["300 of 300 episodes, 33% succeeded"]
    assert 20 < len(clean.texts(".row")) < 80, "only what can be seen is in the page"

    # Filter by keys alone, then by mouse; open one; read it.
    clean.press("/", "t17", "Enter", "ArrowDown")
    clean.until("document.querySelector('.pane')")
    assert clean.texts("#count") == ["3 of 300 episodes, 33% succeeded"]
    assert clean.texts(".pane h2") == ["52: desk/train/t17, attempt 0"]
    assert [text.split() for text in clean.texts(".checks li")] == [
        ["✗", "failed", "action", "look(1)"],
        ["✓", "passed", "db", "database"],
    ]
    wanted = [
        "policy and tools, 10 tokens",
        "Welcome.",
        "Hi",
        "let me see",
        'look {"parcel": "Hello"}',
        "found",
        "Hello",
    ]
    assert clean.texts(".said > :nth-child(2)")[:7] == wanted
    assert clean.texts(".error") == ["could not be parsed: no JSON"]
    clean.click("#filters input[name=reward]")
    clean.press(">=1", "Enter", "ArrowDown")
    clean.until("document.querySelector('.pane h2').textContent.startsWith('53')")

    # The policy, every token, and one token's numbers.
    clean.press("p", "t", "ArrowRight", "ArrowRight")
    clean.until("document.querySelectorAll('.token').length === 3 && document.querySelector('#readout b')")
    assert clean.texts(".policy .text")[0] != "" and clean.texts("button.more") == []
    readout = dict(
        zip(
            ("word", "id", "logprob", "trainer", "drift", "weight", "advantage", "version"), clean.texts("#readout > *")
        )
    )
    assert readout["id"] == "id 6" and readout["logprob"] == "log-probability -0.5000 (60.7%)"
    assert readout["trainer"] == "trainer's -2.5000" and readout["drift"] == "drift -2.00e+0"
    assert readout["weight"] == "importance weight 0.1353" and readout["advantage"] == "advantage +0.500"
    clean.press("m", "m")
    clean.until("document.querySelectorAll('.token')[1].dataset.number === '0.135'")

    # Two attempts side by side, and back again.
    clean.press("t", "p", "c")
    clean.until("document.querySelectorAll('.pane').length === 2")
    assert clean.texts(".pane h2") == ["53: desk/train/t17, attempt 1", "54: desk/train/t17, attempt 2"]
    assert clean.texts(".apart") == ["from here on they differ"] * 2
    clean.press("Escape")
    clean.until("document.querySelectorAll('.pane').length === 1")
    clean.until("location.hash.includes('open=53')")

    # Sort, and a view that its address brings back.
    clean.click("#columns button[name=step]")
    clean.click("#columns button[name=step]")
    assert "↓" in clean.texts("#columns button[name=step]")[0]
    clean.until("location.hash.includes('sort=-step')")
    address = clean.run("location.href")
    clean.open(address)
    clean.until("document.querySelector('.pane h2')?.textContent.startsWith('53')")
    assert clean.texts("#count") == ["1 of 300 episodes, 100% succeeded"]


@browsed
def test_the_page_filters_and_sorts_as_the_terminal_does(write, capsys, clean):
    folder = write(*MIXED)
    clean.open(f"file://{write_page(folder, capsys)}")
    cells = ["2", "2", "desk", "a1", "1", "1.00", "+0.50", "user_stop", "2", "17"]
    assert clean.texts(".row:nth-child(2) span") == cells
    for conditions, numbers in CONDITIONS:
        found = clean.run(f"state.filters = {json.dumps(conditions)}, choose(), found.map((row) => row.number)")
        assert found == numbers, conditions
    entries = catalogue.catalogue(folder)
    for column in COLUMNS:
        for down in (False, True):
            order = [entry.number for entry in catalogue.chosen(entries, {}, column, down)]
            script = f"Object.assign(state, {{filters: {{}}, sort: '{column}', down: {str(down).lower()}}})"
            assert clean.run(f"{script}, choose(), found.map((row) => row.number)") == order, (column, down)
    clean.click("#filters input[name=turns]")
    clean.press("many")
    assert clean.run("document.querySelector('input[name=turns]').getAttribute('aria-invalid')") == "true"
    assert clean.texts("#count")[0].startswith("4 of 4"), "words that say nothing leave nothing out"


@browsed
def test_the_page_shows_hostile_words_as_words(write, capsys, clean):
    line = SCRIPT + "x" * 1_000_000
    folder = write(row(0, task=SCRIPT, words=(line, SCRIPT)), row(1, task=SCRIPT), model=SCRIPT)
    clean.open(f"file://{write_page(folder, capsys)}#open=1&tokens=1")
    clean.until("document.querySelector('.pane')")
    assert SCRIPT in clean.texts(".pane h2")[0] and SCRIPT in clean.texts(".call .text")[0].replace('\\"', '"')
    first = clean.texts(".customer .text")[0]
    assert first.startswith(SCRIPT) and len(first) < 4000
    clean.click(".customer button")
    clean.until("document.querySelector('.customer .text').textContent.length > 30000")
    first = clean.texts(".customer .text")[0]
    assert 33_000 < len(first) < 33_200 and first.endswith(f"show 30,000 of {len(line) - 33_000:,} more letters")
    assert clean.run("document.querySelector('#panes').scrollWidth <= document.querySelector('#panes').clientWidth")
    assert "broken" not in clean.run("document.title").split("<")[0] and clean.texts("img") == []
    # Should markup ever get in, the page's own policy still lets nothing run and nothing be fetched.
    clean.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.harm = 1\">')")
    clean.run("new Promise((done) => setTimeout(done, 50))")
    assert clean.run("window.harm") is None
    clean.events.clear()


@browsed
def test_500_long_episodes_open_at_once(tmp_path, monkeypatch, clean):
    """10,000 tokens each, of which a quarter was said; the page is as large as if every one were another."""
    t = Trajectory(Task("retail", "train", "0"), 0, stop=Stop.USER_STOP, evaluation=Evaluation(1.0))
    generator = torch.Generator().manual_seed(0)
    t.ids = torch.randint(100_000, (10_000,), generator=generator).tolist()
    t.said = [i % 200 >= 150 and i >= 1000 for i in range(10_000)]
    t.logprobs = [-float(p) if says else 0.0 for p, says in zip(torch.rand(10_000, generator=generator), t.said)]
    t.turns = [Turn(i + 150, i + 200, 1) for i in range(1000, 10_000, 200)]
    rng = Random(0)  # what is said does not repeat itself, so that it packs no better than real words
    text = {
        role: [" ".join(str(rng.randrange(10**4)) for _ in range(60)) for _ in t.turns]
        for role in ("user", "assistant")
    }
    t.messages = [Message(role, text[role][i]) for i in range(len(t.turns)) for role in text]
    old = [p - 0.01 for p, says in zip(t.logprobs, t.said) if says]
    one = page.conversation(
        catalogue.Record(entry_like(1), t, old), catalogue.Words(tmp_path, {}), {**SETTINGS, "model": str(tmp_path)}
    )
    one["given"] = " ".join(str(rng.randrange(10**4)) for _ in range(5000))
    packed = page.packed(one)  # packing 500 takes longer than all else here, and is not what is measured
    monkeypatch.setattr(catalogue, "read", lambda entry: entry)
    monkeypatch.setattr(page, "conversation", lambda *_: one)
    monkeypatch.setattr(page, "packed", lambda _: packed)
    out = tmp_path / "page.html"
    size = page.write(out, "long", [entry_like(i) for i in range(1, 501)], catalogue.Words(tmp_path, {}), SETTINGS)
    assert size > 20e6
    clean.open(f"file://{out}")
    marks = dict(clean.run("performance.getEntriesByType('mark').map((mark) => [mark.name, mark.startTime])"))
    print(f"{size / 1e6:.0f} MB, its list after {marks['listed']:.0f} ms, all of it after {marks['whole']:.0f} ms")
    assert marks["listed"] <= marks["whole"] < 2000, marks
    clean.press("End", "t")
    clean.until("document.querySelectorAll('.token').length === 2250")
    assert clean.texts(".pane h2") == ["500: retail/train/499, attempt 0"] and len(clean.texts(".row")) < 80


def entry_like(number):
    values = dict(zip(COLUMNS, (1, "retail", str(number - 1), 0, 1.0, 0.5, "user_stop", 45, 10_000)))
    return Entry(number=number, split="train", path=Path(), offset=0, **values)


@browsed
def test_the_page_is_looked_at(run, capsys, clean, tmp_path):
    """Pictures for a person to look at, in outputs/inspector; and that light and dark differ as they should."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    out = tmp_path / "page.html"
    shown(capsys, run, "--html", out)
    grounds = {}
    for scheme in ("light", "dark"):
        clean.scheme(scheme)
        clean.open(f"file://{out}#open=2&tokens=1")
        clean.until("document.querySelector('.token')")
        assert len(clean.texts(".pane")) == 1
        clean.picture(PICTURES / f"{scheme}.png")
        grounds[scheme] = clean.run("getComputedStyle(document.body).backgroundColor")
        clean.press("c")
        clean.until("document.querySelectorAll('.pane').length === 2")
        clean.picture(PICTURES / f"{scheme}-two.png")
    clean.scheme("light")
    assert brightness(grounds["light"]) > 0.9 and brightness(grounds["dark"]) < 0.2
    clean.press("d", "d")  # as the system has it, dark, light: whatever the system has
    assert clean.run("document.documentElement.dataset.theme") == "light"
    clean.size(420, 800)
    clean.press("d", "t")
    clean.picture(PICTURES / "narrow.png")
    assert clean.run("document.documentElement.scrollWidth") <= 420
    clean.size(1440, 900)


def brightness(colour):
    """0 to 1, of a colour as a browser says it: rgb(...) in 0..255, or color(srgb ...) in 0..1."""
    numbers = [float(each) for each in re.findall(r"[\d.]+", colour)][:3]
    return sum(numbers) / 3 / (255 if colour.startswith("rgb") else 1)
