"""The built-in data: a stand-in for Sub-URMP made by code, so that everything runs without a download.

    python demo.py my-demo              # write it as a Sub-URMP folder, to look at and to listen to

A pair is half a second of additive synthesis and a drawing of the player at its start. Pitch moves the hand,
loudness the arm or the bell, and in silence the player waits. Looks, pieces and noise are random.
"""
import argparse
import zlib
from collections import namedtuple
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import signal
from scipy.io import wavfile

from runs import InputError, Progress, default_cache, run_command, writing, written_whole

DEMO_VERSION = 2                     # raised whenever the demo data come out otherwise
DEMO_RATE, DURATION = 44_100, 0.5    # Hz; seconds of sound in a pair
BAR, REST_PROBABILITY = 0.6, 0.08    # a bar (seconds) holds one note, two notes or a rest
START = 0.15                         # a pair starts so late in its bar (seconds): its first note sounds there
PIECES = {'train': (1, 2, 3, 4), 'validation': (5, 6)}

GOLD, COPPER, SILVER, BLACK, GREY = (246, 190, 40), (230, 126, 48), (226, 230, 238), (22, 20, 24), (46, 46, 56)
MAROON, IVORY, WOOD, DARK_WOOD = (128, 30, 26), (244, 232, 206), (214, 112, 34), (126, 58, 24)


class DemoInstrument(namedtuple('DemoInstrument', 'register rolloff formants attack vibrato noise scale play lift rest '
                                'fingers hold shapes slide bow seated offset even', defaults=((), None, False, 0, 0))):
    """How an instrument sounds, is held and looks.

    Its sound: lowest and highest pitch (MIDI), slope of the spectrum when soft and loud (dB per octave), resonances
    ((Hz, dB), ...), attack (seconds), vibrato (cents), noise of breath or bow beside the tone (dB); `even` partials are
    this much weaker (dB). In the picture lengths are fractions of its width, y points down, angles are in degrees,
    clockwise. `shapes` are strokes (colour, (x, y, width), ...) in the instrument's own frame (one point: a disc),
    which `scale` and a pose (x and y from the player's mouth, angle) take to the picture: `play` for the softest note,
    which `lift` turns for the loudest, `rest` while the player waits. `fingers`: where the playing hand is at the
    lowest and highest pitch; `hold`: the other hand, or the bow on the strings; `slide`: shapes that move along with
    the playing hand; `bow`: the direction from strings to bow hand; `offset`: of the player from the middle.
    """


def keys(colour, size, *places):
    return tuple((colour, (x, 0, size)) for x in places)


def coil(colour, x, y, radius, width):
    angles = np.radians(np.arange(0, 361, 30))
    return colour, *((x + radius * np.cos(a), y + radius * np.sin(a), width) for a in angles)


def bowed(wood):
    """Body, scroll, fingerboard, tailpiece and bridge; x runs from tail (0) to scroll."""
    return ((wood, (0, 0, .16), (.02, 0, .36), (.16, 0, .42), (.29, 0, .08), (.40, 0, .38), (.54, 0, .32),
             (.55, 0, .10)), (wood, (.94, 0, .07), (1, 0, .10)),
            (BLACK, (.34, 0, .07), (.94, 0, .055)), (BLACK, (.05, 0, .06), (.16, 0, .06)),
            (IVORY, (.24, -.07, .025), (.24, .07, .025)))


