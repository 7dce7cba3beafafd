"""The tests: python -m pytest. On a CPU, without network and without any data but the demo's."""
import argparse
import ast
import copy
import csv
import errno
import io
import itertools
import json
import math
import os
import platform
import pwd
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from scipy.io import wavfile
from scipy.signal import resample_poly
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import baselines
import cargan
import demo as demo_module
import evaluate
import generate
import preprocess
import report
import runs
import train
from demo import (BAR, DEMO_INSTRUMENTS, Note, REST, START, demo_melody, demo_pair, demo_picture,
                  demo_player, demo_sound, stable_rng, write_demo)
from evaluate import InceptionV3, frechet_distance, inception, inception_score, kernel_distance
from runs import InputError, writing

HERE = Path(__file__).parent
signal.signal(signal.SIGINT, signal.default_int_handler)        # a background job ignores it
SMALL = ['--size', '32', '--base', '8', '--disc-base', '8', '--batch-size', '5',
         '--init-std', '0.02', '--no-pretrained', '--classifier-epochs', '1']


def run_flags(data, out, *more):
    """The flags of a run of two epochs."""
    flags = ['--data', data, '--cache', data.parent / 'cache', '--out', out, *more]
    return [*map(str, flags), '--epochs', '2', '--device', 'cpu', *SMALL]


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A small demo dataset: 13 classes, 4 pairs in train and 2 in validation each."""
    folder = tmp_path_factory.mktemp('data') / 'demo'
    write_demo(folder, train=4, validation=2, size=64)
    return folder


@pytest.fixture
def data(demo, tmp_path):
    """A copy of the demo dataset to be spoilt."""
    shutil.copytree(demo, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture(scope='session')
def trained(group, two_classes):
    """A run of two epochs, of four steps each, with a copy of the group's C."""
    run, C = two_classes.parent / 'runs/small', group[0] / 'classifier.pt'
    train.main(run_flags(two_classes, run, '--classifier', C, '--workers', '2'))
    return run


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))


def command(*words, **more):
    """Run a command in a process of its own, as a user types it."""
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, **more)


@pytest.fixture
def refused(capsys):
    """Run a command's main(), which must end as bad input should: exit code 2 and one error line
    with these words. Returns all of stderr.
    """
    def run(module, argv, *words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            runs.run_command(lambda: module.main([str(word) for word in argv]))
        err = capsys.readouterr().err
        assert stop.value.code == 2
        line, = [line for line in err.splitlines() if 'error:' in line]
        for word in words:
            assert str(word) in line, line
        return err
    return run


@contextmanager
def small_disk(size):
    """No file can grow beyond `size` bytes."""
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


class Harm:
    """What would make a folder if its pickle were read without weights_only."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def no_network(tmp_path, monkeypatch):
    """An empty download cache, and a proxy where nothing listens."""
    for name in ('https_proxy', 'HTTPS_PROXY'):
        monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'hub'))


def changed(before, after):
    return [name for name in before if not torch.equal(before[name], after[name])]


def same(a, b):
    """Whether two states are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def difference(ours, theirs):
    """|ours - theirs| / |theirs| over lists of tensors: another order of sums moves it little."""
    def joined(tensors):
        return torch.cat([x.detach().double().flatten() for x in tensors])

    error = joined(ours) - joined(theirs)
    return (error.norm() / joined(theirs).norm()).item()


@pytest.fixture(scope='session')
def two_classes(tmp_path_factory):
    """A dataset of 12 pairs in train and 3 in validation of one class, 7 and 1 of another."""
    folder = tmp_path_factory.mktemp('two') / 'two'
    write_demo(folder, train=12, validation=3, size=64)
    for path in folder.glob('*/*/*'):
        if path.name not in ('bassoon', 'viola'):
            shutil.rmtree(path)
    for split, count in (('train', 7), ('validation', 1)):
        for path in folder.glob(f'*/{split}/viola'):
            for file in sorted(path.iterdir())[count:]:
                file.unlink()
    return folder


@pytest.fixture(scope='session')
def two(two_classes):
    """The same at 32x32, opened."""
    return preprocess.open_dataset(two_classes, 32, two_classes.parent / 'cache')


@pytest.fixture(scope='session')
def group(two, two_classes):
    """E, S2IC and CMCGAN, trained by one command for an epoch of four steps: the folder, the flags
    without it, and what was printed.
    """
    flags = ['--data', str(two_classes), '--cache', str(two_classes.parent / 'cache'),
             '--preset', 'small', '--variant', 'E', 'S2IC', 'CMCGAN', '--epochs', '1',
             '--device', 'cpu', *SMALL, '--classifier-epochs', '2']
    out = two_classes.parent / 'group'
    with redirect_stdout(io.StringIO()) as printed:
        train.main([*flags, '--out', str(out)])
    return out, flags, printed.getvalue()


# ------------------------------------------------------------------------------------------- sound

def wav_bytes(payload, bits=16, rate=22050, channels=1, code=1, block=None, speed=None, more=b'',
              before=b'', after=b'', length=None, whole=None, magic=b'RIFF'):
    """A WAV file; `more` goes into its format, `before` and `after` around the sound; `block` and
    `speed` (bytes a frame, a second), `length` (of the sound), `whole` (of the file): its claims.
    """
    block = channels * bits // 8 if block is None else block
    speed = rate * block if speed is None else speed
    form = struct.pack('<HHIIHH', code, channels, rate, speed, block, bits) + more
    length = len(payload) if length is None else length
    sound = struct.pack('<4sI', b'data', length) + payload
    body = b'WAVE' + wav_chunk(b'fmt ', form) + before + sound + after
    return magic + struct.pack('<I', len(body) if whole is None else whole) + body


def wav_chunk(name, content):
    return struct.pack('<4sI', name, len(content)) + content + b'\0' * (len(content) % 2)


@pytest.mark.parametrize('bits', [8, 16, 24, 32])
@pytest.mark.parametrize('channels', [1, 6])
def test_every_wav_format_is_scaled_by_its_full_scale(tmp_path, bits, channels):
    wave = np.random.default_rng(0).uniform(-1, 1, (502, channels))
    wave[500:] = [[-1], [0]]
    full = 2 ** (bits - 1)
    whole = np.round(wave * full).clip(-full, full - 1).astype(int)
    if bits == 8:
        whole += 128                        # unsigned
    samples = [int(x).to_bytes(bits // 8, 'little', signed=bits > 8) for x in whole.flat]
    integers = wav_bytes(b''.join(samples), bits, 192000, channels)
    floats = wav_bytes(wave.astype('<f4').tobytes(), 32, 192000, channels, code=3)
    for content in integers, floats:
        (tmp_path / 'x.wav').write_bytes(content)
        waveform, sample_rate = preprocess.read_wav(tmp_path / 'x.wav')
        assert sample_rate == 192000
        assert waveform.dtype == np.float32
        assert np.abs(waveform - wave.mean(axis=1)).max() <= max(1 / full, 2 ** -23)
        assert waveform[500:].tolist() == [-1, 0]


EXTENSIBLE = struct.pack('<HHIH14s', 22, 20, 0, 1, bytes.fromhex('000000001000800000aa00389b71'))
TWO = struct.pack('<2h', -2 ** 15, 0)
LONG = wav_chunk(b'ds64', struct.pack('<QQQI', 0, 4, 2, 0))
RARE_WAVS = {       # each of them holds full scale downwards and nothing
    '12 bits in 2 bytes': wav_bytes(TWO, 12, block=2),
    '20 bits in 3 bytes, extensible': wav_bytes(b'\0\0\x80\0\0\0', 20, code=0xFFFE, block=3,
                                                more=EXTENSIBLE),
    '64 bits': wav_bytes(struct.pack('<2q', -2 ** 63, 0), 64),
    'floats beyond full scale': wav_bytes(struct.pack('<2d', -1e308, 0), 64, code=3),
    'an unknown part of odd length': wav_bytes(TWO, before=wav_chunk(b'odd ', b'123')),
    'wrong bytes a frame and a second': wav_bytes(TWO, block=1, speed=22050),
    'a stray byte': wav_bytes(TWO, after=b'\0'),
    'three stray bytes': wav_bytes(TWO, after=b'abc'),
    'the header of a part, cut short': wav_bytes(TWO, after=b'LIST\x10'),
    'half a frame': wav_bytes(TWO + b'\1'),
    'written into a pipe by ffmpeg': wav_bytes(TWO, length=2 ** 32 - 1, whole=2 ** 32 - 1),
    'written into a pipe by sox': wav_bytes(TWO, length=0x7ffff000, whole=0x7ffff024),
    'its writer was killed': wav_bytes(TWO, length=0, whole=0),
    'cut short': wav_bytes(TWO, length=100),
    'lengths of 64 bits': wav_bytes(TWO, before=LONG, after=LONG, length=2 ** 32 - 1,
                                    magic=b'RF64'),
}


@pytest.mark.parametrize('kind', RARE_WAVS)
def test_what_is_unambiguous_in_a_wav_is_read_to_its_last_whole_frame(tmp_path, kind):
    (tmp_path / 'x.wav').write_bytes(RARE_WAVS[kind])
    waveform, sample_rate = preprocess.read_wav(tmp_path / 'x.wav')
    assert sample_rate == 22050
    assert waveform.tolist() == [-1, 0]


BAD_WAVS = {
    'empty file': (b'', 'does not begin as RIFF WAVE'),
    'big-endian': (wav_bytes(TWO, magic=b'RIFX'), 'does not begin as RIFF WAVE'),
    'no samples': (wav_bytes(b''), 'no samples of 1 channels'),
    'no samples, but a part': (wav_bytes(b'', after=wav_chunk(b'LIST', b'INFO')),
                               'no samples of 1 channels'),
    'no sound': (b'RIFF\x04\0\0\0WAVE', 'no sound in it'),
    'no format': (b'RIFF\x0c\0\0\0WAVE' + wav_chunk(b'data', TWO), 'codec 0 of 0 bits'),
    'no channels': (wav_bytes(TWO, channels=0), 'no samples of 0 channels'),
    'header alone': (wav_bytes(TWO)[:30], 'no sound in it'),
    'not a number': (wav_bytes(np.full(9, np.nan, '<f4').tobytes(), 32, code=3), 'not finite'),
    'sample rate': (wav_bytes(TWO, rate=1), 'sample rate 1 Hz'),
    'a codec that is no PCM': (wav_bytes(TWO, code=0x55), 'codec 85 of 16 bits'),
}


def hz(mel):
    """Slaney's scale: 66.67 Hz a mel up to 15 mels = 1 kHz, then 27 mels for a factor of 6.4."""
    return 200 / 3 * mel if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def weight(band, k):
    """The weight of FFT bin k in a mel band, by the formula of a triangle of area 1."""
    top = 15 + 27 * math.log(11025 / 1000) / math.log(6.4)
    low, centre, high = (hz(top * (band + i) / 129) for i in range(3))
    f = k * 22050 / 2048
    height = min((f - low) / (centre - low), (high - f) / (high - centre))
    return max(0.0, height) * 2 / (high - low)


def test_mel_filterbank_is_slaneys_by_formula():
    filters = preprocess.mel_filterbank()
    assert filters.shape == (128, 1025)
    for band in (0, 1, 20, 43, 44, 90, 127):
        expected = [weight(band, k) for k in range(1025)]
        np.testing.assert_allclose(filters[band], expected, rtol=1e-5, atol=1e-9)
    # where a triangle spans many bins its sum times the bins' distance is its area
    np.testing.assert_allclose(filters[110:].sum(axis=1) * 22050 / 2048, 1, rtol=1e-2)


@pytest.mark.parametrize('k, amplitude', [(37, 0.5), (200, 0.01), (700, 1.0)])
def test_lms_of_a_tone_by_formula(k, amplitude):
    """A sine in FFT bin k, under a Hann window: power (aN/4)^2 there, (aN/8)^2 on either side."""
    tone = amplitude * np.sin(2 * np.pi * k / 2048 * np.arange(11025)).astype(np.float32)
    lms = preprocess.log_mel_spectrogram(tone, 22050)
    assert lms.shape == (128, 22)
    assert lms.dtype == np.float32
    for band in range(128):
        power = weight(band, k) / 16 + (weight(band, k - 1) + weight(band, k + 1)) / 64
        power *= (amplitude * 2048) ** 2
        if power > 1e-6:
            expected = 10 * math.log10(power)
            np.testing.assert_allclose(lms[band, 3:18], expected, atol=2e-2)    # no reflection


def test_lms_is_absolute_and_exactly_half_a_second():
    rng = np.random.default_rng(1)
    noise = rng.uniform(-0.5, 0.5, 30000).astype(np.float32)
    lms = preprocess.log_mel_spectrogram
    np.testing.assert_allclose(lms(noise / 10, 22050), lms(noise, 22050) - 20, atol=1e-3)
    assert (lms(np.zeros(11025, np.float32), 22050) == -100).all()
    np.testing.assert_array_equal(lms(noise, 22050), lms(noise[:11025], 22050))
    padded = np.pad(noise[:5000], (0, 6025))
    np.testing.assert_array_equal(lms(noise[:5000], 22050), lms(padded, 22050))


@pytest.mark.parametrize('rate', [8000, 44100, 48000, 192000])
def test_other_rates_are_resampled_by_a_filter_designed_once(rate, monkeypatch):
    noise = np.random.default_rng(1).uniform(-0.5, 0.5, 100000).astype(np.float32)
    resampled = resample_poly(noise.astype(np.float64), 22050, rate)
    expected = preprocess.log_mel_spectrogram(resampled, 22050)
    lms = preprocess.log_mel_spectrogram(noise, rate)
    np.testing.assert_allclose(lms, expected, atol=1e-2)
    monkeypatch.setattr('scipy.signal.firwin', None)
    np.testing.assert_array_equal(preprocess.log_mel_spectrogram(noise, rate), lms)


# ------------------------------------------------------------------------------ files and the cache

def png_bytes(width, height, depth, colour, pixels, *parts, wrong=None):
    """A PNG file; `pixels` are its lines, each with a 0 in front, `parts` (name, content) go before
    them; the checksum of the part `wrong` is not its own.
    """
    header = struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)
    content = b'\x89PNG\r\n\x1a\n'
    ends = (b'IDAT', zlib.compress(pixels)), (b'IEND', b'')
    for name, part in (b'IHDR', header), *parts, *ends:
        check = zlib.crc32(name + part) ^ (name == wrong)
        content += struct.pack('>I', len(part)) + name + part + struct.pack('>I', check)
    return content


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_exif(exif):
    """A JPEG with this as what its APP1 says."""
    part = struct.pack('>HH', 0xFFE1, len(exif) + 2) + exif
    return PICTURES['JPEG'][:2] + part + PICTURES['JPEG'][2:]


ORANGE = b'\xf0\x80\x20'
PICTURE = Image.new('RGB', (64, 64), tuple(ORANGE))
PICTURES = {
    'JPEG': saved(PICTURE, 'JPEG', quality=95),
    'CMYK JPEG': saved(PICTURE.convert('CMYK'), 'JPEG', quality=95),
    'PNG': saved(PICTURE, 'PNG'),
    'PNG with alpha': saved(PICTURE.convert('RGBA'), 'PNG'),
    'PNG of a palette': saved(PICTURE.quantize(2), 'PNG', transparency=b'\xff\0'),
    'PNG of 16 bits': png_bytes(1, 1, 16, 2, b'\0\xf0\1\x80\2\x20\3'),
}
PICTURES |= {
    'Exif that is no TIFF': with_exif(b'Exif\0\0nothing of the kind'),
    'Exif that is cut short': with_exif(b'Exif\0\0II*\0\x08\0\0\0\x09\0'),
    'PNG with a bad Exif': png_bytes(1, 1, 8, 2, b'\0' + ORANGE, (b'eXIf', b'no TIFF')),
}


@pytest.mark.filterwarnings('ignore')        # which the commands ignore as well
@pytest.mark.parametrize('kind', PICTURES)
def test_every_kind_of_picture_has_its_colours(tmp_path, kind):
    (tmp_path / 'x').write_bytes(PICTURES[kind])
    pixels = preprocess.read_image(tmp_path / 'x', 8)
    assert pixels.shape == (8, 8, 3)
    assert np.abs(pixels.astype(int) - tuple(ORANGE)).max() <= 3


def test_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same(tmp_path):
    x = np.linspace(0, 255, 1920)
    pixels = np.stack([x, x[::-1], 128 + 99 * np.sin(x / 9)], axis=1)
    full = Image.fromarray(np.tile(pixels.astype(np.uint8), (1080, 1, 1)))
    full.save(tmp_path / 'frame.jpg', quality=95)
    small = preprocess.read_image(tmp_path / 'frame.jpg', 64)
    expected = np.asarray(full.resize((64, 64), Image.Resampling.BICUBIC))
    assert np.abs(small - expected.astype(int)).mean() < 1


def test_grey_of_16_bits_is_not_clipped(tmp_path):
    (tmp_path / 'grey.png').write_bytes(png_bytes(1, 1, 16, 0, b'\0\x70\0'))
    assert preprocess.read_image(tmp_path / 'grey.png', 1).tolist() == [[[0x70] * 3]]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('suffix', ['jpg', 'png'])
def test_a_picture_on_its_side_is_turned_whatever_stands_beside(tmp_path, suffix):
    halves = Image.new('RGB', (64, 32))
    halves.paste((255, 255, 255), (0, 0, 32, 32))
    exif = struct.pack('<2sHIH', b'II', 42, 8, 2)
    exif += struct.pack('<HHIHH', 0x0112, 3, 1, 6, 0)       # turn it right: the left half is above
    exif += struct.pack('<HHIIIii', 0x011a, 10, 1, 38, 0, -1, 0)        # dots an inch: -1/0
    halves.save(tmp_path / f'side.{suffix}', exif=b'Exif\0\0' + exif + bytes(4))
    rows = preprocess.read_image(tmp_path / f'side.{suffix}', 8).mean(axis=(1, 2))
    assert rows[:3].min() > 200
    assert rows[5:].max() < 50


@pytest.mark.parametrize('hidden', [0, 250])
@pytest.mark.parametrize('kind', ['RGBA', 'LA', 'RGB', 'P'])
def test_what_is_transparent_is_white_whatever_colour_hides_there(tmp_path, kind, hidden):
    image = Image.new('RGBA', (8, 8), (hidden, hidden, hidden, 0))
    image.paste((30, 30, 30, 255), (0, 4, 8, 8))
    image = image.convert(kind)
    if kind == 'P':
        image.info['transparency'] = image.getpixel((0, 0))
    elif kind == 'RGB':
        image.info['transparency'] = (hidden,) * 3
    image.save(tmp_path / 'x.png')
    pixels = preprocess.read_image(tmp_path / 'x.png', 8)
    assert (pixels[:4] == 255).all()
    assert np.ptp(pixels[4:]) < 30
    assert pixels[4:].max() < 60


GREY = 1, 1, 8, 0, b'\0\0'
BAD_PICTURES = {
    'empty picture': (b'', 'not a PNG file'),
    'GIF': (saved(PICTURE, 'GIF'), 'not a PNG file'),
    'JPEG cut short': (PICTURES['JPEG'][:-10], 'truncated'),
    'PNG cut short': (PICTURES['PNG'][:-30], 'not a readable'),
    'PNG larger than 8K': (png_bytes(13000, 13000, 1, 0, bytes(9)), '13000 x 13000 pixels'),
    'a wrong checksum of a text': (png_bytes(*GREY, (b'tEXt', b'k\0v'), wrong=b'tEXt'),
                                   "bad header checksum in b'tEXt'"),
    'a strange packing of a text': (png_bytes(*GREY, (b'zTXt', b'k\0\1v')), 'compression method 1'),
    'text bomb': (png_bytes(*GREY, (b'zTXt', b'k\0\0' + zlib.compress(bytes(2 ** 21)))),
                  'too large'),
}


READERS = preprocess.read_wav, partial(preprocess.read_image, size=64)


@pytest.mark.parametrize('kind', [*BAD_WAVS, *BAD_PICTURES])
def test_a_bad_file_is_named_with_the_true_reason(tmp_path, kind):
    content, why = (BAD_WAVS | BAD_PICTURES)[kind]
    (tmp_path / 'bad').write_bytes(content)
    with pytest.raises(InputError) as error:
        READERS[kind in BAD_PICTURES](tmp_path / 'bad')
    line, = str(error.value).splitlines()
    assert line.startswith(f'{tmp_path}/bad: ')
    assert why in line
    assert '; give ' in line


@pytest.mark.parametrize('kind', ['nothing', 'dangling', 'folder', 'fifo', 'device', 'huge'])
def test_what_is_no_file_or_too_large_is_named_and_not_waited_for(tmp_path, kind):
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'folder').mkdir()
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'device').symlink_to('/dev/zero')
    with open(tmp_path / 'huge', 'wb') as file:
        file.truncate(2 ** 31)              # a hole: nobody's memory has to hold it
    why = 'not a file'
    if kind == 'huge':
        why = 'more than 128 MiB'
    elif kind in ('nothing', 'dangling'):
        why = 'no such file'
    for read in READERS:
        with pytest.raises(InputError, match=f'{tmp_path / kind}: .*{why}.*; give '):
            read(tmp_path / kind)


def rename(folder, old, new):
    (folder / old).rename(folder / new)


