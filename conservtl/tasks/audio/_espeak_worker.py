"""Script of a separate process: utterances in, 16-bit samples out, through espeak-ng's library and ctypes.

It imports the standard library only, so that the process starts in milliseconds. espeak-ng's output depends on earlier
utterances of the process and, for whispers and Klatt's synthesiser, on a random number generator that it seeds with
the clock. With a fixed seed, the same utterances in a new process give the same bytes.

Request (JSON on stdin): {"library", "data", "utterances": [[voice, text, rate, pitch, range], ...]}.
Answer: one JSON line on stdout, {"rate", "lengths"} or {"error"}, then the samples, native 16-bit.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

_SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples come to the callback before espeak_Synth returns
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: a bad data path is an error code
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_SEED = 1
_UTF8 = 1  # espeakCHARS_UTF8


def speak(request: dict[str, Any]) -> tuple[int, list[bytes]]:
    """Return the sample rate in Hz and the 16-bit samples of each utterance.

    Raises:
        RuntimeError: the library rejects its data, a voice or a text.
    """
    library = ctypes.CDLL(request["library"])
    parts: list[bytes] = []

    def collect(samples: int | None, count: int, _events: int | None) -> int:
        if samples and count > 0:
            parts.append(ctypes.string_at(samples, 2 * count))
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)(collect)
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, request["data"].encode(), _DONT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"espeak_Initialize returned {rate} for the data in {request['data']}")
    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    library.espeak_SetSynthCallback(callback)
    spoken = []
    for voice, text, words_a_minute, pitch, pitch_range in request["utterances"]:
        parts.clear()
        if code := library.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"there is no voice {voice!r} (espeak_SetVoiceByName returned {code})")
        for parameter, value in ((_RATE, words_a_minute), (_PITCH, pitch), (_RANGE, pitch_range)):
            library.espeak_SetParameter(parameter, value, 0)
        encoded = text.encode()
        code = library.espeak_Synth(encoded, len(encoded) + 1, 0, 0, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        if code or not parts:
            raise RuntimeError(f"voice {voice!r} returns no samples for {text!r} (espeak_Synth returned {code})")
        spoken.append(b"".join(parts))
    return rate, spoken


def main() -> None:
    """Read a request from stdin and write the answer to stdout."""
    out = sys.stdout.buffer
    try:
        rate, spoken = speak(json.load(sys.stdin))
    except (OSError, RuntimeError, AttributeError) as error:
        out.write(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    out.write(json.dumps({"rate": rate, "lengths": [len(part) // 2 for part in spoken]}).encode() + b"\n")
    out.writelines(spoken)


if __name__ == "__main__":
    main()