DEMO_INSTRUMENTS = {
    'bassoon': DemoInstrument((34, 72), (13, 7), ((480, 14), (1200, 6)), .03, 10, -34,
        1, (0, 0, 4), -16, (.02, .10, 24), ((.14, 0), (-.04, .30)), (-.12, .40),
        ((MAROON, (-.20, .52, .075), (.22, -.17, .055)), (IVORY, (.21, -.16, .07), (.23, -.20, .08)),
         (SILVER, (0, 0, .012), (-.03, .01, .014), (-.06, .07, .016), (.01, .16, .018))), seated=True),
    'cello': DemoInstrument((36, 76), (8, 6), ((250, 6), (600, 5), (2000, 4)), .05, 22, -32,
        .66, (.04, .53, -86), 7, (.10, .53, -66), ((.92, 0), (.52, 0)), (.30, 0),
        ((BLACK, (-.10, 0, .02), (0, 0, .02)), *bowed(WOOD)), bow=172, seated=True),
    'clarinet': DemoInstrument((50, 91), (12, 7), ((1500, 4),), .03, 2, -36,
        .44, (0, 0, 118), 24, (-.06, .20, 75), ((.70, 0), (.28, 0)), (.60, 0),
        ((BLACK, (0, 0, .05), (.10, 0, .09), (.78, 0, .10), (.92, 0, .15), (1, 0, .30)),
         *keys(SILVER, .05, .14, .25, .37, .49, .61, .72, .82)), even=26),
    'double_bass': DemoInstrument((28, 60), (9, 7), ((110, 8), (350, 5)), .06, 8, -30,
        .90, (.17, .69, -93), 5, (.20, .69, -79), ((.90, 0), (.52, 0)), (.30, 0),
        ((BLACK, (-.06, 0, .015), (0, 0, .015)), *bowed(DARK_WOOD)), bow=165, offset=-.12),
    'flute': DemoInstrument((60, 96), (22, 12), ((900, 5),), .05, 25, -22,
        .48, (.04, 0, 172), 14, (-.10, .24, 40), ((.84, 0), (.42, 0)), (.28, 0),
        ((SILVER, (0, 0, .065), (1, 0, .065)), *keys(BLACK, .025, .08, .40, .50, .60, .70, .80))),
    'horn': DemoInstrument((41, 77), (18, 9), ((340, 9),), .06, 3, -38,
        1, (0, 0, 0), 16, (.06, .12, -30), ((.19, .27), (.04, .12)), (-.20, .33),
        (coil(COPPER, .05, .23, .135, .03), coil(COPPER, .05, .23, .07, .024),
         (COPPER, (0, 0, .018), (.02, .05, .02), (.12, .08, .025), (.17, .18, .03)),
         (COPPER, (.1, .11, .03), (-.06, .1, .045), (-.17, .22, .08), (-.2, .29, .17), (-.22, .33, .32))), seated=True),
    'oboe': DemoInstrument((58, 91), (9, 5), ((1050, 14), (2900, 9)), .03, 14, -38,
        .42, (0, 0, 90), -20, (0, .28, 20), ((.72, 0), (.25, 0)), (.62, 0),
        ((IVORY, (0, 0, .03), (.12, 0, .03)), (BLACK, (.12, 0, .055), (.9, 0, .065), (1, 0, .13)),
         *keys(SILVER, .03, .25, .35, .45, .55, .65, .75)), seated=True),
    'sax': DemoInstrument((49, 81), (9, 5), ((700, 6), (1700, 6)), .03, 18, -28,
        1, (0, 0, 0), 16, (-.02, .12, -24), ((-.08, .08), (-.14, .30)), (-.10, .24),
        ((BLACK, (0, 0, .02), (-.03, -.01, .025)),
         (GOLD, (-.03, -.01, .02), (-.08, -.02, .025), (-.08, .06, .04), (-.12, .22, .055), (-.16, .44, .07),
          (-.24, .49, .08), (-.29, .4, .09), (-.30, .28, .11), (-.33, .23, .20)))),
    'trombone': DemoInstrument((40, 72), (17, 6), ((600, 6),), .05, 3, -40,
        .52, (0, 0, 172), 12, (-.05, .12, 118), ((.82, 0), (.40, 0)), (.16, -.03),
        ((GOLD, (0, 0, .03), (.55, 0, .03)), (GOLD, (-.22, -.09, .03), (.55, -.09, .03)),
         (GOLD, (-.22, -.09, .04), (-.36, -.22, .05), (-.24, -.35, .05), (.34, -.35, .10), (.48, -.35, .42))),
        ((SILVER, (-.25, 0, .04), (.28, 0, .04), (.36, -.045, .04), (.28, -.09, .04), (-.25, -.09, .04)),
         (SILVER, (0, 0, .03), (0, -.09, .03))), offset=.12),
    'trumpet': DemoInstrument((55, 82), (15, 3), ((1200, 8),), .03, 8, -38,
        .46, (0, 0, 172), 26, (-.08, .24, 120), ((.34, -.10), (.62, -.10)), (.28, -.12),
        ((GOLD, (0, 0, .06), (.05, 0, .035), (.80, 0, .05), (.92, 0, .12), (1, 0, .38)),
         (GOLD, (.20, 0, .05), (.10, -.10, .05), (.20, -.20, .05), (.68, -.20, .05), (.80, -.10, .05), (.70, 0, .05)),
         *((IVORY, (x, .09, .045), (x, -.24, .045)) for x in (.38, .47, .56)))),
    'tuba': DemoInstrument((28, 58), (17, 9), ((230, 8),), .07, 2, -36,
        1, (0, 0, 0), -14, (.02, .06, 20), ((.12, .16), (-.02, .30)), (-.14, .32),
        ((GOLD, (-.13, .08, .07), (-.15, .38, .08), (0, .48, .11), (.14, .4, .12), (.17, -.12, .16), (.17, -.24, .4)),
         coil(GOLD, 0, .25, .10, .05), (GOLD, (0, .02, .03), (-.06, .02, .03), (-.13, .08, .06)),
         *((IVORY, (x, .18, .024), (x, .32, .024)) for x in (-.03, .01, .05))), seated=True),
    'viola': DemoInstrument((48, 84), (9, 7), ((220, 6), (700, 8)), .05, 22, -30,
        .48, (.02, .08, 22), -10, (.02, .36, -55), ((.94, 0), (.60, 0)), (.30, 0),
        bowed(DARK_WOOD), bow=160, seated=True, offset=-.06),
    'violin': DemoInstrument((55, 96), (7, 5), ((480, 5), (2800, 8)), .04, 26, -30,
        .40, (.03, .05, -6), -14, (.06, .32, 50), ((.94, 0), (.58, 0)), (.30, 0),
        bowed(WOOD), bow=140),
}