def test_both_layouts_and_any_class_names(data):
    for part in ('chunk/train', 'chunk/validation', 'img/train', 'img/validation'):
        rename(data / part, 'cello', 'Zaunkönig')
        rename(data / part, 'bassoon', 'diesel engine 4')
    frame = next((data / 'img/train/Zaunkönig').iterdir())
    Image.open(frame).save(frame.with_suffix('.PNG'))
    frame.unlink()
    (data / 'img/train/Zaunkönig/notes.txt').write_bytes(b'x')
    dataset = preprocess.open_dataset(data, 32)
    assert {'Zaunkönig', 'diesel engine 4'} < {*dataset.classes}
    assert dataset.lms_channels == 1
    assert (len(dataset.train), len(dataset.validation)) == (52, 26)

    for path in sorted(data.glob('chunk/*/*/*.wav')):   # the authors' sample: LMS as RGB pictures
        lms = preprocess.log_mel_spectrogram(*preprocess.read_wav(path))
        pixels = ((lms.clip(-80, 40) + 80) * 2).astype(np.uint8)
        Image.fromarray(pixels).convert('RGB').save(path.with_suffix('.png'))
        path.unlink()
    for old, new in (('chunk', 'spectram'), ('spectram/validation', 'spectram/test'),
                     ('img', 'img_256'), ('img_256/validation', 'img_256/test')):
        rename(data, old, new)
    dataset = preprocess.open_dataset(data, 32)
    lms, image, label = dataset.train.batch(range(3))
    assert dataset.lms_channels == 3
    assert lms.shape == image.shape == (3, 3, 32, 32)
    average = (lms.mean(dim=3).permute(0, 2, 1).flatten(1) + 1) * 127.5     # S lines of 3 colours
    torch.testing.assert_close(dataset.train.average_lms()[:3], average)
    brightness = (lms.mean(dim=(1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(dataset.train.loudness()[:3], brightness)


@pytest.fixture(scope='session')
def packed(demo, tmp_path_factory):
    """The demo dataset at 32 pixels, for tests that only read it."""
    return preprocess.open_dataset(demo, 32, tmp_path_factory.mktemp('packed'))


def test_batches_are_what_the_files_hold(demo, tmp_path):
    dataset = preprocess.open_dataset(demo, 64, tmp_path)
    split = dataset.train
    assert dataset.classes == sorted(DEMO_INSTRUMENTS)
    assert len(split) == 52
    lms, image, label = split.batch([5, 40])
    assert lms.shape == (2, 1, 64, 64)
    assert [part.dtype for part in (lms, image, label)] == [torch.float32] * 2 + [torch.int64]
    for row, index in enumerate([5, 40]):
        name = f'{dataset.classes[label[row]]}/{split.stems[index]}'
        frame = np.asarray(Image.open(demo / f'img/train/{name}.jpg')) / 127.5 - 1
        np.testing.assert_allclose(image[row].permute(1, 2, 0), frame, atol=1e-6)
        db = preprocess.log_mel_spectrogram(*preprocess.read_wav(demo / f'chunk/train/{name}.wav'))
        expected = Image.fromarray(((db + 80) / 60 - 1).clip(-1, 1))
        expected = expected.resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(lms[row, 0], np.asarray(expected), atol=1e-3)    # float16
        average = split.average_lms()[index]
        np.testing.assert_allclose(average, db.mean(axis=1), atol=0.05)
        loudness = 10 * np.log10((10 ** (db.astype(float) / 10)).mean())
        assert abs(split.loudness()[index] - loudness) < 0.05


def test_every_mel_band_reaches_the_networks_picture():
    bands = torch.full((128, 128, 22), -80.0)
    bands[range(128), range(128)] = 40          # one clip for each band
    for size in (16, 32, 64, 128, 256):
        loudest = preprocess.network_lms(bands, size).amax((1, 2, 3))
        assert (loudest > -0.9).all(), size


def test_a_recording_is_heard_in_bounded_memory_to_its_end():
    wave = np.random.default_rng(0).uniform(-1, 1, 8000 * 3 - 1).astype(np.float32)
    parts = list(preprocess.recording_lms(wave, 8000, 32, hop=0.25, batch_size=5))
    assert [len(part) for part in parts] == [5, 5, 2]
    last = preprocess.log_mel_spectrogram(wave[22000:], 8000)
    expected = preprocess.network_lms(torch.from_numpy(last)[None], 32)
    torch.testing.assert_close(parts[-1][-1:], expected)
    assert len(list(preprocess.recording_lms(wave[:100], 8000, 32))) == 1


def test_a_subset_holds_these_pairs_of_the_same_cache(packed):
    split = packed.validation
    few = split.subset(torch.tensor([3, 25, 4]))
    assert few.frames is split.frames
    assert few.stems == [split.stems[i] for i in (3, 25, 4)]
    for one, other in zip(few.subset([1, 2]).batch([0, 1]), split.batch([25, 4])):
        assert torch.equal(one, other)
    assert len(split.subset([])) == 0


@pytest.mark.parametrize('n, batch_size, least, sizes', [
    (52, 32, 2, [26, 26]), (5, 1, 2, [3, 2]), (5, 1, 1, [1] * 5), (1, 32, 2, [1]),
    (9, 4, 4, [5, 4])])
def test_no_batch_has_fewer_pairs_than_asked_for(packed, n, batch_size, least, sizes):
    split = packed.train.subset(range(n))
    batches = split.indices(batch_size, seed=1, least=least)
    assert [len(batch) for batch in batches] == sizes
    assert split.count(batch_size, least) == len(sizes)
    assert torch.equal(torch.cat(batches), split.order(1))
    assert sorted(torch.cat(batches).tolist()) == split.order().tolist()


@pytest.mark.parametrize('n', [52, 47, 9])
def test_an_epoch_goes_on_after_any_pair_with_any_batch_size(packed, n):
    """No pair is left out and none comes twice; with the same batch size the batches are the same.
    """
    split = packed.train.subset(range(n))
    assert not torch.equal(split.order(1), split.order(2))
    for before, after in itertools.product([3, 7, 8, 64], repeat=2):
        batches = split.indices(before, seed=1)
        for number in range(len(batches)):
            done = [index for batch in batches[:number] for index in batch]
            rest = split.indices(after, seed=1, start=len(done))
            assert [*done, *torch.cat(rest)] == split.order(1).tolist()
            assert max(map(len, rest)) <= after
            assert before != after or all(map(torch.equal, rest, batches[number:]))
    assert list(split.batches(8, seed=1, start=n)) == []
    for indices, batch in zip(split.indices(4, 1, start=5), split.batches(4, seed=1, start=5)):
        assert torch.equal(batch[1], split.batch(indices)[1])


@pytest.mark.parametrize('n, batch_size', [(7, 4), (52, 8), (2, 64)])
def test_four_processes_share_each_batch_and_none_goes_without(packed, n, batch_size):
    split = packed.train.subset(range(n))
    parts = [list(split.batches(batch_size, seed=5, part=part, parts=4)) for part in range(4)]
    batches = split.indices(batch_size, seed=5)
    assert [len(part) for part in parts] == [len(batches)] * 4      # all take part in every step
    for indices, *shares in zip(batches, *parts):
        whole = split.batch(indices)
        for part in range(len(indices), 4):                             # stand-ins
            assert torch.equal(shares[part][1], whole[1][:1])
        for tensor, *pieces in zip(whole, *shares[:len(indices)]):      # the others are the batch
            assert torch.equal(torch.cat(pieces), tensor)


def test_cache_is_made_once_and_notices_every_change(data, tmp_path, capsys, monkeypatch):
    def packs(size=32, data=data):
        preprocess.open_dataset(data, size, tmp_path / 'cache')
        return 'packing' in capsys.readouterr().err

    before = sorted(data.rglob('*'))
    assert packs()
    assert not packs()
    monkeypatch.setattr(preprocess, 'CACHE_VERSION', preprocess.CACHE_VERSION + 1)
    assert packs()
    assert packs(size=64)
    assert not packs()
    wav = next((data / 'chunk/train/oboe').iterdir())
    wav.write_bytes(wav.read_bytes() + b'\0\0')
    assert packs()
    stamp = wav.stat().st_mtime_ns
    os.utime(wav, ns=(stamp, stamp + 1000))
    assert packs()
    frame = next((data / 'img/train/oboe').iterdir())
    frame.rename(tmp_path / frame.name)
    assert packs()
    monkeypatch.chdir(data.parent)          # by whatever path, with something left out as well
    assert not packs(data='data')
    (tmp_path / frame.name).rename(frame)
    assert packs()
    assert sorted(data.rglob('*')) == before            # nothing put there


def cut_short(path):                        # as by a power cut
    os.truncate(path, path.stat().st_size - 1)


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def test_whatever_stands_in_the_caches_place_it_is_built_again(data, tmp_path, capsys):
    folder = preprocess.open_dataset(data, 32, tmp_path / 'cache').folder

    def built_again():
        capsys.readouterr()
        split = preprocess.open_dataset(data, 32, tmp_path / 'cache').train
        assert len(split.batch([51])[0]) == 1
        return 'packing' in capsys.readouterr().err

    for spoil, name in ((cut_short, 'frames'), (made_a_folder, 'frames'), (cut_short, 'lms'),
                        (Path.unlink, 'lms'), (made_a_folder, 'meta.json')):
        spoil(folder / name)
        assert built_again(), (spoil, name)
    for text in ('[]', '[' * 10 ** 5, '\xff'):
        (folder / 'meta.json').write_text(text)
        assert built_again(), text
    left = folder.rename(folder.with_name(f'{folder.name}.part'))       # as by kill -9
    assert built_again()
    assert not left.exists()


def test_two_that_want_the_same_cache_build_it_once(data, tmp_path, monkeypatch):
    cache = tmp_path / 'cache'
    folder = preprocess.open_dataset(data, 32, cache).folder
    shutil.rmtree(folder)
    err = io.StringIO()                     # capsys loses what threads print while it is read
    monkeypatch.setattr(sys, 'stderr', err)
    with ThreadPoolExecutor(2) as pool:
        with writing(folder):               # until both wait for it
            both = [pool.submit(preprocess.open_dataset, data, 32, cache) for _ in range(2)]
            while err.getvalue().count('waiting for another process') < 2:
                assert not any(job.done() for job in both)
                time.sleep(0.01)
        assert [len(job.result().train) for job in both] == [52, 52]
    assert err.getvalue().count('78 of 78') == 1
    assert list(cache.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written(data, tmp_path, refused):
    (tmp_path / 'file').write_text('')
    flags = ['--data', data, '--size', 32, '--cache']
    refused(preprocess, [*flags, tmp_path / 'file'], tmp_path / 'file/data-32', '--cache')
    with small_disk(10 ** 5):
        words = 'cannot be written (File too large); ', '--cache'
        line = refused(preprocess, [*flags, tmp_path / 'cache'], *words)
    assert f'error: {tmp_path / "cache" / "data-32-"}' in line
    assert not list((tmp_path / 'cache').iterdir())


def test_names_that_cannot_be_printed(data, tmp_path, refused, capsys):
    """Line breaks and bytes that are no text, in names of files, of the data folder, of a class."""
    odd = data.rename(data.with_name(os.fsdecode(b'da\xffta')))
    frame = next((odd / 'img/train/oboe').iterdir())
    for name in ('a\nb', 'esc\x1b[2J', os.fsdecode(b'caf\xe9')):
        (odd / f'chunk/train/oboe/{name}.wav').write_bytes(b'bad')
        shutil.copy(frame, odd / f'img/train/oboe/{name}.jpg')
    preprocess.main(['--data', str(odd), '--size', '32'])
    lines = [line for line in capsys.readouterr().err.splitlines() if 'left out: ' in line]
    assert len(lines) == 3
    for line, name in zip(lines, (r'a\nb.wav', r'caf\udce9.wav', r'esc\x1b[2J.wav')):
        assert fr'da\udcffta/chunk/train/oboe/{name}: not a readable WAV file' in line
    rename(odd / 'img/train', 'oboe', 'o\nboe')
    refused(preprocess, ['--data', odd], r'o\nboe', 'rename it')


def test_bad_files_are_named_in_one_pass_and_left_out(data, tmp_path, capsys):
    def some(part, name, nth=0):
        return sorted((data / part / 'train' / name).iterdir())[nth]

    some('img', 'cello').write_bytes(b'')
    empty = some('chunk', 'cello')          # of the same pair, which is named once
    empty.write_bytes(b'')
    lonely_wav = some('chunk', 'sax', 1)
    some('img', 'sax', 1).unlink()
    lonely_jpg = some('img', 'tuba', 2)
    some('chunk', 'tuba', 2).unlink()
    folder = some('img', 'viola')
    made_a_folder(folder)
    link = some('chunk', 'violin')
    link.unlink()
    link.symlink_to(tmp_path / 'nowhere.wav')
    some('img', 'trumpet').with_suffix('.png').write_bytes(b'')         # the .jpg is used

    dataset = preprocess.open_dataset(data, 32, tmp_path / 'cache')
    assert len(dataset.train) == 52 - 5
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('left out:')]
    assert len(lines) == 5
    for path in (empty, lonely_wav, lonely_jpg, folder, link):
        line, = [line for line in lines if f' {path}: ' in line]
        assert len(line.split(f'{path}: ')[1]) > 5          # a reason
    preprocess.open_dataset(data, 32, tmp_path / 'cache')   # named again when the cache is reused
    assert capsys.readouterr().err.count('left out:') == 5


def test_every_class_needs_a_pair_to_train_on_and_none_in_validation(data, refused, capsys):
    flags = ['--data', str(data), '--size', '32']
    for part in ('chunk', 'img'):
        shutil.rmtree(data / part / 'validation/tuba')
    preprocess.main(flags)
    out, err = capsys.readouterr()
    assert 'no pair in validation of class tuba' in err
    assert re.search(r'^tuba +4 +0$', out, re.MULTILINE)
    for wav in (data / 'chunk/train/horn').iterdir():
        wav.write_bytes(b'')
    err = refused(preprocess, flags, data, 'no good pair in train of class horn')
    assert err.count('left out:') == 4
    for frame in data.glob('img/*/*/*'):
        frame.write_bytes(b'')
    refused(preprocess, flags, data, 'no good pair in train of class bassoon, cello')
    shutil.rmtree(data / 'chunk/validation')
    refused(preprocess, flags, 'chunk/validation or chunk/test')
    for part, split in itertools.product(('chunk', 'img'), ('train', 'validation')):
        (data / 'bare' / part / split).mkdir(parents=True)
    refused(preprocess, ['--data', data / 'bare'], 'no sound and no frame in it')
    refused(preprocess, ['--data', data / 'no'], data / 'no', 'chunk/train or spectram/train')


# ---------------------------------------------------------------------- a dataset from a recording

def cut(folder, samples, frames, *more, rate=22050):
    """Write a recording and frames of these numbers, 10 a second, each of a brightness of its own;
    cut them by the command into folder/data.
    """
    (folder / 'frames').mkdir(exist_ok=True)
    for number in frames:
        Image.new('RGB', (40, 30), (number, 0, 0)).save(folder / f'frames/seen-{number:03}.png')
    wavfile.write(folder / 'take.wav', rate, samples)
    words = ['--cut', folder / 'take.wav', folder / 'frames', '--class', 'horn', '--piece', 'solo',
             '--out', folder / 'data', *more]
    preprocess.main([str(word) for word in words])


def test_a_recording_is_cut_so_that_no_sound_is_in_both_splits(tmp_path, capsys):
    """Of a sound in which no sample is like another."""
    sound = np.arange(65536).astype(np.uint16).view(np.int16)       # 8.2 s
    cut(tmp_path, sound, range(1, 83), rate=8000)
    heard, stems = {}, {}
    for split in 'train', 'validation':
        folder = tmp_path / 'data/chunk' / split / 'horn'
        paths = sorted(folder.iterdir(), key=lambda path: int(path.stem.rpartition('_')[2]))
        stems[split] = [path.stem for path in paths]
        heard[split] = set()
        for path in paths:
            rate, chunk = wavfile.read(path)
            milliseconds = int(path.stem.rpartition('_')[2])
            start = milliseconds * 8
            assert rate == 8000
            assert np.array_equal(chunk, sound[start:start + 4000])
            heard[split] |= set(chunk.tolist())
            frame = Image.open(tmp_path / 'data/img' / split / 'horn' / f'{path.stem}.png')
            assert frame.getpixel((5, 5)) == (milliseconds // 100 + 1, 0, 0)
    assert not heard['train'] & heard['validation']
    assert stems['train'][0] == 'hornsolo_0'
    last, first = (int(stems[split][i].rpartition('_')[2]) for split, i in (('train', -1),
                                                                           ('validation', 0)))
    assert last / 1000 + 0.5 <= 0.8 * len(sound) / 8000 <= first / 1000
    assert stems['validation'][-1] == 'hornsolo_7600'               # the last whole half second
    assert f'{len(stems["train"])} pairs more in train' in capsys.readouterr().out
    preprocess.main(['--data', str(tmp_path / 'data'), '--size', '32'])
    assert 'left out' not in capsys.readouterr().err


def test_a_shifted_cut_takes_later_sound(tmp_path, capsys):
    sound = np.arange(32000, dtype=np.int16)
    cut(tmp_path, sound, range(5, 45), '--shift', '0.1', rate=8000)         # the first frame is 5
    chunk = wavfile.read(tmp_path / 'data/chunk/train/horn/hornsolo_300.wav')[1]
    assert np.array_equal(chunk, sound[3200:7200])
    frame = Image.open(tmp_path / 'data/img/train/horn/hornsolo_300.png')
    assert frame.getpixel((0, 0)) == (8, 0, 0)


def test_a_cut_adds_and_never_overwrites(tmp_path, capsys, refused):
    sound = np.zeros(32000, np.int16)
    cut(tmp_path, sound, range(1, 41), rate=8000)
    before = {path: path.read_bytes() for path in tmp_path.glob('data/*/*/*/*')}
    words = ['--cut', tmp_path / 'take.wav', tmp_path / 'frames', '--class', 'horn',
             '--out', tmp_path / 'data']
    refused(preprocess, [*words, '--piece', 'solo'], 'hornsolo_', '--piece')
    preprocess.main([str(word) for word in [*words, '--piece', 'other']])
    after = {path: path.read_bytes() for path in tmp_path.glob('data/*/*/*/*')}
    assert before.items() < after.items()
    assert len(after) == 2 * len(before)
    broken = tmp_path / 'frames/seen-036.png'
    broken.unlink()
    broken.mkdir()
    refused(preprocess, [*words, '--piece', 'third'], broken, 'remove it')
    assert {path: path.read_bytes() for path in tmp_path.glob('data/*/*/*/*')} == after


def test_a_cut_that_leaves_a_split_empty_says_so(tmp_path, capsys):
    cut(tmp_path, np.zeros(16000, np.int16), range(1, 21), rate=8000)
    said = capsys.readouterr().out
    assert ' 0 in validation; ' in said
    assert said.endswith('cut a recording of more than 2.5 s as well\n')


def test_what_cannot_be_cut_is_refused(tmp_path, capsys, refused):
    sound = np.zeros(32000, np.int16)
    cut(tmp_path, sound, range(1, 41), rate=8000)
    take, frames, out = tmp_path / 'take.wav', tmp_path / 'frames', tmp_path / 'new'
    words = ['--cut', take, frames, '--class', 'horn', '--piece', 'solo', '--out', out]
    refused(preprocess, [*words, '--fps', '25'], 'last 1.6 s at 25 a second', '4.0 s', '--fps')
    refused(preprocess, words[:-2], '--out')
    refused(preprocess, [], '--data', '--cut')
    for name in 'a/b', '..', '', 'v\nw':
        refused(preprocess, [*words, '--class', name], '--class', repr(name))
    refused(preprocess, [*words[:-1], ''], '--out')
    for shift in '100', '-100':
        refused(preprocess, [*words, '--shift', shift], take, shift)
    refused(preprocess, [*words, '--shift', 'nan'], '--shift')
    refused(preprocess, [*words[:-1], take], take / 'chunk/train/horn', '--out')
    refused(preprocess, ['--cut', take, tmp_path / 'none', *words[3:]], 'none', 'no such folder')
    (tmp_path / 'empty').mkdir()
    refused(preprocess, ['--cut', take, tmp_path / 'empty', *words[3:]], 'empty', '.jpg or .png')
    (frames / 'seen.png').write_bytes(b'')
    refused(preprocess, words, 'seen.png', 'number')
    (frames / 'seen.png').rename(frames / 'again-07.png')
    refused(preprocess, words, 'seen-007.png', 'again-07.png')
    refused(preprocess, ['--cut', frames / 'again-07.png', frames, *words[3:]], 'WAV')
    assert not out.exists()


# --------------------------------------------------------------------------------------- demo data

def test_demo_data_is_deterministic_and_whole(demo, tmp_path, refused, monkeypatch):
    write_demo(tmp_path / 'again', train=4, validation=2, size=64)
    files = sorted(path.relative_to(demo) for path in demo.rglob('*.*'))
    assert len(files) == 2 * 78
    assert {path.suffix for path in demo.rglob('tuba04_150.*')} == {'.wav', '.jpg'}
    for file in files:
        assert (demo / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()

    monkeypatch.setattr(demo_module, 'write_demo', partial(write_demo, train=1, validation=1))
    demo_module.main([str(tmp_path / 'full'), '--size', '64'])
    refused(demo_module, [tmp_path / 'full'], 'full', 'exists already')
    (tmp_path / 'file').touch()
    refused(demo_module, [tmp_path / 'file/x'], 'file/x: cannot be written', 'another place')
    refused(demo_module, [tmp_path / 'new', '--size', 0], 'at least 1')


def drawn(instrument, *note):
    """The same player with this instrument, during a note (its pitch, loudness) or a rest."""
    note = Note(0, BAR, *note) if note else REST
    player = demo_player(np.random.default_rng(0))
    return np.asarray(demo_picture(instrument, player, note, 64)).astype(int)


def legs(picture):
    """The middle of the legs above the floor, in pixels."""
    return np.nonzero(np.abs(picture[:55] - demo_module.GREY).max(axis=2) < 6)[1].mean()


def test_pitch_leads_the_demos_player_and_loudness_the_light():
    for instrument in DEMO_INSTRUMENTS.values():
        low, high = instrument.register
        left = drawn(instrument, low, 0)
        right = drawn(instrument, high, 0)
        loud = drawn(instrument, high, 1)
        moved = legs(right) - legs(left)
        assert moved == pytest.approx(2 * demo_module.STEP * 64, abs=2)
        assert (loud[0, 0] > 1.5 * left[0, 0]).all()
        for picture in (left, right, loud, drawn(instrument)):
            red, _, blue = picture[:55, [0, -1]].T
            curtain = (blue > 2 * red).mean(axis=1)
            assert (curtain > 0.85).all()       # at most a bell's rim or a knee leaves


def test_the_demos_gestures_follow_the_sound(monkeypatch):
    monkeypatch.setattr(demo_module, 'STEP', 0)
    monkeypatch.setattr(demo_module, 'LIGHT', (1, 1))
    pictures = []
    for instrument in DEMO_INSTRUMENTS.values():
        low, high = instrument.register
        soft = drawn(instrument, low, 0.1)
        gestures = [drawn(instrument, low, 1), drawn(instrument, high, 0.1), drawn(instrument)]
        for other in gestures + pictures:       # and no two instruments look alike
            assert (np.abs(soft - other).max(axis=2) > 40).sum() > 20       # of 4096 pixels
        pictures.append(soft)


def test_the_demos_picture_is_the_first_frame_of_its_half_second():
    """It shows the note that sounds when the clip begins; in a rest the player waits."""
    seen = []
    violin = DEMO_INSTRUMENTS['violin']
    player = demo_player(stable_rng(0, 'violin'))
    for start in BAR * np.arange(30):
        melody = demo_melody(violin.register, stable_rng(0, 'train', 'violin', 1), start + START)
        notes = [note for note in melody if note.start >= start]
        wave, picture = demo_pair('violin', 'train', 1, start + START, size=64)
        assert picture == demo_picture(violin, player, (notes or [REST])[0], 64)
        assert (np.abs(wave[:5000]).max() > 0.005) == bool(notes)
        seen.append(len(notes))
    assert set(seen) == {0, 1, 2}


def test_an_instrument_has_one_player_who_plays_other_pieces_in_validation(monkeypatch):
    monkeypatch.setattr(demo_module, 'demo_picture', lambda instrument, player, *_: player)
    players = set()
    for name in DEMO_INSTRUMENTS:
        one, player = demo_pair(name, 'train', 1, START)
        other, same = demo_pair(name, 'validation', 9, START)
        assert player == same
        assert not np.array_equal(one, other)
        players.add(player)
    assert len(players) > 6                                 # who differ


def test_demo_sounds_have_their_pitch_and_their_rests():
    for name in ('flute', 'cello', 'tuba'):
        instrument = DEMO_INSTRUMENTS[name]
        note = Note(0, BAR, 57, 0.8)            # 220 Hz
        wave = demo_sound(instrument, [note], 0, np.random.default_rng(0))
        power = np.abs(np.fft.rfft(wave * np.hanning(22050))) ** 2
        power = power / power.sum()
        order = np.fft.rfftfreq(22050, 1 / 44100) / 220
        assert power[np.abs(order - 1) < 0.04].sum() > 1e-3
        partial_tones = np.abs(order / order.round().clip(1) - 1) < 0.04
        assert power[partial_tones & (order < 20)].sum() > 0.9
    rest = demo_sound(instrument, [], 0, np.random.default_rng(0))
    assert rest.std() == pytest.approx(10 ** -3.5, rel=0.1)     # -70 dB


# ---------------------------------------------------------------------------------------- networks

@pytest.fixture(scope='module')
def random_C():
    """A classifier of five classes that was never trained."""
    torch.manual_seed(0)
    return cargan.Classifier(5, pretrained=False).eval()


def numbers(*networks):
    """How many parameters they have."""
    return sum(p.numel() for network in networks for p in network.parameters())


def distance(ours, expected):
    """The norm of the difference, relative to the expected one's."""
    return ((ours - expected).norm() / expected.norm()).item()


def convolutions(network):
    kinds = nn.Conv2d, nn.ConvTranspose2d
    return [module for module in network.modules() if isinstance(module, kinds)]


def attentions(network):
    return [module for module in network.modules() if isinstance(module, cargan.SelfAttention)]


def attention_by_formula(module, x):
    """The sum over all keys, written out with the whole matrix."""
    q = module.query(x).flatten(2)                                      # (B, C/8, HW)
    k = F.max_pool2d(module.key(x), 2).flatten(2)                       # (B, C/8, HW/4)
    v = F.max_pool2d(module.value(x), 2).flatten(2)                     # (B, C/2, HW/4)
    beta = torch.einsum('bcq,bck->bqk', q, k).softmax(dim=2)            # (B, HW, HW/4)
    o = torch.einsum('bqk,bck->bcq', beta, v).unflatten(2, x.shape[2:])
    return x + module.scale * module.output(o)


@pytest.mark.parametrize('channels, height, width', [
    (32, 12, 10),
    (3, 5, 7),
])
def test_attention_is_its_formula(channels, height, width):
    torch.manual_seed(0)
    module = cargan.SelfAttention(channels).double()
    x = torch.randn(2, channels, height, width, dtype=torch.double, requires_grad=True)
    image = module(x)
    assert torch.equal(image, x)                                        # the scale starts at 0
    image.square().sum().backward()
    assert module.scale.grad != 0                                       # and leaves it
    nn.init.constant_(module.scale, 0.7)
    ours = module(x)
    expected = attention_by_formula(module, x)
    assert distance(ours, expected) < 1e-12
    direction = torch.randn_like(x)
    variables = [x, *module.parameters()]
    gradients = torch.autograd.grad(ours, variables, direction)
    wanted = torch.autograd.grad(expected, variables, direction)
    for ours, expected in zip(gradients, wanted):
        assert distance(ours, expected) < 1e-10


def test_attention_never_holds_its_matrix():
    """With the kernel that would hold it switched off, it still works, forwards and backwards."""
    module = cargan.SelfAttention(32)
    x = torch.randn(1, 32, 64, 64, requires_grad=True)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        module(x).sum().backward()
    assert x.grad.shape == x.shape
    assert module.query.out_channels == module.key.out_channels == 4
    assert module.value.out_channels == 16


def attention_inputs(network, x):
    """The channels and heights that the network's attention sees, in order."""
    shapes = []

    def note(module, inputs):
        shapes.append(inputs[0].shape[1:3])
    for module in attentions(network):
        module.register_forward_pre_hook(note)
    network(x)
    return shapes


def test_attention_stands_before_the_last_two_convolutions():
    G = cargan.UNetGenerator(14, base=16, size=64)
    inputs = attention_inputs(G, torch.randn(2, 14, 64, 64))
    assert inputs == [(32, 16), (16, 32)]
    for up in (G.up[-3], G.up[-2]):     # the last of their layers: before the skip is concatenated
        assert isinstance(up[-1], cargan.SelfAttention)
    assert G.up[-1][1].in_channels == 2 * 16
    D = cargan.PatchDiscriminator(4, base=16)
    inputs = attention_inputs(D, torch.randn(2, 4, 64, 64))
    assert inputs == [(64, 8), (128, 7)]
    kinds = [type(layer) for layer in D.layers]
    assert kinds[-6:-4] == [cargan.SelfAttention, nn.Conv2d]
    assert kinds[-2:] == [cargan.SelfAttention, nn.Conv2d]


def test_unet_at_256_is_pix2pixs():
    with torch.device('meta'):
        G = cargan.UNetGenerator(3, attention=False)
        D = cargan.PatchDiscriminator(6, attention=False)
    assert numbers(G) == 54_414_531
    assert numbers(D) == 2_768_705
    assert len(G.down) == len(G.up) == 8
    assert [type(layer) for layer in G.modules()].count(nn.Dropout) == 3
    for layer in convolutions(G) + convolutions(D):
        assert layer.kernel_size == (4, 4)
        assert layer.padding == (1, 1)
    assert {layer.stride for layer in convolutions(G)} == {(2, 2)}


@pytest.mark.parametrize('size', [32, 64, 128])
def test_unet_sizes(size):
    G = cargan.UNetGenerator(5, base=4, size=size)
    image = G(torch.randn(1, 5, size, size))        # no statistics of a single value at 1x1
    assert image.shape == (1, 3, size, size)
    assert 0 < image.abs().max() <= 1


@pytest.mark.parametrize('size', [0, 16, 48, 100])
def test_a_size_is_a_power_of_two_from_32(size):
    for network in (cargan.UNetGenerator, cargan.CARGAN, baselines.S2IC, baselines.CMCGAN):
        with pytest.raises(ValueError, match=f'size {size} is not a power of two from 32'):
            network(5, size=size)


def test_every_skip_reaches_the_output():
    G = cargan.UNetGenerator(3, base=4, size=32).eval()
    outputs = []

    def keep(layer, inputs, output):
        output.retain_grad()
        outputs.append(output)
    for down in G.down:                 # nothing comes back from the layer below
        down.register_forward_pre_hook(lambda layer, inputs: inputs[0].detach())
        down.register_forward_hook(keep)
    image = G(torch.randn(1, 3, 32, 32))
    image.square().sum().backward()
    assert len(outputs) == 5
    for output in outputs:
        assert output.grad.any()


def test_discriminator_sees_70x70():
    D = cargan.PatchDiscriminator(4, base=4, attention=False).eval()
    x = torch.randn(1, 4, 256, 256, requires_grad=True)
    logits = D(x)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    seen = x.grad.abs().sum(dim=(0, 1)).nonzero()                       # rows and columns
    extent = seen.amax(dim=0) - seen.amin(dim=0) + 1
    assert extent.tolist() == [70, 70]
    assert isinstance(D.layers[-1], nn.Conv2d)                          # logits, no sigmoid


def test_weights_start_from_a_normal_distribution():
    G = cargan.UNetGenerator(3, base=16, size=64)
    D = cargan.PatchDiscriminator(4, base=16, init_std=0.02)
    for network, std in ((G, 0.2), (D, 0.02)):
        weights = torch.cat([layer.weight.flatten() for layer in convolutions(network)])
        assert weights.std().item() == pytest.approx(std, rel=0.01)
        assert abs(weights.mean()) < 0.01 * std


def test_classifier_is_resnet50_behind_imagenets_normalisation(random_C):
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    normalised = (image * 0.5 + 0.5 - mean) / std
    logits = random_C(image)
    assert distance(logits, random_C.resnet(normalised)) < 1e-4
    assert logits.shape == (2, 5)
    assert len(random_C.state_dict()) == 320


def test_residue_and_its_gradient_into_g1_through_c():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8, init_std=0.02).train()
    C = model.residue.classifier
    assert not C.training
    before = copy.deepcopy(C.state_dict())
    label = torch.tensor([0, 1, 4, 1])
    L_a = torch.eye(5)[label]
    lms = torch.rand(4, 1, 32, 32)
    coarse = model.G1(cargan.concatenate_label(lms, L_a))
    logits, residue = model.residue(coarse, label)
    softmax = logits.exp()
    softmax = softmax / softmax.sum(dim=1, keepdim=True)
    assert distance(residue, L_a - softmax) < 1e-5
    assert residue.sum(dim=1).abs().max() < 1e-6
    residue.square().sum().backward()   # nothing but the residue's path: L_r -> C -> I' -> G1
    assert model.G1.down[0][0].weight.grad.any()
    for p in C.parameters():
        assert p.grad is None
    assert not changed(before, C.state_dict())


@pytest.mark.parametrize('detach', [False, True])
def test_gradient_passes_a_residue_that_is_not_detached(detach):
    model = cargan.CARGAN(5, size=32, base=8, init_std=0.02, detach_residue=detach)
    coarse, fine, logits = model(torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 4, 1]))
    of_picture, through_residue = torch.autograd.grad(fine.sum(), (coarse, logits),
                                                      retain_graph=True, allow_unused=True)
    assert of_picture.any()
    assert detach == (through_residue is None)
    of_L_C, = torch.autograd.grad(logits.square().sum(), coarse)
    assert of_L_C.any()


def test_no_residue_is_left_where_c_is_certain():
    residue_module = cargan.ResidueModule(nn.Identity())
    logits = torch.tensor([[0.0, 0, 200]]).expand(2, 3)                 # class 2
    _, residue = residue_module(logits, torch.tensor([2, 0]))
    assert residue.tolist() == [[0, 0, 0], [1, 0, -1]]


def test_label_is_tiled_over_the_plane():
    image = torch.rand(2, 3, 4, 4)
    vector = torch.tensor([[1.0, 0], [0, -2]])
    joined = cargan.concatenate_label(image, vector)                    # (2, 5, 4, 4)
    assert torch.equal(joined[:, :3], image)
    for row in range(4):
        for column in range(4):
            assert torch.equal(joined[:, 3:, row, column], vector)


def test_cascade_is_eq_1(random_C):
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8, classifier=random_C).eval()
    lms = torch.rand(2, 1, 32, 32)
    label = torch.tensor([3, 0])
    coarse, fine, logits = model(lms, label)
    L_a = torch.eye(5)[label]
    I1 = model.G1(cargan.concatenate_label(lms, L_a))
    L_r = L_a - random_C(I1).softmax(dim=1)
    I2 = model.G2(cargan.concatenate_label(I1, L_r))
    assert distance(coarse, I1) < 1e-5
    assert distance(logits, random_C(I1)) < 1e-5
    assert distance(fine, I2) < 1e-5


# variant: the attention blocks, what G2 sees (B and E: I' and five classes)
@pytest.mark.parametrize('variant, blocks, channels', [
    ('A', 0, 8),
    ('B', 4, 8),
    ('C', 4, 3),
    ('D', 2, None),
    ('E', 4, 8),
])
def test_variants(random_C, variant, blocks, channels):
    model = cargan.CARGAN(5, 32, 8, variant, lms_channels=3, classifier=random_C)
    lms = torch.rand(2, 3, 32, 32)
    coarse, fine, logits = model(lms, torch.tensor([3, 0]))
    assert coarse.shape == fine.shape == (2, 3, 32, 32)
    assert logits.shape == (2, 5)
    assert len(attentions(model)) == blocks
    if variant == 'D':
        assert coarse is fine
        assert not hasattr(model, 'G2')
    else:
        assert model.G2.down[0][0].in_channels == channels


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant 'F'"):
        cargan.CARGAN(5, variant='F')


# ------------------------------------------------------------------------------------------ losses

def test_eq_2_classification_loss():
    a = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])                  # p of the label: 1/4, 1/2
    b = torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])                  # 1/2, 4/5
    label = torch.tensor([1, 1])
    CE_a = (math.log(4) + math.log(2)) / 2
    CE_b = (math.log(2) + math.log(5 / 4)) / 2
    both = cargan.classification_loss(label, a, b)
    assert both.item() == pytest.approx(0.5 * CE_a + 0.5 * CE_b)
    assert cargan.classification_loss(label, a).item() == pytest.approx(0.5 * CE_a)


