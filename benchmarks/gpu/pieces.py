"""Runs the pieces of a section, each section in a process of its own.

A wrong address on a GPU ends the process that used it, and a library may hang. So the parent never touches the device:
what a piece gave is with it as soon as the piece is done, and after a piece that took its process along another one goes on
behind it.
"""

import gc
import json
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from bench import Bench, Section, say

PATIENCE = 15.0  # seconds beyond its time that a piece may finish in
_TAIL = 12  # lines of a traceback
_forked = multiprocessing.get_context("fork")  # imports torch once for all

Message = tuple[str, str, Any]  # what happened, to which piece, and what came of it


def carry_out(section: Section, bench: Bench, found: dict[str, Any], save: Callable[[], None], until: float) -> None:
    """Fill ``found`` with what a section gives: ``results`` and ``errors`` by piece, and pieces ``left_out``.

    Args:
        section: gives its pieces.
        bench: what it gets.
        found: to be filled.
        save: called after each piece.
        until: when it has to be over in any case, as ``time.monotonic`` counts.
    """
    found |= {"results": {}, "errors": {}, "left_out": []}
    began = time.monotonic()
    if began >= until:
        found["left_out"].append("section")
        return
    done: set[str] = set()
    goes_on = True
    while goes_on:
        before, what, current = len(done), "", "section"
        for what, name, value in _messages(section, bench, frozenset(done), until):
            if what == "begins":
                current = name
                continue
            if what == "gives":
                found["results"][name] = value
            elif what == "left out":
                found["left_out"].append(name)
            elif what != "ends" and not (what == "breaks" and len(done) > before):
                found["errors"][current] = value
                say(f"    {current}: {value['error']}")
            if what in ("gives", "left out", "fails", "dies"):
                done.add(name or current)
            found["seconds"] = time.monotonic() - began
            save()
        goes_on = what in ("breaks", "dies") and len(done) > before


def _messages(section: Section, bench: Bench, done: frozenset[str], until: float) -> Iterator[Message]:
    receives, sends = _forked.Pipe(duplex=False)
    process = _forked.Process(target=_work, args=(section, bench, done, sends))
    process.start()
    sends.close()
    limit = min(bench.ends + PATIENCE, until)
    what = ""
    try:
        while what not in ("ends", "breaks"):
            if not receives.poll(max(0.0, limit - time.monotonic())):
                yield "stops", "", {"error": "its time was over, and it was ended", "traceback": []}
                return
            try:
                what, name, text = receives.recv()
            except EOFError:
                process.join()
                yield "dies", "", {"error": f"its process died: exit code {process.exitcode}", "traceback": []}
                return
            yield what, name, json.loads(text)
    finally:
        _end(process)


def _work(section: Section, bench: Bench, done: frozenset[str], sends: Connection) -> None:
    os.setpgid(0, 0)  # so that what it starts, as compilers, ends with it
    gc.freeze()  # what was imported is not looked through after each piece

    def send(what: str, name: str = "", value: Any = None) -> None:
        sends.send((what, name, json.dumps(value)))

    try:
        torch.manual_seed(0)
        with bench.kernels():
            for name, work in section(bench):
                if name not in done:
                    _do(name, work, bench, send)
        send("ends")
    except Exception as error:  # whatever breaks a section is what is to be found out
        send("breaks", value=_described(error))
    sends.close()


def _do(name: str, work: Callable[[], Any], bench: Bench, send: Callable[..., None]) -> None:
    if bench.left <= 0:
        send("left out", name)
        return
    say(f"  {name}")
    send("begins", name)
    try:
        value = work()
        bench.synchronize()
        json.dumps(value)
    except Exception as error:  # likewise: the other pieces go on
        send("fails", name, _described(error))
    else:
        send("gives", name, value)
    gc.collect()
    bench.synchronize()  # raises where the piece has left the GPU unusable
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def _described(error: Exception) -> dict[str, Any]:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return {"error": f"{type(error).__name__}: {error}"[:2000], "traceback": lines[-_TAIL:]}


def _end(process: Any) -> None:
    process.join(timeout=2.0)
    if process.is_alive():
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it had not come to its own group
            process.kill()
        process.join()
