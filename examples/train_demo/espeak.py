"""The espeak-ng library through ctypes: text and a voice to samples.

Looks for the library and its data in a folder given by `find(folder)` (libespeak-ng.so* beside espeak-ng-data), else
installed on the system (`apt-get install espeak-ng`).
"""

from __future__ import annotations

import ctypes
import ctypes.util
from pathlib import Path

import numpy as np

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS: samples go to the callback
RATE, VOLUME, PITCH, RANGE = 1, 2, 3, 4  # espeak_PARAMETER
UTF8 = 1

CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """One per process: the library keeps its state in globals."""

    def __init__(self, folder: Path | None = None) -> None:
        found = sorted(folder.glob("libespeak-ng.so*")) if folder is not None else []
        name = str(found[0].resolve()) if found else ctypes.util.find_library("espeak-ng")
        if name is None:
            raise RuntimeError("espeak-ng is not installed (apt-get install espeak-ng), and --espeak names no folder")
        self.library = ctypes.CDLL(name)
        data = str(folder.resolve()).encode() if found and folder is not None else None
        self.rate = self.library.espeak_Initialize(SYNCHRONOUS, 200, data, 0)
        if self.rate <= 0:
            raise RuntimeError(f"espeak-ng found no data (in {data!r})")
        self.pieces: list[np.ndarray] = []
        self.callback = CALLBACK(self._take)  # kept: the library calls it later
        self.library.espeak_SetSynthCallback(self.callback)

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if samples and count > 0:
            self.pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int = 175, pitch: int = 50, spread: int = 50) -> np.ndarray:
        """float32 samples at `self.rate`. rate: words per minute; pitch and its spread: 0..100."""
        if self.library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"espeak-ng has no voice {voice!r}")
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, spread), (VOLUME, 90)):
            self.library.espeak_SetParameter(parameter, int(value), 0)
        self.pieces = []
        raw = text.encode() + b"\0"
        if self.library.espeak_Synth(raw, ctypes.c_size_t(len(raw)), 0, 1, 0, UTF8, None, None) != 0:
            raise RuntimeError(f"espeak-ng could not say {text!r}")
        self.library.espeak_Synchronize()
        samples = np.concatenate(self.pieces) if self.pieces else np.zeros(1, np.int16)
        return samples.astype(np.float32) / 32768