def logit(p):
    return torch.tensor([math.log(p / (1 - p))])


def test_eq_3_to_5_adversarial_losses():
    real = logit(0.8)
    fakes = logit(0.3), logit(0.4)
    L_D = cargan.discriminator_loss(real, *fakes)
    expected = -math.log(0.8 * 0.7) - math.log(0.8 * 0.6)
    assert L_D.item() == pytest.approx(expected)
    L_G = cargan.generator_loss(*fakes)
    assert L_G.item() == pytest.approx(math.log(0.7 * 0.6))
    not_saturating = cargan.generator_loss(*fakes, saturating=False)
    assert not_saturating.item() == pytest.approx(-math.log(0.3 * 0.4))
    sure = torch.tensor([1e4])
    assert cargan.discriminator_loss(sure, -sure) == 0
    assert cargan.discriminator_loss(-sure, sure) == 2e4


def test_eq_5_weighs_its_stages():
    real, coarse, fine = torch.linspace(-1, 2, 12).view(3, 4)
    losses = [
        partial(cargan.discriminator_loss, real),
        partial(cargan.generator_loss, saturating=True),
        partial(cargan.generator_loss, saturating=False),
    ]
    for loss in losses:
        expected = 0.3 * loss(coarse) + 2 * loss(fine)
        weighed = loss(coarse, fine, weights=(0.3, 2))
        assert weighed.item() == pytest.approx(expected.item())


def test_l1_and_eq_6():
    image = torch.zeros(1, 3, 2, 2)
    assert cargan.l1_loss(image, image + 0.25, image - 0.5).item() == pytest.approx(0.75)
    assert cargan.objective(2.0, 3.0, 0.5) == pytest.approx(2 + 3 + 50)
    assert cargan.objective(2.0, 3.0, 0.5, 0.5, 2, 10) == pytest.approx(1 + 6 + 5)


# --------------------------------------------------------------------------- the classifier C (3.3)

class Linear(nn.Module):
    """The smallest classifier, of images of 32x32."""

    def __init__(self, classes=2):
        super().__init__()
        torch.manual_seed(0)
        hidden = [nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5)]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, classes))

    def forward(self, x):
        return self.layers(x)


def test_a_tenth_of_each_class_is_held_out_by_seed():
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    labels = torch.tensor([0] * 29 + [1] * 9 + [2] * 10)[order]
    kept, tenth = train.hold_out(labels, seed=3)
    assert torch.cat([kept, tenth]).sort().values.tolist() == list(range(48))
    assert labels[tenth].bincount(minlength=3).tolist() == [2, 0, 1]
    assert torch.equal(train.hold_out(labels, seed=3)[1], tenth)
    assert not torch.equal(train.hold_out(labels, seed=4)[1], tenth)


def test_the_best_epoch_is_chosen_on_train_and_reported_on_validation(two, monkeypatch):
    """The validation frames have no say in what is chosen: with others the same epoch comes out."""
    measured, measure = [], train.measure_accuracy

    def spy(classifier, split, *more):
        share = measure(classifier, split, *more)
        measured.append((len(split), share))
        return share

    def trained_on(dataset, epochs=4):
        settings = dict(epochs=epochs, seed=1, batch_size=4)
        return train.train_classifier(Linear(), dataset, **settings)

    monkeypatch.setattr(train, 'measure_accuracy', spy)
    state = trained_on(two)
    sizes, shares = zip(*measured)
    assert sizes == (1, 1, 1, 1, 4)             # 12 // 10 and 7 // 10 of the classes
    tenths = shares[:-1]
    best = max(epoch for epoch, share in enumerate(tenths, 1) if share == max(tenths))
    assert state['held_out'] == max(tenths)
    assert state['epoch'] == best               # of equals the last
    trained = Linear()
    trained.load_state_dict(state['classifier'])
    assert state['accuracy'] == measure(trained.eval(), two.validation)
    again = trained_on(two._replace(validation=two.train))
    assert same(again['classifier'], state['classifier'])
    # where no class has ten pairs nothing is held out and the last epoch counts
    late = trained_on(two._replace(train=two.train.subset(range(5, 19))), epochs=3)
    assert (late['epoch'], late['held_out']) == (3, None)


def test_a_classifier_goes_on_from_its_last_whole_epoch(two, tmp_path, monkeypatch):
    """Stopped in its third epoch and gone on with, it ends as one that was never stopped."""
    def trained_by(part):
        settings = dict(epochs=4, seed=1, batch_size=4)
        return train.train_classifier(Linear(), two, **settings, part=part)

    monkeypatch.setattr(train, 'PART_SECONDS', 0)
    whole = trained_by(tmp_path / 'whole.pt')
    part = tmp_path / 'part.pt'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_adam(patch, 12, signal.SIGINT)     # five batches an epoch
        trained_by(part)
    assert runs.load_file(part)['epoch'] == 2
    assert same(trained_by(part), whole)
    assert same(runs.load_file(part), runs.load_file(tmp_path / 'whole.pt'))


def test_the_rate_of_a_classifier_falls_to_zero_within_its_steps(two, monkeypatch):
    rates, adam = [], torch.optim.Adam.step

    def step(self):
        rates.append(self.param_groups[0]['lr'])
        adam(self)

    monkeypatch.setattr(torch.optim.Adam, 'step', step)
    train.train_classifier(Linear(), two, epochs=2, lr=0.5, batch_size=4)
    assert rates == pytest.approx([0.05 * left for left in range(10, 0, -1)])
    rates.clear()
    train.train_classifier(Linear(), two, epochs=300, steps=7, lr=0.5, batch_size=4)
    assert len(rates) == 10         # whole epochs
    rates.clear()
    train.train_classifier(Linear(), two, epochs=300, steps=3, lr=0.6, batch_size=4)
    assert rates == pytest.approx([0.6, 0.4, 0.2])      # less than an epoch


def test_no_batch_of_one_and_no_infinite_loss(two):
    sizes, network = [], Linear()

    def note(module, inputs):
        if module.training:
            sizes.append(len(inputs[0]))

    network.register_forward_pre_hook(note)
    nine = two._replace(train=two.train.subset(range(7, 16)))
    train.train_classifier(network, nine, epochs=1, batch_size=2)
    assert sizes == [3, 2, 2, 2]                    # BatchNorm fails at one
    with pytest.raises(InputError, match='--classifier FILE'):
        train.train_classifier(Linear(), two, epochs=1, lr=math.inf, batch_size=4)


def test_s2ics_audio_classifier_is_trained_once_kept_and_frozen(group, two, capsys):
    out, _, printed = group
    assert printed.count('audio classifier: accuracy') == 1
    random = torch.get_rng_state()
    audio, accuracy = train.get_audio_classifier(two)
    assert not capsys.readouterr().out
    assert torch.equal(random, torch.get_rng_state())       # the run's random numbers stay its own
    assert not audio.training
    assert accuracy == train.measure_accuracy(audio, two.validation, source=0)
    assert train.measure_accuracy(audio, two.train, source=0) > 0.9
    for name in 'checkpoint.pt', 'model.pt':
        kept = states(out / 'S2IC-seed-0', name)['model']
        for key, weights in audio.state_dict().items():
            assert torch.equal(kept[f'audio.{key}'], weights)


def test_a_kept_classifier_leaves_the_runs_random_numbers_and_other_gpus_alone(
        two, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)      # which it must not start
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    train.kept_beside(two._replace(folder=tmp_path), 'tiny', lambda: Linear(2), 'key', 'cpu',
                      epochs=1)
    assert (tmp_path / 'tiny.pt').exists()
    assert torch.equal(torch.rand(3), expected)


def test_a_kept_classifier_is_trained_again_for_other_files(two, tmp_path, capsys):
    def kept(fingerprint):
        dataset = two._replace(folder=tmp_path, fingerprint=fingerprint)
        network, accuracy = train.kept_beside(dataset, 'name', Linear, 'key', 'cpu', epochs=2)
        trained = 'name classifier epoch 2/2' in capsys.readouterr().out
        return trained, accuracy, dict(network.state_dict())

    trained, *first = kept('a')
    assert trained
    trained, *again = kept('a')
    assert not trained
    assert same(again, first)
    assert kept('b')[0]
    assert [path.name for path in tmp_path.iterdir()] == ['name.pt']


def test_imagenet_weights(two_classes, tmp_path, refused, no_network):
    """A path given by hand is used; without network, path or --no-pretrained a line says what to
    do.
    """
    source = cargan.Classifier(1000, pretrained=False).resnet
    torch.save(source.state_dict(), tmp_path / 'resnet50.pth')
    resnet = cargan.Classifier(13, pretrained=str(tmp_path / 'resnet50.pth')).resnet
    assert torch.equal(resnet.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    flags = run_flags(two_classes, tmp_path / 'run')
    flags.remove('--no-pretrained')
    refused(train, flags, 'ImageNet weights', '--classifier FILE', '--no-pretrained')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'wrong.pth')
    flags += ['--classifier', tmp_path / 'wrong.pth']
    refused(train, flags, 'wrong.pth', '--no-pretrained')


def test_the_classifier_of_another_run_is_used_as_it_is(group, two, tmp_path):
    source, path = group[0] / 'classifier.pt', tmp_path / 'classifier.pt'
    args, = train.parse_args(['--data', 'x', '--classifier', str(source)])
    C = train.get_classifier(args, two, path, 'cpu')
    kept = runs.load_file(source)
    assert same(runs.load_file(path), kept)
    assert same(dict(C.state_dict()), kept['classifier'])
    for place in path, tmp_path / 'new.pt':
        with pytest.raises(InputError, match='a classifier of other classes'):
            train.get_classifier(args, two._replace(classes=['tuba', 'horn']), place, 'cpu')


# --------------------------------------------------------------------- one step of each side (3.4)

NETS = {'E': ('G1', 'G2'), 'S2IC': ('phi', 'G'), 'CMCGAN': ('E_A', 'E_V', 'D_A', 'D_V')}


def make_trainer(*flags, classes=5, device='cpu', C=Linear):
    """A Trainer at 32x32, whose C is small."""
    args, = train.parse_args(['--data', 'x', *SMALL, *flags])
    return train.Trainer(args, classes, 1, C(classes), torch.device(device))


def batch(n=4):
    torch.manual_seed(1)
    lms, image = (torch.rand(n, channels, 32, 32) * 2 - 1 for channels in (1, 3))
    return lms, image, torch.arange(n) % 5


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(*networks):
    return [p.grad for network in networks for p in network.parameters()]


@pytest.mark.parametrize('variant', ['E', 'S2IC'])
@pytest.mark.parametrize('moving', ['G', 'D'])
def test_each_step_moves_its_own_weights_alone(moving, variant):
    """With the other optimiser's rate at 0, a step of both shows what one of them moves."""
    ours = make_trainer('--variant', variant)
    still = ours.D_optimizer if moving == 'G' else ours.G_optimizer
    still.param_groups[0]['lr'] = 0.0
    nets = {name: getattr(ours.model, name) for name in NETS[variant]}
    nets['D'] = ours.D
    before = {name: weights(module) for name, module in nets.items()}
    frozen = [ours.model.residue.classifier]
    if variant == 'S2IC':
        frozen.append(ours.model.audio)
    states = [copy.deepcopy(network.state_dict()) for network in frozen]
    for _ in range(2):      # attention's projections have no gradient until their scale has left 0
        ours.step(*batch())
    for name, module in nets.items():
        assert module.training
        moved = changed(before[name], weights(module))
        if (name == 'D') == (moving == 'D'):
            assert moved == list(before[name])
        else:
            assert not moved
    for network, state in zip(frozen, states):
        assert not changed(state, network.state_dict())
        assert all(p.grad is None for p in network.parameters())
        assert not any(module.training for module in network.modules())


def test_a_step_is_the_papers_by_hand():
    """The gradients that Trainer.step leaves, against those of the equations written out: G1 and G2
    first, then D, on the fakes of G's step; each kind of image passes D in its own batch.
    """
    ours = make_trainer('--dropout', '0', '--lambdas', '2', '3', '50', '0.3', '0.7')
    ours.D_optimizer.param_groups[0]['lr'] = 0.0
    model, D = copy.deepcopy((ours.model, ours.D))
    C = model.residue.classifier
    lms, image, label = batch()
    losses = ours.step(lms, image, label)

    def P(x):
        return D(torch.cat([lms, x], dim=1)).sigmoid()

    generators = nn.ModuleList([model.G1, model.G2]).requires_grad_(True)
    coarse, fine, logits = model(lms, label)
    L_C = F.cross_entropy(logits, label) / 2 + F.cross_entropy(C(fine), label) / 2
    P_coarse, P_fine = P(coarse), P(fine)
    L_cGAN = 0.3 * torch.log(1 - P_coarse).mean() + 0.7 * torch.log(1 - P_fine).mean()
    L_L1 = (image - coarse).abs().mean() + (image - fine).abs().mean()
    L_G = 2 * L_C + 3 * L_cGAN + 50 * L_L1
    grads = torch.autograd.grad(L_G, list(generators.parameters()))
    assert difference(gradients(ours.model.G1, ours.model.G2), grads) < 0.01

    P_real, P_coarse, P_fine = P(image), P(coarse.detach()), P(fine.detach())
    L_D = -torch.log(P_real).mean()
    L_D = L_D - 0.3 * torch.log(1 - P_coarse).mean() - 0.7 * torch.log(1 - P_fine).mean()
    grads = torch.autograd.grad(3 * L_D, list(D.parameters()))
    assert difference(gradients(ours.D), grads) < 0.01
    assert difference([losses], [torch.stack([L_C, L_cGAN, L_L1, L_D])]) < 1e-3


