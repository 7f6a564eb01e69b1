"""Episodes as one page that needs nothing else: no server, no network, no file beside it.

The list stands in the page as it is. Each conversation stands there packed (JSON, gzip, base64), and is unpacked when
it is opened, so that hundreds of long ones open at once. What anybody said gets into the page in these two ways only,
and the scripts show it as text, never as markup; the page's own policy lets no other one run and nothing be fetched.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minitau import catalogue
from minitau.catalogue import COLUMNS, TEXTS, Entry, Record, Token, Words
from minitau.files import written_whole
from minitau.log import finite
from minitau.script import progress_bar

HERE = Path(__file__).parent
HEAD, FOOT = (HERE / "page.html").read_text(encoding="utf-8").split("<!-- conversations -->\n")


def write(path: Path, title: str, entries: Sequence[Entry], words: Words, settings: Mapping[str, Any]) -> int:
    """Write the page of these episodes, one at a time; its size in bytes. Raises OSError if it cannot be written."""
    style, script = together("page.css"), together("list.js", "reader.js")
    listed = finite({"columns": COLUMNS, "texts": TEXTS, "rows": [catalogue.as_row(entry) for entry in entries]})
    parts = {
        "title": html.escape(title),
        "style": style,
        "style_hash": digest(style),
        "script": script,
        "script_hash": digest(script),
        "list": as_json(listed).replace("<", "\\u003c"),  # no text in it can end the element that it stands in
    }
    head = HEAD
    for name, value in parts.items():
        head = head.replace(f"{{{{ {name} }}}}", value)
    with written_whole(path) as scratch, open(scratch, "w", encoding="utf-8") as file:
        file.write(head)
        bar = progress_bar("packing", len(entries), "episode")
        for entry in entries:
            text = packed(conversation(catalogue.read(entry), words, settings))
            file.write(f'<script type="text/plain" id="episode-{entry.number}">{text}</script>\n')
            bar.update()
        bar.close()
        file.write(FOOT)
    return path.stat().st_size


def packed(value: Any) -> str:
    return base64.b64encode(gzip.compress(as_json(value).encode(), mtime=0)).decode()


def together(*names: str) -> str:
    return "\n" + "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def digest(text: str) -> str:
    """What a content security policy calls a script or style by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def conversation(record: Record, words: Words, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows of one episode."""
    t = record.trajectory
    given = catalogue.given_before(t)
    replies = catalogue.tokens_by_turn(record, settings)
    return {
        "said": sum(t.said),
        "seconds": {name: rounded(value, 3) for name, value in t.seconds.items()},
        "detail": t.detail,
        "note": t.evaluation.note if t.evaluation else "",
        "checks": [[check.kind, check.name, check.passed] for check in t.evaluation.checks] if t.evaluation else None,
        "given": words.together(given) if words else None,
        "given_tokens": len(given),
        "messages": [
            [m.role, m.content, [[call.name, json.dumps(call.arguments, ensure_ascii=False)] for call in m.calls]]
            for m in t.messages
        ],
        "turns": [
            {"version": turn.weight_version, "error": turn.error, "tokens": columns(reply, words)}
            for turn, reply in zip(t.turns, replies)
        ],
    }


def columns(reply: Sequence[Token], words: Words) -> list[list[Any]]:
    """The tokens of a reply as five lists: ids, texts, log-probabilities, importance weights, drifts."""
    return [
        [token.id for token in reply],
        [words.each(token.id) for token in reply],
        [rounded(token.logprob, 4) for token in reply],
        [rounded(token.weight, 4) for token in reply],
        [rounded(token.drift, 3, significant=True) for token in reply],
    ]


def rounded(value: float | None, digits: int, significant: bool = False) -> float | None:
    """`value` with so many digits; None also if it is not finite, which JSON cannot say."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}") if significant else round(value, digits)


def as_json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)