Note = namedtuple('Note', 'start duration pitch loudness')    # seconds, seconds, MIDI, 0 ... 1
REST = Note(0, 0, 0, 0)
Player = namedtuple('Player', 'skin hair shirt x light')


def stable_rng(*key):
    """A random generator that depends on `key` alone, in every process and on every machine."""
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def demo_melody(register, rng, end):
    """The notes of a piece up to `end` seconds: a random walk within the register, with rests."""
    low, high = register
    pitch, notes = rng.uniform(low, high), []
    for start in np.arange(0, end, BAR):
        rest, two = rng.random() < REST_PROBABILITY, rng.random() < .5
        onsets = [rng.uniform(0, .12), rng.uniform(.32, .42), BAR]
        for onset, until in zip(onsets, onsets[1:]) if two else [onsets[::2]]:
            pitch = low + abs(pitch + rng.normal(0, 4) - low)      # reflected at either end
            pitch = high - abs(high - pitch)
            loudness = rng.uniform(.05, 1)
            if not rest:
                notes.append(Note(start + onset, until - onset, pitch, loudness))
    return notes


def one_period(instrument, frequency, loud):
    """A period of the tone, (4096,), peak 1: its partials below 18 kHz, so that none aliases."""
    order = np.arange(1, min(int(18_000 / frequency), 100) + 1)
    level = -instrument.rolloff[loud] * np.log2(order) - instrument.even * (order % 2 == 0)
    for centre, gain in instrument.formants:
        level += gain * np.exp(-(2 * np.log2(order * frequency / centre)) ** 2)
    spectrum = np.zeros(2049, complex)
    spectrum[order] = -1j * 10 ** (level / 20)
    period = np.fft.irfft(spectrum)
    return period / np.abs(period).max()


def demo_sound(instrument, notes, moment, rng):
    """The waveform from `moment` (seconds) on: (22050,) float32 in [-1, 1]."""
    time = moment + np.arange(int(DURATION * DEMO_RATE)) / DEMO_RATE
    room, noise = rng.standard_normal((2, len(time)))
    wave = 10 ** (-70 / 20) * room
    noise = 10 ** (instrument.noise / 20) * signal.lfilter([.5], [1, -.5], noise)
    for note in notes:
        inside = (time >= note.start) & (time < note.start + note.duration)
        if not inside.any():
            continue
        t = time[inside] - note.start
        envelope = np.clip(np.minimum(t / instrument.attack, (note.duration - t) / .05), 0, 1)
        frequency = 440 * 2 ** ((note.pitch - 69) / 12)
        vibrato = instrument.vibrato / 1200 * np.sin(2 * np.pi * 5.5 * t)
        phase = np.cumsum(frequency * 2 ** vibrato) / DEMO_RATE
        soft, loud = (np.interp(phase, np.arange(4096) / 4096, one_period(instrument, frequency, loud), period=1)
                      for loud in (False, True))
        bright = envelope * note.loudness                     # a louder tone is a brighter tone
        tone = (1 - bright) * soft + bright * loud + noise[inside]
        wave[inside] += .07 * (.8 / .07) ** note.loudness * envelope * tone
    return np.clip(wave, -1, 1).astype(np.float32)