def test_the_c_of_the_steps_is_c_without_batchnorm():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8).double()
    C = model.residue.classifier
    norms = [module for module in C.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for mean in norm.running_mean, norm.bias:
            mean.normal_(std=0.5)
        for scale in norm.running_var, norm.weight:
            scale.uniform_(0.5, 1.5)
    before = runs.digest(C)
    twin = train.fuse_classifier(model)
    fused = twin.residue.classifier
    assert (twin.G1, twin.G2) == (model.G1, model.G2)
    assert len(norms) == 53
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any(p.requires_grad for p in fused.parameters())

    image = torch.rand(2, 3, 64, 64, dtype=torch.double, requires_grad=True)
    expected = C.resnet(image)                      # C itself answers in float32
    logits = fused.resnet(image)
    assert distance(logits, expected) < 1e-10
    direction = torch.randn_like(expected)
    wanted, = torch.autograd.grad(expected, image, direction)
    gradient, = torch.autograd.grad(logits, image, direction)
    assert distance(gradient, wanted) < 1e-8
    assert runs.digest(C) == before


@pytest.mark.parametrize('variant', cargan.VARIANTS)
def test_files_and_metrics_are_of_c_itself(variant):
    C = cargan.Classifier(5, pretrained=False)
    before = runs.digest(C)
    ours = make_trainer('--variant', variant, '--ema', '2', C=lambda _: C)
    ours.step(*batch())
    for model in ours.model, ours.average:
        assert model.residue.classifier is C
    assert runs.digest(C) == ours.classifier_digest == before
    state = train.trainer_state(ours)
    expected = cargan.CARGAN(5, 32, 8, variant).state_dict()
    names = [name for name in expected if not name.startswith('residue')]
    assert list(state['model']) == list(state['average']) == names
    twin = ours.G_step.model.residue.classifier
    assert not isinstance(twin.resnet.bn1, nn.BatchNorm2d)
    assert all(p.grad is None for p in twin.parameters())


@pytest.mark.parametrize('name', baselines.BASELINES)
def test_a_baselines_step_weighs_its_losses(name):
    """L_G and L_Cons by the second and the third of --lambdas, L_D by the second."""
    ours = make_trainer('--variant', name, '--lambdas', '7', '3', '50', '1', '1')
    ours.D_optimizer.param_groups[0]['lr'] = 0.0
    model, D = copy.deepcopy((ours.model, ours.D))
    inputs = batch()
    torch.manual_seed(3)
    losses = ours.step(*inputs)

    torch.manual_seed(3)
    generators = nn.ModuleList(getattr(model, net) for net in NETS[name]).requires_grad_(True)
    terms, fakes = baselines.GeneratorStep(model, D)(*inputs)
    L_G, L_Cons = terms[0, 1:] / 4
    grads = torch.autograd.grad(3 * L_G + 50 * L_Cons, list(generators.parameters()))
    stepped = [getattr(ours.model, net) for net in NETS[name]]
    assert difference(gradients(*stepped), grads) < 0.01
    L_D = baselines.DiscriminatorStep(model, D)(*inputs, fakes)[0] / 4
    grads = torch.autograd.grad(3 * L_D, list(D.parameters()))
    assert difference(gradients(ours.D), grads) < 0.01
    assert difference([losses], [torch.stack([torch.zeros(()), L_G, L_Cons, L_D])]) < 1e-3
    assert (L_Cons > 0.1) == (name == 'CMCGAN')


@pytest.mark.parametrize('variant', 'ABCD')
def test_ablations_train(variant):
    ours = make_trainer('--variant', variant)
    before = weights(ours.model)
    for _ in range(3):
        assert ours.step(*batch()).isfinite().all()
    moved = {name.split('.')[0] for name in changed(before, weights(ours.model))}
    assert moved == ({'G1'} if variant == 'D' else {'G1', 'G2'})
    assert ours.lambdas == (0 if variant == 'B' else 1, 1, 100)
    attention = [m for m in ours.D.modules() if isinstance(m, cargan.SelfAttention)]
    assert bool(attention) == (variant != 'A')


def test_training_learns():
    """Twenty steps on one batch of plain colours bring both stages nearer to the truth."""
    ours = make_trainer('--lr', '0.002')
    lms, _, label = batch(8)
    colours = torch.linspace(-0.8, 0.8, 15).view(5, 3, 1, 1)
    image = colours[label].expand(-1, -1, 32, 32)
    first, *_, last = [ours.step(lms, image, label)[2] for _ in range(20)]
    assert last < 0.6 * first


def test_seed_betas_and_the_form_of_the_loss_are_flags():
    first = make_trainer('--seed', '3', '--betas', '0.5', '0.9')
    again = make_trainer('--seed', '3', '--no-saturating')
    other = make_trainer('--seed', '4')
    assert not changed(weights(first.D), weights(again.D))
    assert changed(weights(first.D), weights(other.D))
    assert tuple(first.G_optimizer.param_groups[0]['betas']) == (0.5, 0.9)
    assert again.step(*batch())[1] > 0 > first.step(*batch())[1]


def test_the_average_of_the_weights_is_its_formula():
    """Half-life of at most a fifth of the images seen; only the average moves; C is not copied."""
    ours = make_trainer('--ema', '2')
    expected = weights(ours.model)
    for step in range(1, 4):
        ours.step(*batch())
        decay = 0.5 ** (5 / min(2, 0.2 * 5 * step))
        for name, now in weights(ours.model).items():
            expected[name] = decay * expected[name] + (1 - decay) * now
    torch.testing.assert_close(weights(ours.average), expected)
    assert ours.average.residue.classifier is ours.model.residue.classifier
    assert ours.inference is ours.average


def test_the_steps_bring_their_precision_into_any_thread():
    """DataParallel's threads have an autocast of their own, which knows nothing of bf16."""
    ours, dtypes = make_trainer('--amp', 'bf16'), []
    for module in ours.model.G2.down[1][1], ours.D.layers[0]:
        module.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    lms, image, label = batch()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(ours.G_step, lms, image, label).result()
        thread.submit(ours.D_step, lms, image, label, (image, image)).result()
    assert dtypes == [torch.bfloat16] * (1 + 2 + 3)


def test_mixed_precision_keeps_pictures_losses_and_residue_in_float32():
    C = cargan.Classifier(5, pretrained=False)
    exact = make_trainer('--dropout', '0', C=lambda _: C)
    ours = make_trainer('--dropout', '0', '--amp', 'bf16', C=lambda _: C)
    lms, image, label = batch()
    with torch.autocast('cpu', torch.bfloat16):
        coarse, fine, logits = ours.model(lms, label)
        _, residue = ours.model.residue(coarse, label)
        scores = ours.D(torch.cat([lms, fine], dim=1))
    assert {x.dtype for x in (coarse, fine, logits, residue, scores)} == {torch.float32}
    losses = ours.step(lms, image, label)
    assert difference([losses], [exact.step(lms, image, label)]) < 0.05
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


def test_a_split_batch_adds_up():
    """What DataParallel gathers: the parts' terms, each times its size, make the whole batch's."""
    ours = make_trainer('--dropout', '0')
    for network in ours.model, ours.D:
        network.eval()
    lms, image, label = batch(7)
    terms, fakes = ours.G_step(lms, image, label)
    L_D = ours.D_step(lms, image, label, fakes)
    for part in slice(0, 4), slice(4, 7):
        pairs = lms[part], image[part], label[part]
        terms = terms - ours.G_step(*pairs)[0]
        L_D = L_D - ours.D_step(*pairs, [x[part] for x in fakes])
    assert terms.abs().max() < 1e-3
    assert L_D.abs() < 1e-3


@pytest.mark.parametrize('variant', ['E', 'S2IC'])
def test_compiled_steps_are_the_steps(variant, monkeypatch):
    """Each is one graph. The backend is the one that only traces: others take minutes."""
    traced = partial(nn.Module.compile, backend='eager', fullgraph=True)
    monkeypatch.setattr(nn.Module, 'compile', lambda step, **more: traced(step, **more))
    plain = make_trainer('--variant', variant)
    ours = make_trainer('--variant', variant, '--compile')
    losses = []
    for trainer in plain, ours:
        torch.manual_seed(3)
        losses.append(trainer.step(*batch()))
    assert difference(losses[:1], losses[1:]) < 1e-3
    for name in 'model', 'D', 'G_step', 'D_step':
        assert list(getattr(ours, name).state_dict()) == list(getattr(plain, name).state_dict())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_data_parallel_takes_the_same_step():
    args, = train.parse_args(['--data', 'x', *SMALL, '--dropout', '0', '--amp', 'off'])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    losses = []
    for gpus in [0], [0, 1]:
        ours = train.Trainer(args, 5, 1, None, torch.device('cuda:0'), gpus)
        ours.model.eval()
        ours.D.eval()               # BatchNorm sees each GPU's part alone
        losses.append(ours.step(*(x.cuda() for x in batch(7))).cpu())
    assert difference(losses[:1], losses[1:]) < 0.01


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_step_on_the_gpu_is_that_of_the_cpu():
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    losses = []
    for device in 'cpu', 'cuda':
        ours = make_trainer('--dropout', '0', '--amp', 'off', device=device)
        losses.append(ours.step(*(x.to(device) for x in batch())).cpu())
    assert difference(losses[:1], losses[1:]) < 0.01


# ---------------------------------------------------------------------- BatchNorm outside training

def test_recalibrated_statistics_are_those_of_the_weights(two):
    """They bring what is generated in eval mode near to what a batch in training gives."""
    ours = make_trainer('--dropout', '0', classes=2)
    lms, image, label = two.train.batch(range(19))
    for _ in range(3):
        ours.step(lms, image, label)

    def generated(mode):
        with torch.no_grad():
            return copy.deepcopy(ours.model).train(mode)(lms, label)[1]

    before, random = weights(ours.model), torch.get_rng_state()
    outrun = difference([generated(False)], [generated(True)])
    train.recalibrate_batchnorm(ours.model, two.train.batches(19))
    assert difference([generated(False)], [generated(True)]) < 0.1 * outrun
    assert ours.model.training
    assert not ours.model.residue.classifier.training
    assert not changed(before, weights(ours.model))
    assert torch.equal(random, torch.get_rng_state())


def test_statistics_of_small_batches_are_those_of_all_pictures(two):
    """The first BatchNorm's input is the same in any batch: nothing between them may be lost."""
    ours, seen = make_trainer(classes=2), []
    lms, _, label = two.train.batch(range(19))
    norm = ours.model.G1.down[1][2]
    hook = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    ours.model(lms, label)
    hook.remove()
    var, mean = torch.var_mean(seen[0], dim=(0, 2, 3))
    train.recalibrate_batchnorm(ours.model, two.train.batches(4))
    assert difference([norm.running_mean], [mean]) < 1e-3
    assert difference([norm.running_var], [var]) < 1e-3


def test_what_does_not_generate_is_not_recalibrated(two):
    """CMCGAN's way from a sound to F_Image has E_A and D_V: the BatchNorm of the others stays."""
    ours = make_trainer('--variant', 'CMCGAN', classes=2)
    ours.step(*two.train.batch(range(19)))
    before = copy.deepcopy(ours.model.state_dict())
    train.recalibrate_batchnorm(ours.model, two.train.batches(16, seed=0))
    moved = changed(before, ours.model.state_dict())
    buffers = [name for name, _ in ours.model.named_buffers() if not name.startswith('residue')]
    assert {name[:3] for name in buffers} == {*NETS['CMCGAN']}
    assert sorted(moved) == sorted(name for name in buffers if name[:3] in ('E_A', 'D_V'))


# ------------------------------------------------------------------------ the loop, nothing is lost

def states(run, name='checkpoint.pt'):
    return torch.load(run / name, weights_only=True)


def resume(run, *more):
    """The flags that go on with a run of two epochs."""
    return ['--resume', str(run), '--epochs', '3', '--device', 'cpu', *map(str, more)]


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the trained run, to be spoilt."""
    return shutil.copytree(trained, tmp_path / 'copy')


def stop_adam(patch, place, number=None):
    """At this step of Adam, counted from 1, raise this signal or, without one, an error."""
    count, adam = itertools.count(1), torch.optim.Adam.step

    def step(*args, **more):
        if next(count) == place:
            if number is None:
                raise InputError('seen')
            signal.raise_signal(number)         # here and now, as os.kill() is not
        return adam(*args, **more)

    patch.setattr(torch.optim.Adam, 'step', step)


def test_a_run_is_one_folder(trained):
    assert {path.name for path in trained.iterdir()} == {
        'config.json', 'classifier.pt', 'checkpoint.pt', 'model.pt', 'log.csv', 'samples',
        'report.html', 'curves.png'}
    header, *rows = csv.reader(open(trained / 'log.csv'))
    assert header == ['step', 'epoch', 'L_C', 'L_cGAN', 'L_L1', 'L_D']
    numbers = np.array(rows, float)
    assert np.isfinite(numbers).all()
    assert numbers[:, 0].tolist() == list(range(1, 9))
    assert numbers[:, 1].tolist() == [1] * 4 + [2] * 4
    samples = {path.name for path in (trained / 'samples').iterdir()}
    assert samples == {'epoch-0001.png', 'epoch-0002.png'}
    config = json.loads((trained / 'config.json').read_text())
    assert (config['size'], config['classes']) == (32, ['bassoon', 'viola'])
    made = config['made']
    assert made['command'].endswith(' '.join(SMALL))
    assert re.fullmatch(r'0:\d\d:\d\d, \d+\.\d images/s', made['since the last start'])
    assert made['machine'] == f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    assert made['epoch'] == 2
    kept = states(trained)['model']
    assert not [name for name in kept if 'residue' in name]         # C is kept once


def test_a_signal_loses_nothing_and_the_resumed_run_is_the_uninterrupted_one(
        trained, two_classes, tmp_path, capsys, monkeypatch):
    """G and D make a step of Adam each: stopped between them, in the second epoch."""
    half, C = tmp_path / 'half', trained / 'classifier.pt'
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        stop_adam(patch, 11, signal.SIGTERM)
        train.main(run_flags(two_classes, half, '--classifier', C))
    assert end.value.code == 128 + signal.SIGTERM
    again = f'and saved; go on with: python train.py --resume {half}'
    assert again in capsys.readouterr().out
    assert states(half)['pairs'] == 2 * 5
    with open(half / 'log.csv', 'a') as file:
        file.write('7,2,1,1,1,1\n8,2,0.5')      # steps after the checkpoint, and half a line
    (half / 'checkpoint.pt.part').write_bytes(b'half a checkpoint')
    train.main(['--resume', str(half), '--device', 'cpu'])
    out = capsys.readouterr().out
    assert 'resumed after 1 of 2 epochs and 10 pairs' in out
    assert out.splitlines()[-1] == f'now: python evaluate.py {half}'
    for name in 'checkpoint.pt', 'model.pt':
        assert same(states(half, name), states(trained, name))
    assert (half / 'log.csv').read_text() == (trained / 'log.csv').read_text()
    assert {path.name for path in half.iterdir()} == {path.name for path in trained.iterdir()}


def test_a_stop_before_the_first_step_does_not_say_that_it_is_saved(
        two_classes, tmp_path, capsys, monkeypatch):
    stop_adam(monkeypatch, 1, signal.SIGINT)        # in C's first step
    with pytest.raises(KeyboardInterrupt):
        train.main(run_flags(two_classes, tmp_path / 'run'))
    out = capsys.readouterr().out
    assert 'and saved' not in out
    assert f'Go on with: python train.py --resume {tmp_path}' in out


def test_a_second_sigint_ends_at_once(monkeypatch):
    monkeypatch.setattr(os, 'write', lambda *_: None)
    with train.Saver() as saver:
        signal.raise_signal(signal.SIGINT)
        assert saver.due()
        assert saver.signal == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_checkpoint_every_ten_minutes(monkeypatch):
    saver, now = train.Saver(), time.monotonic()
    dues = []
    for minutes in (9.9, 10.1, 20.0, 20.2):
        monkeypatch.setattr(time, 'monotonic', lambda: now + 60 * minutes)
        dues.append(saver.due())
    assert dues == [False, True, False, True]


def killed(place, *words):
    """train.py in a process of its own, with a checkpoint after each step, that is killed at this
    step of Adam, whoever's it is, counted from 1.
    """
    code = ('import os, signal, sys, torch, train\n'
            'left, adam = [int(sys.argv.pop(1))], torch.optim.Adam.step\n'
            'def step(*args, **more):\n'
            '    left[0] -= 1\n'
            '    if not left[0]:\n'
            '        os.kill(os.getpid(), signal.SIGKILL)\n'
            '    return adam(*args, **more)\n'
            'torch.optim.Adam.step = step\n'
            'train.SAVE_MINUTES = train.PART_SECONDS = 0\n'
            'train.run_command(train.main)')
    return command('-c', code, place, *words, env=dict(os.environ, PYTHONPATH=str(HERE)))


def test_killed_runs_go_on_to_the_same_end(group, tmp_path, capsys):
    """kill -9 in C's second step, in E's second of G, in S2IC's second of D; then at places drawn
    by seed over all of C, G and D: CARGAN_KILLS=10 python -m pytest -k killed_runs
    """
    expected, flags, _ = group
    rng = np.random.default_rng(0)
    for trial in range(1 + int(os.environ.get('CARGAN_KILLS', 0))):
        out = tmp_path / f'out{trial}'
        words = [*flags, '--out', str(out)]
        places = [2, 1 + 3, 6 + 4]
        if trial > 0:
            places = rng.integers(1, 12, 2)
        for place in places:
            assert killed(place, *words).returncode == -signal.SIGKILL
        capsys.readouterr()
        train.main(words)
        printed = capsys.readouterr().out
        assert 'audio classifier' not in printed                # it is kept beside the cache
        if trial == 0:
            assert 'run 1 of' not in printed
            assert f'run 2 of 3: {out}/S2IC-seed-0\n' in printed
            assert 'resumed after 0 of 1 epochs and 5 pairs' in printed
        for run in 'E-seed-0', 'S2IC-seed-0', 'CMCGAN-seed-0':
            for name in 'checkpoint.pt', 'model.pt':
                assert same(states(out / run, name), states(expected / run, name))
            log = (expected / run / 'log.csv').read_text()
            assert (out / run / 'log.csv').read_text() == log
        assert list(out.rglob('classifier.pt')) == [out / 'classifier.pt']
        assert not list(out.rglob('*part*'))


def test_a_refused_resume_leaves_the_run_as_it_was(
        trained, run, two_classes, tmp_path, refused, monkeypatch):
    """config.json is byte for byte as before until the first new step is made."""
    data = shutil.copytree(two_classes, tmp_path / 'data')
    for path in list(data.glob('*/*/viola')):
        shutil.copytree(path, path.with_name('zither'))
    (tmp_path / 'file').touch()
    refused(train, resume(run, '--data', tmp_path / 'typo'), 'typo', '--data')
    refused(train, resume(run, '--cache', tmp_path / 'file'), 'file', '--cache')
    refused(train, resume(run, '--data', data), 'classes')
    with monkeypatch.context() as patch:
        stop_adam(patch, 1)
        refused(train, resume(run, '--lr', 1), 'seen')
    for name in 'classifier.pt', 'checkpoint.pt':
        (run / name).write_text('no weights')
        refused(train, resume(run, '--lr', 1), run / name)
    assert (run / 'config.json').read_bytes() == (trained / 'config.json').read_bytes()


def test_model_is_never_older_than_checkpoint(run, refused, monkeypatch):
    """Where the disk is full after one of the two files, the next start makes both."""
    save = train.save_file

    def full(state, path):
        if path.name == 'checkpoint.pt':
            raise InputError('full')
        save(state, path)

    def epochs():
        return states(run, 'model.pt')['epoch'], states(run)['epoch']

    with monkeypatch.context() as patch:
        patch.setattr(train, 'save_file', full)
        refused(train, resume(run), 'full')
    assert epochs() == (3, 2)
    train.main(resume(run))
    assert epochs() == (3, 3)


def test_another_classifier_is_no_way_to_go_on(run, group, tmp_path, refused):
    state = runs.load_file(run / 'classifier.pt')
    state['classifier']['resnet.fc.bias'] += 1
    torch.save(state, run / 'classifier.pt')
    refused(train, resume(run), run / 'classifier.pt', 'not the classifier', 'put that one back')
    (run / 'classifier.pt').unlink()
    refused(train, resume(run), run / 'classifier.pt', 'is gone')
    moved = shutil.copytree(group[0] / 'E-seed-0', tmp_path / 'moved')
    refused(train, resume(moved), moved / '../classifier.pt', 'is gone')
    assert not (tmp_path / 'classifier.pt').exists()


def test_another_batch_size_within_an_epoch_sees_each_pair_once(
        group, two_classes, tmp_path, monkeypatch):
    C = group[0] / 'classifier.pt'
    run, seen, step = tmp_path / 'run', [], train.Trainer.step

    def note(self, lms, *more, **options):
        seen.extend(lms.flatten(1).sum(dim=1).tolist())
        return step(self, lms, *more, **options)

    monkeypatch.setattr(train.Trainer, 'step', note)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_adam(patch, 3, signal.SIGTERM)
        train.main(run_flags(two_classes, run, '--variant', 'D', '--classifier', C))
    assert len(seen) == 10
    train.main(['--resume', str(run), '--epochs', '1', '--batch-size', '4', '--device', 'cpu'])
    assert len(seen) == len(set(seen)) == 19


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        trained, run, two, refused):
    kept = f'{run / "checkpoint.pt"} is still the last good checkpoint'
    words = run / 'bad-batch.txt', kept, '--resume', '--lr'
    line = refused(train, resume(run, '--lr', 1e25), *words).splitlines()[-1]
    name, step = re.search(r'error: (L_\w+) is \S+ at step (\d+), epoch 3:', line).groups()
    first, *stems = (run / 'bad-batch.txt').read_text().splitlines()
    assert first.startswith(name)
    indices = two.train.indices(5, 1000003 * 3)[int(step) - 1 - 8]
    assert stems == [two.train.stems[i] for i in indices]
    assert same(states(run), states(trained))


def test_weights_that_are_not_finite_are_not_saved(tmp_path, two):
    ours = make_trainer(classes=2)
    train.save_checkpoint(ours, tmp_path, two.train)
    before = (tmp_path / 'checkpoint.pt').read_bytes()
    ours.model.G2.down[0][0].weight.data[0, 0, 0, 0] = math.nan
    words = 'G2.down.0.0.weight is not finite after step 0.*pt is still the last good'
    with pytest.raises(InputError, match=words):
        train.save_checkpoint(ours, tmp_path, two.train)
    assert (tmp_path / 'checkpoint.pt').read_bytes() == before


def test_a_full_disk_leaves_the_checkpoint_before(trained, run, refused):
    with small_disk(10 ** 6):
        refused(train, resume(run), run / 'model.pt', 'cannot be written', 'still whole')
    assert same(states(run), states(trained))
    assert not list(run.glob('*part*'))


def test_a_name_that_the_terminal_lacks_is_printed_all_the_same(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding='cp1252')
    monkeypatch.setattr(sys, 'stdout', out)
    runs.run_command(lambda: print('violin, \u4e8c\u80e1'))
    out.flush()
    assert out.buffer.getvalue() == b'violin, \\u4e8c\\u80e1\n'


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    def unknown(_):
        raise KeyError('uid not found')

    monkeypatch.setattr(pwd, 'getpwuid', unknown)
    for name in 'HOME', 'XDG_CACHE_HOME':
        monkeypatch.delenv(name)
    assert runs.default_cache() == Path(tempfile.gettempdir(), 'cargan')


def test_two_commands_in_one_folder(run, refused):
    held = os.open(run, os.O_RDONLY)
    runs.fcntl.flock(held, runs.fcntl.LOCK_EX)          # as another process does
    refused(train, resume(run), run, 'another process', '--out')
    os.close(held)
    with pytest.raises(BlockingIOError, match='mine'), runs.open_run(run, resume=True):
        raise BlockingIOError('mine')                   # free again, and no other process is named


def test_a_file_system_without_locks_is_no_full_disk(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(runs.fcntl, 'flock', refuse)
    with runs.writing(tmp_path / 'file'), runs.open_run(tmp_path / 'run'):
        pass
    assert capsys.readouterr().err.count('no locks here') == 2


def spoil(path, kind):
    """Put something hostile or broken in place of a file of a run."""
    if kind == 'dangling':
        path.unlink()
        path.symlink_to('nowhere')
    elif kind == 'cut':
        path.write_bytes(path.read_bytes()[:100])
    else:
        state = states(path.parent, path.name)
        if kind == 'code':
            state['classifier'] = Harm(str(path.parent / 'harm'))
        elif kind == 'shapes':
            state['model']['G1.down.0.0.weight'] = torch.zeros(1)
        else:
            state['G_optimizer']['state'][0]['exp_avg'] = torch.zeros(1)
        torch.save(state, path)


@pytest.mark.parametrize('name, kinds', [
    ('config.json', ('cut',)),
    ('checkpoint.pt', ('dangling', 'cut', 'code', 'shapes', 'optimiser')),
    ('classifier.pt', ('code',)),
    ('model.pt', ('code', 'shapes'))])
def test_a_spoilt_run_is_named_by_every_command(
        trained, two_classes, tmp_path, refused, name, kinds):
    """And no file of weights can run code."""
    clip = min((two_classes / 'chunk/validation/viola').iterdir())
    for kind in kinds:
        run = shutil.copytree(trained, tmp_path / kind)
        spoil(run / name, kind)
        if name != 'model.pt':              # which no training reads
            refused(train, resume(run), name)
        if name != 'checkpoint.pt':         # nor this the command below
            words = [run, clip, '--label', 'viola', '--out', tmp_path / 'x.png']
            refused(generate, words, name)
        assert not (run / 'harm').exists()
        assert not (tmp_path / 'x.png').exists()


def test_no_classifier_can_run_code(two_classes, tmp_path, refused):
    C = tmp_path / 'C.pt'
    harm = Harm(str(tmp_path / 'harm'))
    torch.save(dict(classifier=harm, classes=[], accuracy=1.0), C)
    refused(train, run_flags(two_classes, tmp_path / 'run', '--classifier', C), C)
    assert not (tmp_path / 'harm').exists()
    assert not (tmp_path / 'run').exists()


def test_out_of_memory_says_what_to_lower(run, refused, monkeypatch):
    """No GPU is needed to see what is said when one is too small."""
    def small(self, *_):
        raise torch.OutOfMemoryError('CUDA out of memory')

    monkeypatch.setattr(cargan.CARGAN, 'forward', small)
    refused(train, resume(run), 'the memory of cpu is too small: --batch-size 5 must be lower')
    monkeypatch.setattr(generate, 'recording_lms', small)
    wavfile.write(run / 'x.wav', 22050, np.zeros(9, np.int16))
    refused(generate, [run, run / 'x.wav', '--label', 'viola', '--out', run / 'x.png'],
            'CUDA out of memory', 'Lower --batch-size')


def test_a_note_says_that_d_has_won(two_classes, tmp_path, trained, monkeypatch, capsys):
    """Once, with the mean L_D of the epoch."""
    monkeypatch.setattr(train, 'VICTORY', 100.0)
    C, run = trained / 'classifier.pt', tmp_path / 'run'
    train.main(run_flags(two_classes, run, '--classifier', C, '--disc-base', '4'))
    note, = [line for line in capsys.readouterr().err.splitlines() if 'D has won' in line]
    L_D = [float(row.split(',')[5]) for row in report.log_rows(run / 'log.csv')]
    said = float(re.search('L_D was (.*) over epoch 1:', note)[1])
    assert said == pytest.approx(np.mean(L_D[:4]), abs=1e-4)
    assert '--init-std 0.02' in note
    assert '--no-saturating' in note
    assert not train.d_has_won([torch.tensor(100.0), torch.tensor(101.0)], 1)


def test_float32_is_float32_before_c_is_trained(two_classes, tmp_path, monkeypatch):
    allowed = []

    def look(*args, **more):
        allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise InputError('seen')

    monkeypatch.setattr(train, 'get_classifier', look)
    for amp in 'off', 'bf16':
        with pytest.raises(InputError, match='seen'):
            train.main(run_flags(two_classes, tmp_path / amp, '--amp', amp))
    assert allowed == [(False, False), (True, True)]


# -------------------------------------------------------------------------------- several processes

def one_step(part=slice(None)):
    """A step on a part of seven pairs, in eval mode and with rates of 0: the trainer."""
    ours = make_trainer('--dropout', '0')
    for network in ours.model, ours.D:
        network.eval()
    for optimizer in ours.G_optimizer, ours.D_optimizer:
        optimizer.param_groups[0]['lr'] = 0.0
    ours.step(*(x[part] for x in batch(7)), size=7)
    return ours


def scenes(folder, data):
    """What each of two processes of one torchrun does, one scene after the other."""
    torch.set_num_threads(1)
    args = train.make_parser().parse_args(['--device', 'cpu'])
    with train.distributed(args), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, 'distributed', lambda _: nullcontext())    # one group for all scenes
        first = train.rank() == 0
        ours = one_step(slice(0, 4) if first else slice(4, 7))
        if first:
            torch.save(gradients(ours.model.G1, ours.D), folder / 'grads.pt')
        save = train.save_checkpoint

        def keep(trainer, run, *more):      # a copy of the run as it is after its first epoch
            save(trainer, run, *more)
            if first and trainer.epoch == 1 and run.name == 'whole':
                shutil.copytree(run, run.with_name('run'))

        patch.setattr(train, 'save_checkpoint', keep)
        train.main(run_flags(data, folder / 'whole', '--variant', 'D'))
        train.main(['--resume', str(folder / 'run'), '--device', 'cpu'])
        C = folder / 'whole/classifier.pt'
        flags = run_flags(folder / 'data', folder / 'few', '--classifier', C)
        train.main([*flags, '--batch-size', '2'])

        forward, count = train.DiscriminatorStep.forward, itertools.count(1)

        def small(*inputs):
            if not first and next(count) == 2:
                raise torch.OutOfMemoryError('CUDA out of memory')
            return forward(*inputs)

        patch.setattr(train.DiscriminatorStep, 'forward', small)
        train.main(run_flags(data, folder / 'small', '--classifier', C))


def test_two_processes(two_classes, tmp_path):
    """Their gradients are one process's; resumed they end as if never stopped; three pairs in
    batches of two and one leave none without work; one that is out of memory ends them all by name.
    """
    data = shutil.copytree(two_classes, tmp_path / 'data')
    for folder in data.glob('*/*/*'):
        count = 2 if folder.match('train/viola') else 1
        for path in sorted(folder.iterdir())[count:]:
            path.unlink()
    arguments = [str(tmp_path), str(two_classes)]
    (tmp_path / 'scenes.py').write_text(
        f'import runs, {Path(__file__).stem} as tests\nfrom pathlib import Path\n'
        f'runs.run_command(lambda: tests.scenes(*map(Path, {arguments})))')
    done = command('-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', 2,
                   tmp_path / 'scenes.py', env=dict(os.environ, PYTHONPATH=str(HERE)), timeout=300)
    assert 'error: process 1: the memory of cpu is too small' in done.stderr, done.stderr
    assert 'error: process 0: another process ended' in done.stderr
    assert done.returncode != 0
    assert done.stdout.count(' classes; on ') == 4              # rank 0 alone speaks

    ours = one_step()
    grads = torch.load(tmp_path / 'grads.pt', weights_only=True)
    assert difference(grads, gradients(ours.model.G1, ours.D)) < 0.01

    assert 'resumed after 1 of 2 epochs' in done.stdout
    state = states(tmp_path / 'run')
    assert (state['steps'], len(state['random'])) == (8, 2)
    assert not same(*state['random'])
    assert same(state, states(tmp_path / 'whole'))
    assert states(tmp_path / 'few')['steps'] == 4


def test_one_instrument_is_enough(two_classes, tmp_path, monkeypatch, capsys, refused):
    """C has nothing to tell apart: it is not trained, and its losses are 0. All commands work."""
    data, run = tmp_path / 'one', tmp_path / 'run'
    shutil.copytree(two_classes, data, ignore=shutil.ignore_patterns('viola'))
    train.main(run_flags(data, run))
    assert 'only one class, bassoon: C has nothing to tell apart' in capsys.readouterr().out
    rows = report.log_rows(run / 'log.csv')
    assert len(rows) == 6
    assert all(row.split(',')[2] == '0' for row in rows)                # L_C
    config, model, _ = generate.load_run(run)
    lms, image, label = preprocess.open_dataset(data, 32, tmp_path / 'cache').train.batch([0, 1])
    with torch.no_grad():
        logits, residue = model.residue(image, label)
    assert logits.tolist() == residue.tolist() == [[0.0], [0.0]]
    evaluate.main([str(run)])
    printed = capsys.readouterr().out
    assert 'Does it hear?' in printed
    assert 'recognised' not in printed
    missing = 'fid_independent, kid_independent, is_independent, accuracy, accuracy_independent'
    assert f'not computed: fid, kid, is (no Inception weights), {missing}\n' in printed
    validation = json.loads((run / 'metrics.json').read_text())['validation']
    kinds = {'fine', 'coarse', 'real', 'random_frame', 'nearest_sound', 'mean_frame', 'other_sound'}
    assert validation.keys() == kinds
    assert validation['fine'].keys() == {'l1', 'match', 'classes'}
    evaluate.main([str(run), str(run)])
    monkeypatch.chdir(tmp_path)
    clip = min((data / 'chunk/validation/bassoon').iterdir())
    generate.main([str(run), str(clip)])
    assert Path(clip.with_suffix('.png').name).exists()
    refused(train, run_flags(data, tmp_path / 'S2IC', '--variant', 'S2IC'), 'S2IC', 'two')
    assert not (tmp_path / 'S2IC').exists()     # nothing was begun


# ------------------------------------------------------------------------------------ several runs

def test_several_runs_share_c_and_go_on_by_the_same_command(
        group, tmp_path, capsys, refused, monkeypatch):
    out, flags = tmp_path / 'out', [*group[1], '--variant', 'D', '--seed', '0', '1']
    refused(train, flags, '--out')
    flags += ['--out', str(out), '--classifier', str(group[0] / 'classifier.pt')]
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        stop_adam(patch, 8 + 3, signal.SIGTERM)         # in the second run
        train.main(flags)
    assert 'go on with: the same command' in capsys.readouterr().out
    train.main(flags)
    text = capsys.readouterr().out
    assert f'run 2 of 2: {out}/D-seed-1\n' in text
    assert 'run 1 of' not in text
    assert 'resumed after 0 of 1 epochs and 10 pairs' in text
    assert text.splitlines()[-1] == f'now: python evaluate.py {out}'
    names = {path.name for path in out.iterdir()}
    assert names == {'classifier.pt', 'D-seed-0', 'D-seed-1'}
    assert changed(states(out / 'D-seed-0')['model'], states(out / 'D-seed-1')['model'])
    refused(train, [*flags, '--epochs', '2'], out / 'D-seed-0', 'epochs is 1, not 2', '--out')
    config, _, trained_for = generate.load_run(out / 'D-seed-1')
    assert (config['seed'], config['variant'], trained_for['steps']) == (1, 'D', 4)


def test_a_run_that_diverges_does_not_keep_the_others(
        group, tmp_path, capsys, refused, monkeypatch):
    """They are trained, its name comes last; finished by --resume with another rate, it is
    accepted.
    """
    out = tmp_path / 'out'
    flags = [*group[1], '--variant', 'D', '--seed', '0', '1', '--out', str(out)]
    flags += ['--classifier', str(group[0] / 'classifier.pt')]
    step = train.Trainer.step

    def diverge(self, *batch, **more):
        losses = step(self, *batch, **more)
        if self.args.seed == 0:
            losses *= math.nan
        return losses

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, 'step', diverge)
        err = refused(train, flags, '1 of 2 runs failed', out / 'D-seed-0', '--resume')
    assert f'{out}/D-seed-0 failed: L_C is nan at step 1' in err
    assert states(out / 'D-seed-1')['epoch'] == 1
    train.main(['--resume', str(out / 'D-seed-0'), '--lr', '0.0001', '--device', 'cpu'])
    capsys.readouterr()
    train.main(flags)
    assert 'run 1 of' not in capsys.readouterr().out


def test_two_commands_of_one_group_train_c_once(group, two, tmp_path, monkeypatch):
    """As on two GPUs, a seed each; C is trained by the one, waited for by the other."""
    made, err = [], io.StringIO()

    def make(*_):
        made.append('C')
        while 'waiting for another process' not in err.getvalue():
            time.sleep(0.01)
        return runs.load_file(group[0] / 'classifier.pt')

    monkeypatch.setattr(train, 'make_classifier', make)
    monkeypatch.setattr(sys, 'stderr', err)
    job = argparse.Namespace(seed=0), two, tmp_path / 'classifier.pt', 'cpu'
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(train.get_classifier, *job) for _ in range(2)]
        first, second = [dict(thread.result().state_dict()) for thread in both]
    assert made == ['C']
    assert same(first, second)


def test_all_are_seven_runs_for_each_seed(tmp_path, refused):
    flags = ['--data', 'x', '--variant', 'all', '--preset', 'small', '--out', str(tmp_path)]
    plan = train.plan_runs(train.parse_args([*flags, '--seed', '0', '1', '2']))
    models = *'ABCDE', 'S2IC', 'CMCGAN'
    names = [f'{variant}-seed-{seed}' for variant in models for seed in (0, 1, 2)]
    assert [run for _, run in plan] == [tmp_path / name for name in names]
    assert [args.lr for args, _ in plan] == [4e-4] * 15 + [2e-4] * 6
    assert {args.epochs for args, _ in plan} == {40}
    for more in ['--benchmark', '3'], ['--resume', tmp_path]:
        refused(train, [*flags, *more], 'several runs', more[0])
    # what is named twice is one
    one, = train.parse_args(['--data', 'x', '--variant', 'D', 'D', '--seed', '1', '1'])
    assert (one.variant, one.seed, one.group) == ('D', 1, False)


# ------------------------------------------------------------------------------------------- flags

def test_defaults_are_the_papers_numbers():
    args, = train.parse_args(['--data', 'Sub-URMP'])
    paper = dict(size=256, base=64, disc_base=64, batch_size=64, epochs=200, lr=0.0008,
                 betas=[0.9, 0.999], init_std=0.2, lambdas=[1, 1, 100, 1, 1], ema=0,
                 preset='paper', variant='E', pretrained=True, saturating=True, dropout=0.5)
    assert vars(args).items() >= paper.items()
    ours = make_trainer()
    for optimizer in ours.G_optimizer, ours.D_optimizer:
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]['lr'] == 0.0008


def test_presets_say_what_they_change_and_yield_to_flags(capsys):
    args, = train.parse_args(['--epochs', '6', '--size', '32'])
    out = capsys.readouterr().out
    assert (args.preset, args.epochs, args.size, args.base) == ('demo', 6, 32, 32)
    for words in ('model E, preset demo: base 32 (paper 64)', 'size 32 (paper 256)',
                  'betas [0.5, 0.999] (paper [0.9, 0.999])', 'python train.py --data Sub-URMP'):
        assert words in out
    args, = train.parse_args(['--data', 'x y', '--preset', 'small', '--lr', '9'])
    assert (args.lr, args.ema, args.pretrained) == (9, 1500, True)
    assert args.amp == 'off'
    assert 'amp' not in out             # which the paper does not speak of
    typed = "python train.py --data 'x y' --preset small --lr 9"
    assert args.made['command'] == typed


def test_precision_is_the_presets_or_the_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda _: True)
    for flags, mode in ([], 'bf16'), (['--preset', 'demo'], 'off'), (['--preset', 'small'], 'off'):
        args, = train.parse_args(['--data', 'x', *flags])
        assert train.amp_mode(args, torch.device('cuda')) == mode
        args, = train.parse_args(['--data', 'x', *flags, '--amp', 'fp16'])
        assert train.amp_mode(args, torch.device('cuda')) == 'fp16'


@pytest.mark.parametrize('batch_size, device, gpus', [
    (64, None, [0, 1, 2, 3]),
    (11, 'cuda', [0, 1]),
    (3, None, [0]),
    (64, 'cuda:1', []),
    (64, 'cpu', []),
])
def test_each_gpu_has_four_pictures(batch_size, device, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    args = argparse.Namespace(batch_size=batch_size, device=device)
    assert train.choose_gpus(args) == gpus


def test_several_gpus_of_one_process_are_not_compiled_for(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    flags = ['--compile', '--benchmark', 1, '--batch-size', 8]
    refused(train, flags, '--compile', '--device cuda:0', 'torchrun')


def test_a_baselines_settings_are_its_own_and_yield_to_flags(tmp_path, capsys, refused):
    """Size, widths, batch, epochs and EMA are the preset's, but the paper's epochs; the rest is
    theirs.
    """
    for name, epochs in (('S2IC', 35), ('CMCGAN', 200)):
        flags = ['--data', 'x', '--variant', name]
        args, = train.parse_args(flags)
        theirs = dict(epochs=epochs, size=256, base=64, batch_size=64, ema=0, lr=2e-4,
                      betas=[0.5, 0.999], init_std=0.02, lambdas=[0, 1, 1, 1, 1])
        assert vars(args).items() >= theirs.items()
        said = capsys.readouterr().out
        assert f'model {name}, preset paper: lr 0.0002 (paper 0.0008)' in said
        small, = train.parse_args([*flags, '--preset', 'small', '--lr', '0.1'])
        assert (small.epochs, small.base, small.ema, small.lr) == (40, 32, 1500, 0.1)
        runs.write_config(tmp_path, vars(small), classes=[], lms_channels=1)
        again, = train.parse_args(['--resume', str(tmp_path), '--lr', '0.3'])
        assert (again.variant, again.lr, again.lambdas) == (name, 0.3, small.lambdas)
        for flag in (['--dropout', '0.3'], ['--no-saturating'], ['--detach-residue']):
            for words in [*flags, 'E', '--out', 'y'], ['--resume', tmp_path]:
                refused(train, [*words, *flag], name, 'no such choice')
    capsys.readouterr()         # those of CAR-GAN's variants are the same
    train.parse_args(['--data', 'x', '--variant', 'S2IC', 'D', 'E', '--out', 'y'])
    assert re.findall(r'^model (\w+), preset', capsys.readouterr().out, re.M) == ['S2IC']


def test_wrong_use_is_one_line(run, two_classes, tmp_path, refused):
    refused(train, run_flags(two_classes, run), run, '--resume')
    refused(train, resume(run, '--base', 16), '--base 16', '8')
    refused(train, resume(run, '--preset', 'small'), '--preset', 'leave the flag out')
    refused(train, resume(tmp_path), tmp_path, 'not a run')
    for flags in (['--size', '100'], ['--batch-size', '0'], ['--lr', '-1'], ['--variant', 'F'],
                  ['--dropout', '1'], ['--lr', 'nan'], ['--device', 'gpu']):
        refused(train, ['--data', two_classes, *flags], *flags)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/mine.txt').write_text('keep me')
    for out in tmp_path / 'full/mine.txt/run', tmp_path / 'full':
        refused(train, run_flags(two_classes, out), out, '--out')


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        train.main(['--help'])
    out = capsys.readouterr().out
    assert 'python train.py --data Sub-URMP' in out
    flags = set(re.findall(r'^  (?:-h, )?(--[a-z][a-z-]+)', out, re.M))
    assert {'--data', '--variant', '--help'} < flags
    assert len(flags - {'--help'}) <= 28


def test_benchmark(capsys):
    flags = ['--size', '32', '--base', '8', '--batch-size', '2', '--device', 'cpu']
    train.main(['--benchmark', '1', *flags])
    line = capsys.readouterr().out.splitlines()[-1]
    rate, memory = re.fullmatch(r'(\S+) images/s; peak memory (\S+) GB', line).groups()
    assert float(rate) > 0
    assert 0.1 < float(memory) < 30


# ------------------------------------------------------------------------------ FID's Inception

def fill(network):
    """Weights that keep the activations near 1; NumPy's old generator never changes."""
    numbers = np.random.RandomState(0)
    state = network.state_dict()
    for name, value in state.items():
        if name.endswith('num_batches_tracked'):
            continue
        noise = torch.from_numpy(numbers.standard_normal(value.shape).astype(np.float32))
        if value.ndim > 1:
            value.copy_(noise * (2 / value[0].numel()) ** 0.5)
        else:
            value.copy_(noise * 0.1 + name.endswith(('bn.weight', 'running_var')))
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope='session')
def network():
    """FID's Inception with random weights."""
    return fill(InceptionV3())


