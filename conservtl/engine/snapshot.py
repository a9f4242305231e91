"""Snapshots: the complete state of a run, from which it resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from conservtl.engine.batch import Cut
from conservtl.engine.distribution import load_whole, whole_on_cpu, with_placed_state
from conservtl.engine.kept_weights import Selection
from conservtl.engine.optimizer import class_name
from conservtl.engine.randomness import generator_states, restore_generators, seed_all
from conservtl.engine.session import Session
from conservtl.engine.stored_weights import follow_layout
from conservtl.engine.training import Training
from conservtl.errors import SpecError
from conservtl.kernels.dtensor import from_part, part_of, place_like
from conservtl.layers import unwrap

__all__ = ["State", "gather_generators", "restore", "snapshot"]

# They change no result but by rounding.
_FREE = frozenset({"channels_last", "compile", "distributed", "fused", "hold", "hold_memory", "tf32"})


@dataclass
class State:
    """Progress of a run.

    Args:
        epoch: finished epochs.
        batch: finished batches of the current epoch.
        step: finished optimizer steps.
        seconds: wall clock before the run was last resumed.
        total: sum of the losses of the current epoch's examples so far.
        seen: number of those examples, as many as stand for this process's share of those of all.
        history: one line per epoch.
        selection: the best evaluation so far.
        drawn: states of the random generators at the beginning of the current epoch.
        threads: phase -> CPU threads chosen by timing.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seconds: float = 0.0
    total: float = 0.0
    seen: float = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    selection: Selection = field(default_factory=Selection)
    drawn: dict[str, Any] = field(default_factory=dict)
    threads: dict[int, int] = field(default_factory=dict)


def gather_generators(session: Session, generators: Sequence[torch.Generator]) -> list[dict[str, Any]]:
    """Return the states of the random generators of each of many processes; all of them call this together."""
    return session.processes.gathered(generator_states(generators)) if session.processes.many else []


def snapshot(
    session: Session,
    state: State,
    generators: Mapping[str, Any],
    gathered: Sequence[Mapping[str, Any]] = (),
    cut: Cut | None = None,
) -> dict[str, Any]:
    """Return everything that ``restore`` needs; if parameters are sharded, all processes call it together.

    ``generators`` are this process's states, ``gathered`` those of every process if they are known. ``cut`` is None for
    batches of a DataLoader.
    """
    scaler, model = session.accelerator.scaler, unwrap(session.adaptation.model)
    selection = dict(vars(state.selection))
    if session.sharded and selection["weights"] is not None:
        live = model.state_dict()
        selection["weights"] = {
            name: from_part(part, live[name], part.dtype) for name, part in selection["weights"].items()
        }
    content = {
        "state": {**vars(state), "selection": selection},
        "settings": session.training.model_dump(mode="json"),
        "optimizer_class": class_name(session.made[0]),
        "model": model.state_dict(),
        "adaptation": session.adaptation.state_dict(),
        "optimizer": session.raw.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "average": session.average.state_dict() if session.average is not None else None,
        "proxies": session.proxies is not None,
        "generators": dict(generators),
        "processes": [dict(states) for states in gathered],
        "world": session.processes.world,
        "batch": None if cut is None else cut.size,
    }
    if not session.sharded:
        return content
    return {
        name: whole_on_cpu(part, keep=session.processes.main)
        if name in ("state", "model", "adaptation", "optimizer", "average")
        else part
        for name, part in content.items()
    }


