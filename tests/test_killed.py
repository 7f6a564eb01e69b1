"""benchmarks/killed.py: ranks that torchrun started are killed and go on, on a CPU to the last bit."""

import json

import pytest

from benchmarks import killed
from minitau.episode import BadInput


def test_a_killed_run_goes_on_to_the_last_bit(tmp_path, capfd):
    words = ["--shape", "tiny", "--dtype", "float32", "--ranks", "1", "--work", str(tmp_path)]
    killed.main(words)
    found = json.loads(capfd.readouterr().out)
    assert found == json.loads((tmp_path / "killed.json").read_text()) and found["agrees"]
    (again,) = found["resumed"]  # the ranks of the run that was killed are one already
    for name in ("loss", "grad_norm"):
        assert again[name] == found["straight"][name] and len(set(again[name])) == killed.LOOK
    assert again["seconds_until_first_step"] > 0
    with pytest.raises(BadInput, match="another run's"):
        killed.main(words)


FIRST = {"ranks": 2, "loss": [9.0, 8.0], "grad_norm": [2.0, 1.5]}


@pytest.mark.parametrize(
    ("change", "agrees"),
    [
        ({}, True),
        ({"loss": [9.0, 8.001], "grad_norm": [2.01, 1.51]}, True),
        ({"loss": [9.000001, 8.0]}, False),  # another weight
        ({"loss": [9.000001, 8.0], "ranks": 1}, True),
        ({"loss": [9.0, 8.009]}, False),  # moments that are lost
        ({"loss": [9.0, 8.009], "ranks": 1}, False),
        ({"grad_norm": [2.0, 1.6]}, False),
        ({"loss": [float("nan"), 8.0], "ranks": 1}, False),
    ],
)
def test_what_a_resumed_run_may_differ_in(change, agrees):
    assert killed.agrees({**FIRST, **change}, FIRST) is agrees
