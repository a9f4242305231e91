"""Weights from strangers: damaged files, headers that lie, pickles that mean harm. Made by a seed.

``python tests/faults/hostile_weights.py --files 5000 --seed 0`` adapts a model from each and prints a line of JSON.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

import conservtl as ctl

LONGEST_SECONDS = 5.0
EXECUTED = "CONSERVTL_EXECUTED"


def model() -> nn.Module:
    """Return the model that the weights are for."""
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(body=nn.Linear(4, 3), norm=nn.BatchNorm1d(3), head=nn.Linear(3, 2)))


def weights() -> dict[str, Tensor]:
    """Return its weights."""
    return model().state_dict()


def saved(content: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def header(fields: Any, data: bytes = b"\x00" * 48, length: int | None = None) -> bytes:
    """Return a safetensors file with this header."""
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


class _Executes:
    def __reduce__(self) -> Any:
        return os.putenv, (EXECUTED, "1")


def _with_pickle(payload: bytes) -> bytes:
    """Return torch's format around a pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def _lists_that_multiply() -> bytes:
    """Return weights beside lists of twice the same list, 60 levels deep."""
    inner: list[Any] = []
    for _ in range(60):
        inner = [inner, inner]
    return saved({**weights(), "more": inner})


def _allocating() -> bytes:
    """Return a pickle that calls bytearray(2^32)."""
    return _with_pickle(
        b"\x80\x02}X\x01\x00\x00\x00acbuiltins\nbytearray\n\x8a\x05" + (2**32).to_bytes(5, "little") + b"\x85Rs."
    )


def _holding_itself() -> bytes:
    entries: dict[str, Any] = dict(weights())
    entries["state_dict"] = entries
    return saved(entries)


def _holding_itself_deeper() -> bytes:
    entries: dict[str, Any] = {"epoch": 3, "model": {"optimizer": {}}}
    entries["model"]["model"] = entries["model"]
    return saved(entries)


def by_hand() -> dict[str, tuple[str, Callable[[], bytes]]]:
    """Return name -> (suffix, content) of files made by hand."""
    good = weights()
    f32 = {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}
    expanded = torch.zeros(1).expand(10**9)
    body, quantised = good["body.weight"], torch.quantize_per_tensor(good["body.weight"], 0.1, 0, torch.qint8)

    def ours(text: str) -> bytes:
        return header({"__metadata__": {"conservtl": text}, "body.weight": f32})

    def old(content: Any) -> bytes:
        return saved(content, _use_new_zipfile_serialization=False)

    def nested() -> Tensor:
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    return {
        "metadata is a number": (".safetensors", lambda: header({"__metadata__": 3, "body.weight": f32})),
        "metadata is nested": (".safetensors", lambda: header({"__metadata__": {"a": {"b": 1}}, "body.weight": f32})),
        "our header is no JSON": (".safetensors", lambda: ours("{")),
        "our header is a list": (".safetensors", lambda: ours("[1]")),
        "our header is deep": (".safetensors", lambda: ours("[" * 50_000)),
        "our header lies": (".safetensors", lambda: ours('{"task": [], "labels": 3, "extended": 1}')),
        "shape too large": (".safetensors", lambda: header({"body.weight": {**f32, "shape": [2**40, 2**40]}})),
        "shape negative": (".safetensors", lambda: header({"body.weight": {**f32, "shape": [-3, 4]}})),
        "offsets past the end": (".safetensors", lambda: header({"body.weight": {**f32, "data_offsets": [0, 2**62]}})),
        "offsets reversed": (".safetensors", lambda: header({"body.weight": {**f32, "data_offsets": [48, 0]}})),
        "type unknown": (".safetensors", lambda: header({"body.weight": {**f32, "dtype": "F31"}})),
        "header of exabytes": (".safetensors", lambda: header({}, length=2**62)),
        "header of zeros": (".safetensors", lambda: b"\x00" * 64),
        "header is a list": (".safetensors", lambda: header([1, 2])),
        "header is deep": (".safetensors", lambda: header(b'{"a":' * 20_000 + b"1" + b"}" * 20_000)),
        "no tensors": (".safetensors", lambda: save({})),
        "empty": (".safetensors", lambda: b""),
        "empty pt": (".pt", lambda: b""),
        "text": (".pt", lambda: b"weights"),
        "number": (".pt", lambda: saved(3)),
        "list": (".pt", lambda: saved([1, 2])),
        "tensor": (".pt", lambda: saved(torch.ones(3))),
        "sparse": (".pt", lambda: saved({**good, "body.weight": body.to_sparse()})),
        "sparse rows": (".pt", lambda: saved({**good, "body.weight": body.to_sparse_csr()})),
        "quantised": (".pt", lambda: saved({**good, "body.weight": quantised})),
        "meta": (".pt", lambda: saved({**good, "body.weight": body.to("meta")})),
        "nested": (".pt", lambda: saved({**good, "body.weight": nested()})),
        "no dimension": (".pt", lambda: saved({**good, "head.weight": torch.tensor(1.0)})),
        "no dimension, bias": (".pt", lambda: saved({**good, "head.bias": torch.tensor(1.0)})),
        "complex": (".pt", lambda: saved({**good, "body.weight": body.to(torch.complex64)})),
        "boolean": (".pt", lambda: saved({**good, "body.weight": body > 0})),
        "text for a tensor": (".pt", lambda: saved({**good, "body.weight": "x"})),
        "names that are no text": (".pt", lambda: saved({3: torch.ones(3), None: torch.ones(2), (1,): torch.ones(1)})),
        "name of a megabyte": (".pt", lambda: saved({"a" * 2**20: torch.ones(3)})),
        "stride 0": (".pt", lambda: saved({**good, "body.weight": expanded})),
        "stride 0, of the right shape": (".pt", lambda: saved({**good, "body.weight": torch.zeros(1).expand(3, 4)})),
        "stride 0, of no name": (".pt", lambda: saved({**good, "more": expanded})),
        "holds itself": (".pt", _holding_itself),
        "holds itself deeper": (".pt", _holding_itself_deeper),
        "lists that multiply": (".pt", _lists_that_multiply),
        "a pickle of 4 GiB": (".pt", _allocating),
        "no pickle": (".pt", lambda: _with_pickle(b"")),
        "a pickle of opcodes": (".pt", lambda: _with_pickle(b"\x80\x02(((((((((.")),
        "executes": (".pt", lambda: saved({**good, "body.weight": _Executes()})),
        "executes, old pickle": (".pt", lambda: pickle.dumps({"body.weight": _Executes()})),
        "executes, older format": (".pt", lambda: old({**good, "x": _Executes()})),
        "older format": (".pt", lambda: old(good)),
        "a bomb in a zip": (".pt", _bomb),
        "right, safetensors": (".safetensors", lambda: save(good)),
        "right": (".pt", lambda: saved({"state_dict": good, "epoch": 3})),
    }  # fmt: skip