def restore(
    session: Session,
    saved: Mapping[str, Any],
    generators: Sequence[torch.Generator],
    augmenting: torch.Generator | None = None,
) -> State:
    """Restore the model, its optimizer and the random generators from a snapshot, of as many processes or others.

    Each process restores its own generators. If the file holds those of one process only (it was written when another
    was lost, or by another number of processes), the other processes draw from new seeds, so that no two processes draw
    the same. The order of the data goes on as it was in any case.

    With many processes, the first of ``generators`` is that of the order of the data, if there is one; ``augmenting``
    and that of the session's proxies are among them.
    """
    settings = session.training.model_dump(mode="json")
    previous = Training().model_dump(mode="json") | saved["settings"]  # an older version may not have had all of them
    if differing := [key for key, value in settings.items() if not _alike(key, previous[key], value)]:
        key = differing[0]
        raise SpecError(
            f"resume: the checkpoint was made with training.{key}={previous[key]!r}, but now it is {settings[key]!r}. "
            "Use the same spec."
        )
    made = class_name(session.made[0])
    if (before := saved.get("optimizer_class", made)) != made:
        raise SpecError(
            f"resume: the checkpoint was made with the optimizer {before}, but now it is {made}. Use the same."
        )
    with_proxies, has = saved.get("proxies", False), session.proxies is not None
    if with_proxies != has:
        raise SpecError(
            f"resume: the checkpoint was made {'with' if with_proxies else 'without'} proxies, but now there are "
            f"{'some' if has else 'none'}. {'Leave them out' if has else 'Pass the same'}."
        )
    written, world = saved.get("world", 1), session.processes.world
    if saved.get("batch", 1) is None and written != world:
        raise SpecError(
            f"resume: a DataLoader divides its batches itself, so {written} processes that began a run must go on with "
            f"it; there are {world}. Start {written}, or pass a dataset instead of a DataLoader."
        )
    model, weights = unwrap(session.adaptation.model), saved["state"]["selection"]["weights"]
    optimizer = saved["optimizer"]
    if session.sharded:
        live = model.state_dict()
        load_whole(live, saved["model"])
        optimizer = with_placed_state(session.raw, optimizer)
        if weights is not None:
            weights = {name: part_of(place_like(one, live[name], one.dtype)) for name, one in weights.items()}
    else:
        model.load_state_dict(saved["model"])
    session.adaptation.load_state_dict(saved["adaptation"])
    session.raw.load_state_dict(optimizer)  # after the adaptation, which scales rates as it begins a phase
    follow_layout(session.raw)
    if saved["scaler"] is not None and session.accelerator.scaler is not None:
        session.accelerator.scaler.load_state_dict(saved["scaler"])
    if session.average is not None:
        session.average.load_state_dict(saved["average"])
    state = State(**{**saved["state"], "selection": Selection(**{**saved["state"]["selection"], "weights": weights})})
    _restore_generators(session, saved, state, generators, augmenting)
    return state


def _restore_generators(
    session: Session,
    saved: Mapping[str, Any],
    state: State,
    generators: Sequence[torch.Generator],
    augmenting: torch.Generator | None,
) -> None:
    """Restore the generators of this process, and the states at the beginning of the epoch."""
    rank, world, written = session.processes.rank, session.processes.world, saved.get("world", 1)
    if rank > 0:  # the sums of all processes are in the first one's
        state.total = state.seen = 0
    if len(saved.get("processes", ())) == world == written:
        restore_generators(saved["processes"][rank], generators)
        return
    drawing = [augmenting, None if session.proxies is None else session.proxies.generator]
    ordered = not all(any(one is other for other in drawing) for one in generators)
    own, drawn = saved["generators"], state.drawn
    if written == 1 and world > 1 and ordered:  # one process draws orders from torch's global generator
        own, drawn = ({**one, "own": [one["torch"], *one["own"]]} if one else one for one in (own, drawn))
    if written > 1 and world == 1 and len(own["own"]) > len(generators):
        own, drawn = ({**one, "torch": one["own"][0], "own": one["own"][1:]} if one else one for one in (own, drawn))
    restore_generators(own, generators)
    state.drawn = dict(drawn)
    if rank > 0:
        seed_all((torch.initial_seed() + rank * (state.step + 1)) % 2**62)
        for one in drawing:
            if one is not None:
                one.manual_seed(one.initial_seed() + rank * (state.step + 1))


def _alike(key: str, before: Any, now: Any) -> bool:
    """Return whether a run is the same with two values of a setting: so it is whatever the number of workers."""
    counts = key == "num_workers" and isinstance(before, int) and isinstance(now, int)
    return before == now or key in _FREE or counts