def test_names_and_shapes_are_those_of_the_fid_weights(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 566                       # 94 convolutions with 6 entries each, fc with 2
    weights = [shape for name, shape in shapes.items() if name.endswith(('weight', 'bias'))]
    assert sum(map(math.prod, weights)) == 23850960
    expected = {
        'Conv2d_4a_3x3.bn.running_var': (192,), 'Mixed_5d.branch_pool.conv.weight': (64, 288, 1, 1),
        'Mixed_6c.branch7x7_2.conv.weight': (160, 160, 1, 7),
        'Mixed_7a.branch7x7x3_4.conv.weight': (192, 192, 3, 3),
        'Mixed_7b.branch3x3dbl_3b.conv.weight': (384, 384, 3, 1), 'fc.bias': (1008,)}
    assert {name: shapes[name] for name in expected} == expected
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


GOLDEN = {
    64: [0.31487, 0.416104, 1.04752, 0.0847179, 0.0365558, 0.0117877, 0.0836658, 0,
         -0.712324, -1.45251, -0.202041, 1.28359],
    299: [0.450484, 0.586331, 1.59732, 0.1494, 0.0379128, 0.0219257, 0.103194, 0,
          -0.743717, -1.78469, -0.0811616, 1.75713]}


@pytest.mark.parametrize('size', [64, 299])
def test_the_features_are_those_of_pytorch_fid(network, size):
    """GOLDEN is what pytorch-fid 0.3.0 makes of the same weights and picture, features and logits;
    it adds the bias of the last layer, which the Inception score's reference leaves out.
    """
    pixels = np.random.RandomState(1).uniform(0, 1, (1, 3, size, size)).astype(np.float32)
    features, logits = network(torch.from_numpy(pixels))
    assert features.shape == (1, 2048)
    assert logits.shape == (1, 1008)
    biased = logits + network.fc.bias
    got = [features.mean(), features.std(), *features[0, ::400], *biased[0, ::300]]
    np.testing.assert_allclose(got, GOLDEN[size], rtol=1e-3, atol=1e-4)
    assert difference([logits], [features @ network.fc.weight.T]) < 1e-5


def test_weights_from_a_file(network, tmp_path):
    state = {name: value for name, value in network.state_dict().items()
             if 'num_batches' not in name}          # as older torch wrote it
    torch.save(state, tmp_path / 'weights.pth')
    loaded = inception(tmp_path / 'weights.pth')
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not changed(state, loaded.state_dict())


def test_weights_that_cannot_be_had(tmp_path, no_network):
    """Neither from the network, nor from a broken download, nor from a file: a line says it."""
    with pytest.raises(InputError) as error:
        inception()
    lines = [str(error.value)]
    cached = tmp_path / 'hub/hub/checkpoints/pt_inception-2015-12-05-6726825d.pth'
    cached.parent.mkdir(parents=True, exist_ok=True)
    cached.write_bytes(b'half a down')
    with pytest.raises(InputError, match=str(cached)) as error:
        inception()
    lines.append(str(error.value))
    path = tmp_path / 'weights.pth'
    harm = {'fc.weight': Harm(str(tmp_path / 'ran'))}
    for content in None, harm, [1, 2], {'fc.weight': torch.zeros(1000, 2048)}:
        if content is not None:
            torch.save(content, path)
        with pytest.raises(InputError, match=str(path)) as error:
            inception(path)
        lines.append(str(error.value))
    for line in lines:
        assert f'{evaluate.INCEPTION_URL}: fetch it and give it with --inception PATH' in line
        assert '\n' not in line
    assert not (tmp_path / 'ran').exists()


# ------------------------------------------------------------------------------ distance and score

def features(n, d=24, seed=0, offset=0.0):
    """Correlated features (n, d) >= offset, as behind a ReLU; the seed moves their Gaussian."""
    mixing, rows = np.random.RandomState(seed), np.random.RandomState(seed + 100)
    return np.maximum(rows.randn(n, d) @ mixing.randn(d, d) + mixing.randn(d), 0) + offset


def by_sqrtm(a, b):
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    means = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return means + np.trace(S_a) + np.trace(S_b) - 2 * np.trace(linalg.sqrtm(S_a @ S_b)).real


@pytest.mark.parametrize('n, m', [(200, 300), (24, 25), (26, 400), (10, 15), (10, 200)])
def test_frechet_distance_is_the_formula(n, m):
    a, b = features(n), features(m, seed=1)
    expected = by_sqrtm(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(a).float(), b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('n', [2, 24, 26, 500])
@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_a_set_is_at_no_distance_from_itself(n, offset):
    a = features(n, offset=offset)
    assert 0 <= frechet_distance(a, a[::-1].copy()) <= 1e-6 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 24, rel=1e-6)


def test_equal_rows_are_at_the_distance_of_their_means():
    assert frechet_distance(np.ones((5, 3)), np.zeros((9, 3))) == pytest.approx(3)


@pytest.mark.parametrize('n, m', [(2, 3), (30, 20), (2500, 40)])
def test_kernel_distance_is_the_formula(n, m):
    """The unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3; n of 2500 comes in blocks."""
    a, b = features(n), features(m, seed=1)
    K_aa, K_bb = (a @ a.T / 24 + 1) ** 3, (b @ b.T / 24 + 1) ** 3
    K_ab = (a @ b.T / 24 + 1) ** 3
    within_a = (K_aa.sum() - np.trace(K_aa)) / (n * (n - 1))
    within_b = (K_bb.sum() - np.trace(K_bb)) / (m * (m - 1))
    expected = within_a + within_b - 2 * K_ab.mean()
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(a, b, evaluate.kernel_mean(b)) == kernel_distance(a, b)
    assert kernel_distance(torch.from_numpy(b).float(), a) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('distance', [frechet_distance, kernel_distance])
@pytest.mark.parametrize('a, b', [
    (np.ones((1, 3)), np.ones((5, 3))), (np.ones((5, 3)), np.ones((0, 3))),
    (np.ones((5, 3)), np.ones((5, 4))), (np.ones(5), np.ones(5)),
    (np.array([[0, 1], [np.nan, 0]]), np.eye(2)), (np.eye(2), np.array([[0, 1], [np.inf, 0]]))],
    ids=['one row', 'nothing', 'two d', 'flat', 'nan', 'inf'])
def test_features_without_a_distance_are_refused(distance, a, b):
    with pytest.raises(ValueError, match='features'):
        distance(a, b)


def test_inception_score_of_classes_used_equally_is_their_number():
    one_hot = torch.eye(5)                                           # 0 log 0 = 0
    assert inception_score(one_hot.repeat(20, 1)) == pytest.approx((5, 0), abs=1e-9)
    one_class_a_split = one_hot.repeat_interleave(20, dim=0)
    assert inception_score(one_class_a_split, splits=5) == pytest.approx((1, 0), abs=1e-9)
    vanishing = np.tile([[1.0, 0.0], [1.0, 5e-324]], (10, 1))
    assert inception_score(vanishing, splits=2) == pytest.approx((1, 0))


def test_inception_score_is_the_formula_on_uneven_splits():
    p = np.random.RandomState(0).dirichlet(np.full(6, 0.3), 25)
    scores = []
    for part in np.array_split(p, 4):
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    expected = np.mean(scores), np.std(scores)
    assert inception_score(p, splits=4) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize('rows, splits', [
    (np.full((9, 2), 0.5), 10), (np.full((9, 2), 0.5), 0), (np.ones(10), 1),
    (np.full((9, 2), 0.7), 1), (np.tile([[1.5, -0.5]], (9, 1)), 1), (np.full((9, 2), np.nan), 1)],
    ids=['few rows', 'no split', 'flat', 'logits', 'negative', 'nan'])
def test_rows_without_a_score_are_refused(rows, splits):
    with pytest.raises(ValueError, match='not rows of probabilities'):
        inception_score(rows, splits)


def test_match_by_hand():
    """In the first class 0 is nearer to its own frame than to that of 1, and as near as to that of
    2; 1 is nearer to both others, 2 to its own. The second class has no two clips.
    """
    truth = torch.tensor([[0, 0], [4, 0], [0, 4], [9, 9]])
    pictures = torch.tensor([[0, 2], [0, 2], [0, 3], [0, 0]])
    labels = torch.tensor([5, 5, 5, 2])
    assert evaluate.match_accuracy(pictures, truth, labels) == (1.5 + 0 + 2) / 6
    assert evaluate.match_accuracy(pictures, truth, torch.arange(4)) is None
    truth = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    assert evaluate.match_accuracy(truth, truth, labels) == 1
    deaf = truth[:1].expand(40, -1, -1, -1)
    assert evaluate.match_accuracy(deaf, truth, labels) == 0.5


# -------------------------------------------------------------------- the independent classifier

def test_the_independent_classifier_is_trained_once_and_is_not_c(two, tmp_path, capsys):
    dataset = two._replace(folder=tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    independent = evaluate.get_independent(dataset)
    assert torch.equal(torch.get_rng_state(), state)    # the run's random numbers stay its own
    assert 'independent classifier epoch 10/10' in capsys.readouterr().out
    assert not independent.training
    assert len(independent.resnet.layer1) == 2                  # ResNet18, C is a ResNet50
    _, image, _ = dataset.train.batch(range(19))
    rows, logits = independent(image)
    assert rows.shape == (19, 512)
    assert torch.equal(independent.resnet(image), logits)
    assert difference([logits], [independent.resnet.fc(rows)]) < 1e-5
    assert independent.accuracy == train.measure_accuracy(independent.resnet, dataset.validation)
    again = evaluate.get_independent(dataset)
    assert 'epoch' not in capsys.readouterr().out
    assert not changed(again.state_dict(), independent.state_dict())


# ------------------------------------------------------------------------------------ the metrics

class Colours(nn.Module):
    """A space of images by their mean colour (B, 3); two classes, red and the rest."""
    accuracy = 1.0

    def forward(self, image):
        colour = image.mean(dim=(2, 3))
        return colour, torch.stack([colour[:, 0], -colour[:, 0]], dim=1)


def test_generated_pictures_are_seen_in_8_bits():
    """All networks see what a file would hold; L1 stays on the floats. Out of range is cut."""
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    files = torch.stack([torch.from_numpy(np.array(generate.picture(x))) for x in image])
    files = files.permute(0, 3, 1, 2)
    seen = {}

    def spy(name):
        return lambda x: (seen.update({name: x}), Colours()(x))[1]

    networks = {name: spy(name) for name in ('inception', 'independent')}
    some = torch.tensor([False, True])
    rows = evaluate.look_at(image, networks, image * 0, lambda x: spy('C')(x)[1], some)
    assert torch.equal(rows['pictures'], files[1:])
    assert difference([seen['inception']], [files / 255]) < 1e-6
    for name in 'independent', 'C':
        assert difference([seen[name]], [files / 127.5 - 1]) < 1e-6
    expected = image.abs().mean(dim=(1, 2, 3))
    assert difference([rows['l1']], [expected]) < 1e-6


def test_the_inception_score_is_that_of_mixed_up_pictures(two):
    """Sorted by class, each of the ten parts would hold one class and the score be 1."""
    split = two.train.subset([*range(12)] * 5 + [*range(12, 19)] * 6)
    p = torch.eye(2)[split.labels]
    rows = dict(features_independent=torch.rand(102, 3), probabilities_independent=p,
                predictions_independent=split.labels, l1=torch.zeros(102))
    metrics = evaluate.metrics_of(rows, split, dict(rows))
    mixed = p[torch.randperm(102, generator=torch.Generator().manual_seed(0))]
    score, spread = inception_score(mixed)
    assert (metrics['is_independent'], metrics['is_independent_std']) == (score, spread)
    assert score > 1.5
    assert metrics['fid_independent'] == pytest.approx(0, abs=1e-5)
    assert metrics['accuracy_independent'] == 1
    assert 'accuracy' not in metrics


def test_random_frames_are_of_the_class_and_not_their_own():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    other = torch.tensor([2, 0, 1, 1, 0] * 20)
    drawn = evaluate.random_frames(labels, other)
    assert torch.equal(labels[drawn], other)
    assert set(drawn.tolist()) == set(range(6))
    assert torch.equal(evaluate.random_frames(labels, other), drawn)
    many = torch.cat([torch.tensor([1]), torch.tensor([0, 2]).repeat(20)])
    own = evaluate.random_frames(many, many, own=True)
    assert torch.equal(many[own], many)
    assert own[0] == 0                                          # the only one of its class
    assert not (own[1:] == torch.arange(1, 41)).any()
    assert len(own.unique()) > 20


def test_the_nearest_sound_by_hand(two):
    train, validation = two.train, two.validation
    for split in train, validation:
        nearest = evaluate.nearest_sounds(train, split)
        for i in range(len(split)):
            apart = (train.average_lms() - split.average_lms()[i]).double().norm(dim=1)
            apart[train.labels != split.labels[i]] = math.inf
            if split is train:
                apart[i] = math.inf
            assert nearest[i] == apart.argmin()
    alone = train.subset([0, 12])
    assert evaluate.nearest_sounds(alone, alone).tolist() == [0, 1]


def evaluated(run, dataset, networks, folder, images=None):
    args = argparse.Namespace(batch_size=2, images=images, data=None)
    config = runs.load_config(run)
    return evaluate.evaluate_run(run, folder, config, dataset, networks, args, torch.device('cpu'))


def test_kid_is_of_some_rows_of_large_sets():
    """Of small sets of all."""
    features = torch.arange(40.0).reshape(20, 2)
    assert evaluate.draw_rows(features, 7).unique(dim=0).shape == (7, 2)
    assert torch.equal(evaluate.draw_rows(features, 30).sort(dim=0).values, features)
    assert torch.equal(evaluate.draw_rows(features, 7), evaluate.draw_rows(features, 20)[:7])


def test_the_metrics_by_hand(group, two, tmp_path):
    """Of model E, and the controls: each kind of picture is made here once more, all at once."""
    frames, split = two.train.subset([0, 1, 2, 12, 13]), two.validation.subset([0, 1, 3])
    dataset = two._replace(train=frames, validation=split)
    networks = dict(inception=Colours(), independent=Colours())
    run, images = group[0] / 'E-seed-0', tmp_path / 'images'
    model, metrics = evaluated(run, dataset, networks, tmp_path, images)
    assert metrics == json.loads((tmp_path / 'metrics.json').read_text())
    shown, real = {}, frames.batch(range(5))[1]
    means = torch.stack([real[:3].mean(dim=0), real[3:].mean(dim=0)])
    for name, split in dict(train=frames, validation=split).items():
        lms, image, label = split.batch(range(len(split)))
        own = name == 'train'
        draws = [real[evaluate.random_frames(frames.labels, label, own, seed)] for seed in range(8)]
        other = evaluate.random_frames(label, label, own=True)
        nearest = evaluate.nearest_sounds(frames, split)
        with torch.no_grad():
            coarse, fine, _ = model(lms, label)
            other_sound, wrong_label = model(lms[other], label)[1], model(lms, 1 - label)[1]
        copies = dict(random_frame=draws[0], nearest_sound=real[nearest], mean_frame=means[label])
        shown[name] = dict(copies, coarse=coarse, fine=fine, real=image)
        if not own:
            shown[name].update(other_sound=other_sound, wrong_label=wrong_label)
        assert metrics[name].keys() - {'failures'} == shown[name].keys()
        for kind, x in shown[name].items():
            found, saved = metrics[name][kind], generate.as_saved(x)
            seen = Colours()(saved)[1].argmax(dim=1)
            assert found['accuracy_independent'] == (seen == label).double().mean()
            assert found['is'] is None                                      # of so few
            assert ('accuracy' in found) == (kind in ('coarse', 'fine', 'real'))
            if 'accuracy' in found:
                named = model.residue.classifier(saved).argmax(dim=1)
                assert found['accuracy'] == (named == label).double().mean()
            if kind == 'random_frame':
                x = torch.stack(draws)
            else:
                matched = evaluate.match_accuracy(saved, image, label)
                assert found.get('match', 1) == matched
            assert found['l1'] == pytest.approx((x - image).abs().mean().item(), rel=1e-4, abs=1e-9)
        assert metrics[name]['mean_frame']['match'] == 0.5
        for i in range(len(split)):
            path = images / name / two.classes[label[i]] / f'{split.stems[i]}.png'
            apart = np.asarray(Image.open(path)).astype(int) - generate.picture(fine[i])
            assert np.abs(apart).max() <= 1
    given = metrics['validation']['wrong_label']
    both = given['accuracy_given'] + given['accuracy_independent']          # of two classes
    assert both == pytest.approx(1)
    for name, another in ('train', 'validation'), ('validation', 'train'):
        for kind, x in shown[name].items():
            truth = shown[another if kind == 'real' else name]['real']
            a, b = (Colours()(generate.as_saved(y))[0] for y in (x, truth))
            found = metrics[name][kind]
            for ending, a, b in ('_independent', a, b), ('', (a + 1) / 2, (b + 1) / 2):
                for metric, distance in ('fid', frechet_distance), ('kid', kernel_distance):
                    expected = pytest.approx(distance(a, b), rel=1e-3, abs=1e-6)
                    assert found[metric + ending] == expected


def test_failures_are_the_pictures_that_were_judged(group, two, tmp_path, monkeypatch):
    """S2IC draws its noise anew at each call. Each picture is looked at once."""
    judged, grids = [], {}

    class Deaf(Colours):
        def forward(self, image):
            judged.extend(image)
            colour, logits = super().forward(image)
            return colour, torch.tensor([1.0, 0]).expand_as(logits)

    def note(rows, path):
        grids[path.name] = rows

    monkeypatch.setattr(evaluate, 'draw_grid', note)
    clips = [*range(12, 19)] * 3        # of the other class
    dataset = two._replace(validation=two.train.subset(clips))
    (tmp_path / 'failures.png').write_bytes(b'of an earlier evaluation')
    run = group[0] / 'S2IC-seed-0'
    model, metrics = evaluated(run, dataset, dict(independent=Deaf()), tmp_path)
    assert not (tmp_path / 'failures.png').exists()
    # the mean frames, I'' and the frames of both splits, the grid
    assert len(judged) == 2 + 2 * 19 + 2 * 21 + 2
    loudness = dataset.validation.loudness()
    silent = (loudness < -40).sum().item()
    failures = dict(clips=21, wrong=21, near_silent=silent, near_silent_wrong=silent)
    assert metrics['validation']['failures'] == failures
    rows = grids['failures.png']
    levels = [f'{level:.0f} dB' for level in loudness.sort().values[:16]]
    assert [title.splitlines()[1] for title, _ in rows] == levels     # the quietest
    pictures = [np.asarray(generate.picture(x)) for x in judged]
    for title, row in rows:
        assert title.startswith('viola') and title.endswith('seen as\nbassoon')
        for stage in "I'", "I''":
            assert any(np.array_equal(row[stage], x) for x in pictures)
    with torch.no_grad():
        anew = generate.picture(model(*dataset.validation.batch([0])[::2])[1][0])
    assert not any(np.array_equal(anew, x) for x in pictures)
    fine = {key: value for key, value in metrics['train']['fine'].items() if key != 'classes'}
    assert metrics['train']['coarse'] == fine


# -------------------------------------------------------------------------------------- the command

@pytest.fixture
def folder(group, tmp_path, monkeypatch, no_network):
    """A folder of runs, E and S2IC, to be measured by other networks."""
    folder = shutil.copytree(group[0], tmp_path / 'runs', copy_function=os.link)
    shutil.rmtree(folder / 'CMCGAN-seed-0')
    monkeypatch.setattr(evaluate, 'get_independent', lambda *_: Colours())
    monkeypatch.setattr(evaluate, 'get_audio_classifier', lambda *_: None)
    return folder


@pytest.fixture
def measured(monkeypatch):
    """What is measured: the folders that it is written to. The same weights are measured once."""
    folders, kept, measure = [], {}, evaluate.measure

    def spy(model, dataset, networks, batch_size, device, folder, images):
        folders.append(folder)
        key = runs.digest(model), dataset.fingerprint, *networks
        if key not in kept:
            kept[key] = measure(model, dataset, networks, batch_size, device, folder, images)
        return kept[key]

    monkeypatch.setattr(evaluate, 'measure', spy)
    return folders


def change(path, **values):
    """Change what a .json or .pt file holds, by a new file."""
    if path.suffix == '.pt':
        runs.save_file(dict(runs.load_file(path), **values), path)
    else:
        runs.write_text(path, json.dumps(json.loads(path.read_text()) | values))


def test_a_run_is_measured_again_where_something_is_new(folder, measured, monkeypatch, capsys):
    """The weights, the data, the independent classifier, or Inception at hand."""
    monkeypatch.chdir(folder.parent)
    run = Path('runs/S2IC-seed-0')      # the newest run below runs/
    path = run / 'metrics.json'

    def evaluated_again():
        measured.clear()
        evaluate.main(['--device', 'cpu'])
        return measured == [run]

    assert evaluated_again()
    text, first = capsys.readouterr().out, path.read_text()
    assert {'grid.png', 'metrics.json', 'report.html'} < {file.name for file in run.iterdir()}
    assert not evaluated_again()
    assert capsys.readouterr().out == text
    change(path, measured=json.loads(first)['measured'] | dict(data='other files'))
    assert evaluated_again()
    assert path.read_text() == first
    for broken in '[]', '{', json.dumps(json.loads(first) | dict(version=0)):
        path.write_text(broken)
        report.write_page(run)          # as if nothing had been measured
        assert evaluated_again()
        assert path.read_text() == first
    state = runs.load_file(run / 'model.pt')['model']
    change(run / 'model.pt', model={name: value * 1.5 for name, value in state.items()})
    assert evaluated_again()
    assert path.read_text() != first
    another = Colours()
    another.register_buffer('weights', torch.ones(1))
    monkeypatch.setattr(evaluate, 'get_independent', lambda *_: another)
    assert evaluated_again()
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, 'inception', lambda path: Colours())
        assert evaluated_again()
    assert json.loads(path.read_text())['train']['fine']['fid'] is not None
    assert not evaluated_again()        # without Inception it keeps what it has
    assert 'is not to be had' in capsys.readouterr().err


def test_looking_at_an_unfinished_run_does_not_make_it_done(folder, measured, refused, capsys):
    run, flags = folder / 'E-seed-0', ['--device', 'cpu']
    change(run / 'config.json', epochs=6)       # its checkpoint has one

    def titles():
        evaluate.main([str(folder), *flags])
        assert f'{run}: left out, not done: epoch 1 of 6' in capsys.readouterr().out
        return list(json.loads((folder / 'tables.json').read_text()))

    assert titles() == ['S2IC']
    evaluate.main([str(run), *flags])
    assert f'{run} is not done: epoch 1 of 6' in capsys.readouterr().out
    assert json.loads((run / 'metrics.json').read_text())['epoch'] == 1
    assert titles() == ['S2IC']
    shutil.rmtree(folder / 'S2IC-seed-0')
    refused(evaluate, [folder, *flags], folder, 'no run in it is done')
    assert measured == [folder / 'S2IC-seed-0', run]


def test_one_table_is_of_one_independent_classifier(folder, measured, monkeypatch, capsys):
    """And of one state of the data: what was found by another before is measured again."""
    flags = ['--device', 'cpu']
    another = Colours()
    another.register_buffer('weights', torch.ones(1))
    evaluate.main([str(folder / 'E-seed-0'), *flags])
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, 'get_independent', lambda *_: another)
        evaluate.main([str(folder / 'S2IC-seed-0'), *flags])
    measured.clear()
    evaluate.main([str(folder), *flags])
    assert measured == [folder / 'S2IC-seed-0']
    found = [json.loads(path.read_text())['measured'] for path in folder.glob('*/metrics.json')]
    assert len(found) == 2
    for name in 'independent', 'data':
        assert found[0][name] == found[1][name]
    assert found[0]['weights'] != found[1]['weights']