def _bomb() -> bytes:
    """Return a compressed pickle of 64 MiB of zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02B" + struct.pack("<I", 2**26) + b"\x00" * 2**26 + b".")
        archive.writestr("archive/version", "3\n")
    return file.getvalue()


def mutated(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield files with bits flipped, parts cut, repeated or exchanged; in torch's format also inside its pickle."""
    chance = random.Random(seed)
    good = [
        (".safetensors", save(weights(), {"a": "b"})),
        (".pt", saved(weights())),
        (".pt", saved({"state_dict": weights(), "epoch": 3, "args": {"lr": 0.1}})),
        (".pt", saved(weights(), _use_new_zipfile_serialization=False)),
    ]
    for _ in range(count):
        suffix, content = chance.choice(good)
        if zipfile.is_zipfile(io.BytesIO(content)) and chance.random() < 0.6:
            yield suffix, _pickle_changed(content, chance)
        else:
            first = struct.unpack("<Q", content[:8])[0] + 8 if suffix == ".safetensors" else len(content)
            yield suffix, _changed(content, chance, first if chance.random() < 0.8 else len(content))


def _changed(content: bytes, chance: random.Random, end: int) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(max(1, min(end, len(changed))))
        how = chance.choice(["flip", "flip", "set", "cut", "repeat", "digit"])
        if not changed:
            break
        if how == "flip":
            changed[at] ^= 1 << chance.randrange(8)
        elif how == "set":
            changed[at] = chance.choice([0, 255, 0x7F, 0x80, *b"{}[]\"',:0129-eq.(tRcbX"])
        elif how == "cut":
            del changed[at : at + chance.randint(1, 60)]
        elif how == "repeat":
            changed[at:at] = changed[at : at + chance.randint(1, 60)]
        else:
            digits = [place for place in range(len(changed)) if 48 <= changed[place] <= 57 and place < end]
            if digits:
                changed[chance.choice(digits)] = chance.choice(b"0123456789-.")
    return bytes(changed)


def _pickle_changed(content: bytes, chance: random.Random) -> bytes:
    """Return the archive with its pickle changed and all checksums right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, _changed(part, chance, len(part)) if name.endswith("data.pkl") else part)
    return file.getvalue()


def outcome(path: Path) -> tuple[str, str]:
    """Return what adapting from a file ends in, and the message."""
    begun = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adaptation = ctl.adapt(model(), path, [ctl.L2SP(alpha=0.1)])
        str(adaptation.plan)
        ended, message = "read", ""
    except ctl.ConservtlError as error:
        ended, message = "refused", str(error)
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        ended, message = "failed", f"{type(error).__name__}: {error}"
    if time.process_time() - begun > LONGEST_SECONDS:
        ended = "slow"
    if ended == "refused" and len(message) > 3000:
        ended = "message"
    return ("executed", message) if EXECUTED in os.environ or os.getenv(EXECUTED) else (ended, message)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Adapt from files; return how many ended in which way, and the first that ended in a wrong one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    counts: collections.Counter[str] = collections.Counter()
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (suffix, content) in enumerate(mutated(options.files, options.seed)):
            path = Path(folder) / f"weights{suffix}"
            path.write_bytes(content)
            ended, message = outcome(path)
            counts[ended] += 1
            if ended not in ("read", "refused") and len(wrong) < 10:
                wrong.append({"ended": ended, "message": message[:500], "number": number})
            path.unlink()
    return {"counts": dict(counts), "wrong": wrong}


if __name__ == "__main__":
    found = main()
    print(json.dumps(found, indent=1))  # noqa: T201 - a script
    sys.exit(bool(found["wrong"]))