def demo_player(rng):
    """Random looks; light shirts, so that every instrument stands out."""
    skin, hair, shirt = (colours[rng.integers(4)] for colours in (
        ((246, 208, 178), (232, 186, 150), (186, 128, 92), (128, 84, 60)),
        ((36, 26, 22), (92, 56, 30), (206, 166, 92), (150, 146, 146)),
        ((240, 238, 232), (206, 214, 224), (222, 206, 196), (198, 216, 200))))
    return Player(skin, hair, shirt, x=rng.uniform(.48, .52), light=rng.uniform(.9, 1.2))


@lru_cache(maxsize=8)
def empty_stage(light, size):
    """A blue curtain with folds and a wooden floor, darker at the edges: PIL RGB image, size x size."""
    y, x = np.mgrid[:size, :size][..., None] / size
    folds = 1 + .22 * np.sin(50 * x + 1.5 * np.sin(5 * x))
    spot = light * (1 - .8 * ((x - .5) ** 2 + (y - .45) ** 2))
    picture = spot * np.where(y > .88, (128, 90, 66), folds * (34, 66, 150))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def place(points, x, y, angle, scale=1.0):
    """Take points (n, 2 or 3) = (x, y[, width]) from an object's frame to the picture's."""
    points = np.array(points, float) * scale
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    points[:, :2] = points[:, :2] @ ((c, s), (-s, c)) + (x, y)
    return points


def draw_stroke(draw, colour, points):
    """Draw a smooth stroke through points (n, 3) = (x, y, width), with a dark outline."""
    points, canvas = np.array(points, float), draw.im.size[0]
    for _ in range(2 if len(points) > 2 else 0):              # Chaikin's corner cutting
        a, b = points[:-1], points[1:]
        cut = np.stack([.75 * a + .25 * b, .25 * a + .75 * b], 1).reshape(-1, 3)
        points = np.concatenate([points[:1], cut, points[-1:]])
    for fill, margin in ((tuple(int(.45 * c) for c in colour), .009), (colour, 0)):
        centre, half = points[:, :2] * canvas, (points[:, 2:] / 2 + margin) * canvas
        if len(points) == 1:
            draw.ellipse([*(centre - half)[0], *(centre + half)[0]], fill)
            continue
        dx, dy = np.gradient(centre, axis=0).T
        normal = np.stack([dy, -dx], 1) / np.hypot(dx, dy)[:, None]
        left, right = (centre + normal * half).tolist(), (centre - normal * half).tolist()
        for i in range(len(points) - 1):                      # piece by piece, as a coil overlaps
            draw.polygon([*left[i], *left[i + 1], *right[i + 1], *right[i]], fill)


def bent_arm(shoulder, hand, side):
    """The stroke of an arm on `side` (-1 or 1), its elbow down and outwards."""
    reach = np.hypot(*(hand - shoulder))
    across = (hand - shoulder)[::-1] * (-1, 1) * np.sqrt(max((.15 / reach) ** 2 - .25, 0))
    elbow = (shoulder + hand) / 2 + across * (1 if across @ (.6 * side, 1) > 0 else -1)
    return [(*shoulder, .065), (*elbow, .06), (*elbow, .06), (*hand, .045)]


