"""The built-in data: a stand-in for Sub-URMP made by code, so that all runs without a download.

    python demo.py my-demo              # write it as a Sub-URMP folder, to look at and to listen to

A pair is half a second of additive synthesis and a drawing of the player at its start. Pitch leads
the player across the stage and moves the hand; loudness turns up the light and moves the arm or the
bell; in silence the player waits in the dark. Looks, pieces and noise are random: each instrument
has one player, who plays other pieces in validation than in train.
"""
import argparse
import zlib
from collections import namedtuple
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy.io import wavfile

from runs import (Progress, at_least, default_cache, new_path, run_command, writing,
                  written_whole)

DEMO_VERSION = 5            # raised whenever the demo data come out otherwise
DEMO_RATE = 44_100          # Hz
DURATION = 0.5              # seconds of sound in a pair
BAR = 0.6                   # seconds; a bar holds one note, two notes or a rest
REST_PROBABILITY = 0.08
START = 0.15                # seconds into its bar a pair starts: the bar's first note sounds there
PIECES = {'train': range(1, 9), 'validation': range(9, 13)}
STEP = .12                  # from the middle of the stage to its place for the highest pitch
LIGHT = .7, 1.4             # on the stage, in silence and for the loudest note


# ------------------------------------------------------------------------------ the instruments

@dataclass(frozen=True, kw_only=True)
class DemoInstrument:
    """How an instrument sounds, is held and looks.

    Lengths are fractions of the picture's width, y points down, angles are in degrees, clockwise.
    The instrument is drawn in a frame of its own, which `scale` and a pose (x and y from the
    player's mouth, angle) take to the picture.
    """
    # what is heard
    register: tuple         # lowest and highest pitch (MIDI)
    rolloff: tuple          # slope of the spectrum, when soft and when loud (dB per octave)
    formants: tuple         # resonances: (Hz, dB), ...
    even: float = 0         # even partials are this much weaker (dB)
    attack: float           # seconds
    vibrato: float          # cents
    noise: float            # of breath or bow, beside the tone (dB)
    # how it is held
    seated: bool = False
    offset: float = 0       # of the player from the middle of the stage
    scale: float = 1
    play: tuple             # pose for the softest note
    lift: float             # by how much the loudest note turns it
    rest: tuple             # pose while the player waits
    fingers: tuple          # (x, y) of the playing hand at the lowest and at the highest pitch
    hold: tuple             # (x, y) of the other hand, or of the bow on the strings
    bow: float = None       # the angle from the strings to the bow hand
    # how it looks: strokes (colour, 'x y width, x y width, ...'); one of a single point is a disc
    shapes: tuple
    slide: tuple = ()       # strokes that move along with the playing hand


GOLD = 246, 190, 40
COPPER = 230, 126, 48
SILVER = 226, 230, 238
BLACK = 22, 20, 24
GREY = 46, 46, 56
MAROON = 128, 30, 26
IVORY = 244, 232, 206
WOOD = 214, 112, 34
DARK_WOOD = 126, 58, 24


def keys(colour, size, *places):
    """Discs at these x along the instrument."""
    return [(colour, f'{x} 0 {size}') for x in places]


def coil(x, y, radius, width):
    """The points of a circle of tube."""
    angles = np.radians(np.arange(0, 361, 30))
    return ','.join(f'{x + radius * np.cos(a)} {y + radius * np.sin(a)} {width}' for a in angles)


def bowed(wood):
    """Body, scroll, fingerboard, tailpiece and bridge; x runs from tail (0) to scroll."""
    return [
        (wood, '0 0 .16, .02 0 .36, .16 0 .42, .29 0 .08, .40 0 .38, .54 0 .32, .55 0 .10'),
        (wood, '.94 0 .07, 1 0 .10'),
        (BLACK, '.34 0 .07, .94 0 .055'),
        (BLACK, '.05 0 .06, .16 0 .06'),
        (IVORY, '.24 -.07 .025, .24 .07 .025'),
    ]