def test_several_runs_side_by_side(folder, measured, tmp_path, refused, capsys):
    """A column a model, of its seeds; one for a run that was finished with other settings, and one
    for a run from before there was such a setting.
    """
    flags = ['--device', 'cpu']
    for seed in 1, 2, 3:
        run = folder / f'S2IC-seed-{seed}'
        shutil.copytree(folder / 'S2IC-seed-0', run, copy_function=os.link)
        change(run / 'config.json', seed=seed, compile=bool(seed), out=str(run))
    change(folder / 'S2IC-seed-0/config.json', lr=0.1, made=dict(command='train'))
    old = folder / 'S2IC-seed-3/config.json'
    settings = json.loads(old.read_text())
    del settings['ema']
    runs.write_text(old, json.dumps(settings))
    evaluate.main([str(folder), *flags])
    out, text = capsys.readouterr().out, (folder / 'tables.md').read_text()
    assert text.strip() in out
    columns = json.loads((folder / 'tables.json').read_text())
    kept = {title: [metrics['seed'] for metrics in found] for title, (_, found) in columns.items()}
    assert kept == {'E': [0], 'S2IC': [1, 2], 'S2IC, ema None': [3], 'S2IC, lr 0.1': [0]}
    assert {'report.html', 'figure4.png', 'figure6.png'} < {path.name for path in folder.iterdir()}
    assert all((path / 'report.html').exists() for path in folder.glob('*-seed-*'))
    # by name they are printed only, unless --out says where to
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    named = [str(folder / name) for name in ('S2IC-seed-0', 'E-seed-0')]
    evaluate.main([*named, *flags])
    assert '## Table 2' in capsys.readouterr().out
    evaluate.main([*named, '--out', str(tmp_path / 'out'), *flags])
    assert list(json.loads((tmp_path / 'out/tables.json').read_text())) == ['E', 'S2IC']
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert len(measured) == 5
    refused(evaluate, [*named, tmp_path / 'none', *flags], tmp_path / 'none', 'not a run')
    refused(evaluate, [folder, '--images', tmp_path / 'new', *flags], '--images', 'one run')
    change(folder / 'S2IC-seed-0/config.json', data='/other')
    refused(evaluate, [folder, *flags], folder / 'S2IC-seed-0', 'its data', folder / 'E-seed-0')


def test_other_data_leaves_the_runs_files_as_they_are(folder, two_classes, tmp_path, refused):
    """--data goes to a folder of its own in the run, the tables to one in the folder of runs. The
    other data has one pair in validation, and a stem that is no UTF-8.
    """
    flags = ['--device', 'cpu', '--cache', str(tmp_path / 'cache')]
    (folder / 'tables.md').write_text('of its own data')
    before = {path: path.read_bytes() for path in folder.rglob('*') if path.is_file()}
    other = shutil.copytree(two_classes, tmp_path / 'one pair')
    for path in other.glob('*/validation/bassoon'):
        shutil.rmtree(path)
    for path in other / 'img/train/viola', other / 'chunk/train/viola':
        old = sorted(path.iterdir())[0]
        os.rename(old, os.path.join(os.fsencode(path), b'h\xff' + os.fsencode(old.suffix)))
    evaluate.main([str(folder), '--data', str(other), *flags])
    assert {path: path.read_bytes() for path in before} == before
    assert '## Table 2' in (folder / 'one pair/tables.md').read_text()
    run = folder / 'E-seed-0'
    found = json.loads((run / 'one pair/metrics.json').read_text())
    assert found['data'] == str(other)
    assert found['pictures'] == dict(train=19, validation=1)
    fine = found['validation']['fine']
    for metric in 'fid_independent', 'kid_independent', 'is_independent', 'match':
        assert fine[metric] is None
    assert fine['accuracy_independent'] in (0, 1)
    assert list(fine['classes']) == ['viola']
    # every I'', of one run, into a new folder
    images = tmp_path / 'images'
    flags += ['--data', str(other)]
    to_images = [str(run), '--out', str(tmp_path / 'out'), '--images', str(images)]
    evaluate.main([*to_images, *flags])
    assert {path: path.read_bytes() for path in before} == before
    assert (tmp_path / 'out/metrics.json').exists()
    written = {path.relative_to(images).with_suffix('') for path in images.rglob('*.png')}
    assert written == {path.relative_to(other / 'img').with_suffix('')
                       for path in (other / 'img').rglob('*.jpg')}
    refused(evaluate, [*to_images, *flags], images)
    for path in other.glob('*/*/viola'):
        path.rename(path.with_name('violet'))
    refused(evaluate, [run, *flags], other, 'classes')


def test_without_inception_all_else_comes(folder, measured, refused, capsys, tmp_path, monkeypatch):
    run, flags, asked = folder / 'S2IC-seed-0', ['--device', 'cpu'], []
    monkeypatch.setattr(evaluate, 'get_audio_classifier', lambda *of: asked.append(of))
    evaluate.main([str(run), *flags])
    assert len(asked) == 1              # generate.py asks it what plays
    err = capsys.readouterr().err
    assert 'fid, kid and is: not computed' in err
    assert '--inception PATH' in err
    assert 'fid' not in json.loads((run / 'metrics.json').read_text())['train']['fine']
    refused(evaluate, [run, *flags, '--require-inception'], '--inception PATH')
    refused(evaluate, [run, *flags, '--inception', tmp_path / 'none.pth'], 'none.pth')
    monkeypatch.chdir(tmp_path / 'hub')
    refused(evaluate, [], 'no run', 'python train.py')
    refused(evaluate, [folder, '--batch-size', '0'], '--batch-size', 'must be at least 1')


def test_the_grid_shows_the_nearest_train_frame(group, two, tmp_path, monkeypatch):
    """A row a class: LMS, I', I'', truth and the train frame nearest to I'' for the independent
    classifier.
    """
    grids = {}
    monkeypatch.setattr(evaluate, 'draw_grid', lambda rows, path: grids.update({path.name: rows}))
    model, _ = evaluated(group[0] / 'E-seed-0', two, dict(independent=Colours()), tmp_path)
    frames = two.train.batch(range(19))[1]
    clips = generate.example_clips(two)
    for (title, row), (name, (lms, _, label)) in zip(grids['grid.png'], clips, strict=True):
        assert title == name
        assert list(row) == ['LMS', "I'", "I''", 'truth', 'nearest in train']
        with torch.no_grad():
            fine = generate.as_saved(model(lms, label)[1])
        nearest = (Colours()(fine)[0] - Colours()(frames)[0]).norm(dim=1).argmin()
        assert np.array_equal(row['nearest in train'], generate.picture(frames[nearest]))
        assert np.array_equal(row["I''"], generate.picture(fine[0]))


# ----------------------------------------------------------------------- tables, claims, the report

def cells(text):
    """The rows of the first Markdown table in a text."""
    table = re.search(r'(?:^\|.*\|\n?)+', text, re.M)[0].splitlines()
    assert len(set(map(len, table))) == 1
    assert re.fullmatch(r'(\|-+)+\|', table[1])
    del table[1]
    return [[cell.strip() for cell in line[1:-1].split('|')] for line in table]


def seeds(*factors, **fine):
    """Metrics by hand, of a run for each factor: these of I'' times the factor on validation, half
    of that on train.
    """
    def kinds(factor):
        scaled = {name: value and value * factor for name, value in fine.items()}
        return dict(
            fine=scaled, coarse=scaled, real=dict(accuracy=0.99, l1=0.0), random_frame=dict(l1=0.3),
            mean_frame=dict(l1=0.2, match=0.5), nearest_sound=dict(l1=0.15, match=0.7),
            other_sound=dict(l1=fine['l1'] + 0.03),
            wrong_label=dict(accuracy=0.1, accuracy_given=0.6 * factor))

    about = dict(data='/urmp', size=64, epoch=20, pictures=dict(train=3000, validation=2048))
    return [dict(about, train=kinds(factor / 2), validation=kinds(factor)) for factor in factors]


def of_model(fid, inception_score, accuracy, match):
    return {'fid': fid, 'is': inception_score, 'accuracy': accuracy, 'accuracy_independent': 0.5,
            'l1': 0.1, 'match': match}


MODELS = {
    'A': of_model(30, 5, 0.8, 0.6), 'B': of_model(24, 4, 0.8, 0.8), 'C': of_model(4, 5, 0.8, 0.8),
    'D': of_model(12, 10, 0.8, 0.8), 'E': of_model(12, 5, 0.8, 0.8),
    'S2IC': of_model(50, 2, 0.2, 0.8), 'CMCGAN': of_model(40, 2, 0.8, 0.5)}
COLUMNS = {model: (model, seeds(0.9, 1, 1.1, **fine)) for model, fine in MODELS.items()}


def claims(text):
    """{of which model: [(verdict, metric, both numbers)]} of a text."""
    lines = text.partition("## The paper's claims")[2].split('- E is ahead of ')[1:]
    return {line.partition(':')[0]: re.findall(r'(\w+) by (\w+) \((.*?)\)', line)
            for line in lines}


def test_a_table_has_four_digits_and_names_what_was_not_computed():
    two = seeds(1, 3, l1=0.1, accuracy=0.12345, match=None)
    shown = {'two': (two, 'fine', 'E'), 'one': (two[:1], 'fine', 'S2IC'),
             'real': (two[:1], 'real', 'real'), 'mean': (two[:1], 'mean_frame', 'mean_frame')}
    assert cells(report.table(shown, 'validation')) == [
        ['validation', *shown],
        ['accuracy', '0.2469 +- 0.175', '0.1235', '0.99', '-'],
        ['accuracy, paper', '0.9033', '0.7556', '0.9956', ''],
        ['l1', '0.2 +- 0.141', '0.1', '0', '0.2'],
        ['match', '-', '-', '-', '0.5']]
    del shown['mean']
    assert report.table(shown, 'validation').splitlines()[-1] == (
        'not computed: fid, kid, is (no Inception weights), fid_independent, kid_independent, '
        'is_independent, accuracy_independent, match')
    two[0]['validation']['fine']['fid'] = 279.30221
    rows = {name: row for name, *row in cells(report.table(shown, 'validation'))}
    assert rows['fid'] == ['-', '279.3', '-']           # one seed of two has it
    assert 'fid, paper' not in rows                     # the paper has none of S2IC


def test_a_verdict_is_welchs(recwarn):
    """Of 3, 4, 5 and three others of variance 1, t is 2.776 where the means differ by 2.267."""
    for far, ahead, behind in ((2.28, 'confirmed', 'reversed'), (2.25, 'undecided', 'undecided')):
        theirs = [x - far for x in (3, 4, 5)]
        assert report.verdict([3, 4, 5], theirs, 1) == ahead
        assert report.verdict([3, 4, 5], theirs, -1) == behind
        assert report.verdict(theirs, [3, 4, 5], 1) == behind
    # t is 2.37: enough for Student's 17 degrees of freedom (2.11), not for Welch's 2.9 (3.3)
    assert report.verdict([3, 4, 5], [1.5, 3.5] * 8, 1) == 'undecided'
    assert report.verdict([9], [1, 2, 3], 1) == 'undecided'
    assert report.verdict([1, 1, 1], [1, 1, 1], 1) == 'undecided'
    assert report.verdict([1, 1, 1], [0.5, 0.5, 0.5], 1) == 'confirmed'
    assert not recwarn.list


def test_the_papers_tables_by_hand(tmp_path):
    longer = 'E', seeds(1, **MODELS['E'] | dict(fid=1000))
    text = report.paper_tables(COLUMNS | {'E, longer': longer}, tmp_path)
    assert (tmp_path / 'tables.md').read_text() == f'{text}\n'
    assert text.split('\n\n')[:3] == [
        '# /urmp, 64 pixels, 3000 pairs in train, 2048 pairs in validation',
        'Model E. Does it hear? match 0.8 +- 0.08; the nearest sound 0.7, without hearing 0.5. Is '
        'it recognised? accuracy_independent 0.5 +- 0.05. How far from the truth? l1 0.1 +- 0.01; '
        'the mean frame 0.2.',
        'Mean +- deviation, seeds: A 3, B 3, C 3, D 3, E 3, S2IC 3, CMCGAN 3, E, longer 1']
    controls = ['real frames', 'random frame', 'mean frame', 'nearest sound']
    head, *rows = cells(text.split('## Table 1')[1])
    assert head == ['validation', *COLUMNS, 'E, longer', 'E, another sound', 'E, wrong label',
                    *controls]
    table1 = {name: dict(zip(head[1:], row)) for name, *row in rows}
    assert table1['fid']['E'] == '12 +- 1.2'
    assert table1['fid']['E, longer'] == '1000'
    paper = [table1['fid, paper'][model] for model in COLUMNS]
    assert paper == ['279.3', '332.2', '380.1', '307.4', '240.8', '', '']
    assert table1['l1']['E, another sound'] == '0.13'
    assert table1['match']['nearest sound'] == '0.7'
    head, *rows = cells(text.split('## Table 2')[1])
    assert head == ['', 'accuracy, train', 'accuracy, train, paper', 'accuracy, validation',
                    'accuracy, validation, paper', 'accuracy_independent, train',
                    'accuracy_independent, validation', 'match, train', 'match, validation']
    table2 = {name: row for name, *row in rows}
    assert list(table2) == ['E', 'S2IC', 'CMCGAN', 'E, longer', 'E, another sound',
                            'E, wrong label', *controls]
    assert table2['S2IC'] == ['0.1 +- 0.01', '0.8737', '0.2 +- 0.02', '0.7556', '0.25 +- 0.025',
                              '0.5 +- 0.05', '0.4 +- 0.04', '0.8 +- 0.08']
    assert table2['real frames'] == ['0.99', '', '0.99', '0.9956', '-', '-', '-', '-']
    assert 'Of these 0.6 +- 0.06 are recognised as the label given.' in text
    # what was written is enough to write it again
    again = json.loads((tmp_path / 'tables.json').read_text())
    assert report.paper_tables(again, tmp_path) == text


def test_the_papers_claims_by_hand(tmp_path):
    """B: 1 - 12/24, 5/4 - 1; C: 1 - 12/4, 5/5 - 1; D: 0, 5/10 - 1; by match, too."""
    text = report.paper_tables(COLUMNS, tmp_path)
    assert 'one table in five has a false one' in text
    fid, score, match = '12 +- 1.2 against ', '5 +- 0.5 against ', '0.8 +- 0.08 against '
    same = 'undecided', 'match', f'{match}0.8 +- 0.08'
    assert claims(text) == {
        'A, without attention': [
            ('confirmed', 'fid', f'{fid}30 +- 3'), ('undecided', 'is', f'{score}5 +- 0.5'),
            ('confirmed', 'match', f'{match}0.6 +- 0.06')],
        'B, without the classification loss L_C': [
            ('confirmed', 'fid', f'{fid}24 +- 2.4: 50 % better, in the paper 27.51 %'),
            ('undecided', 'is', f'{score}4 +- 0.4: 25 % better, in the paper 22.39 %'), same],
        'C, without the residue module': [
            ('reversed', 'fid', f'{fid}4 +- 0.4: -200 % better, in the paper 36.66 %'),
            ('undecided', 'is', f'{score}5 +- 0.5: 0 % better, in the paper 103.01 %'), same],
        'D, without stage II': [
            ('undecided', 'fid', f'{fid}12 +- 1.2: 0 % better, in the paper 21.67 %'),
            ('reversed', 'is', f'{score}10 +- 1: -50 % better, in the paper 13.01 %'), same],
        'S2IC, a baseline': [
            ('confirmed', 'accuracy', '0.8 +- 0.08 against 0.2 +- 0.02'),
            ('undecided', 'accuracy_independent', '0.5 +- 0.05 against 0.5 +- 0.05')],
        'CMCGAN, a baseline': [
            ('undecided', 'accuracy', '0.8 +- 0.08 against 0.8 +- 0.08'),
            ('undecided', 'accuracy_independent', '0.5 +- 0.05 against 0.5 +- 0.05')]}