def demo_picture(instrument, player, note, sway, size):
    """The player during `note` (or REST), `sway` beside the usual place: PIL RGB image, size x size."""
    factor = max(2, -(-256 // size))              # drawn larger, then averaged: anti-aliasing
    image = empty_stage(player.light, size * factor).copy()
    stroke = partial(draw_stroke, ImageDraw.Draw(image))
    seated, playing = instrument.seated, note is not REST

    x, neck = player.x + instrument.offset + sway, .39 if seated else .31
    head, hip = neck - .095, neck + .29
    for side in (-1, 1):
        thigh, knee, foot = (x + side * out for out in ((.05, .15, .14) if seated else (.05, .06, .07)))
        stroke(GREY, [(thigh, hip - .04, .10), (thigh, hip, .10), (knee, hip + .06 if seated else .77, .09),
                      (foot, .85, .075), (foot, .95, .07)])
    stroke(player.shirt, [(x, neck - .02, .06), (x, neck, .20), (x, neck + .08, .22), (x, hip + .02, .17)])
    stroke(player.hair, [(x, head - .018, .155)])
    stroke(player.skin, [(x, head + .012, .125)])
    for side in (-1, 1):
        stroke(BLACK, [(x + side * .024, head + .005, .006)])

    # What is heard: loudness turns the instrument and draws the bow, pitch moves the fingers.
    height = np.interp(note.pitch, instrument.register, (0, 1))
    dx, dy, angle = instrument.play if playing else instrument.rest
    pose = x + dx, head + .045 + dy, angle + instrument.lift * note.loudness, instrument.scale
    fingers = np.array([1 - height, height]) @ instrument.fingers
    hands = place([fingers, instrument.hold], *pose)
    strokes = [(colour, place(points, *pose)) for colour, *points in instrument.shapes]
    strokes += [(colour, place(np.add(points, (*fingers, 0)), *pose)) for colour, *points in instrument.slide]
    if instrument.bow is not None:
        grip = .05 + .22 * note.loudness
        bow = (*hands[1], instrument.bow) if playing else (x - .17, neck + .22, -75)     # hanging down at the side
        hands[1], tip = place([(grip, 0), (grip - .40, 0)], *bow)
        strokes.append((IVORY, [(*hands[1], .016), (*tip, .016)]))

    hands = hands[hands[:, 0].argsort()]                      # from left to right: uncrossed arms
    for side, hand in zip((-1, 1), hands):
        shoulder = np.array([x + side * .095, neck + .045])
        stroke(player.shirt, bent_arm(shoulder, hand, side))
    for colour, points in strokes:
        stroke(colour, points)
    for hand in hands:
        stroke(player.skin, [(*hand, .05)])
    return image.reduce(factor)


def demo_pair(instrument, split, piece, moment, seed=0, size=256):
    """Half a second of a piece from `moment` (seconds) on, and its player at that moment, as Sub-URMP has it.

    Returns the waveform, (22050,) float32 in [-1, 1] at 44,100 Hz, and a PIL RGB image.
    """
    rng, instrument = stable_rng(seed, split, instrument, piece), DEMO_INSTRUMENTS[instrument]
    player = demo_player(rng)
    notes = demo_melody(instrument.register, rng, moment + DURATION)
    shown = next((note for note in notes if note.start <= moment < note.start + note.duration), REST)
    waveform = demo_sound(instrument, notes, moment, rng)
    return waveform, demo_picture(instrument, player, shown, rng.uniform(-.01, .01), size)


def write_demo(directory, train=40, validation=12, size=256, seed=0):
    """Write `train` and `validation` pairs of each instrument, laid out as Sub-URMP is: chunk/<split>/<instrument>/
    <stem>.wav and img/.../<stem>.jpg, the stem <instrument><piece>_<milliseconds>. The same arguments, the same bytes.
    """
    counts = {'train': train, 'validation': validation}
    plan = [(split, name, i) for split in counts for name in DEMO_INSTRUMENTS for i in range(counts[split])]
    progress = Progress()
    for done, (split, name, i) in enumerate(plan, 1):
        bar, piece = divmod(i, len(PIECES[split]))
        moment, piece = bar * BAR + START, PIECES[split][piece]
        waveform, picture = demo_pair(name, split, piece, moment, seed, size)
        stem = f'{split}/{name}/{name}{piece:02d}_{round(1000 * moment)}'
        sound, image = Path(directory, f'chunk/{stem}.wav'), Path(directory, f'img/{stem}.jpg')
        for path in (sound, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(sound, DEMO_RATE, np.round(32767 * waveform).astype(np.int16))
        picture.save(image, quality=92)
        progress(f'demo data: {done} of {len(plan)} pairs drawn', last=done == len(plan))


def demo_data(size, cache=None):
    """The folder of the demo data at size x size, below the cache; written once. Raises InputError if it cannot be."""
    folder = Path(cache or default_cache()) / f'demo-v{DEMO_VERSION}-{size}'
    if not folder.exists():
        with writing(folder):
            if not folder.exists():     # another process may have written it while we waited
                with written_whole(folder) as part:
                    write_demo(part, size=size)
    return folder


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('directory', metavar='DIR', help='the new folder to write')
    parser.add_argument('--size', type=int, default=256, metavar='N', help='side of the pictures in pixels')
    args = parser.parse_args(argv)
    if args.size < 1:
        parser.error('--size must be at least 1')
    if Path(args.directory).exists():
        raise InputError(f'{args.directory}: exists already; name a new folder')
    write_demo(args.directory, size=args.size)


if __name__ == '__main__':
    run_command(main)