DEMO_INSTRUMENTS = {
    'bassoon': DemoInstrument(
        register=(34, 72),
        rolloff=(13, 7), formants=((480, 14), (1200, 6)),
        attack=.03, vibrato=10, noise=-34,
        seated=True, offset=-.06,
        play=(0, 0, 4), lift=-16, rest=(.02, .10, 24),
        fingers=((.14, 0), (-.04, .30)), hold=(-.12, .40),
        shapes=(
            (MAROON, '-.20 .52 .075, .22 -.17 .055'),
            (IVORY, '.21 -.16 .07, .23 -.20 .08'),
            (SILVER, '0 0 .012, -.03 .01 .014, -.06 .07 .016, .01 .16 .018'),
        ),
    ),
    'cello': DemoInstrument(
        register=(36, 76),
        rolloff=(8, 6), formants=((250, 6), (600, 5), (2000, 4)),
        attack=.05, vibrato=22, noise=-32,
        seated=True, offset=-.09, scale=.66,
        play=(.04, .53, -86), lift=7, rest=(.10, .53, -66),
        fingers=((.92, 0), (.52, 0)), hold=(.30, 0), bow=172,
        shapes=(
            (BLACK, '-.10 0 .02, 0 0 .02'),
            *bowed(WOOD),
        ),
    ),
    'clarinet': DemoInstrument(
        register=(50, 91),
        rolloff=(12, 7), formants=((1500, 4),), even=26,
        attack=.03, vibrato=2, noise=-36,
        offset=.02, scale=.44,
        play=(0, 0, 118), lift=24, rest=(-.06, .20, 75),
        fingers=((.70, 0), (.28, 0)), hold=(.60, 0),
        shapes=(
            (BLACK, '0 0 .05, .10 0 .09, .78 0 .10, .92 0 .15, 1 0 .30'),
            *keys(SILVER, .05, .14, .25, .37, .49, .61, .72, .82),
        ),
    ),
    'double_bass': DemoInstrument(
        register=(28, 60),
        rolloff=(9, 7), formants=((110, 8), (350, 5)),
        attack=.06, vibrato=8, noise=-30,
        offset=-.18, scale=.90,
        play=(.17, .69, -93), lift=5, rest=(.20, .69, -79),
        fingers=((.90, 0), (.52, 0)), hold=(.30, 0), bow=165,
        shapes=(
            (BLACK, '-.06 0 .015, 0 0 .015'),
            *bowed(DARK_WOOD),
        ),
    ),
    'flute': DemoInstrument(
        register=(60, 96),
        rolloff=(22, 12), formants=((900, 5),),
        attack=.05, vibrato=25, noise=-22,
        offset=.12, scale=.48,
        play=(.04, 0, 172), lift=14, rest=(-.10, .24, 40),
        fingers=((.84, 0), (.42, 0)), hold=(.28, 0),
        shapes=(
            (SILVER, '0 0 .065, 1 0 .065'),
            *keys(BLACK, .025, .08, .40, .50, .60, .70, .80),
        ),
    ),
    'horn': DemoInstrument(
        register=(41, 77),
        rolloff=(18, 9), formants=((340, 9),),
        attack=.06, vibrato=3, noise=-38,
        seated=True, offset=.08,
        play=(0, 0, 0), lift=16, rest=(.06, .12, -30),
        fingers=((.19, .27), (.04, .12)), hold=(-.20, .33),
        shapes=(
            (COPPER, coil(.05, .23, .135, .03)),
            (COPPER, coil(.05, .23, .07, .024)),
            (COPPER, '0 0 .018, .02 .05 .02, .12 .08 .025, .17 .18 .03'),
            (COPPER, '.1 .11 .03, -.06 .1 .045, -.17 .22 .08, -.2 .29 .17, -.22 .33 .32'),
        ),
    ),
    'oboe': DemoInstrument(
        register=(58, 91),
        rolloff=(9, 5), formants=((1050, 14), (2900, 9)),
        attack=.03, vibrato=14, noise=-38,
        seated=True, offset=.11, scale=.46,
        play=(0, 0, 90), lift=-20, rest=(0, .24, 50),
        fingers=((.72, 0), (.25, 0)), hold=(.62, 0),
        shapes=(
            (IVORY, '0 0 .03, .12 0 .03'),
            (BLACK, '.12 0 .055, .9 0 .065, 1 0 .13'),
            *keys(SILVER, .03, .25, .35, .45, .55, .65, .75),
        ),
    ),
    'sax': DemoInstrument(
        register=(49, 81),
        rolloff=(9, 5), formants=((700, 6), (1700, 6)),
        attack=.03, vibrato=18, noise=-28,
        offset=.18,
        play=(0, 0, 0), lift=16, rest=(-.02, .12, -24),
        fingers=((-.08, .08), (-.14, .30)), hold=(-.10, .24),
        shapes=(
            (BLACK, '0 0 .02, -.03 -.01 .025'),
            (GOLD, '-.03 -.01 .02, -.08 -.02 .025, -.08 .06 .04, -.12 .22 .055, -.16 .44 .07,'
                   '-.24 .49 .08, -.29 .4 .09, -.30 .28 .11, -.33 .23 .20'),
        ),
    ),
    'trombone': DemoInstrument(
        register=(40, 72),
        rolloff=(17, 6), formants=((600, 6),),
        attack=.05, vibrato=3, noise=-40,
        offset=.20, scale=.45,
        play=(0, 0, 172), lift=12, rest=(-.05, .12, 118),
        fingers=((.82, 0), (.40, 0)), hold=(.16, -.03),
        shapes=(
            (GOLD, '0 0 .04, .55 0 .04'),
            (GOLD, '-.22 -.09 .04, .55 -.09 .04'),
            (GOLD, '-.22 -.09 .05, -.36 -.22 .06, -.24 -.35 .06, .34 -.35 .12, .48 -.35 .48'),
        ),
        slide=(
            (GOLD, '-.25 0 .05, .28 0 .05, .36 -.045 .05, .28 -.09 .05, -.25 -.09 .05'),
            (GOLD, '0 0 .04, 0 -.09 .04'),
        ),
    ),
    'trumpet': DemoInstrument(
        register=(55, 82),
        rolloff=(15, 3), formants=((1200, 8),),
        attack=.03, vibrato=8, noise=-38,
        seated=True, offset=-.19, scale=.52,
        play=(0, 0, 8), lift=-26, rest=(.10, .22, 30),
        fingers=((.34, .10), (.62, .10)), hold=(.28, .12),
        shapes=(
            (GOLD, '0 0 .06, .05 0 .05, .76 0 .07, .90 0 .16, 1 0 .46'),
            (GOLD, '.20 0 .06, .10 .10 .06, .20 .20 .06, .68 .20 .06, .80 .10 .06, .70 0 .06'),
            (BLACK, '.36 -.12 .035, .36 .24 .035'),
            (BLACK, '.46 -.12 .035, .46 .24 .035'),
            (BLACK, '.56 -.12 .035, .56 .24 .035'),
        ),
    ),
    'tuba': DemoInstrument(
        register=(28, 58),
        rolloff=(17, 9), formants=((230, 8),),
        attack=.07, vibrato=2, noise=-36,
        seated=True, offset=-.07,
        play=(0, 0, 0), lift=-14, rest=(.02, .06, 20),
        fingers=((.12, .16), (-.02, .30)), hold=(-.14, .32),
        shapes=(
            (GOLD, '-.13 .08 .07, -.15 .38 .08, 0 .48 .11, .14 .4 .12, .17 -.12 .16, .17 -.24 .4'),
            (GOLD, coil(0, .25, .10, .05)),
            (GOLD, '0 .02 .03, -.06 .02 .03, -.13 .08 .06'),
            (IVORY, '-.03 .18 .024, -.03 .32 .024'),
            (IVORY, '.01 .18 .024, .01 .32 .024'),
            (IVORY, '.05 .18 .024, .05 .32 .024'),
        ),
    ),
    'viola': DemoInstrument(
        register=(48, 84),
        rolloff=(9, 7), formants=((220, 6), (700, 8)),
        attack=.05, vibrato=22, noise=-30,
        seated=True, offset=-.11, scale=.44,
        play=(.02, .08, 22), lift=-10, rest=(.02, .36, -55),
        fingers=((.94, 0), (.60, 0)), hold=(.30, 0), bow=160,
        shapes=bowed(DARK_WOOD),
    ),
    'violin': DemoInstrument(
        register=(55, 96),
        rolloff=(7, 5), formants=((480, 5), (2800, 8)),
        attack=.04, vibrato=26, noise=-30,
        offset=-.12, scale=.44,
        play=(.03, .05, -6), lift=-14, rest=(.06, .32, 50),
        fingers=((.94, 0), (.58, 0)), hold=(.30, 0), bow=140,
        shapes=bowed(WOOD),
    ),
}