def test_without_e_there_is_nothing_to_claim_and_without_fid_nothing_by_it(tmp_path):
    text = report.paper_tables({model: COLUMNS[model] for model in ('D', 'S2IC')}, tmp_path)
    assert 'claims' not in text
    assert 'label given' not in text
    assert [row[0] for row in cells(text.split('## Table 2')[1])][:3] == ['', 'S2IC', 'real frames']
    columns = {}
    for model, fid in ('B', 24), ('E', 12):
        runs = seeds(0.9, 1, 1.1, fid_independent=fid, is_independent=None, l1=0.1)
        columns[model] = model, runs
    text = report.paper_tables(columns, tmp_path)
    (_, found), = claims(text).items()
    assert found == [('confirmed', 'fid_independent', '12 +- 1.2 against 24 +- 2.4')]


# ------------------------------------------------------------------------ the page, the log, curves

NASTY = '<b>&"\udcff'       # a class or a folder may be called so
REFRESH = 'meta', {'http-equiv': 'refresh', 'content': '30'}


class Page(HTMLParser):
    """What is on a page: its tags in order with their attributes, the pictures as Pillow reads
    them, its text.
    """

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(path.read_text('utf-8'))
        self.names = [name for name, _ in self.tags]
        self.images = []
        for name, more in self.tags:
            if name == 'img':
                file = io.BytesIO(b64decode(more['src'].partition(',')[2]))
                self.images.append(Image.open(file))
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'link', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_log(run, rows, tail=''):
    lines = ['step,epoch,L_C,L_cGAN,L_L1,L_D', *(','.join(map(str, row)) for row in rows), tail]
    (run / 'log.csv').write_text('\n'.join(lines))


@pytest.fixture
def finished(tmp_path):
    """A run of 20 epochs of ten steps; its pictures are of one colour each, the samples' redder
    from each to the next.
    """
    run = tmp_path / 'run'
    (run / 'samples').mkdir(parents=True)
    made = dict(command='python train.py --data "a b"', machine='an <abacus>', epoch=20)
    (run / 'config.json').write_text(json.dumps(dict(
        size=64, base=32, disc_base=16, seed=0, variant='C', data=f'/data/{NASTY}', cache=None,
        classes=['viola'], lms_channels=1,
        preset='small', epochs=20, made=made)))
    metrics, = seeds(1, accuracy=0.5, accuracy_independent=0.25, l1=0.125, match=0.875)
    metrics |= dict(data=f'/data/{NASTY}', independent_accuracy=0.75, versions=dict(torch='2.x'),
                    version=report.METRICS_VERSION)
    recognised = {'horn': 0.9, 'sax': 0.5, NASTY: 0.1, 'tuba': 0.7}
    metrics['validation']['fine']['classes'] = {
        name: dict(accuracy_independent=accuracy) for name, accuracy in recognised.items()}
    metrics['validation']['failures'] = dict(clips=9, wrong=4, near_silent=3, near_silent_wrong=2)
    (run / 'metrics.json').write_text(json.dumps(metrics))
    rows = []
    for step in range(1, 201):
        losses = [k + 100 / step for k in range(4)]
        rows.append((step, 1 + (step - 1) // 10, *losses))
    write_log(run, rows)
    for epoch in range(1, 21):
        Image.new('RGB', (90, 60), (10 * epoch, 0, 0)).save(run / f'samples/epoch-{epoch:04d}.png')
    Image.new('RGB', (100, 60), (0, 200, 0)).save(run / 'grid.png')
    Image.new('RGB', (100, 60), (0, 0, 200)).save(run / 'failures.png')
    return run


def test_the_page_of_a_finished_run(finished):
    """In order, without anything from elsewhere, and whatever the names are."""
    report.write_page(finished)
    page = Page(finished / 'report.html')
    green, curves, *reds, blue = page.images
    assert green.getpixel((50, 30))[1] > 150
    assert blue.getpixel((50, 30))[2] > 150
    reds = [red.getpixel((50, 30))[0] for red in reds]
    assert len(reds) == 7
    assert reds == sorted(set(reds))
    assert np.array_equal(curves, Image.open(finished / 'curves.png'))
    rest = page.text
    for words in (
            'epoch 20 of 20', 'Model C, without the residue module, on /data/<b>&"', 'preset small',
            'python train.py --data "a b"', 'measured after epoch 20',
            'Does it hear? match 0.875; the nearest sound 0.7, without hearing 0.5. Is it '
            'recognised? accuracy_independent 0.25. How far from the truth? l1 0.125; the mean ',
            "I'' fine", 'another sound', 'nearest sound',
            'not computed: fid, kid, is (no Inception weights), fid_independent',
            'worst classes of validation: <b>&"\\udcff 0.1, sax 0.5, tuba 0.7',
            '0.75 on real frames; it mistakes 4 of 9', 'Near-silent are 3, of which it mistakes 2',
            'grid: LMS', 'Losses', 'Samples', 'Failures', 'machine: an <abacus>', 'torch: 2.x'):
        assert words in rest
        rest = rest.partition(words)[2]
    assert page.names.count('table') == 2
    assert 'now:' not in page.text
    assert REFRESH not in page.tags
    assert all(more['alt'] for name, more in page.tags if name == 'img')
    assert not {'script', 'b', 'abacus', 'iframe', 'object', 'base', 'svg'} & set(page.names)
    links = [more[name] for _, more in page.tags for name in ('src', 'href') if name in more]
    assert all(link.startswith('data:') for link in links)
    assert not re.search(r'https?:|url\(|@import', (finished / 'report.html').read_text('utf-8'))
    with pytest.raises(InputError):
        report.write_page(finished.parent)


def test_the_page_while_a_run_is_at_work(finished):
    """It has the newest sample for the grid, loads itself again, and says what was measured when;
    once done, it says how to measure.
    """
    def page(**made):
        change(finished / 'config.json', epochs=30, made=made)
        report.write_page(finished)
        page = Page(finished / 'report.html')
        assert 'measured after epoch 20' in page.text
        assert page.images[0].getpixel((50, 30))[0] > 150
        return page

    at_work, done = page(epoch=25), page(epoch=30)
    assert REFRESH in at_work.tags
    assert 'epoch 25 of 30' in at_work.text
    assert 'now:' not in at_work.text
    assert REFRESH not in done.tags
    assert f'now: python evaluate.py {finished}' in done.text
    for name in ('metrics.json', 'failures.png', 'grid.png', 'log.csv'):
        (finished / name).unlink()
    shutil.rmtree(finished / 'samples')
    change(finished / 'config.json', made={}, data=None)
    (finished / 'curves.png').unlink()
    report.write_page(finished)
    begun = Page(finished / 'report.html')
    assert REFRESH in begun.tags
    assert 'epoch 0 of 30' in begun.text
    assert 'on demo data' in begun.text
    assert not begun.images


def test_the_page_of_several_runs(tmp_path):
    folder = tmp_path / '<i>'
    folder.mkdir()
    Image.new('RGB', (30, 20)).save(folder / 'figure5.png')
    table = report.markdown([[NASTY, 'b'], ['c', 'd']])
    report.write_folder_page(folder, f'# {NASTY}\n\n{table}\n\n{NASTY}')
    page = Page(folder / 'report.html')
    assert ' '.join(page.names).partition('h1 ')[2] == (
        'h2 div table tr th th tr td td p figure figcaption img')
    assert page.text.count('<b>&"') == 3
    assert page.tags[page.names.index('div')][1]['class'] == 'scroll'


def test_large_pictures_and_long_logs_make_no_large_page(finished):
    noise = np.random.default_rng(0).integers(0, 256, (872, 1580, 3), np.uint8)
    Image.fromarray(noise).save(finished / 'noise', 'BMP')
    (finished / 'failures.png').unlink()
    for path in [finished / 'grid.png', *finished.glob('samples/*')]:
        path.unlink()
        path.symlink_to(finished / 'noise')
    losses = np.random.default_rng(0).random((50_000, 4)).round(4)
    write_log(finished, [(i + 1, 1 + i // 250, *row) for i, row in enumerate(losses)])
    report.write_page(finished)
    page = Page(finished / 'report.html')
    assert [image.width for image in page.images] == [1440, 1440, *[400] * 7]
    assert (finished / 'report.html').stat().st_size < 3e6


def test_the_log_is_written_every_100_steps_and_gone_on_with(tmp_path):
    path = tmp_path / 'log.csv'
    log = report.Log(path, 0)
    for step in range(1, 102):
        log.add(step, 1, torch.tensor([step, 0.5, 0.25, 1e-7]), list)
    assert path.read_text().splitlines()[::50] == [
        'step,epoch,L_C,L_cGAN,L_L1,L_D', '50,1,50,0.5,0.25,1e-07', '100,1,100,0.5,0.25,1e-07']
    log.flush()
    assert len(path.read_text().splitlines()) == 102
    path.write_text(path.read_text() + '102,1,0.')          # killed
    report.Log(path, 60)
    assert path.read_text().splitlines()[-1] == '60,1,60,0.5,0.25,1e-07'
    report.Log(path, 0)
    assert path.read_text() == 'step,epoch,L_C,L_cGAN,L_L1,L_D\n'


def test_a_bad_batch_may_have_names_that_are_no_text(tmp_path):
    log = report.Log(tmp_path / 'log.csv', 0)
    log.add(1, 1, torch.ones(4), lambda: ['good'])
    log.add(2, 1, torch.tensor([1.0, 2, math.nan, 3]), lambda: [os.fsdecode(b'violin\xff')])
    with pytest.raises(InputError, match='L_L1 is nan at step 2, epoch 1.*no checkpoint yet'):
        log.flush()
    lines = (tmp_path / 'bad-batch.txt').read_bytes().splitlines()
    assert lines == [b'L_L1 is nan at step 2, epoch 1; its pairs:', b'violin\xff']
    assert 'nan' in (tmp_path / 'log.csv').read_text()


def test_the_log_is_read_without_what_is_torn(tmp_path):
    write_log(tmp_path, [(1, 1, 1, 2, 3, 4), (2, 1, 1, 2, 3, 4), (3, 2, 1, 'inf', 3, 4),
                         (4, 2, 5, 6, 7, 8)], '5,3,1,2,3,4')    # the last line's end is missing
    epochs, losses = report.read_log(tmp_path / 'log.csv')
    assert epochs.tolist() == [0.5, 1, 2]
    assert losses.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]


@pytest.mark.parametrize('rows', [0, 1])
def test_a_log_of_a_row_or_none(tmp_path, rows):
    write_log(tmp_path, [(1, 1, 1, 2, 3, 4)] * rows)
    report.draw_losses(tmp_path / 'log.csv', tmp_path / 'curves.png')
    assert (tmp_path / 'curves.png').exists() == bool(rows)


def test_the_curves_by_hand():
    """Of 100 epochs of one step: the mean over five is bold, the rest faint, at its place."""
    losses = np.where(np.arange(1, 101) % 5 == 0, 5.0, 0.0)         # any five have a mean of 1
    plot = np.asarray(report.draw_curve('L_D', np.arange(1.0, 101), losses)).astype(int)
    assert plot.shape == (340, 720, 3)
    per_unit = 244 / 5.25       # pixels, from 292 upwards: 5 % stay free above
    for epoch in range(7, 94, 5):
        bold = np.flatnonzero((plot[:, 100 + 6 * epoch] == (31, 95, 168)).all(axis=1))
        assert 1 <= len(bold) <= 4
        assert abs(bold.mean() - (292 - per_unit)) <= 1
    y, x = (plot == (169, 196, 228)).all(axis=2).nonzero()
    assert abs(y.min() - (292 - 5 * per_unit)) <= 2
    assert abs(y.max() - 292) <= 2
    assert abs(x.max() - 700) <= 2


def test_ticks_are_round_and_few():
    for low, high in ((0.18, 0.83), (-0.3, 7), (100, 101), (-7e-4, 9e-4), (0, 5e6), (0, 5.99)):
        ticks = report.ticks(low, high)
        assert 3 <= len(ticks) <= 6
        assert low <= ticks[0]
        assert ticks[-1] <= high + 1e-9
        np.testing.assert_allclose(np.diff(ticks), float(f'{ticks[1] - ticks[0]:.0e}'))


# ------------------------------------------------------------------- what a trained model draws

def tile(number):
    """A picture of its own colour."""
    return Image.new('RGB', (32, 32), (10 * number, 0, 0))


def test_grid_shows_the_pictures_in_their_place(tmp_path):
    rows = [('top', {'left': tile(0), 'right': tile(1)})]
    rows.append(('bottom', {'left': tile(2), 'right': tile(3)}))
    generate.draw_grid(rows, tmp_path / 'grid.png')
    sheet = Image.open(tmp_path / 'grid.png').convert('RGB')
    assert sheet.size == (130 + 2 * 132, 28 + 2 * 132)
    for i, j in itertools.product((0, 1), (0, 1)):
        middle = 130 + j * 132 + 64, 28 + i * 132 + 64
        assert sheet.getpixel(middle) == (10 * (2 * i + j), 0, 0)


@pytest.mark.parametrize('count, shown', [(2, [0, 1]), (36, range(36)), (72, range(0, 72, 2))])
def test_examples_are_of_each_class_or_of_36_evenly_spaced(two, count, shown):
    names = [f'class {label}' for label in range(count)]
    pairs = two.train.subset([i % 19 for i in range(count)])
    pairs.labels = torch.arange(count)
    unheard = two.validation.subset([0])            # of class 0 alone
    clips = generate.example_clips(two._replace(classes=names, train=pairs, validation=unheard))
    assert [batch[2].item() for _, batch in clips] == list(shown)
    titles = [f'class {label} (train)' for label in shown]
    assert [title for title, _ in clips] == ['class 0', *titles[1:]]


def test_a_run_is_its_model_or_its_checkpoint_and_the_classifier_they_name(group, tmp_path):
    out = shutil.copytree(group[0], tmp_path / 'group')
    run = out / 'E-seed-0'
    _, model, trained_for = generate.load_run(run)
    assert trained_for == dict(epoch=1, steps=4)
    kept = runs.load_file(run / 'checkpoint.pt')
    assert not changed(kept['average'], model.state_dict())     # what generates is the average
    assert changed(kept['average'], kept['model'])
    C = runs.load_file(out / 'classifier.pt')['classifier']
    assert same(C, dict(model.residue.classifier.state_dict()))
    (run / 'model.pt').unlink()
    again = generate.load_run(run)[1]
    assert same(dict(again.state_dict()), dict(model.state_dict()))
    C['resnet.fc.bias'] += 1
    torch.save(dict(classifier=C), out / 'classifier.pt')
    with pytest.raises(InputError, match='not the classifier'):
        generate.load_run(run)


def test_data_that_is_gone_is_asked_for(group, two_classes, tmp_path):
    config = runs.load_config(group[0] / 'E-seed-0')
    gone = dict(config, data=str(tmp_path / 'gone'))
    with pytest.raises(InputError, match='gone: the data of this run is not there; .*--data'):
        generate.open_run_data(gone)
    dataset = generate.open_run_data(gone, data=two_classes)
    assert dataset.classes == ['bassoon', 'viola']
    with pytest.raises(InputError, match='not those the run was trained on'):
        generate.open_run_data(dict(config, classes=['viola']))


def test_figures_4_to_6_have_their_columns(tmp_path):
    def rows(red):
        names = 'LMS', "I'", "I''", 'truth'
        shown = {name: Image.new('RGB', (8, 8), (red + i, 0, 0)) for i, name in enumerate(names)}
        return [('clip', shown)]

    def columns(name):
        sheet = Image.open(tmp_path / name).convert('RGB')
        middles = range(130 + 64, sheet.width, 132)
        return [sheet.getpixel((x, 28 + 64))[0] for x in middles]

    shown = {'CMCGAN': ('CMCGAN', rows(30))}
    generate.paper_figures(shown, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ['figure6.png']
    shown = {'A': ('A', rows(10)), 'E': ('E', rows(20)), **shown}
    generate.paper_figures(shown, tmp_path)
    assert columns('figure4.png') == [10, 12, 22, 13]         # LMS, A, E, truth
    assert columns('figure5.png') == [10, 11, 12, 21, 22, 13]
    assert columns('figure6.png') == [20, 22, 32, 23]


def test_a_recording_is_heard_every_hop():
    """Half a second from each moment on, silence after the end: by a model whose I'' is as bright
    as its LMS is loud.
    """
    def ear(lms, label):
        assert label.tolist() == [1] * len(lms)
        loud = lms.mean(dim=(1, 2, 3), keepdim=True)
        return None, loud.expand(-1, 3, 32, 32), None

    def heard(wave, rate=22050, hop=0.5):
        pictures = generate.generate_recording(ear, ['a', 'b'], wave, rate, 'b', 32, hop=hop)
        seconds, images, _ = zip(*pictures)
        np.testing.assert_allclose(seconds, hop * np.arange(len(seconds)))
        return [image.getpixel((0, 0))[0] for image in images]

    wave = np.random.default_rng(0).normal(0, 0.1, 44100).astype(np.float32)
    wave[22050:] = 0                    # a second of noise, a second of silence
    loud, _, still, last = heard(wave)
    assert loud > still == last
    twice = heard(wave, hop=0.25)
    assert len(twice) == 8
    assert still == twice[4] < twice[3] < loud          # half of twice[3] is noise
    # 0.15 s are 3307.5 samples, read from 3308; nothing is one picture
    cases = [(0.15, 0.15, 1), (1.1, 0.1, 11), (0, 0.5, 1), (0.501, 0.5, 2)]
    for length, hop, count in cases:
        part = wave[:round(length * 22050)]
        assert len(heard(part, hop=hop)) == count
    assert len(heard(wave[:11025], rate=11025)) == 2    # half of this rate is no whole number


def scene_of(count, hop):
    """Pictures that grow brighter every `hop` seconds, for as long as they last."""
    moments = [generate.Moment(i * hop, tile(i), None) for i in range(count)]
    return generate.Scene(iter(moments), count * hop, 'a <scene>', ["I''"], None)


def test_a_gif_moves_in_real_time(tmp_path):
    hop = 1 / 3
    assert generate.save_scene(scene_of(24, hop), tmp_path / 'a.gif') == 24
    durations = []
    with Image.open(tmp_path / 'a.gif') as gif:
        assert (gif.n_frames, gif.info['loop']) == (24, 0)
        for i in range(24):
            gif.seek(i)
            durations.append(gif.info['duration'])
            red, _, _ = gif.convert('RGB').getpixel((5, 5))
            assert abs(red - 10 * i) < 5
    assert all(abs(duration - 1000 * hop) < 10 for duration in durations)
    assert abs(sum(durations) - 24000 * hop) <= 5       # no error adds up


def test_a_png_wraps_at_sixteen(tmp_path):
    generate.save_scene(scene_of(20, 0.25), tmp_path / 'a.png')
    sheet = Image.open(tmp_path / 'a.png').convert('RGB')
    assert sheet.size == (4 + 16 * 132, 2 * (28 + 132))
    for i in range(20):
        left = 4 + i % 16 * 132
        top = i // 16 * 160
        assert sheet.getpixel((left + 64, top + 28 + 64)) == (10 * i, 0, 0)
        time_above = sheet.crop((left, top, left + 128, top + 28))
        assert time_above.getextrema()[0][0] < 100


def tiles(path):
    """The pictures of a sheet of one row."""
    sheet = np.asarray(Image.open(path).convert('RGB')).astype(int)
    assert sheet.shape[0] == 28 + 132
    lefts = range(4, sheet.shape[1], 132)
    return [sheet[28:156, left:left + 128] for left in lefts]


def page_of(path):
    """What a scene's page shows: [(seconds, pixels, L1)] and the WAV file that it plays."""
    text = Path(path).read_text()
    rows = re.findall(r'^(\[.*\]),$', text, re.M)
    moments = []
    for seconds, image, l1 in map(json.loads, rows):
        pixels = np.asarray(Image.open(io.BytesIO(b64decode(image))).convert('RGB'))
        moments.append((seconds, pixels, l1))
    sound, = re.findall(r'^const sound = "(.*)"$', text, re.M)
    return moments, io.BytesIO(b64decode(sound))


def test_a_picture_is_generated_for_a_recording(
        group, two, two_classes, tmp_path, refused, monkeypatch, capsys):
    run = group[0] / 'E-seed-0'
    model = generate.load_run(run)[1]
    clip = min((two_classes / 'chunk/validation/viola').iterdir())
    lms, _, label = two.validation.batch([3])
    monkeypatch.chdir(tmp_path)
    flags = ['--label', 'viola', '--device', 'cpu']
    generate.main([str(run), str(clip), *flags])
    generated, = tiles(clip.with_suffix('.png').name)
    with torch.no_grad():
        expected = generate.picture(model(lms, label)[1][0])
    expected = np.asarray(expected.resize((128, 128), Image.Resampling.BICUBIC))
    assert np.abs(generated - expected).max() <= 3      # the cache holds float16

    samples = np.random.default_rng(0).integers(-9999, 9999, (28000, 2)).astype('<i2')
    wavfile.write('long.wav', 22050, samples)           # 1.27 s
    long = [str(run), 'long.wav', *flags]
    generate.main([*long, '--out', 'scene.png'])
    generate.main([*long, '--out', 'new/folder/twice.png', '--hop', '0.25'])
    Path('new/folder/twice.png').rename('twice.png')
    printed = capsys.readouterr().out
    assert '\nnew/folder/twice.png: 6 moments; long.wav: viola, every 0.25 s, by model E' in printed
    assert np.array_equal(tiles('twice.png')[::2], tiles('scene.png'))
    generate.main([*long, '--out', 'scene.gif', '--hop', '0.3'])
    with Image.open('scene.gif') as gif:
        assert (gif.size, gif.n_frames, gif.info['duration']) == ((32, 32), 5, 300)
    generate.main([*long, '--out', 'frames', '--hop', '0.25'])
    names = [f'{milliseconds:08}.png' for milliseconds in range(0, 1500, 250)]
    assert sorted(path.name for path in Path('frames').iterdir()) == names
    generate.main([*long, '--out', 'scene.html', '--hop', '0.25'])
    moments, sound = page_of('scene.html')
    for (seconds, image, l1), name in zip(moments, names, strict=True):
        assert seconds == int(name[:8]) / 1000
        assert l1 is None
        assert np.array_equal(image, np.asarray(Image.open(f'frames/{name}')))
    assert wavfile.read(sound)[0] == 22050
    sound.seek(0)
    mono = samples.astype(float).mean(axis=1)
    assert np.abs(wavfile.read(sound)[1] - mono).max() <= 0.5

    refused(generate, [*long, '--out', 'scene.png'], 'scene.png', 'exists')
    refused(generate, [*long, '--out', 'frames'], 'frames', 'exists')
    refused(generate, [*long, '--out', 'scene.jpg'], 'scene.jpg', '.html, .gif, .png or a folder')
    refused(generate, [run, *flags], 'recording', '--piece')
    refused(generate, [run, '--piece', '', '--out', 'x.html'], '--piece', 'validation')
    refused(generate, [run, '--piece', '', *flags, '--out', 'x.html'], '--label', '--piece')
    refused(generate, [run, '--piece', '', '--hop', '1', '--out', 'x.html'], '--hop', '--piece')
    refused(generate, [*long, '--split', 'train', '--out', 'x.html'], '--split', 'a recording')
    refused(generate, [*long, '--piece', 'viola09'], 'recording', '--piece')
    refused(generate, [run, '.', *flags, '--out', 'x.html'], 'not a file')
    refused(generate, [*long, '--label', 'kazoo'], 'kazoo', 'bassoon, viola')
    x = ['--out', 'x.png']
    refused(generate, [run, 'scene.png', *flags, *x], 'scene.png', 'WAV')
    for hop in '0', '601':
        refused(generate, [*long, *x, '--hop', hop], '--hop')
    assert not list(tmp_path.glob('x.*'))


def test_a_piece_is_shown_beside_the_truth(group, two, two_classes, tmp_path, refused, monkeypatch):
    """LMS, I', I'' and truth of each clip in the order of time, with the sound of the chunks."""
    monkeypatch.chdir(tmp_path)
    run = group[0] / 'E-seed-0'
    pieces = generate.find_pieces(two.train)
    clips = pieces['bassoon01']
    milliseconds = [int(two.train.stems[index].split('_')[1]) for _, index in clips]
    assert len(clips) > 1
    assert milliseconds == sorted(milliseconds)
    flags = [str(run), '--piece', 'bassoon01', '--split', 'train', '--device', 'cpu']
    generate.main(flags)
    moments, sound = page_of('bassoon01.html')
    model = generate.load_run(run)[1]
    with torch.no_grad():
        lms, image, label = two.train.batch([index for _, index in clips])
        coarse, fine, _ = model(lms, label)
    for i, (seconds, pixels, l1) in enumerate(moments):
        assert seconds == clips[i][0] == (milliseconds[i] - milliseconds[0]) / 1000
        assert l1 == pytest.approx((fine[i] - image[i]).abs().mean().item(), rel=1e-4)
        shown = [generate.lms_picture(lms[i])]
        shown += map(generate.picture, (coarse[i], fine[i], image[i]))
        expected = np.concatenate([np.asarray(tile, float) for tile in shown], axis=1)
        assert np.abs(pixels - expected).mean() < 20            # the page's are not kept exactly
    assert len(moments) == len(clips)
    rate, heard = wavfile.read(sound)
    folder = two_classes / 'chunk/train/bassoon'
    chunks = [wavfile.read(folder / f'bassoon01_{moment}.wav')[1] for moment in milliseconds]
    assert (rate, len(heard)) == (44100, round((seconds + 0.5) * 44100))
    for moment, chunk in zip(milliseconds, chunks):     # the demo's begin 0.6 s after one another
        start = round((moment - milliseconds[0]) / 1000 * rate)
        until = start + round(0.1 * rate)
        assert np.abs(heard[start:until].astype(int) - chunk[:until - start]).max() <= 1

    monkeypatch.setattr(generate, 'piece_sound', None)          # a .gif has no use for it
    generate.main([*flags, '--out', 'piece.gif'])
    with Image.open('piece.gif') as gif:
        assert (gif.size, gif.n_frames) == ((128, 32), len(clips))
    refused(generate, [*flags, '--out', 'piece.png'], 'piece.png', '.html, .gif or a folder')
    there = ', '.join(generate.find_pieces(two.validation))
    flags = [run, '--piece', 'bassoon01', '--out', 'x.html']
    refused(generate, flags, 'bassoon01: not in validation', there)
    stems = [f'solo_{100 * k}' for k in range(len(two.validation))]
    alike = two._replace(validation=replace(two.validation, stems=stems))
    monkeypatch.setattr(generate, 'open_run_data', lambda *_: alike)
    refused(generate, [run, '--piece', 'solo', '--out', 'x.html'], 'solo: bassoon, viola have one')


@pytest.mark.parametrize('name', ['x.html', 'x.png', 'x.gif', 'x'])
def test_what_a_user_has_is_never_replaced(tmp_path, name):
    """Neither what was there, nor what a killed process left beside it, nor what came meanwhile."""
    out = tmp_path / name
    picture = Image.new('RGB', (32, 32))
    sound = np.zeros(8000, np.float32), 8000

    def scene(meanwhile=lambda: None):
        def moments():
            meanwhile()
            yield generate.Moment(0.0, picture, None)
        return generate.Scene(moments(), 0.5, 'a scene', ["I''"], sound)

    for taken in out, tmp_path / f'{name}.part':
        taken.write_text('mine')
        with pytest.raises(InputError, match=f'{taken}: exists already'):
            generate.save_scene(scene(), out)
        assert taken.read_text() == 'mine'
        taken.unlink()
    with pytest.raises(InputError, match=f'{out}: was made by another meanwhile'):
        generate.save_scene(scene(lambda: out.write_text('mine')), out)
    assert out.read_text() == 'mine'
    assert [*tmp_path.iterdir()] == [out]
    out.unlink()
    out.symlink_to('nowhere')
    with pytest.raises(InputError, match=f'{out}: exists already'):
        generate.save_scene(scene(), out)
    out.unlink()
    generate.save_scene(scene(), out)
    assert [*tmp_path.iterdir()] == [out]


def test_settings_of_another_program_are_not_replaced(tmp_path, two_classes, refused):
    settings = tmp_path / 'config.json'
    settings.write_text('{"mine": 1}')
    refused(train, ['--data', two_classes, '--out', tmp_path], tmp_path, 'not an empty folder')
    assert settings.read_text() == '{"mine": 1}'


def test_chunks_that_overlap_are_heard_as_far_as_the_next_one_begins(tmp_path, capsys):
    """A ramp cut every 100 ms and put together again is the ramp."""
    ramp = np.arange(-33075, 33075) // 2
    cut(tmp_path, ramp.astype(np.int16), frames=range(1, 31))
    data = preprocess.open_dataset(tmp_path / 'data', 32, tmp_path / 'cache')
    split = data.validation
    clips = generate.find_pieces(split)['hornsolo']
    heard, rate = generate.piece_sound(data, split, clips)
    start = round(int(split.stems[clips[0][1]].split('_')[1]) / 1000 * rate)
    assert np.array_equal(np.round(heard * 32768), ramp[start:start + len(heard)])


def test_what_plays_in_a_recording_is_heard(
        group, two, two_classes, tmp_path, monkeypatch, capsys, refused):
    """Without --label: the likeliest, by the geometric mean over its half seconds, of a bassoon's
    and two of a viola's here.
    """
    monkeypatch.chdir(tmp_path)
    names = 'bassoon', 'viola', 'viola'
    clips = [min((two_classes / 'chunk/validation' / name).iterdir()) for name in names]
    samples = np.concatenate([wavfile.read(clip)[1] for clip in clips])
    wavfile.write('three.wav', wavfile.read(clips[0])[0], samples)
    audio, accuracy = train.get_audio_classifier(two)
    flags = [str(group[0] / 'E-seed-0'), 'three.wav', '--device', 'cpu']
    capsys.readouterr()
    generate.main([*flags, '--out', 'heard.gif'])
    line, last = capsys.readouterr().out.splitlines()
    lms = torch.cat(list(preprocess.recording_lms(*preprocess.read_wav('three.wav'), 32)))
    with torch.no_grad():
        likelihood = audio(lms).softmax(dim=1).double()
    mean = likelihood.prod(dim=0) ** (1 / 3)
    heard = mean / mean.sum()
    likely = [(two.classes[i], f'{heard[i]:.4f}') for i in heard.argsort(descending=True)]
    assert re.findall(r'(\w+) ([01]\.\d{4})\b', line.split(', by')[0]) == likely
    assert f'is {accuracy:.4f};' in line
    name = likely[0][0]
    assert last.startswith(f'heard.gif: 3 moments; three.wav: {name}, every 0.5 s, by model E of ')
    generate.main([*flags, '--out', 'told.gif', '--label', name])
    assert Path('told.gif').read_bytes() == Path('heard.gif').read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 1       # nothing is heard where it is told
    flags += ['--out', 'x.gif', '--cache', tmp_path]
    refused(generate, flags, '--label CLASS', 'evaluate.py')


def test_six_sounds_are_the_quietest_and_from_low_to_high(two, tmp_path):
    """By a model whose I'' is as bright as its LMS; of 12 bassoons of train."""
    def ear(lms, label):
        assert label.tolist() == [0] * 6
        return None, lms.expand(-1, 3, -1, -1), None

    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, 'draw_grid', lambda rows, path: shown.extend(rows))
        generate.draw_sounds(ear, two.train, tmp_path / 'x.png')
    (_, lms), (_, fine), (_, truth) = shown
    assert list(lms) == list(fine) == list(truth) == ['quietest', '1 low', '2', '3', '4', '5 high']
    level = {}
    for name, image in fine.items():
        level[name] = np.asarray(image.convert('L'), float).mean(axis=1)
    assert min(level, key=lambda name: level[name].sum()) == 'quietest'
    low, middle, high = (level[name].argmax() for name in ('1 low', '3', '5 high'))
    assert low - 1 <= middle <= high + 1            # by 8 bits and 32 rows
    assert low < high


# --------------------------------------------------------------------------------------- baselines

both_baselines = pytest.mark.parametrize('name', baselines.BASELINES)


@pytest.fixture(scope='module')
def pairs():
    """A demo pair of each instrument at 32x32, as a batch."""
    lms = []
    image = []
    for instrument in DEMO_INSTRUMENTS:
        waveform, picture = demo_pair(instrument, 'train', 1, 0.0, size=32)
        lms.append(torch.from_numpy(preprocess.log_mel_spectrogram(waveform, 44_100)))
        image.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    image = torch.stack(image) / 127.5 - 1
    return preprocess.network_lms(torch.stack(lms), 32), image, torch.arange(13)


def baseline(name, classifier=None, size=32, base=8, lms_channels=1):
    """A baseline of five classes and its discriminator; C serves generation alone."""
    torch.manual_seed(0)
    model, D = baselines.BASELINES[name]
    model = model(5, size, base, lms_channels, classifier or nn.Identity())
    return model, D(size, base, lms_channels)


def clips(size=32, lms_channels=1):
    """Four random LMS and images, labels (0, 1, 1, 1)."""
    torch.manual_seed(1)
    lms = torch.rand(4, lms_channels, size, size) * 2 - 1
    image = torch.rand(4, 3, size, size) * 2 - 1
    return lms, image, torch.tensor([0, 1, 1, 1])


def networks(model):
    """The networks that a G step moves, by name."""
    children = dict(model.named_children())
    return {name: net for name, net in children.items() if name not in ('audio', 'residue')}


def generate_seeded(model, lms, seed):
    torch.manual_seed(seed)
    return model.generate(lms)


@both_baselines
@pytest.mark.parametrize('size, lms_channels', [(32, 1), (64, 3)])
def test_baselines_shapes(random_C, name, size, lms_channels):
    model, D = baseline(name, random_C, size, 4, lms_channels)
    lms, image, label = clips(size, lms_channels)
    coarse, fine, logits = model(lms, label)
    for generated in (coarse, fine, model.generate(lms)):
        assert generated.shape == image.shape
        assert generated.dtype == torch.float32
        assert 0 < generated.abs().max() <= 1
    assert logits.shape == (4, 5)
    if name == 'S2IC':
        assert model.audio(lms).shape == (4, 5)
        features = model.audio.features(lms)
        assert features.shape == (4, 128)
        assert D(image, features).shape == (4,)
    else:
        assert D(image, lms).shape == (4,)
        outputs = model.cycles(lms, image)
        assert len(outputs) == 8
        for kind, output in outputs.items():
            side = lms if kind.endswith('Sound') else image
            assert output.shape == side.shape
            assert output.abs().max() <= 1


@pytest.mark.parametrize('size, audio, s2ic, cmcgan', [
    (64, 399_869, (3_371_971, 3_069_825), (11_105_668, 6_046_337)),
    (256, 4_332_029, (11_762_627, 11_460_481), (44_750_212, 22_827_649)),
])
def test_baselines_parameters(size, audio, s2ic, cmcgan):
    C = nn.Identity()
    with torch.device('meta'):
        model = baselines.S2IC(13, size, classifier=C)
        D = baselines.S2ICDiscriminator(size)
        assert numbers(model.audio) == audio
        assert (numbers(model.phi, model.G), numbers(D)) == s2ic
        model = baselines.CMCGAN(13, size, classifier=C)
        D = baselines.CMCGANDiscriminator(size)
        assert (numbers(model), numbers(D)) == cmcgan


@both_baselines
def test_baselines_weights_start_from_a_normal_distribution(name):
    model, D = baseline(name)
    layers = convolutions(D)
    for network in networks(model).values():
        layers += convolutions(network)
    for layer in layers:
        weight = layer.weight
        if hasattr(layer, 'parametrizations'):
            weight = layer.parametrizations.weight.original
        if weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
        if layer.bias is not None:
            assert not layer.bias.any()


def test_audio_classifier_decays_its_linear_layers_alone():
    audio = baselines.AudioClassifier(13, 32)
    free, decayed = audio.parameter_groups()
    assert decayed['weight_decay'] == 1e-4
    assert 'weight_decay' not in free
    for p in decayed['params']:
        assert p.dim() < 3              # 4: a convolution's
    assert len(decayed['params']) == 6
    everything = [*free['params'], *decayed['params']]
    assert len(everything) == 14
    assert set(everything) == set(audio.parameters())
    dropouts = [module.p for module in audio.modules() if isinstance(module, nn.Dropout)]
    assert dropouts == [0.3, 0.2]


def test_audio_classifier_learns_half_seconds_from_any_moment_on():
    """In training the LMS turn by up to a quarter of their time, each way; elsewhere not at all."""
    audio = baselines.AudioClassifier(13, 32)
    lms = torch.randn(2, 1, 32, 32)
    heard = []
    audio.convolutions.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    torch.manual_seed(0)
    for _ in range(200):
        audio(lms)
    shifts = set()
    for turned in heard:
        equal = [i for i in range(-16, 16) if torch.equal(turned, lms.roll(i, dims=3))]
        assert len(equal) == 1
        shifts.update(equal)
    assert shifts == set(range(-8, 9))
    heard.clear()
    audio.features(lms)
    audio.eval()(lms)
    for same in heard:
        assert torch.equal(same, lms)


def test_s2ic_steps_by_hand():
    model, D = baseline('S2IC')
    D.eval()
    lms, image, label = clips()
    features = model.audio.features(lms)
    fake = generate_seeded(model, lms, seed=2)
    torch.manual_seed(2)
    terms, fakes = baselines.GeneratorStep(model, D)(lms, image, label)
    assert torch.equal(fakes[0], fake)
    assert not fakes[0].requires_grad
    L_G = -D(fake, features).sigmoid().log().mean()
    assert terms[0].tolist() == pytest.approx([0, 4 * L_G.item(), 0], rel=1e-5)

    torch.manual_seed(3)
    index, valid = baselines.mismatch(label)
    assert valid
    real = D(image, features).sigmoid()
    wrong = D(image[index], features).sigmoid()
    fake = D(fake, features).sigmoid()
    wrong_and_fake = (1 - wrong).log().mean() + (1 - fake).log().mean()
    expected = -real.log().mean() - wrong_and_fake / 2
    torch.manual_seed(3)
    L_D = baselines.DiscriminatorStep(model, D)(lms, image, label, fakes)
    assert L_D.shape == (1,)
    assert L_D.item() == pytest.approx(4 * expected.item(), rel=1e-5)


def test_cmcgan_steps_by_hand():
    model, D = baseline('CMCGAN')
    D.eval()
    a, v, label = clips()
    E_A, E_V = model.E_A, model.E_V
    torch.manual_seed(2)
    terms, fakes = baselines.GeneratorStep(model, D)(a, v, label)
    torch.manual_seed(2)
    z = torch.randn(4, 10)

    def D_A(features):
        return model.D_A(features, z)

    def D_V(features):
        return model.D_V(features, z)
    F_Image, F_Sound = D_V(E_A(a)), D_A(E_V(v))
    R_Image, R_Sound = D_V(E_V(v)), D_A(E_A(a))
    for ours, expected in zip(fakes, (F_Image, F_Sound)):
        assert torch.equal(ours, expected)
        assert not ours.requires_grad
    S_rvfa, S_fvra = D(v, F_Sound).sigmoid(), D(F_Image, a).sigmoid()
    L_G = -S_rvfa.log().mean() - S_fvra.log().mean()
    differences = [D_A(E_V(F_Image)) - a, D_V(E_A(F_Sound)) - v]
    differences += [D_V(E_A(R_Sound)) - v, D_A(E_V(R_Image)) - a]
    L_Cons = sum(difference.abs().mean() for difference in differences)
    expected = [0, 4 * L_G.item(), 4 * L_Cons.item()]
    assert terms[0].tolist() == pytest.approx(expected, rel=1e-5)

    torch.manual_seed(3)
    index, valid = baselines.mismatch(label)
    assert valid
    expected = -2 * D(v, a).sigmoid().log().mean()
    pairs = (v, a[index]), (v[index], a), (v, F_Sound), (F_Image, a)
    for pair in pairs:
        S = D(*pair).sigmoid()
        expected = expected - (1 - S).log().mean() / 2
    torch.manual_seed(3)
    L_D = baselines.DiscriminatorStep(model, D)(a, v, label, fakes)
    assert L_D.shape == (1,)
    assert L_D.item() == pytest.approx(4 * expected.item(), rel=1e-5)


def test_mismatch_is_any_row_of_another_class():
    label = torch.tensor([0, 1, 0, 2])
    torch.manual_seed(0)
    seen = set()
    for _ in range(100):
        index, valid = baselines.mismatch(label)
        assert valid
        seen |= set(enumerate(index.tolist()))
    others = torch.nonzero(label[:, None] != label).tolist()
    assert seen == set(map(tuple, others))


@both_baselines
def test_a_batch_of_one_class_has_no_wrong_pairs(name):
    model, D = baseline(name)
    D.eval()
    lms, image, _ = clips()
    label = torch.full((4,), 2)
    _, fakes = baselines.GeneratorStep(model, D)(lms, image, label)
    L_D, = baselines.DiscriminatorStep(model, D)(lms, image, label, fakes)
    if name == 'S2IC':
        features = model.audio.features(lms)
        real, *generated = D(image, features), D(fakes[0], features)
        weight = 1
    else:
        real, *generated = D(image, lms), D(image, fakes[1]), D(fakes[0], lms)
        weight = 2
    expected = weight * F.softplus(-real).mean()
    for logits in generated:
        expected = expected + F.softplus(logits).mean() / 2
    assert L_D.item() == pytest.approx(4 * expected.item(), rel=1e-5)


@both_baselines
def test_discriminators_see_pairs(name):
    """Not the sum of what they see in each: such a D would not notice a pair that does not match.
    """
    D = baseline(name)[1].double().eval()
    x, y = clips()[1][:2, None].double()
    sound = (1, 128) if name == 'S2IC' else (1, 1, 32, 32)
    a, b = torch.randn(2, *sound, dtype=torch.double)
    change = D(x, a) - D(y, a)
    other = D(x, b) - D(y, b)
    assert (change - other).abs() > 1e-3 * change.abs() > 0


@both_baselines
@torch.no_grad()
def test_baselines_see_sound_and_noise_but_not_the_label(random_C, name):
    model, _ = baseline(name, random_C)
    lms, _, label = clips()
    random = torch.get_rng_state()
    coarse, fine, logits = model.eval()(lms, label)
    assert torch.equal(coarse, fine)
    assert distance(logits, random_C(fine)) < 1e-5
    assert torch.equal(model.eval()(lms, label + 1)[1], fine)
    assert torch.equal(model.eval().generate(lms), fine)
    assert not torch.equal(model.generate(lms), fine)                   # another z
    assert not torch.equal(model.eval().generate(lms.flip(0)), fine)
    assert torch.equal(torch.get_rng_state(), random)
    if name == 'CMCGAN':
        outputs = model.eval().cycles(lms, torch.zeros(4, 3, 32, 32))
        assert torch.equal(outputs['F_Image'], fine)
    model.train()
    first = generate_seeded(model, lms, seed=7)
    assert not torch.equal(model.generate(lms), first)
    assert torch.equal(generate_seeded(model, lms, seed=7), first)   # a checkpoint keeps the state


def reached(network):
    """The names of its children that a gradient has reached."""
    names = set()
    for name, p in network.named_parameters():
        if p.grad is not None and p.grad.any():
            names.add(name.split('.')[0])
    return names


@both_baselines
def test_each_baseline_step_trains_its_own_networks_alone(name):
    model, D = baseline(name)
    if name == 'S2IC':
        assert not any(module.training for module in model.train().audio.modules())
    lms, image, label = clips()
    terms, fakes = baselines.GeneratorStep(model, D)(lms, image, label)
    terms.sum().backward()
    assert reached(model) == set(networks(model))               # not the audio classifier
    model.zero_grad()
    D.zero_grad()
    before = copy.deepcopy(model.state_dict())
    L_D, = baselines.DiscriminatorStep(model, D)(lms, image, label, fakes)
    L_D.backward()
    assert reached(D) == {'image', 'sound', 'head'}
    assert not reached(model)
    assert not changed(before, model.state_dict())              # BatchNorm's statistics neither


@pytest.mark.parametrize('kind, nets', [
    ('RF_Sound', 'E_A E_V D_A D_V'),
    ('RF_Image', 'E_A E_V D_A D_V'),
    ('FR_Image', 'E_A D_A D_V'),
    ('FR_Sound', 'E_V D_A D_V'),
])
def test_each_cycle_trains_the_networks_on_its_way(kind, nets):
    model, _ = baseline('CMCGAN')
    lms, image, _ = clips()
    model.cycles(lms, image)[kind].square().sum().backward()
    assert reached(model) == set(nets.split())


@both_baselines
def test_baseline_steps_enter_autocast_in_any_thread(name):
    model, D = baseline(name)
    batch = clips()
    seen, out = set(), []
    for layer in convolutions(model) + convolutions(D):
        layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))

    def work():
        terms, fakes = baselines.GeneratorStep(model, D, torch.bfloat16)(*batch)
        L_D, = baselines.DiscriminatorStep(model, D, torch.bfloat16)(*batch, fakes)
        out.extend([terms, L_D, *fakes])
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {torch.bfloat16}
    assert len(out) > 2
    for result in out:
        assert result.dtype == torch.float32
        assert result.isfinite().all()


def test_cmcgan_learns_to_reconstruct(pairs):
    lms, image, label = pairs
    model, D = baseline('CMCGAN')
    G_step = baselines.GeneratorStep(model, D)
    D_step = baselines.DiscriminatorStep(model, D)
    G_optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999))
    D_optimizer = torch.optim.Adam(D.parameters(), lr=2e-3, betas=(0.5, 0.999))
    curve = []
    for _ in range(20):
        terms, fakes = G_step(lms, image, label)
        curve.append(terms[0, 2].item())
        model.zero_grad()
        (terms[0, 1] + 10 * terms[0, 2]).backward()
        G_optimizer.step()
        L_D, = D_step(lms, image, label, fakes)
        D.zero_grad()
        L_D.backward()
        D_optimizer.step()
    assert curve[-1] < 0.8 * curve[0]           # 0.69 of it; 0.95 without L_Cons


