"""Speech Commands through torchaudio, as waveforms of one second."""

import hashlib
import re
import wave
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.datasets import SPEECHCOMMANDS

from gsmooth_lightning.data.base import Files, ImageData, Inputs
from gsmooth_lightning.errors import RequestError, check_whole

RATE = 16_000
NAME = re.compile(r"[^_]+_nohash_\d+(\.wav)+")
SUBSETS = {"train": "training", "val": "validation", "test": "testing"}
SPEAKERS = {"train": range(0, 6), "val": range(6, 7), "test": range(7, 10)}
"""Tenths of the speakers, by the last digit of a hash, when the official lists leave a split empty."""


class SpeechCommands(ImageData):
    """Spoken words (Warden 2018) at 16 kHz and 16 bits, (1, 16000) in [-1, 1]: padded with silence or cut to a second.

    The official lists `validation_list.txt` and `testing_list.txt` split it. Where they leave a split empty (a folder
    with the test clips only), the speakers are split by a hash of their name: 6/10 train, 1/10 validate, 3/10 test.

    Args:
        root: folder that holds `SpeechCommands/speech_commands_v0.02`.
        words: the classes, in order of the labels; None takes all words in alphabetical order.
        version: of the data set's folder.
    """

    def __init__(self, root: str, words: Sequence[str] | None = None, version: str = "v0.02"):
        self.root, self.words, self.version = root, words, version

    @property
    def folder(self) -> Path:
        return Path(self.root) / "SpeechCommands" / f"speech_commands_{self.version}"

    def split(self, name: str, classes: int) -> Inputs:
        clips = self._clips
        words = list(self.words) if self.words is not None else sorted({word for _, word, _ in clips[None]})
        known = {word for _, word, _ in clips[None]}
        absent = [word for word in words if word not in known]
        if absent:
            raise RequestError(f"{self.folder} holds no clips of {absent[0]!r}; correct data.dataset.words")
        if self._by_speaker:
            chosen = [clip for clip in clips[None] if _tenth(clip[2]) in SPEAKERS[name]]
        else:
            chosen = clips[SUBSETS[name]]
            self._check_speakers()
        files = [(path, words.index(word)) for path, word, _ in chosen if word in words]
        return Files(files, self.folder, classes, read_second, nn.Identity())

    def _check_speakers(self) -> None:
        """Refuses lists under which a speaker trains and tests: a list that was cut."""
        train, val, test = ({speaker for *_, speaker in self._clips[subset]} for subset in SUBSETS.values())
        if test & (train | val):
            raise RequestError(
                f"speaker {min(test & (train | val))} is in testing_list.txt of {self.folder} and also outside it: the "
                "lists are not complete; unpack the data set again"
            )

    @cached_property
    def _clips(self) -> dict[str | None, list[tuple[str, str, str]]]:
        """(path below the folder, word, speaker) of every clip, by the official subset, and under None of all."""
        found: dict[str | None, list[tuple[str, str, str]]] = {}
        for subset in (None, *SUBSETS.values()):
            try:
                listed = SPEECHCOMMANDS(self.root, f"speech_commands_{self.version}", subset=subset)
            except (RuntimeError, OSError) as failure:
                if subset is not None and self.folder.is_dir():  # no lists
                    found[subset] = []
                    continue
                raise RequestError(
                    f"{self.folder} is missing; unpack Speech Commands there, or set data.dataset.root to the folder "
                    "above SpeechCommands"
                ) from failure
            paths = [Path(path) for path in listed._walker if Path(path) != self.folder]  # a list's blank line
            for path in paths:
                if not NAME.fullmatch(path.name):
                    raise RequestError(
                        f"{path} is not named SPEAKER_nohash_NUMBER.wav; rename it, or correct validation_list.txt and "
                        "testing_list.txt"
                    )
            found[subset] = [(f"{p.parent.name}/{p.name}", p.parent.name, p.name.split("_")[0]) for p in paths]
        return found

    @property
    def _by_speaker(self) -> bool:
        return not all(self._clips[subset] for subset in SUBSETS.values())

    @property
    def names(self) -> Sequence[str] | None:
        return self.words

    def describe(self) -> str:
        if self._by_speaker:
            how = "split by speaker (6/10 train, 1/10 validate, 3/10 test by SHA-256 of the speaker's name)"
        else:
            how = "split by the official lists"
        words = "all words" if self.words is None else f"{len(self.words)} words"
        return f"Speech Commands {self.version}, {words}, one second at 16 kHz, {how}"


class TimeShift(nn.Module):
    """A waveform, (1, t), earlier or later by up to `most` samples, uniformly at random; silence fills the gap. An
    augmentation for data.augment.

    Raises:
        RequestError: `most` is no whole number from 0 on.
    """

    def __init__(self, most: int):
        super().__init__()
        check_whole("data.augment", most=(most, 0))
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        most = min(self.most, x.shape[-1])
        by = int(torch.randint(-most, most + 1, ()))
        return functional.pad(x, (by, -by))


def read_second(path: str) -> Tensor:
    """A clip as (1, 16000) in [-1, 1]; shorter ones end in silence, longer ones are cut."""
    clip, rate = soundfile.read(path, dtype="int16", always_2d=True)
    try:
        with wave.open(path) as header:  # soundfile reads what is left of a truncated file and says nothing
            promised = header.getnframes()
    except wave.Error as failure:
        raise ValueError(f"no plain PCM: {failure}") from failure
    if len(clip) != promised:
        raise ValueError(f"{len(clip)} samples instead of {promised}")
    if rate != RATE or clip.shape[1] != 1:
        raise ValueError(f"{rate} Hz and {clip.shape[1]} channels instead of {RATE} Hz and 1")
    samples = torch.from_numpy(clip[:RATE, 0].astype(np.float32)) / 32768
    return functional.pad(samples, (0, RATE - len(samples)))[None]


def _tenth(speaker: str) -> int:
    return int(hashlib.sha256(speaker.encode()).hexdigest(), 16) % 10