# ------------------------------------------------------------------------------------ the sound

Note = namedtuple('Note', 'start duration pitch loudness')    # seconds, seconds, MIDI, 0 ... 1
REST = Note(0, 0, 0, 0)


def stable_rng(*key):
    """A random generator that depends on `key` alone, in every process and on every machine."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def demo_melody(register, rng, end):
    """The notes of a piece up to `end` seconds: a random walk within the register, with rests."""
    low, high = register
    pitch = rng.uniform(low, high)
    notes = []
    for start in np.arange(0, end, BAR):
        rest = rng.random() < REST_PROBABILITY
        one_note = rng.random() >= .5
        onsets = [rng.uniform(0, .12), rng.uniform(.32, .42), BAR]
        if one_note:
            del onsets[1]
        for onset, until in pairwise(onsets):
            pitch = low + abs(pitch + rng.normal(0, 4) - low)      # reflected at either end
            pitch = high - abs(high - pitch)
            loudness = rng.uniform(.05, 1)
            if not rest:
                notes.append(Note(start + onset, until - onset, pitch, loudness))
    return notes


def one_period(instrument, frequency, rolloff):
    """A period of the tone, (4096,), peak 1: its partials below 18 kHz, so that none aliases."""
    order = np.arange(1, min(int(18_000 / frequency), 100) + 1)
    level = -rolloff * np.log2(order) - instrument.even * (order % 2 == 0)
    for centre, gain in instrument.formants:
        level += gain * np.exp(-(2 * np.log2(order * frequency / centre)) ** 2)
    spectrum = np.zeros(2049, complex)
    spectrum[order] = -1j * 10 ** (level / 20)
    period = np.fft.irfft(spectrum)
    return period / np.abs(period).max()


def demo_tone(instrument, note, time, noise):
    """The waveform of a note at `time` (seconds from its start), beside this noise."""
    envelope = np.minimum(time / instrument.attack, (note.duration - time) / .05).clip(0, 1)
    frequency = 440 * 2 ** ((note.pitch - 69) / 12)
    vibrato = instrument.vibrato / 1200 * np.sin(2 * np.pi * 5.5 * time)
    phase = np.cumsum(frequency * 2 ** vibrato) / DEMO_RATE
    period = np.arange(4096) / 4096
    soft, loud = [np.interp(phase, period, one_period(instrument, frequency, rolloff), period=1)
                  for rolloff in instrument.rolloff]
    bright = envelope * note.loudness                     # a louder tone is a brighter tone
    tone = (1 - bright) * soft + bright * loud + noise
    return .07 * (.8 / .07) ** note.loudness * envelope * tone


def demo_sound(instrument, notes, moment, rng):
    """The waveform from `moment` (seconds) on: (22050,) float32 in [-1, 1]."""
    from scipy.signal import lfilter        # takes a second to import
    time = moment + np.arange(int(DURATION * DEMO_RATE)) / DEMO_RATE
    room, noise = rng.standard_normal((2, len(time)))
    wave = 10 ** (-70 / 20) * room
    noise = 10 ** (instrument.noise / 20) * lfilter([.5], [1, -.5], noise)
    for note in notes:
        heard = (time >= note.start) & (time < note.start + note.duration)
        if heard.any():
            wave[heard] += demo_tone(instrument, note, time[heard] - note.start, noise[heard])
    return wave.clip(-1, 1).astype(np.float32)


# ---------------------------------------------------------------------------------- the picture

Player = namedtuple('Player', 'skin hair shirt')
SKIN = (246, 208, 178), (232, 186, 150), (186, 128, 92), (128, 84, 60)
HAIR = (36, 26, 22), (92, 56, 30), (206, 166, 92), (150, 146, 146)
SHIRT = (240, 238, 232), (206, 214, 224), (222, 206, 196), (198, 216, 200)  # light, behind gold
STANDING = (                # strokes of the legs, from the middle of the shoulders
    (GREY, '-.05 .25 .10, -.05 .29 .10, -.06 .46 .09, -.07 .54 .075, -.07 .64 .07'),
    (GREY, '.05 .25 .10, .05 .29 .10, .06 .46 .09, .07 .54 .075, .07 .64 .07'),
)
SITTING = (
    (GREY, '-.05 .25 .10, -.05 .29 .10, -.15 .35 .09, -.14 .46 .075, -.14 .56 .07'),
    (GREY, '.05 .25 .10, .05 .29 .10, .15 .35 .09, .14 .46 .075, .14 .56 .07'),
)


def demo_player(rng):
    """Random looks."""
    return Player(*(colours[rng.integers(4)] for colours in (SKIN, HAIR, SHIRT)))


@cache
def empty_stage(size):
    """A blue curtain with folds and a wooden floor, darker at the edges: (size, size, 3) floats."""
    y, x = np.mgrid[:size, :size][..., None] / size
    folds = 1 + .22 * np.sin(50 * x + 1.5 * np.sin(5 * x))
    spot = 1 - .8 * ((x - .5) ** 2 + (y - .45) ** 2)
    return spot * np.where(y > .88, (128, 90, 66), folds * (34, 66, 150))


def place(points, x, y, angle, scale=1.0):
    """Take points (n, 2 or 3) = (x, y[, width]) from an object's frame to the picture's."""
    points = np.array(points, float) * scale
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    points[:, :2] = points[:, :2] @ ((c, s), (-s, c)) + (x, y)
    return points


def place_shapes(shapes, pose, shift=(0, 0)):
    """The strokes (colour, points (n, 3)) of these shapes in the picture."""
    placed = []
    for colour, text in shapes:
        points = np.array([point.split() for point in text.split(',')], float)
        placed.append((colour, place(points + (*shift, 0), *pose)))
    return placed


def draw_stroke(draw, colour, points):
    """Draw a smooth stroke through points (n, 3) = (x, y, width), with a dark outline."""
    points = np.array(points, float)
    canvas = draw.im.size[0]
    if len(points) > 2:
        for _ in range(2):                                    # Chaikin's corner cutting
            a, b = points[:-1], points[1:]
            cut = np.stack([.75 * a + .25 * b, .25 * a + .75 * b], 1).reshape(-1, 3)
            points = np.concatenate([points[:1], cut, points[-1:]])
    outline = tuple(int(.45 * c) for c in colour)
    centre = points[:, :2] * canvas
    for fill, margin in ((outline, .009), (colour, 0)):
        half = (points[:, 2:] / 2 + margin) * canvas
        if len(points) == 1:
            draw.ellipse([*(centre - half)[0], *(centre + half)[0]], fill)
            continue
        dx, dy = np.gradient(centre, axis=0).T
        normal = np.stack([dy, -dx], 1) / np.hypot(dx, dy)[:, None]
        left = centre + normal * half
        right = centre - normal * half
        pieces = np.hstack([left[:-1], left[1:], right[1:], right[:-1]])
        for corners in pieces.tolist():                       # one by one, as a coil overlaps
            draw.polygon(corners, fill)


def bent_arm(shoulder, hand, side):
    """The stroke of an arm on `side` (-1 or 1), its elbow down and outwards."""
    arm = hand - shoulder
    bend = np.sqrt(max((.15 / np.hypot(*arm)) ** 2 - .25, 0))
    across = arm[::-1] * (-1, 1) * bend
    if across @ (.6 * side, 1) <= 0:
        across = -across
    elbow = (shoulder + hand) / 2 + across
    return np.column_stack([(shoulder, elbow, elbow, hand), (.065, .06, .06, .045)])


def demo_picture(instrument, player, note, size):
    """The player during `note` (or REST): PIL RGB image, size x size."""
    factor = max(2, -(-256 // size))              # drawn larger, then averaged: anti-aliasing
    light = np.interp(note.loudness, (0, 1), LIGHT)
    stage = (light * empty_stage(size * factor)).clip(0, 255)
    height = .5 if note is REST else np.interp(note.pitch, instrument.register, (0, 1))
    x = .5 + instrument.offset + STEP * (2 * height - 1)
    neck, legs = (.39, SITTING) if instrument.seated else (.31, STANDING)

    # Loudness turns the instrument and draws the bow, pitch moves the fingers.
    dx, dy, angle = instrument.rest if note is REST else instrument.play
    pose = x + dx, neck - .05 + dy, angle + instrument.lift * note.loudness, instrument.scale
    fingers = np.array([1 - height, height]) @ instrument.fingers
    hands = place([fingers, instrument.hold], *pose)
    held = place_shapes(instrument.shapes, pose) + place_shapes(instrument.slide, pose, fingers)
    if instrument.bow is not None:
        bow = *hands[1], instrument.bow
        if note is REST:
            bow = x - .17, neck + .22, -75                    # hanging down at the side
        grip = .05 + .22 * note.loudness
        hands[1], tip = place([(grip, 0), (grip - .40, 0)], *bow)
        held.append((IVORY, [(*hands[1], .016), (*tip, .016)]))
    hands = hands[hands[:, 0].argsort()]                      # from left to right: uncrossed arms

    strokes = place_shapes([
        *legs,
        (player.shirt, '0 -.02 .06, 0 0 .20, 0 .08 .22, 0 .31 .17'),
        (player.hair, '0 -.113 .155'),
        (player.skin, '0 -.083 .125'),
        (BLACK, '-.024 -.09 .006'),
        (BLACK, '.024 -.09 .006'),
    ], (x, neck, 0))
    for side, hand in zip((-1, 1), hands):
        shoulder = np.array([x + side * .095, neck + .045])
        strokes.append((player.shirt, bent_arm(shoulder, hand, side)))
    strokes += held + [(player.skin, [(*hand, .05)]) for hand in hands]
    image = Image.fromarray(stage.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for colour, points in strokes:
        draw_stroke(draw, colour, points)
    return image.reduce(factor)


# ------------------------------------------------------------------------------------ the pairs

def demo_pair(instrument, split, piece, moment, seed=0, size=256):
    """Half a second of a piece from `moment` (seconds) on, and its player at that moment.

    Returns the waveform, (22050,) float32 in [-1, 1] at 44,100 Hz, and a PIL RGB image.
    """
    player = demo_player(stable_rng(seed, instrument))
    rng = stable_rng(seed, split, instrument, piece)
    instrument = DEMO_INSTRUMENTS[instrument]
    notes = demo_melody(instrument.register, rng, moment + DURATION)
    shown = REST
    for note in notes:
        if note.start <= moment < note.start + note.duration:
            shown = note
    waveform = demo_sound(instrument, notes, moment, rng)
    return waveform, demo_picture(instrument, player, shown, size)


def write_demo(directory, train=100, validation=16, size=256, seed=0):
    """Write `train` and `validation` pairs of each instrument, laid out as Sub-URMP is:
    chunk/<split>/<instrument>/<stem>.wav and img/.../<stem>.jpg, the stem
    <instrument><piece>_<milliseconds>. The same arguments, the same bytes.
    """
    counts = {'train': train, 'validation': validation}
    total = (train + validation) * len(DEMO_INSTRUMENTS)
    progress = Progress()
    done = 0
    for split, name in product(counts, DEMO_INSTRUMENTS):
        sounds = Path(directory, 'chunk', split, name)
        pictures = Path(directory, 'img', split, name)
        sounds.mkdir(parents=True, exist_ok=True)
        pictures.mkdir(parents=True, exist_ok=True)
        for i in range(counts[split]):
            bar, nth = divmod(i, len(PIECES[split]))
            piece = PIECES[split][nth]
            moment = bar * BAR + START
            waveform, picture = demo_pair(name, split, piece, moment, seed, size)
            stem = f'{name}{piece:02d}_{round(1000 * moment)}'
            samples = np.round(32767 * waveform).astype(np.int16)
            wavfile.write(sounds / f'{stem}.wav', DEMO_RATE, samples)
            picture.save(pictures / f'{stem}.jpg', quality=92)
            done += 1
            progress(f'demo data: {done} of {total} pairs drawn', last=done == total)


def demo_data(size, cache=None):
    """The folder of the demo data at size x size, below the cache; written once.

    Raises InputError if it cannot be.
    """
    folder = Path(cache or default_cache()) / f'demo-v{DEMO_VERSION}-{size}'
    if not folder.exists():
        with writing(folder):
            if not folder.exists():     # another process may have written it while we waited
                with written_whole(folder) as part:
                    write_demo(part, size=size)
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('directory', metavar='DIR', help='the new folder to write')
    parser.add_argument('--size', type=at_least(int, 1), default=256, help='pixels a side')
    args = parser.parse_args(argv)
    with new_path(args.directory) as part:
        write_demo(part, size=args.size)


if __name__ == '__main__':
    run_command(main)