def test_audio_classifier_learns(pairs):
    lms, _, label = pairs
    torch.manual_seed(0)
    audio = baselines.AudioClassifier(13, 32)
    optimizer = torch.optim.Adam(audio.parameter_groups(), lr=2e-3)
    for _ in range(100):
        loss = F.cross_entropy(audio(lms), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right = audio.eval()(lms).argmax(dim=1) == label
    assert right.sum() >= 10


# ------------------------------------------------------------------------- the whole, as a newcomer

def test_the_readmes_lines_of_python(trained, tmp_path, monkeypatch):
    """They run as they stand, on a run of one's own."""
    text = (HERE / 'README.md').read_text()
    blocks = re.findall(r'```python\n(.*?)```', text, re.S)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    wavfile.write('clip.wav', 22050, np.zeros(22050, '<i2'))
    names = {}
    for block in blocks:
        block = block.replace('runs/<name>', str(trained)).replace('violin', 'viola')
        with torch.no_grad():
            exec(block, names)
        names.setdefault('first', names.get('fine'))
    assert names['first'].shape == (2, 3, 256, 256)
    assert sorted(path.name for path in tmp_path.glob('*.png')) == ['00.0.png', '00.5.png']


def shown_commands(text):
    """The commands of a Markdown text's blocks, without comments."""
    commands = []
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', text, re.S | re.M)
    for block in [block for language, block in blocks if not language]:
        for line in block.splitlines():
            words = line.partition(' #')[0].split()
            if words and words[0] in ('python', 'pip', 'torchrun', 'ffmpeg'):
                commands.append(' '.join(words))
    return commands


def test_the_readmes_commands_are_run():
    """.ci/run types all but those that want Sub-URMP, several GPUs or ffmpeg; it may add a flag."""
    text = (HERE / '.ci/run').read_text().replace('"$run"', 'runs/<name>')
    typed = re.findall(r'^step (.*)$', text, re.M)
    commands = shown_commands((HERE / 'README.md').read_text())
    assert len(commands) > 10
    for words in commands:
        elsewhere = words.startswith('ffmpeg') or 'Sub-URMP' in words or 'runs/all' in words
        if not elsewhere:
            assert any(line == words or line.startswith(f'{words} ') for line in typed), words


@pytest.mark.parametrize('path', sorted(HERE.glob('docs/*.md')), ids=lambda path: path.name)
def test_the_commands_of_the_docs_have_these_flags(path, capsys):
    """They train for hours; here they are parsed as they stand."""
    for words in shown_commands(path.read_text()):
        program, *flags = words.split()[1:]
        if program == 'train.py':
            assert train.parse_args(flags)


def test_the_results_loop_keeps_every_eighth_clip(tmp_path):
    """Of both halves of a pair alike, in each class; validation stays whole."""
    block, = re.findall(r'^cp -rL .*?^done\n', (HERE / 'docs/results.md').read_text(), re.S | re.M)
    for folder, suffix in ('img', 'jpg'), ('chunk', 'wav'):
        for split, name in itertools.product(('train', 'validation'), ('flute', 'oboe')):
            path = tmp_path / 'mini-sub-urmp' / folder / split / name
            path.mkdir(parents=True)
            for k in range(20):
                (path / f'{name}_{k:02}.{suffix}').touch()
    subprocess.run(['bash', '-euc', block], cwd=tmp_path, check=True)
    for folder, name in itertools.product(('img', 'chunk'), ('flute', 'oboe')):
        kept = {path.stem for path in (tmp_path / 'clips20' / folder / 'train' / name).iterdir()}
        assert kept == {f'{name}_{k:02}' for k in (0, 8, 16)}
        assert len([*(tmp_path / 'clips20' / folder / 'validation' / name).iterdir()]) == 20


def test_arrows_of_import_run_one_way():
    """Each module imports those after it in this order alone; cargan.py knows no other file."""
    order = ['evaluate', 'train', 'report', 'generate', 'demo', 'preprocess', 'runs', 'baselines',
             'cargan']
    assert {path.stem for path in HERE.glob('*.py')} == {*order, 'test_cargan'}
    for i, name in enumerate(order):
        imported = set()
        for node in ast.walk(ast.parse((HERE / f'{name}.py').read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module)
        assert imported & {*order} <= {*order[i + 1:]}, name


def test_train_reads_as_section_3_5():
    """C's training, a step of each side, the loop; then checkpoints, several runs, flags."""
    text = (HERE / 'train.py').read_text()
    names = ['def train_classifier', 'class GeneratorStep', 'class DiscriminatorStep',
             'class Trainer', 'def train_gan', 'def save_checkpoint', 'def load_checkpoint',
             'def train_all', 'def make_parser', 'def main']
    places = [text.index(name) for name in names]
    assert places == sorted(places)


def test_train_without_data_makes_the_demo(tmp_path, monkeypatch, capsys):
    """As a newcomer types it, but for the size of everything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, 'write_demo', partial(write_demo, train=2, validation=1))
    train.main(['--device', 'cpu', '--epochs', '1', *SMALL, '--batch-size', '13'])
    out = capsys.readouterr().out
    run, = (tmp_path / 'runs').iterdir()
    assert out.splitlines()[-1] == f'now: python evaluate.py runs/{run.name}'
    assert (tmp_path / 'xdg/cargan').is_dir()
