"""The tests: python -m pytest. On a CPU, without network and without any data but the demo's."""
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
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import zlib
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import lru_cache, partial
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
import preprocess
import report
import runs
import train
from demo import (BAR, DEMO_INSTRUMENTS, Note, REST, START, demo_melody, demo_pair, demo_picture, demo_player,
                  demo_sound, stable_rng, write_demo)
from evaluate import InceptionV3, frechet_distance, inception, inception_score, kernel_distance
from runs import InputError, writing

HERE = Path(__file__).parent
SMALL = '--size 32 --base 8 --disc-base 8 --batch-size 13 --init-std 0.02 --no-pretrained --classifier-epochs 1'.split()


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
def trained(demo, tmp_path_factory):
    """A run of two epochs, and the cache it used."""
    folder = tmp_path_factory.mktemp('trained')
    train.main(['--data', str(demo), '--cache', str(folder / 'cache'), '--out', str(folder / 'runs/small'),
                '--epochs', '2', '--sample-every', '1', '--workers', '2', '--device', 'cpu', *SMALL])
    return folder / 'runs/small', folder / 'cache'


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


# ------------------------------------------------------------------------------------------- sound

def wav_bytes(payload, bits, rate=22050, channels=1, code=1, block=None, more=b'', before=b'', length=None):
    """A WAV file; `more` goes into its format, `before` before the sound, `length` is what it claims to hold."""
    block = block or channels * bits // 8
    form = struct.pack('<HHIIHH', code, channels, rate, rate * block, block, bits) + more
    length = len(payload) if length is None else length
    body = b'WAVE' + wav_chunk(b'fmt ', form) + before + struct.pack('<4sI', b'data', length) + payload
    return struct.pack('<4sI', b'RIFF', len(body)) + body


def wav_chunk(name, content):
    return struct.pack('<4sI', name, len(content)) + content + b'\0' * (len(content) % 2)


@pytest.mark.parametrize('bits, code, step', [(8, 1, 2 ** -7), (16, 1, 2 ** -15), (24, 1, 2 ** -23),
                                              (32, 1, 2 ** -23), (32, 3, 2 ** -23), (64, 3, 2 ** -23)])
@pytest.mark.parametrize('channels, rate', [(1, 8000), (2, 44100), (6, 192000)])
def test_every_wav_format_is_scaled_by_its_full_scale(tmp_path, bits, code, step, channels, rate):
    rng = np.random.default_rng(0)
    wave = np.concatenate([rng.uniform(-1, 1, (500, channels)), [[-1.0] * channels, [0.0] * channels]])
    if code == 3:
        payload = wave.astype(f'<f{bits // 8}').tobytes()
    elif bits == 8:
        payload = (np.round(wave * 127) + 128).clip(0, 255).astype(np.uint8)
        payload[-2] = 0
        payload = payload.tobytes()
        wave[:-2] = np.round(wave[:-2] * 127) / 128
    else:
        full = 2 ** (bits - 1)
        whole = np.round(wave * full).clip(-full, full - 1).astype('<i8')
        payload = b''.join(int(x).to_bytes(bits // 8, 'little', signed=True) for x in whole.ravel())
    (tmp_path / 'x.wav').write_bytes(wav_bytes(payload, bits, rate, channels, code))
    waveform, sample_rate = preprocess.read_wav(tmp_path / 'x.wav')
    assert sample_rate == rate and waveform.dtype == np.float32 and waveform.shape == (502,)
    assert np.abs(waveform - wave.mean(axis=1)).max() <= step
    assert waveform[-2] == -1 and waveform[-1] == 0


def hz(mel):
    """Slaney's scale, written out: 66.67 Hz a mel up to 15 mels = 1 kHz, then 27 mels for a factor of 6.4."""
    return 200 / 3 * mel if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)


def weight(band, k):
    """The weight of FFT bin k in a mel band, by the formula of a triangle of area 1."""
    top = 15 + 27 * math.log(11025 / 1000) / math.log(6.4)
    low, centre, high = (hz(top * (band + i) / 129) for i in range(3))
    f = k * 22050 / 2048
    return max(0.0, min((f - low) / (centre - low), (high - f) / (high - centre))) * 2 / (high - low)


def test_mel_filterbank_is_slaneys_by_formula():
    filters = preprocess.mel_filterbank()
    assert filters.shape == (128, 1025) and filters.dtype == np.float32
    for band in (0, 1, 20, 43, 44, 90, 127):
        np.testing.assert_allclose(filters[band], [weight(band, k) for k in range(1025)], rtol=1e-5, atol=1e-9)
    # where a triangle spans many bins its sum times the bins' distance is its area
    np.testing.assert_allclose(filters[110:].sum(axis=1) * 22050 / 2048, 1, rtol=1e-2)
    assert preprocess.mel_filterbank(16000, 512, 40, 100, 4000).shape == (40, 257)


@pytest.mark.parametrize('k, amplitude', [(37, 0.5), (200, 0.01), (700, 1.0)])
def test_lms_of_a_tone_by_formula(k, amplitude):
    """A sine in FFT bin k, under a Hann window: power (aN/4)^2 in bin k and (aN/8)^2 on either side."""
    tone = amplitude * np.sin(2 * np.pi * k / 2048 * np.arange(11025)).astype(np.float32)
    lms = preprocess.log_mel_spectrogram(tone, 22050)
    assert lms.shape == (128, 22) and lms.dtype == np.float32
    for band in range(128):
        power = sum(weight(band, k + i) * (amplitude * 2048 / share) ** 2 for i, share in ((-1, 8), (0, 4), (1, 8)))
        if power > 1e-6:
            expected = 10 * math.log10(power)
            np.testing.assert_allclose(lms[band, 3:18], expected, atol=2e-2)    # frames without reflection


def test_lms_is_absolute_and_exactly_half_a_second():
    rng = np.random.default_rng(1)
    noise = rng.uniform(-0.5, 0.5, 30000).astype(np.float32)
    lms = preprocess.log_mel_spectrogram
    np.testing.assert_allclose(lms(noise / 10, 22050), lms(noise, 22050) - 20, atol=1e-3)
    assert (lms(np.zeros(11025, np.float32), 22050) == -100).all()
    np.testing.assert_array_equal(lms(noise, 22050), lms(noise[:11025], 22050))
    np.testing.assert_array_equal(lms(noise[:5000], 22050), lms(np.pad(noise[:5000], (0, 6025)), 22050))
    for rate in (8000, 44100, 48000, 192000):       # cut before or after resampling, it is the same
        common = math.gcd(rate, 22050)
        whole = resample_poly(noise.astype(np.float64), 22050 // common, rate // common)
        np.testing.assert_allclose(lms(noise, rate), lms(whole, 22050), atol=1e-2)


EXTENSIBLE = struct.pack('<HHIH14s', 22, 20, 0, 1, bytes.fromhex('000000001000800000aa00389b71'))
RARE_WAVS = {       # each of them holds full scale downwards and nothing
    '12 bits in 2 bytes': wav_bytes(struct.pack('<2h', -2 ** 15, 0), 12, block=2),
    '20 bits in 3 bytes, extensible': wav_bytes(b'\0\0\x80\0\0\0', 20, code=0xFFFE, block=3, more=EXTENSIBLE),
    '64 bits': wav_bytes(struct.pack('<2q', -2 ** 63, 0), 64),
    'floats beyond full scale': wav_bytes(struct.pack('<2d', -1e308, 0), 64, code=3),
    'an unknown part of odd length': wav_bytes(struct.pack('<2h', -2 ** 15, 0), 16, before=wav_chunk(b'odd ', b'123')),
}


@pytest.mark.filterwarnings('ignore')        # which the commands ignore as well
@pytest.mark.parametrize('kind', RARE_WAVS)
def test_rare_kinds_of_wav(tmp_path, kind):
    (tmp_path / 'x.wav').write_bytes(RARE_WAVS[kind])
    waveform, sample_rate = preprocess.read_wav(tmp_path / 'x.wav')
    assert sample_rate == 22050 and waveform.tolist() == [-1, 0]


BAD_WAVS = {
    'empty file': (b'', 'not understood'),
    'no samples': (wav_bytes(b'', 16), 'no samples'),
    'less than a frame of 65,535 channels': (wav_bytes(bytes(99), 8, channels=65535), '65535'),
    'no sound': (b'RIFF\x04\0\0\0WAVE', 'WAV file ('),
    'no channels': (wav_bytes(bytes(99), 16, channels=0, block=2), 'by zero'),
    'header alone': (wav_bytes(bytes(100), 16)[:30], 'cut short: 10 of 16 bytes'),
    'cut short': (wav_bytes(bytes(100), 16)[:-40], 'cut short: 60 of 100 bytes'),
    '4 GB claimed': (wav_bytes(bytes(100), 16, length=2 ** 32 - 1), 'cut short: 100 of 4294967295 bytes'),
    'not a number': (wav_bytes(np.full(100, np.nan, '<f4').tobytes(), 32, code=3), 'not finite'),
    'sample rate': (wav_bytes(bytes(100), 16, rate=1), 'sample rate 1 Hz'),
    'a codec that is no PCM': (wav_bytes(bytes(100), 16, code=0x55), 'MPEGLAYER3'),
    'too long': (wav_bytes(bytes(600 * 8000 + 1), 8, rate=8000), 'more than 10 minutes'),
    'nothing but parts': (wav_bytes(bytes(100), 16, before=wav_chunk(b'LIST', b'') * 10 ** 5), 'too many parts'),
}


@pytest.mark.parametrize('kind', BAD_WAVS)
def test_bad_wav_is_named(tmp_path, kind):
    path, (content, why) = tmp_path / 'bad.wav', BAD_WAVS[kind]
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        preprocess.read_wav(path)
    line, = str(error.value).splitlines()
    assert line.startswith(f'{path}: ') and why in line and 'give an uncompressed one' in line


def test_of_a_long_wav_its_beginning_can_be_read(tmp_path):
    (tmp_path / 'long.wav').write_bytes(wav_bytes(bytes(range(100)) * 48001, 8, rate=8000))        # over 10 minutes
    waveform, rate = preprocess.read_wav(tmp_path / 'long.wav', seconds=0.5)
    assert rate == 8000 and waveform.shape == (4000,)
    assert waveform[:100].tolist() == [(i - 128) / 128 for i in range(100)]
    with pytest.raises(InputError, match='long.wav: .*more than 10 minutes'):
        preprocess.read_wav(tmp_path / 'long.wav')
    os.truncate(tmp_path / 'long.wav', 2 ** 31)             # a hole in the file: nobody's memory has to hold it
    with pytest.raises(InputError, match='long.wav: .*more than 128 MiB'):
        preprocess.read_wav(tmp_path / 'long.wav', seconds=0.5)


# ------------------------------------------------------------------------------- files and the cache

def test_large_jpeg_is_decoded_at_a_reduced_scale_and_looks_the_same(tmp_path):
    y, x = np.mgrid[:1080, :1920]
    pixels = np.stack([x / 1920, y / 1080, (np.sin(x / 90) + np.sin(y / 70) + 2) / 4], axis=2)
    full = Image.fromarray((pixels * 255).astype(np.uint8))
    full.save(tmp_path / 'frame.jpg', quality=95)
    small = preprocess.read_image(tmp_path / 'frame.jpg', 64)
    assert small.shape == (64, 64, 3) and small.dtype == np.uint8
    expected = np.asarray(full.resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(small - expected).mean() < 1


def png_bytes(width, height, depth, colour, pixels, *parts, interlaced=False):
    """A PNG file; `pixels` are its lines, each with a 0 in front, and `parts` (name, content) go before them."""
    parts = [(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, interlaced)), *parts,
             (b'IDAT', zlib.compress(pixels)), (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(struct.pack('>I', len(content)) + name + content
                                           + struct.pack('>I', zlib.crc32(name + content)) for name, content in parts)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


ORANGE, PICTURE = b'\xf0\x80\x20', Image.new('RGB', (64, 64), (0xf0, 0x80, 0x20))
ADAM7 = (1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)     # what each pass holds of 8 x 8 pixels
PICTURES = {
    'JPEG': saved(PICTURE, 'JPEG', quality=95),
    'progressive JPEG': saved(PICTURE, 'JPEG', quality=95, progressive=True),
    'CMYK JPEG': saved(PICTURE.convert('CMYK'), 'JPEG', quality=95),
    'PNG': saved(PICTURE, 'PNG'),
    'PNG with alpha': saved(PICTURE.convert('RGBA'), 'PNG'),
    'PNG of a palette': saved(PICTURE.quantize(2), 'PNG', transparency=b'\x80\xff'),
    'PNG of 16 bits': png_bytes(1, 1, 16, 2, b'\0\xf0\1\x80\2\x20\3'),
    'interlaced PNG': png_bytes(8, 8, 8, 2, b''.join((b'\0' + ORANGE * w) * h for w, h in ADAM7), interlaced=True),
    'animated PNG of no pictures': png_bytes(1, 1, 8, 2, b'\0' + ORANGE, (b'acTL', bytes(8))),
}


@pytest.mark.filterwarnings('ignore')        # which the commands ignore as well
@pytest.mark.parametrize('kind', PICTURES)
def test_every_kind_of_picture_has_its_colours(tmp_path, kind):
    (tmp_path / 'x').write_bytes(PICTURES[kind])
    pixels = preprocess.read_image(tmp_path / 'x', 8)
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.astype(int) - tuple(ORANGE)).max() <= 3


def test_grey_of_16_bits_and_pictures_on_their_side(tmp_path):
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / 'grey.png')
    assert np.abs(preprocess.read_image(tmp_path / 'grey.png', 8)[..., 1] - ramp / 257).max() <= 1
    halves = Image.new('RGB', (64, 32))
    halves.paste((255, 255, 255), (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6                        # to be shown turned to the right: the left half is above
    for name in ('side.jpg', 'side.png'):
        halves.save(tmp_path / name, exif=exif)
        rows = preprocess.read_image(tmp_path / name, 8).mean(axis=(1, 2))
        assert rows[:3].min() > 200 and rows[5:].max() < 50


def too_many_scans():
    whole = saved(Image.new('L', (64, 64)), 'JPEG', progressive=True)
    last = whole.rindex(b'\xff\xda')
    return whole[:-2] + whole[last:-2] * 100 + whole[-2:]


PROFILE = b'iCCP', b'p\0\0' + zlib.compress(bytes(100))
BAD_PICTURES = {
    'empty file': (b'', 'another kind of file'),
    'GIF': (saved(PICTURE, 'GIF'), 'another kind of file'),
    'JPEG cut short': (PICTURES['JPEG'][:-10], 'truncated'),
    'PNG cut short': (PICTURES['PNG'][:-30], 'not a readable'),
    'PNG bomb that Pillow takes': (png_bytes(13000, 13000, 1, 0, bytes(13000 * 1626)), '13000 x 13000 pixels'),
    'PNG of a single column': (png_bytes(1, 10 ** 7, 1, 0, bytes(2 * 10 ** 7)), '1 x 10000000 pixels'),
    'JPEG of huge claims': (PICTURES['JPEG'].replace(struct.pack('>HH', 64, 64), struct.pack('>HH', 9000, 9000)),
                            '9000 x 9000 pixels'),
    'text bomb': (png_bytes(1, 1, 8, 0, b'\0\0', (b'zTXt', b'k\0\0' + zlib.compress(bytes(2 ** 21)))), 'too large'),
    'nothing but parts': (png_bytes(1, 1, 8, 0, b'\0\0', *[(b'none', b'')] * 50000), 'too many parts'),
    'nothing but profiles': (png_bytes(1, 1, 8, 0, b'\0\0', *[PROFILE] * 100), 'too many parts'),
    'nothing but markers': (b'\xff\xd8' + b'\xff' * 200000, 'too many parts'),
    'a hundred scans': (too_many_scans(), 'too many parts'),
}


@pytest.mark.filterwarnings('ignore')        # which the commands ignore as well
@pytest.mark.parametrize('kind', BAD_PICTURES)
def test_bad_picture_is_named(tmp_path, kind):
    path, (content, why) = tmp_path / 'bad.jpg', BAD_PICTURES[kind]
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        preprocess.read_image(path, 64)
    line, = str(error.value).splitlines()
    assert line.startswith(f'{path}: ') and why.lower() in line.lower() and 'give ' in line


def test_a_picture_that_claims_4_gb_takes_no_such_memory(tmp_path):
    """Its pixels are there; what the part that holds them claims beyond them, Pillow reads in one piece."""
    start, end = PICTURES['PNG of 16 bits'].split(b'IDAT')
    (tmp_path / 'x.png').write_bytes(start[:-4] + struct.pack('>I', 2 ** 32 - 1) + b'IDAT' + end)
    resource = pytest.importorskip('resource')
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path('/proc/self/statm').read_text().split()[0]) * 4096 + 2 ** 30
    resource.setrlimit(resource.RLIMIT_AS, (size, limits[1]))
    try:
        assert preprocess.read_image(tmp_path / 'x.png', 1).tolist() == [[[240, 128, 32]]]
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize('kind', ['nothing', 'dangling', 'folder', 'loop', 'fifo', 'device'])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind):
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'loop').symlink_to('loop')
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'device').symlink_to('/dev/zero')
    for read in (preprocess.read_wav, lambda path: preprocess.read_image(path, 64)):
        with pytest.raises(InputError, match=f'{tmp_path / kind}: .*no such file.*; give '):
            read(tmp_path / kind)


def rename(folder, old, new):
    (folder / old).rename(folder / new)


def test_both_layouts_and_any_class_names(data):
    for split in ('train', 'validation'):
        for part in ('chunk', 'img'):
            for name in sorted(DEMO_INSTRUMENTS)[2:]:
                shutil.rmtree(data / part / split / name)
            rename(data / part / split, 'cello', 'Zaunkönig')
            rename(data / part / split, 'bassoon', 'diesel engine 4')
    frame = next((data / 'img/train/Zaunkönig').iterdir())
    Image.open(frame).save(frame.with_suffix('.PNG'))
    frame.unlink()
    (data / 'img/train/.DS_Store').write_bytes(b'x')
    (data / 'img/train/Zaunkönig/notes.txt').write_bytes(b'x')
    dataset = preprocess.open_dataset(data, 32)
    assert dataset.classes == ['Zaunkönig', 'diesel engine 4'] and dataset.lms_channels == 1
    assert (len(dataset.train), len(dataset.validation)) == (8, 4)

    for split in ('train', 'validation'):           # as the authors' sample has it: LMS as RGB pictures
        for path in sorted((data / 'chunk' / split).glob('*/*.wav')):
            lms = preprocess.log_mel_spectrogram(*preprocess.read_wav(path))
            pixels = ((lms.clip(-80, 40) + 80) * 2).astype(np.uint8)
            Image.fromarray(pixels).convert('RGB').save(path.with_suffix('.png'))
            path.unlink()
    for old, new in (('chunk', 'spectram'), ('spectram/validation', 'spectram/test'),
                     ('img', 'img_256'), ('img_256/validation', 'img_256/test')):
        rename(data, old, new)
    dataset = preprocess.open_dataset(data, 32)
    lms, image, label = dataset.train.batch(range(3))
    assert dataset.lms_channels == 3 and lms.shape == image.shape == (3, 3, 32, 32)
    assert -1 <= lms.min() < lms.max() <= 1


def test_batches_are_what_the_files_hold(demo, tmp_path):
    dataset = preprocess.open_dataset(demo, 64, tmp_path)
    split = dataset.train
    assert dataset.classes == sorted(DEMO_INSTRUMENTS) and len(split) == 52
    lms, image, label = split.batch([5, 40])
    assert lms.shape == (2, 1, 64, 64) and image.shape == (2, 3, 64, 64) and lms.dtype == image.dtype == torch.float32
    assert label.dtype == torch.int64 and label.shape == (2,)
    for row, index in enumerate([5, 40]):
        name = f'{dataset.classes[label[row]]}/{split.stems[index]}'
        frame = np.asarray(Image.open(demo / f'img/train/{name}.jpg')) / 127.5 - 1
        np.testing.assert_allclose(image[row].permute(1, 2, 0), frame, atol=1e-6)
        db = preprocess.log_mel_spectrogram(*preprocess.read_wav(demo / f'chunk/train/{name}.wav'))
        expected = Image.fromarray(((db + 80) / 60 - 1).clip(-1, 1)).resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(lms[row, 0], np.asarray(expected), atol=1e-3)        # float16 in the cache
        assert split.stems[index].startswith(dataset.classes[label[row]])


def test_every_mel_band_reaches_the_networks_picture():
    bands = torch.full((128, 128, 22), -80.0)
    bands[range(128), range(128)] = 40          # one clip for each band
    for size in (16, 32, 64, 128, 256):
        assert (preprocess.network_lms(bands, size).amax((1, 2, 3)) > -0.9).all(), size
    lms = torch.rand(128, 22, generator=torch.Generator().manual_seed(0)) * 160 - 100
    scaled = ((lms + 80) / 60 - 1).clamp(-1, 1)
    small, large = (preprocess.network_lms(lms[None], size) for size in (32, 256))
    pillow = Image.fromarray(scaled.numpy()).resize((32, 32), Image.Resampling.BILINEAR)    # which antialiases
    np.testing.assert_allclose(small[0, 0], np.asarray(pillow), atol=1e-5)
    plain = F.interpolate(scaled[None, None], (256, 256), mode='bilinear')
    np.testing.assert_allclose(large, plain, atol=1e-5)


def test_a_subset_holds_these_pairs_of_the_same_cache(demo, tmp_path):
    split = preprocess.open_dataset(demo, 32, tmp_path).validation
    few = split.subset(torch.tensor([3, 25, 4]))
    assert len(few) == 3 and few.frames is split.frames and few.stems == [split.stems[i] for i in (3, 25, 4)]
    for one, other in zip(few.subset([1, 2]).batch([0, 1]), split.batch([25, 4])):
        assert torch.equal(one, other)
    assert few.labels.tolist() == split.labels[[3, 25, 4]].tolist() and len(split.subset([])) == 0


@pytest.mark.parametrize('n, batch_size, least, sizes', [
    (52, 32, 2, [26, 26]), (5, 2, 2, [3, 2]), (5, 1, 2, [3, 2]), (5, 1, 1, [1] * 5), (33, 32, 2, [17, 16]),
    (3, 2, 2, [3]), (1, 32, 2, [1]), (9, 4, 4, [5, 4])])
def test_no_batch_has_fewer_pairs_than_asked_for(demo, tmp_path, n, batch_size, least, sizes):
    split = preprocess.open_dataset(demo, 32, tmp_path).train.subset(range(n))
    batches = split.indices(batch_size, seed=1, least=least)
    assert [len(batch) for batch in batches] == sizes and len(sizes) == split.count(batch_size, least)
    assert sorted(torch.cat(batches).tolist()) == list(range(n)) and torch.equal(split.order(1), torch.cat(batches))
    assert n < 5 or not torch.equal(split.order(1), split.order(2)) and split.order().tolist() == list(range(n))
    assert [len(label) for _, _, label in split.batches(batch_size, seed=1, least=least)] == sizes


@pytest.mark.parametrize('n, batch_size', [(7, 4), (52, 8), (2, 64)])
def test_four_processes_share_each_batch_and_none_goes_without(demo, tmp_path, n, batch_size):
    split = preprocess.open_dataset(demo, 32, tmp_path).train.subset(range(n))
    parts = [list(split.batches(batch_size, seed=5, part=part, parts=4)) for part in range(4)]
    batches = split.indices(batch_size, seed=5)
    assert [len(part) for part in parts] == [len(batches)] * 4          # all take part in every step
    for indices, *shares in zip(batches, *parts):
        whole = split.batch(indices)
        for part in range(len(indices), 4):                             # stand-ins
            assert torch.equal(shares[part][1], whole[1][:1])
        for tensor, *pieces in zip(whole, *shares[:len(indices)]):      # the others are the batch
            assert torch.equal(torch.cat(pieces), tensor) and all(len(piece) for piece in pieces)


def test_loudness_is_the_mean_power_of_the_bands(demo, tmp_path):
    split = preprocess.open_dataset(demo, 32, tmp_path).train
    expected = [10 * np.log10((10 ** (split.lms[row].astype(float) / 10)).mean()) for row in split.rows]
    np.testing.assert_allclose(split.loudness(), expected, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_split_on_the_gpu_gives_the_same_batches_on_every_device(demo, tmp_path):
    split = preprocess.open_dataset(demo, 64, tmp_path).train
    expected = split.batch(range(52))
    epoch = split.batches(13, 'cuda')
    batches = [next(epoch)]
    assert split.resident_bytes == 0 and split.to('cpu').resident_bytes == 0
    assert split.to('cuda').resident_bytes == 52 * (128 * 22 * 2 + 64 * 64 * 3 + 8)
    batches += epoch                                # moved in the midst of an epoch
    for got, wanted in zip(map(torch.cat, zip(*batches)), expected):
        torch.testing.assert_close(got.cpu(), wanted, atol=1e-4, rtol=0)
    busy = torch.ones(4096, 4096, device='cuda')
    for _ in range(50):                             # the GPU lags behind: a copy that nobody waits for comes late
        busy = busy @ busy / 4096
    for got, wanted in zip(split.batch(range(52), 'cpu'), expected):
        assert got.device.type == 'cpu'
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_cache_is_made_once_and_notices_every_change(data, tmp_path, capsys, monkeypatch):
    def packs(size=32, folder=tmp_path / 'cache', data=data):
        preprocess.open_dataset(data, size, folder)
        return 'packing' in capsys.readouterr().err
    before = sorted(path.relative_to(data) for path in data.rglob('*'))
    assert packs() and not packs()
    monkeypatch.setattr(preprocess, 'CACHE_VERSION', preprocess.CACHE_VERSION + 1)
    assert packs() and not packs()
    assert packs(size=64) and not packs(size=64) and not packs(size=32)
    wav = next((data / 'chunk/train/oboe').iterdir())
    wav.write_bytes(wav.read_bytes() + b'\0\0')
    assert packs() and not packs()
    stamp = wav.stat().st_mtime_ns
    os.utime(wav, ns=(stamp, stamp + 1000))
    assert packs() and not packs()
    frame = next((data / 'img/train/oboe').iterdir())
    frame.unlink()
    assert packs() and not packs()
    monkeypatch.chdir(data.parent)          # by whatever path, with something left out as well
    assert not packs(data='data')
    frame.write_bytes(next((data / 'img/train/oboe').iterdir()).read_bytes())
    packs()
    assert sorted(path.relative_to(data) for path in data.rglob('*')) == before      # nothing put there


def test_whatever_stands_in_the_caches_place_it_is_built_again(data, tmp_path, capsys):
    folder = preprocess.open_dataset(data, 32, tmp_path / 'cache').folder
    def cut_short(path):                    # as by a full disk
        os.truncate(path, path.stat().st_size - 1)
    def made_a_folder(path):
        path.unlink()
        path.mkdir()
    spoilt = [(spoil, folder / name) for spoil in (cut_short, made_a_folder, Path.unlink)
              for name in ('frames', 'lms', 'meta.json')]
    spoilt += [(lambda path, text=text: path.write_text(text), folder / 'meta.json')
               for text in ('[]', 'null', '{"bytes": []}', '{"bytes": {}}', '[' * 10 ** 5, '\xff')]
    spoilt += [(lambda path: (shutil.rmtree(path), path.write_text('a file')), folder),
               (lambda path: (shutil.rmtree(path), path.symlink_to('nowhere')), folder)]
    for spoil, path in spoilt:
        spoil(path)
        capsys.readouterr()
        assert len(preprocess.open_dataset(data, 32, tmp_path / 'cache').train.batch([51])[0]) == 1
        assert 'packing' in capsys.readouterr().err, path


def test_a_killed_build_is_not_taken_for_whole(data, tmp_path):
    """A build is killed with -9 half-way; what it left is not read, and is swept away by the next."""
    code = ('import os, preprocess\n'
            'preprocess.Progress.__call__ = lambda *_, **__: os.kill(os.getpid(), 9)\n'
            f'preprocess.open_dataset({str(data)!r}, 32, {str(tmp_path / "cache")!r})')
    assert command('-c', code, cwd=HERE).returncode == -9
    assert list((tmp_path / 'cache').glob('*.part'))
    assert len(preprocess.open_dataset(data, 32, tmp_path / 'cache').train) == 52
    assert not list((tmp_path / 'cache').glob('*.part'))


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps'), reason='needs Linux')
def test_what_was_read_of_the_cache_takes_no_memory(demo, tmp_path):
    dataset = preprocess.open_dataset(demo, 64, tmp_path)
    batch, _ = dataset.train.batch(range(52))[1], dataset.train.loudness()
    report = Path('/proc/self/smaps').read_text()
    for name in ('frames', 'lms'):
        assert re.findall(rf'{re.escape(str(dataset.folder / name))}\n(?:.*\n)*?Rss: +(\d+) kB', report) == ['0'] * 2
    assert torch.equal(dataset.train.batch(range(52))[1], batch)


def test_two_processes_that_want_the_same_cache_build_it_once(data, tmp_path):
    cache, code = tmp_path / 'cache', 'import preprocess; print(len(preprocess.open_dataset({!r}, 32, {!r}).train))'
    folder = preprocess.open_dataset(data, 32, cache).folder
    shutil.rmtree(folder)
    with writing(folder):        # until both wait for it
        both = [subprocess.Popen([sys.executable, '-c', code.format(str(data), str(cache))], cwd=HERE, text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
        for process in both:
            assert process.stderr.readline() == f'waiting for another process that writes {folder}\n'
    outs, errs = zip(*(process.communicate() for process in both))
    assert outs == ('52\n', '52\n') and ''.join(errs).count('78 of 78') == 1, errs
    assert {path.name for path in cache.iterdir()} == {folder.name, f'{folder.name}.lock'}


def test_a_cache_that_cannot_be_written(data, tmp_path, refused, monkeypatch):
    (tmp_path / 'file').write_text('')
    flags = ['--data', data, '--size', 32, '--cache']
    refused(preprocess, [*flags, tmp_path / 'file'], tmp_path / 'file/data-32', '--cache')
    with small_disk(10 ** 5):
        line = refused(preprocess, [*flags, tmp_path / 'cache'], 'cannot be written (File too large); ', '--cache')
    left, = (tmp_path / 'cache').iterdir()
    assert left.suffix == '.lock' and f'error: {left.with_suffix("")}: ' in line


def test_names_that_cannot_be_printed(data, tmp_path, refused):
    """Line breaks and bytes that are no text, in the names of files, of the data folder and of a class."""
    odd = data.rename(data.with_name(os.fsdecode(b'da\xffta')))
    frame = next((odd / 'img/train/oboe').iterdir())        # of which Pillow would warn
    frame.write_bytes(PICTURES['animated PNG of no pictures'])
    for name in ('a\nb', 'esc\x1b[2J', os.fsdecode(b'caf\xe9')):
        (odd / f'chunk/train/oboe/{name}.wav').write_bytes(b'bad')
        shutil.copy(next((odd / 'img/train/oboe').glob('*.jpg')), odd / f'img/train/oboe/{name}.jpg')
    done = command(HERE / 'preprocess.py', '--data', odd, '--size', 32, env=dict(os.environ, PYTHONUTF8='1'))
    lines = [line for line in done.stderr.splitlines() if line.startswith('left out: ')]
    assert lines == [line for line in done.stderr.splitlines() if not line.startswith('packing ')]
    assert done.returncode == 0 and [line.count('.wav: not a readable WAV file') for line in lines] == [1, 1, 1]
    for line, name in zip(lines, (r'a\nb.wav', r'caf\udce9.wav', r'esc\x1b[2J.wav')):
        assert fr'da\udcffta/chunk/train/oboe/{name}: ' in line
    rename(odd / 'img/train', 'oboe', 'o\nboe')
    refused(preprocess, ['--data', odd], r'o\nboe', 'rename it')


def test_bad_files_are_all_named_in_one_pass_and_left_out(data, tmp_path, capsys):
    def some(part, name, nth=0, split='train'):
        return sorted((data / part / split / name).iterdir())[nth]
    truncated, text, empty = some('img', 'cello'), some('img', 'flute'), some('chunk', 'horn')
    truncated.write_bytes(truncated.read_bytes()[:600])
    text.write_text('not a picture')
    empty.write_bytes(b'')
    garbage, lonely_wav, lonely_jpg = some('chunk', 'oboe'), some('chunk', 'sax', 1), some('img', 'tuba', 2)
    garbage.write_bytes(os.urandom(2000))
    both = some('img', 'oboe')                              # the frame of the same pair
    both.write_bytes(b'\xff\xd8\xff')
    some('img', 'sax', 1).unlink()
    some('chunk', 'tuba', 2).unlink()
    folder, link = some('img', 'viola'), some('chunk', 'violin')
    folder.unlink(), folder.mkdir()
    link.unlink(), link.symlink_to(tmp_path / 'nowhere.wav')
    Image.new('RGB', (64, 64)).save(some('img', 'trumpet').with_suffix('.png'))     # the .jpg beside it is used

    dataset = preprocess.open_dataset(data, 32, tmp_path / 'cache')
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('left out:')]
    for path in (truncated, text, empty, garbage, both, lonely_wav, lonely_jpg, folder, link):
        line, = [line for line in lines if f' {path}: ' in line]
        assert len(line.split(f'{path}: ')[1]) > 5          # a reason
    assert len(lines) == 9 and len(dataset.train) == 52 - 8
    preprocess.open_dataset(data, 32, tmp_path / 'cache')   # named again when the cache is reused
    assert capsys.readouterr().err.count('left out:') == 9
    with pytest.raises(InputError, match='9 problems'):
        preprocess.open_dataset(data, 32, tmp_path / 'cache', strict=True)


def test_classes_in_one_split_only(data, capsys):
    for part in ('chunk', 'img'):
        shutil.rmtree(data / part / 'validation/tuba')
    dataset = preprocess.open_dataset(data, 32)
    assert 'no pair in validation of class tuba' in capsys.readouterr().err
    assert len(dataset.classes) == 13 and len(dataset.train) == 52 and len(dataset.validation) == 24
    for part in ('chunk', 'img'):
        shutil.rmtree(data / part / 'train/oboe')
    with pytest.raises(InputError, match='no good pair in train of class oboe'):
        preprocess.open_dataset(data, 32)


def test_commands_refuse_bad_data_with_one_line(data, tmp_path, refused):
    for wav in (data / 'chunk/train/horn').iterdir():
        wav.write_bytes(b'')
    flags = ['--data', data, '--out', tmp_path / 'run', *SMALL]
    err = refused(train, flags, data, 'no good pair in train of class horn')
    assert err.count('left out:') == 4 and not (tmp_path / 'run').exists()
    shutil.rmtree(data / 'chunk/validation')
    refused(preprocess, ['--data', data], 'chunk/validation or chunk/test')
    refused(preprocess, ['--data', tmp_path / 'nothing'], 'nothing', 'chunk/train or spectram/train')


def test_strict_stops_at_any_bad_file(data, capsys, refused):
    next((data / 'img/train/horn').iterdir()).write_bytes(b'')
    refused(preprocess, ['--data', data, '--strict', '--size', 32], data, '1 problems')
    refused(preprocess, ['--data', data, '--size', 0], 'at least 1')
    preprocess.main(['--data', str(data), '--size', '32'])
    assert any(line.split() == ['horn', '3', '2'] for line in capsys.readouterr().out.splitlines())


# --------------------------------------------------------------------------------------- demo data

def test_demo_data_is_deterministic_and_whole(demo, tmp_path, refused, capsys, monkeypatch):
    write_demo(tmp_path / 'again', train=4, validation=2, size=64)
    files = sorted(path.relative_to(demo) for path in demo.rglob('*.*'))
    assert len(files) == 2 * 78 and {path.stem for path in files if 'tuba' in path.parts} == {
        'tuba01_150', 'tuba02_150', 'tuba03_150', 'tuba04_150', 'tuba05_150', 'tuba06_150'}
    for file in files:
        assert (demo / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()
    write_demo(tmp_path / 'other', train=1, validation=1, size=64, seed=1)
    file = next(tmp_path.glob('other/chunk/train/tuba/*'))
    assert file.read_bytes() != (demo / file.relative_to(tmp_path / 'other')).read_bytes()
    monkeypatch.setattr(demo_module, 'write_demo', partial(write_demo, train=5, validation=1))       # for time
    demo_module.main([str(tmp_path / 'full'), '--size', '64'])
    assert '78 of 78' in capsys.readouterr().err and (tmp_path / 'full/img/train/tuba/tuba01_750.jpg').exists()
    refused(demo_module, [tmp_path / 'full'], 'full', 'exists already')
    refused(demo_module, [tmp_path / 'new', '--size', 0], 'at least 1')


def test_demo_sound_shows_in_the_picture():
    player = demo_player(np.random.default_rng(0))
    def draw(instrument, note, size=64):
        return np.asarray(demo_picture(instrument, player, note, 0, size)).astype(int)
    pictures = []
    for instrument in DEMO_INSTRUMENTS.values():
        low, high = instrument.register
        soft, *others = (draw(instrument, note) for note in
                         (Note(0, 0.6, low, 0.1), Note(0, 0.6, low, 1.0), Note(0, 0.6, high, 0.1), REST))
        for other in others:                            # of 4096 pixels these change clearly
            assert (np.abs(other - soft).max(axis=2) > 40).sum() > 20
        pictures.append(soft)
    for i, one in enumerate(pictures):                  # and no two instruments look alike
        for other in pictures[:i]:
            assert (np.abs(one - other).max(axis=2) > 40).sum() > 100
    assert draw(instrument, REST, 256).shape == (256, 256, 3)


def test_the_demos_picture_is_the_first_frame_of_its_half_second():
    """It shows the note that sounds when the clip begins, not the one in its middle; in a rest the player waits."""
    seen = dict(two=0, rest=0)
    for name, bar in itertools.product(('violin', 'trombone'), range(30)):
        rng, instrument, moment = stable_rng(0, 'train', name, 1), DEMO_INSTRUMENTS[name], bar * BAR + START
        player = demo_player(rng)
        notes = [note for note in demo_melody(instrument.register, rng, moment + 0.5)
                 if bar * BAR <= note.start < moment + 0.25]            # of this bar, up to the clip's middle
        wave, picture = demo_pair(name, 'train', 1, moment, size=64)
        def distance(note):
            drawn = demo_picture(instrument, player, note, 0, 64)       # beside it by at most 0.01 of its width
            return np.abs(np.asarray(picture).astype(int) - np.asarray(drawn)).mean()
        if not notes:
            assert np.abs(wave[:5000]).max() < 0.005 and distance(REST) < distance(Note(0, 1, 60, 0.5))
            seen['rest'] += 1
            continue
        first, *others = notes
        assert first.start <= moment < first.start + first.duration and np.abs(wave[:5000]).max() > 0.005
        for second in others:
            if abs(second.loudness - first.loudness) > 0.3:             # so that the two look different
                assert distance(first) < distance(second)
                seen['two'] += 1
    assert seen['two'] >= 5 and seen['rest'] >= 2


def test_demo_sounds_have_their_pitch_and_their_rests():
    for name in ('flute', 'cello', 'tuba'):
        instrument = DEMO_INSTRUMENTS[name]
        pitch = sum(instrument.register) // 2
        wave = demo_sound(instrument, [Note(0, 0.6, pitch, 0.8)], 0, np.random.default_rng(0))
        power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        order = np.fft.rfftfreq(len(wave), 1 / 44100) / (440 * 2 ** ((pitch - 69) / 12))
        assert wave.shape == (22050,) and power[np.abs(order - 1) < 0.04].sum() > 1e-3 * power.sum()
        harmonic = (np.abs(order / order.round().clip(1) - 1) < 0.04) & (order < 20)
        assert power[harmonic].sum() > 0.9 * power.sum()
    rest = demo_sound(instrument, [], 0, np.random.default_rng(0))
    assert 20 * math.log10(np.sqrt((rest ** 2).mean())) == pytest.approx(-70, abs=1)


# ---------------------------------------------------------------------------------------- networks

def attention_by_formula(module, x):
    """The sum over all keys, written out with the whole matrix."""
    q, k, v = (f(x) for f in (module.query, module.key, module.value))
    k, v = F.max_pool2d(k, 2), F.max_pool2d(v, 2)
    beta = torch.einsum('bcq,bck->bqk', q.flatten(2), k.flatten(2)).softmax(dim=2)
    o = torch.einsum('bqk,bck->bcq', beta, v.flatten(2)).view(len(x), -1, *x.shape[2:])
    return x + module.scale * module.output(o)


@pytest.mark.parametrize('channels, height, width', [(32, 12, 10), (64, 7, 7), (8, 4, 4), (3, 5, 6)])
def test_attention_is_its_formula(channels, height, width):
    torch.manual_seed(0)
    module = cargan.SelfAttention(channels).double()
    x = torch.randn(2, channels, height, width, dtype=torch.double, requires_grad=True)
    assert torch.equal(module(x), x)                # the scale starts at 0
    nn.init.constant_(module.scale, 0.7)
    ours, expected = module(x), attention_by_formula(module, x)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(x), [x, *module.parameters()]
    torch.testing.assert_close(torch.autograd.grad((ours * direction).sum(), parameters),
                               torch.autograd.grad((expected * direction).sum(), parameters), rtol=1e-8, atol=1e-9)


def test_attention_never_holds_its_matrix():
    """With the kernel that would hold it switched off, attention still works, forwards and backwards."""
    module = cargan.SelfAttention(32)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        x = torch.randn(1, 32, 64, 64, requires_grad=True)
        module(x).sum().backward()
    widths = module.query.out_channels, module.key.out_channels, module.value.out_channels
    assert widths == (4, 4, 16) and x.grad.shape == x.shape


def attention_inputs(network, x):
    """The shapes (C, H, W) that the network's attention sees, in order."""
    seen = []
    for module in network.modules():
        if isinstance(module, cargan.SelfAttention):
            module.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape[1:])))
    network(x)
    return seen


def test_attention_stands_before_the_last_two_convolutions():
    G = cargan.UNetGenerator(14, base=16, size=64)
    assert attention_inputs(G, torch.randn(2, 14, 64, 64)) == [(32, 16, 16), (16, 32, 32)]     # S/4, S/2
    for up in (G.up[-3], G.up[-2]):         # the last of their layers: before the skip is concatenated
        assert isinstance(up[-1], cargan.SelfAttention)
    assert G.up[-1][1].in_channels == 2 * 16
    D = cargan.PatchDiscriminator(4, base=16)
    assert attention_inputs(D, torch.randn(2, 4, 64, 64)) == [(64, 8, 8), (128, 7, 7)]
    layers = [layer for layer in D.layers if isinstance(layer, (nn.Conv2d, cargan.SelfAttention))]
    assert [type(layer).__name__ for layer in layers[-4:]] == ['SelfAttention', 'Conv2d'] * 2
    assert not attention_inputs(cargan.UNetGenerator(14, base=8, size=32, attention=False), torch.randn(2, 14, 32, 32))


def test_unet_at_256_is_pix2pixs():
    with torch.device('meta'):
        G = cargan.UNetGenerator(3, attention=False)
        D = cargan.PatchDiscriminator(6, attention=False)
        full = cargan.UNetGenerator(14)
    assert sum(p.numel() for p in G.parameters()) == 54_414_531
    assert sum(p.numel() for p in D.parameters()) == 2_768_705
    assert len(G.down) == len(G.up) == 8
    assert sum(p.numel() for p in full.parameters()) == pytest.approx(54.4e6, rel=2e-3)
    assert [type(layer) for up in G.up for layer in up].count(nn.Dropout) == 3
    for module in [*G.modules(), *D.modules()]:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            assert module.kernel_size == (4, 4) and module.padding == (1, 1)
    assert {m.stride for m in G.modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))} == {(2, 2)}


@pytest.mark.parametrize('size', [32, 64, 128])
def test_unet_sizes(size):
    G = cargan.UNetGenerator(5, base=4, size=size)
    image = G(torch.randn(2, 5, size, size))
    assert image.shape == (2, 3, size, size) and image.abs().max() <= 1
    assert G.eval()(torch.randn(1, 5, size, size)).shape == (1, 3, size, size)
    for bad in (16, 48, 100, 0):
        with pytest.raises(ValueError, match='power of two'):
            cargan.UNetGenerator(5, size=bad)


def test_every_skip_reaches_the_output():
    G = cargan.UNetGenerator(3, base=4, size=32).eval()
    x, down = torch.randn(1, 3, 32, 32), []
    for layer in G.down:
        layer.register_forward_hook(lambda m, i, out: down.append(out.retain_grad() or out))
    G(x).square().sum().backward()
    assert [tuple(out.shape[2:]) for out in down] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert all(out.grad.abs().sum() > 0 for out in down)


def test_discriminator_sees_70x70():
    D = cargan.PatchDiscriminator(4, base=4, attention=False).eval()
    x = torch.randn(1, 4, 256, 256, requires_grad=True)
    logits = D(x)
    assert logits.shape == (1, 1, 30, 30) and D(x[..., :64, :64]).shape == (1, 1, 6, 6)
    logits[0, 0, 15, 15].backward()
    rows, columns = torch.nonzero(x.grad[0].abs().sum(dim=0), as_tuple=True)
    assert rows.max() - rows.min() + 1 == columns.max() - columns.min() + 1 == 70
    assert not any(isinstance(module, (nn.Sigmoid, nn.Tanh)) for module in D.modules())     # logits


def test_weights_start_from_a_normal_distribution():
    for network, std in ((cargan.UNetGenerator(3, base=16, size=64), 0.2),
                         (cargan.PatchDiscriminator(4, base=16, init_std=0.02), 0.02)):
        weights = torch.cat([module.weight.flatten() for module in network.modules()
                             if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d))])
        assert weights.std().item() == pytest.approx(std, rel=0.01) and abs(weights.mean()) < 0.01 * std


def test_classifier_is_resnet50_behind_imagenets_normalisation():
    C = cargan.Classifier(7, pretrained=False).eval()
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(C(image), C.resnet((image * 0.5 + 0.5 - mean) / std))
    assert C(image).shape == (2, 7) and len(C.state_dict()) == 320


def test_residue_and_its_gradient_into_g1_through_c():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8, init_std=0.02).train()
    C = model.residue.classifier
    assert not C.training and not any(p.requires_grad for p in C.parameters())
    before = copy.deepcopy(C.state_dict())
    lms, label = torch.rand(4, 1, 32, 32), torch.tensor([0, 1, 4, 1])
    coarse = model.G1(cargan.concatenate_label(lms, F.one_hot(label, 5)))
    logits, residue = model.residue(coarse, label)
    torch.testing.assert_close(logits, C(coarse))
    softmax = torch.exp(logits) / torch.exp(logits).sum(dim=1, keepdim=True)
    torch.testing.assert_close(residue, torch.eye(5)[label] - softmax)
    torch.testing.assert_close(residue.sum(dim=1), torch.zeros(4), atol=1e-6, rtol=0)
    residue.square().sum().backward()               # nothing but the residue's path: L_r -> C -> I' -> G1
    assert all(p.grad is not None for p in model.G1.parameters()) and model.G1.up[-1][1].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in C.parameters()) and not changed(before, C.state_dict())

    sure = nn.Linear(12, 5)
    nn.init.zeros_(sure.weight), nn.init.constant_(sure.bias, 0)
    sure.bias.data[2] = 200                         # certain of class 2
    _, residue = cargan.ResidueModule(nn.Sequential(nn.Flatten(), sure))(torch.rand(2, 3, 2, 2), torch.tensor([2, 0]))
    torch.testing.assert_close(residue, torch.tensor([[0., 0, 0, 0, 0], [1, 0, -1, 0, 0]]))


def test_label_is_tiled_over_the_plane():
    image, vector = torch.rand(2, 3, 4, 4), torch.tensor([[1, 0], [0, 1]])
    joined = cargan.concatenate_label(image, vector)
    assert joined.shape == (2, 5, 4, 4) and torch.equal(joined[:, :3], image)
    assert (joined[0, 3] == 1).all() and (joined[0, 4] == 0).all() and (joined[1, 4] == 1).all()


def test_cascade_is_eq_1():
    torch.manual_seed(0)
    model = cargan.CARGAN(5, size=32, base=8).eval()
    lms, label = torch.rand(2, 1, 32, 32), torch.tensor([3, 0])
    coarse, fine, logits = model(lms, label)
    I1 = model.G1(torch.cat([lms, torch.eye(5)[label][:, :, None, None].expand(2, 5, 32, 32)], 1))
    L_r = torch.eye(5)[label] - model.residue.classifier(I1).softmax(1)
    I2 = model.G2(torch.cat([I1, L_r[:, :, None, None].expand(2, 5, 32, 32)], 1))
    for ours, expected in ((coarse, I1), (fine, I2), (logits, model.residue.classifier(I1))):
        torch.testing.assert_close(ours, expected)


def test_variants():
    lms, label = torch.rand(2, 3, 32, 32), torch.tensor([3, 0])
    models = {v: cargan.CARGAN(5, size=32, base=8, variant=v, lms_channels=3).eval() for v in 'ABCDE'}
    for model in models.values():
        coarse, fine, logits = model(lms, label)
        assert coarse.shape == fine.shape == (2, 3, 32, 32) and logits.shape == (2, 5)
    def attentions(model):
        return sum(isinstance(module, cargan.SelfAttention) for module in model.modules())
    assert [attentions(model) for model in models.values()] == [0, 4, 4, 2, 4]
    assert models['E'].G2.down[0][0].in_channels == models['B'].G2.down[0][0].in_channels == 3 + 5
    assert models['C'].G2.down[0][0].in_channels == 3
    coarse, fine, _ = models['D'](lms, label)
    assert coarse is fine and not hasattr(models['D'], 'G2')
    with pytest.raises(ValueError, match="variant 'F'"):
        cargan.CARGAN(5, variant='F')


# ------------------------------------------------------------------------------------------ losses

def test_eq_2_classification_loss():
    a, b = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
    # -log p of the label: a: 1/4 (label 1), 1/2; b: 1/2, 4/5
    expected = 0.5 * (math.log(4) + math.log(2)) / 2 + 0.5 * (math.log(2) + math.log(5 / 4)) / 2
    label = torch.tensor([1, 1])
    assert cargan.classification_loss(label, a, b).item() == pytest.approx(expected)
    assert cargan.classification_loss(label, a).item() == pytest.approx(0.5 * (math.log(4) + math.log(2)) / 2)


def test_eq_3_to_5_adversarial_losses():
    def logit(p):
        return torch.tensor([math.log(p / (1 - p))])
    real, coarse, fine = logit(0.8), logit(0.3), logit(0.4)
    expected = -(math.log(0.8) + math.log(0.7)) - (math.log(0.8) + math.log(0.6))       # the real term twice
    assert cargan.discriminator_loss(real, coarse, fine).item() == pytest.approx(expected, rel=1e-5)
    assert cargan.discriminator_loss(real, coarse).item() == pytest.approx(-math.log(0.8 * 0.7), rel=1e-5)
    assert cargan.generator_loss(coarse, fine).item() == pytest.approx(math.log(0.7 * 0.6), rel=1e-5)
    assert cargan.generator_loss(coarse, fine, saturating=False).item() == pytest.approx(-math.log(0.3 * 0.4), rel=1e-5)
    extreme = torch.tensor([1e4]), torch.tensor([-1e4])
    assert all(math.isfinite(cargan.discriminator_loss(*pair)) for pair in (extreme, extreme[::-1]))


def test_eq_5_weighs_its_stages():
    real, coarse, fine = torch.randn(3, 4, 1, 2, 2)
    for loss in partial(cargan.discriminator_loss, real), cargan.generator_loss:
        each = loss(coarse), loss(fine)
        assert loss(coarse, fine) == pytest.approx(sum(each).item(), rel=1e-5)
        assert loss(coarse, fine, weights=(0.3, 2)) == pytest.approx((0.3 * each[0] + 2 * each[1]).item(), rel=1e-5)


def test_l1_and_eq_6():
    image = torch.zeros(1, 3, 2, 2)
    assert cargan.l1_loss(image, image + 0.25, image - 0.5).item() == pytest.approx(0.75)
    assert cargan.objective(2.0, 3.0, 0.5) == pytest.approx(2 + 3 + 50)
    assert cargan.objective(2.0, 3.0, 0.5, 0.5, 2, 10) == pytest.approx(1 + 6 + 5)


# ---------------------------------------------------------------------------------------- training

NETS = {'E': ('G1', 'G2'), 'S2IC': ('phi', 'G'), 'CMCGAN': ('E_A', 'E_V', 'D_A', 'D_V')}      # what a G step moves


def trainer(*flags, classes=5):
    args, = train.parse_args(['--data', 'x', *SMALL, *flags])
    return train.Trainer(args, classes, 1, None, torch.device('cpu'))


def batch(n=4, size=32):
    torch.manual_seed(1)
    return torch.rand(n, 1, size, size) * 2 - 1, torch.rand(n, 3, size, size) * 2 - 1, torch.arange(n) % 5


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize('variant', ['E', *baselines.BASELINES])
@pytest.mark.parametrize('moving', ['G', 'D'])
def test_each_step_moves_its_own_weights_alone(moving, variant):
    """With the other optimiser's rate at 0, a step of both shows what one of them moves."""
    ours = trainer('--variant', variant)
    still = ours.D_optimizer if moving == 'G' else ours.G_optimizer
    still.param_groups[0]['lr'] = 0.0
    C = ours.model.residue.classifier
    nets = {name: getattr(ours.model, name) for name in NETS[variant]} | {'D': ours.D}
    before = {name: weights(module) for name, module in nets.items()}
    frozen = [C, *([ours.model.audio] if variant == 'S2IC' else [])]
    states = [copy.deepcopy(network.state_dict()) for network in frozen]
    for _ in range(2):          # attention's projections have no gradient until their scale has left 0
        ours.step(*batch())
    moved = {name: len(changed(before[name], weights(module))) for name, module in nets.items()}
    assert moved == {name: len(before[name]) if (name == 'D') == (moving == 'D') else 0 for name in nets}
    for network, state in zip(frozen, states):
        assert not changed(state, network.state_dict()) and all(p.grad is None for p in network.parameters())
        assert not any(module.training for module in network.modules())
    assert all(module.training for module in nets.values())


@pytest.mark.parametrize('fresh', [False, True])
def test_a_step_is_the_papers_by_hand(fresh):
    """The gradients that Trainer.step leaves, against those of the equations written out: G1 and G2 first, then
    D, on the fakes of G's step or, `fresh`, on those of after it; each kind of image passes D in its own batch.
    """
    ours = trainer('--dropout', '0', '--lambdas', '2', '3', '50', '0.3', '0.7', *['--fresh-fakes'] * fresh)
    ours.D_optimizer.param_groups[0]['lr'] = 0.0
    other = copy.deepcopy((ours.model, ours.D))
    lms, image, label = batch()
    losses = ours.step(lms, image, label)
    model, D = other
    model.G1.requires_grad_(True), model.G2.requires_grad_(True)
    coarse, fine, logits = model(lms, label)
    L_C = 0.5 * F.cross_entropy(logits, label) + 0.5 * F.cross_entropy(model.residue.classifier(fine), label)
    D_coarse, D_fine = (D(torch.cat([lms, x], 1)) for x in (coarse, fine))
    L_cGAN = 0.3 * torch.log(1 - D_coarse.sigmoid()).mean() + 0.7 * torch.log(1 - D_fine.sigmoid()).mean()
    L_L1 = (image - coarse).abs().mean() + (image - fine).abs().mean()
    grads = torch.autograd.grad(2 * L_C + 3 * L_cGAN + 50 * L_L1, [*model.G1.parameters(), *model.G2.parameters()])
    left = [p.grad for p in [*ours.model.G1.parameters(), *ours.model.G2.parameters()]]
    torch.testing.assert_close(left, list(grads), rtol=1e-3, atol=1e-5)
    if fresh:
        before = fine
        with torch.no_grad():
            coarse, fine, _ = ours.model(lms, label)
        assert (fine - before).abs().mean() > 0.01
    D_real, *D_stages = (D(torch.cat([lms, x.detach()], 1)) for x in (image, coarse, fine))
    L_D = -torch.log(D_real.sigmoid()).mean() - sum(
        weight * torch.log(1 - x.sigmoid()).mean() for weight, x in zip((0.3, 0.7), D_stages))
    grads = torch.autograd.grad(3 * L_D, list(D.parameters()))
    torch.testing.assert_close([p.grad for p in ours.D.parameters()], list(grads), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses, torch.stack([L_C, L_cGAN, L_L1, L_D]).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', baselines.BASELINES)
def test_a_baselines_step_weighs_its_losses(name):
    """L_G and L_Cons by the second and the third of --lambdas, L_D by the second; D sees the fakes of G's step."""
    ours = trainer('--variant', name, '--lambdas', '7', '3', '50', '1', '1')
    ours.D_optimizer.param_groups[0]['lr'] = 0.0
    (model, D), inputs = copy.deepcopy((ours.model, ours.D)), batch()
    torch.manual_seed(3)
    losses = ours.step(*inputs)
    torch.manual_seed(3)
    moving = [p.requires_grad_(True) for net in NETS[name] for p in getattr(model, net).parameters()]
    terms, fakes = baselines.GeneratorStep(model, D)(*inputs)
    L_G, L_Cons = terms[0, 1:] / 4
    grads = torch.autograd.grad(3 * L_G + 50 * L_Cons, moving)
    left = [p.grad for net in NETS[name] for p in getattr(ours.model, net).parameters()]
    torch.testing.assert_close(left, list(grads), rtol=1e-3, atol=1e-5)
    L_D, = baselines.DiscriminatorStep(model, D)(*inputs, fakes)[0][0] / 4
    grads = torch.autograd.grad(3 * L_D, list(D.parameters()))
    torch.testing.assert_close([p.grad for p in ours.D.parameters()], list(grads), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses, torch.stack([torch.zeros(()), L_G, L_Cons, L_D]).detach())
    assert (L_Cons > 0.1) == (name == 'CMCGAN')


def test_recalibrated_statistics_are_those_of_the_weights(trained, demo):
    """They bring what is generated in eval mode near to what a batch in training gives, and move no weight."""
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    ours = trainer('--dropout', '0', '--batch-size', '52', classes=13)
    lms, image, label = next(split.batches(52, seed=0))
    for _ in range(3):
        ours.step(lms, image, label)

    def generated(model):
        with torch.no_grad():
            return model(lms, label)[1]

    before, in_batch = weights(ours.model), generated(copy.deepcopy(ours.model))
    outrun = (generated(copy.deepcopy(ours.model).eval()) - in_batch).abs().mean()
    random = torch.get_rng_state()
    cargan.recalibrate_batchnorm(ours.model, split.batches(52, seed=0))
    recalibrated = (generated(copy.deepcopy(ours.model).eval()) - in_batch).abs().mean()
    assert recalibrated < 0.1 * outrun
    assert ours.model.training and not ours.model.residue.classifier.training
    assert not changed(before, weights(ours.model)) and torch.equal(random, torch.get_rng_state())


def test_statistics_of_small_batches_are_those_of_all_pictures(trained, demo, tmp_path):
    """The first BatchNorm's input is the same in any batch: what a checkpoint has of it must not lose what lies
    between them, and batches of one pair are put together.
    """
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    ours, seen = trainer('--batch-size', '1', classes=13), []
    lms, _, label = next(split.batches(52, seed=0))
    norm = ours.model.G1.down[1][2]
    with torch.no_grad(), norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        ours.model(lms, label)
    var, mean = torch.var_mean(seen[0], dim=(0, 2, 3))
    ours.save(tmp_path, split)
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean, var), rtol=1e-3, atol=1e-5)


def test_what_does_not_generate_is_not_recalibrated(two):
    """CMCGAN's way from a sound to F_Image has E_A and D_V: their BatchNorm is set, that of the others stays."""
    ours = trainer('--variant', 'CMCGAN', classes=2)
    ours.step(*two.train.batch(range(19)))
    before, random = copy.deepcopy(ours.model.state_dict()), torch.get_rng_state()
    cargan.recalibrate_batchnorm(ours.model, two.train.batches(16, seed=0))
    buffers = {name for name, _ in ours.model.named_buffers() if not name.startswith('residue')}
    assert set(changed(before, ours.model.state_dict())) == {name for name in buffers if name[:3] in ('E_A', 'D_V')}
    assert {name[:3] for name in buffers} == {*NETS['CMCGAN']} and torch.equal(random, torch.get_rng_state())
    assert all(module.training for name, module in ours.model.named_modules() if not name.startswith('residue.'))


@pytest.mark.parametrize('average', [False, True])
def test_a_checkpoint_within_an_epoch_generates_as_its_weights_do(trained, demo, tmp_path, average):
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    ours = trainer('--dropout', '0', '--ema', '100' if average else '0', classes=13)
    lms, image, label = next(split.batches(52, seed=0))
    ours.step(lms, image, label)
    ours.save(tmp_path, split)
    model = copy.deepcopy(ours.inference).train()
    kept = torch.load(tmp_path / 'model.pt', weights_only=True)
    assert not [name for name in kept['model'] if 'residue' in name]
    evaluate.load_generators(ours.model, kept['model'], tmp_path / 'model.pt')
    with torch.no_grad():
        difference = (model(lms, label)[1] - ours.model.eval()(lms, label)[1]).abs().mean()
    assert difference < 0.03


@pytest.mark.parametrize('variant', ['E', *baselines.BASELINES])
def test_the_average_of_the_weights_is_its_formula(variant):
    """Half-life of at most a fifth of the images seen; what moves is the average alone, and C is not copied."""
    ours = trainer('--ema', '4', '--variant', variant)
    expected = weights(ours.model)
    for step in range(1, 4):
        ours.step(*batch())
        decay = 0.5 ** (13 / min(4, 0.2 * 13 * step))
        expected = {name: decay * value + (1 - decay) * p for (name, value), p in
                    zip(expected.items(), weights(ours.model).values())}
    torch.testing.assert_close(weights(ours.average), expected)
    assert ours.average.residue.classifier is ours.model.residue.classifier and ours.inference is ours.average
    assert trainer().inference.training and trainer().average is None


def test_the_rate_decays_linearly_over_the_last_epochs():
    ours = trainer('--lr', '0.001', '--epochs', '6', '--lr-decay-epochs', '3')
    rates = []
    for epoch in range(1, 7):
        ours.set_epoch(epoch)
        rates.append(ours.D_optimizer.param_groups[0]['lr'])
    assert rates == pytest.approx([0.001, 0.001, 0.001, 0.00075, 0.0005, 0.00025])
    assert ours.G_optimizer.param_groups[0]['lr'] == rates[-1]


def test_the_steps_bring_their_precision_into_any_thread():
    """DataParallel's threads have an autocast of their own, which knows nothing of bf16."""
    ours, dtypes = trainer('--amp', 'bf16'), []
    for module in ours.model.G2.down[1][1], ours.D.layers[0]:
        module.register_forward_hook(lambda _, inputs, output: dtypes.append(output.dtype))
    lms, image, label = batch()
    for step, more in (ours.G_step, ()), (ours.D_step, (torch.stack([image, image], 1),)):
        dtypes.clear()
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(step, lms, image, label, *more).result()
        assert dtypes and set(dtypes) == {torch.bfloat16}


def test_a_checkpoint_of_one_precision_goes_on_in_another(tmp_path, trained, demo):
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    trainer('--amp', 'bf16', classes=13).save(tmp_path, split)
    for other in 'fp16', 'off':
        trainer('--amp', other, classes=13).load(tmp_path / 'checkpoint.pt')


@pytest.mark.parametrize('variant', 'ABCD')
def test_ablations_train(variant):
    ours = trainer('--variant', variant)
    before = weights(ours.model)
    losses = [ours.step(*batch()) for _ in range(3)]
    assert torch.stack(losses).isfinite().all()
    moved = {name.split('.')[0] for name in changed(before, weights(ours.model))}
    assert moved == ({'G1'} if variant == 'D' else {'G1', 'G2'})
    assert ours.lambdas == (0 if variant == 'B' else 1, 1, 100)
    assert variant != 'A' or not any(isinstance(module, cargan.SelfAttention) for module in ours.D.modules())


def test_seed_and_betas_are_flags():
    first, again, other = (trainer('--seed', seed, '--betas', '0.5', '0.9') for seed in ('3', '3', '4'))
    assert not changed(weights(first.model), weights(again.model)) and changed(weights(first.D), weights(other.D))
    assert tuple(first.G_optimizer.param_groups[0]['betas']) == (0.5, 0.9)


def test_saturating_form_is_a_flag():
    assert trainer('--no-saturating').step(*batch())[1] > 0 > trainer('--saturating').step(*batch())[1]


def test_training_learns():
    """Twenty steps on one batch of plain colours bring both stages nearer to the truth."""
    ours, (lms, _, label) = trainer('--lr', '0.002'), batch(8)
    colours = torch.linspace(-0.8, 0.8, 15).view(5, 3)[label][:, :, None, None].expand(-1, -1, 32, 32)
    first, *_, last = [ours.step(lms, colours, label)[2].item() for _ in range(20)]
    assert last < 0.6 * first


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_data_parallel_takes_the_same_step():
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0', '--amp', 'off'])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    losses = []
    for gpus in ([0], [0, 1]):
        ours = train.Trainer(args, 5, 1, None, torch.device('cuda:0'), gpus)
        ours.model.eval(), ours.D.eval()            # BatchNorm sees each GPU's part alone
        losses.append(ours.step(*(x.cuda() for x in batch(7))))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)


def test_a_split_batch_adds_up():
    """What DataParallel gathers: the parts' terms, each times its size, make the whole batch's mean."""
    ours = trainer('--dropout', '0')
    ours.model.eval(), ours.D.eval()
    lms, image, label = batch(7)
    _, fakes = ours.G_step(lms, image, label)
    for step, inputs in (ours.G_step, (lms, image, label)), (ours.D_step, (lms, image, label, fakes)):
        parts = [step(*(x[part] for x in inputs))[0] for part in (slice(0, 4), slice(4, 7))]
        torch.testing.assert_close(torch.cat(parts).sum(dim=0) / 7, step(*inputs)[0][0] / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_step_on_the_gpu_is_that_of_the_cpu():
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0', '--amp', 'off'])
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    steps = []
    for device in ('cpu', 'cuda'):
        ours = train.Trainer(args, 5, 1, None, torch.device(device))
        steps.append(ours.step(*(x.to(device) for x in batch())).cpu())
    torch.testing.assert_close(*steps, rtol=1e-2, atol=1e-2)


def test_defaults_are_the_papers_numbers():
    args, = train.parse_args(['--data', 'Sub-URMP'])
    assert (args.size, args.base, args.disc_base, args.batch_size, args.epochs) == (256, 64, 64, 64, 200)
    assert (args.lr, args.betas, args.init_std) == (0.0008, [0.9, 0.999], 0.2)
    assert (args.lambdas, args.ema, args.lr_decay_epochs, args.preset) == ([1, 1, 100, 1, 1], 0, 0, 'paper')
    assert (args.variant, args.pretrained, args.saturating, args.dropout) == ('E', True, True, 0.5)
    ours = trainer()
    for optimizer in (ours.G_optimizer, ours.D_optimizer):
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]['lr'] == 0.0008 and tuple(optimizer.param_groups[0]['betas']) == (0.9, 0.999)


def test_presets_say_what_they_change_and_yield_to_flags(capsys):
    args, = train.parse_args(['--epochs', '6', '--size', '32'])
    out = capsys.readouterr().out
    assert (args.preset, args.epochs, args.lr_decay_epochs, args.size, args.base) == ('demo', 6, 0, 32, 32)
    for words in ('model E, preset demo: base 32 (paper 64)', 'epochs 6 (paper 200)',
                  'size 32 (paper 256)', 'betas [0.5, 0.999] (paper [0.9, 0.999])', 'saturating False',
                  'pretrained False', 'lambdas [0.1, 1.0, 100.0, 1.0, 1.0] (paper [1.0, 1.0, 100.0, 1.0, 1.0])',
                  'python train.py --data Sub-URMP'):
        assert words in out
    args, = train.parse_args(['--data', 'x', '--preset', 'small', '--lr-decay-epochs', '9'])
    assert (args.lr, args.lr_decay_epochs, args.pretrained) == (4e-4, 9, True)
    (named,), (default,) = (train.parse_args(['--data', 'x y', *more]) for more in (['--preset', 'paper'], []))
    assert (named.made.pop('command'), default.made.pop('command')) == (
        "python train.py --data 'x y' --preset paper", "python train.py --data 'x y'")      # as it was typed
    assert named == default
    assert train.make_parser().parse_args(['--seed', '3', '--variant', 'A', 'B']).variant == ['A', 'B']


def test_a_baselines_settings_are_its_own_and_yield_to_flags(tmp_path, capsys, refused):
    """Size, widths, batch, epochs and EMA are the preset's, but the paper's epochs; the rest is theirs."""
    for name, epochs in (('S2IC', 35), ('CMCGAN', 200)):
        args, = train.parse_args(['--data', 'x', '--variant', name])
        assert (args.epochs, args.size, args.base, args.batch_size, args.ema) == (epochs, 256, 64, 64, 0)
        own = (2e-4, [0.5, 0.999], 0.02, 0.0, False, [0, 1, 1, 1, 1], False)
        assert (args.lr, args.betas, args.init_std, args.dropout, args.saturating, args.lambdas,
                args.fresh_fakes) == own
        assert f'model {name}, preset paper: lr 0.0002 (paper 0.0008)' in capsys.readouterr().out
        small, = train.parse_args(['--data', 'x', '--variant', name, '--preset', 'small', '--lr', '0.1'])
        assert (small.epochs, small.lr_decay_epochs, small.base, small.ema, small.lr) == (40, 0, 32, 1500, 0.1)
        assert small.lambdas == [0, 1, 1, 1, 1]
        runs.write_config(tmp_path, vars(small))
        again, = train.parse_args(['--resume', str(tmp_path), '--lr', '0.3'])
        assert (again.variant, again.lr, again.lambdas) == (name, 0.3, small.lambdas)
        for flag in (['--dropout', '0.3'], ['--saturating'], ['--no-saturating'], ['--fresh-fakes']):
            for words in ['--data', 'x', '--variant', 'E', name, '--out', 'y'], ['--resume', tmp_path]:
                refused(train, [*words, *flag], flag[0].replace('no-', ''), name, 'no such choice')
    cargans = train.parse_args(['--data', 'x', '--variant', 'E', 'D', '--out', 'y', '--dropout', '0.3'])
    assert [(args.variant, args.dropout, args.lr) for args in cargans] == [('E', 0.3, 0.0008), ('D', 0.3, 0.0008)]
    capsys.readouterr()         # those of CAR-GAN's variants are the same
    train.parse_args(['--data', 'x', '--variant', 'S2IC', 'D', 'E', '--preset', 'small', '--out', 'y'])
    assert re.findall(r'^model (\w+), preset small', capsys.readouterr().out, re.M) == ['S2IC', 'D']


def test_all_are_seven_runs_for_each_seed(tmp_path, refused):
    flags = ['--data', 'x', '--variant', 'all', '--preset', 'small', '--out', str(tmp_path / 'out')]
    plan = train.plan_runs(train.parse_args([*flags, '--seed', '0', '1', '2']))
    assert [run.relative_to(tmp_path / 'out').name for _, run in plan] == [
        f'{variant}-seed-{seed}' for variant in (*'ABCDE', 'S2IC', 'CMCGAN') for seed in (0, 1, 2)]
    assert all(run.name == f'{args.variant}-seed-{args.seed}' and args.group for args, run in plan)
    assert {args.lr for args, _ in plan[:15]} == {4e-4} and {args.lr for args, _ in plan[15:]} == {2e-4}
    assert {args.epochs for args, _ in plan} == {40}
    for more in ['--benchmark', '3'], ['--resume', tmp_path]:
        refused(train, [*flags, *more], 'several runs', more[0])
    refused(train, flags[:-2], '--out')
    # what is named twice is one
    assert len(train.parse_args([*flags, '--variant', 'all', 'E', '--seed', '1', '1'])) == 7
    one, = train.parse_args(['--data', 'x', '--variant', 'D', 'D', '--seed', '1', '1'])
    assert (one.variant, one.seed, one.group) == ('D', 1, False)


def test_a_run_of_several_that_older_code_began_goes_on(tmp_path):
    """Its config.json does not say how it was made."""
    flags, run = ['--data', 'x', '--preset', 'small', '--seed', '0', '1', '--out', str(tmp_path)], tmp_path / 'E-seed-0'
    run.mkdir()
    settings = vars(train.parse_args(flags)[0])
    del settings['made']
    runs.write_config(run, settings)
    (args, _), _ = train.plan_runs(train.parse_args(flags))
    runs.write_config(run, vars(args))
    report.write_page(run)
    assert 'epoch 0 of 40' in Page(run / 'report.html').text


def states(run):
    return torch.load(run / 'checkpoint.pt', weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def run_flags(demo, cache, out, *more):
    """The command of the fixture `trained`, into another folder."""
    return ['--data', str(demo), '--cache', str(cache), '--out', str(out), '--epochs', '2', '--sample-every', '1',
            '--device', 'cpu', *SMALL, *map(str, more)]


@pytest.mark.parametrize('number, step', [(signal.SIGTERM, 1), (signal.SIGINT, 2 + 11)])
def test_a_signal_ends_the_step_and_the_resumed_run_is_the_uninterrupted_one(trained, demo, tmp_path, capsys, number,
                                                                              step):
    """C makes the first 2 steps of Adam, then G and D make one each a step: stopped at C's first, and between G's and
    D's in the second epoch.
    """
    run, cache = trained
    half, count, adam = tmp_path / 'half', itertools.count(1), torch.optim.Adam.step

    def stop(*args, **more):
        if next(count) == step:
            os.kill(os.getpid(), number)
        return adam(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(torch.optim.Adam, 'step', stop)
        train.main(run_flags(demo, cache, half))
    assert end.value.code == 128 + number and next(count) == step + (2 if step > 2 and step % 2 else 1)
    assert f'python train.py --resume {half}' in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL        # given back
    with open(half / 'log.csv', 'a') if step > 2 else nullcontext() as file:
        if file:
            file.write('7,2,1,1,1,1\n8,2,0.5')          # steps after the checkpoint, and half a line
    (half / 'checkpoint.pt.part').write_bytes(b'half a checkpoint')
    train.main(['--resume', str(half), '--device', 'cpu'])
    assert f'resumed after {(step - 2) // 8} of 2 epochs' in capsys.readouterr().out or step == 1
    assert same(states(half), states(run))
    assert (half / 'log.csv').read_text() == (run / 'log.csv').read_text()
    assert json.loads((half / 'metrics.json').read_text()) == json.loads((run / 'metrics.json').read_text())
    assert {path.name for path in half.iterdir()} == {path.name for path in run.iterdir()}


def test_a_second_sigint_ends_at_once(trained, demo, tmp_path):
    flags = run_flags(demo, trained[1], tmp_path / 'run', '--classifier', trained[0] / 'classifier.pt')
    code = ('import os, signal, train\n'
            'def stop(*args, **more):\n'
            '    os.kill(os.getpid(), signal.SIGINT), os.kill(os.getpid(), signal.SIGINT)\n'
            'train.torch.optim.Adam.step = stop\n'
            f'train.main({flags})')
    done = command('-c', code, env=dict(os.environ, PYTHONPATH=str(HERE)))
    assert done.returncode == -signal.SIGINT and 'finishing the step' in done.stderr
    assert not (tmp_path / 'run/checkpoint.pt').exists()


def killed(place, *words):
    """train.py in a process of its own, which is killed at this step of Adam, whoever's it is, counted from 1."""
    code = ('import os, signal, sys, torch, train\n'
            'left, adam = [int(sys.argv.pop(1))], torch.optim.Adam.step\n'
            'def step(*args, **more):\n'
            '    left[0] -= 1\n'
            '    if not left[0]:\n'
            '        os.kill(os.getpid(), signal.SIGKILL)\n'
            '    return adam(*args, **more)\n'
            'torch.optim.Adam.step = step\n'
            'train.run_command(train.main)')
    return command('-c', code, place, *words, env=dict(os.environ, PYTHONPATH=str(HERE)))


def test_killed_runs_go_on_to_the_same_end(trained, demo, tmp_path):
    """kill -9 in a step of C, then of G, then of D, at places drawn by seed. By hand, for many places:
    CARGAN_KILLS=30 python -m pytest -s -k killed_runs
    """
    expected, log = states(trained[0]), (trained[0] / 'log.csv').read_text()
    run = tmp_path / 'run'
    for trial in range(int(os.environ.get('CARGAN_KILLS', 1))):
        rng = np.random.default_rng(trial)
        begun = rng.integers(1, 4)          # whole steps of G and D before the second kill, of eight
        places = rng.integers(1, 3), 2 + 2 * begun + 1, 2 * rng.integers(1, 8 - begun)
        words = run_flags(demo, tmp_path / 'cache', run, '--save-minutes', '0')
        for place in places:
            assert killed(place, *words).returncode == -signal.SIGKILL
            words = ['--resume', run, '--device', 'cpu']
        done = command(HERE / 'train.py', *words)
        assert done.returncode == 0, done.stderr
        assert same(states(run), expected) and (run / 'log.csv').read_text() == log
        print(f'killed in steps {places} of Adam: trial {trial + 1} ended as the uninterrupted run', flush=True)
        assert not [path for path in tmp_path.rglob('*') if 'part' in path.name]
        shutil.rmtree(run)


@pytest.mark.parametrize('resumed', [True, False])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(trained, demo, tmp_path, refused, resumed):
    run, cache = trained
    out = tmp_path / 'run'
    wild = ['--lr', '1e25']
    if resumed:
        shutil.copytree(run, out)
        before, epoch, flags = states(run)['steps'], 3, ['--resume', out, '--epochs', '3', '--device', 'cpu', *wild]
        kept = f'{out / "checkpoint.pt"} is still the last good checkpoint'
    else:
        before, epoch, flags = 0, 1, run_flags(demo, cache, out, *wild, '--classifier', run / 'classifier.pt')
        kept = 'there is no checkpoint yet'
    line = refused(train, flags, out / 'bad-batch.txt', kept, '--resume', '--lr').splitlines()[-1]
    name, step = re.search(rf'error: (L_\w+) is \S+ at step (\d+), epoch {epoch}:', line).groups()
    text = (out / 'bad-batch.txt').read_text().splitlines()
    split = preprocess.open_dataset(demo, 32, cache).train
    assert text[0].startswith(name) and text[1:] == [
        split.stems[i] for i in split.indices(13, 1000003 * epoch)[int(step) - 1 - before]]
    assert same(states(out), states(run)) if resumed else not (out / 'checkpoint.pt').exists()
    row, = [row for row in csv.reader(open(out / 'log.csv')) if row[0] == step]
    assert not math.isfinite(float(row[2 + train.LOSSES.index(name)]))


def test_a_bad_batch_may_have_names_that_are_no_text(tmp_path):
    log = report.Log(tmp_path / 'log.csv', 0)
    log.add(1, 1, torch.tensor([1.0, 2.0, math.nan, 3.0]), lambda: [os.fsdecode(b'violin\xff')])
    with pytest.raises(InputError, match='L_L1 is nan at step 1, epoch 1.*no checkpoint yet'):
        log.flush()
    assert (tmp_path / 'bad-batch.txt').read_bytes().endswith(b'violin\xff\n')


def test_a_file_system_without_locks_is_no_full_disk(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(runs.fcntl, 'flock', refuse)
    with runs.writing(tmp_path / 'file'), runs.open_run(tmp_path / 'run', dict(resume=None, data=None, cache=None)):
        pass
    assert capsys.readouterr().err.count('no locks here') == 2


def test_weights_that_are_not_finite_are_not_saved(tmp_path, trained, demo):
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    ours = trainer(classes=13)
    ours.save(tmp_path, split)
    before = (tmp_path / 'checkpoint.pt').read_bytes()
    ours.model.G2.down[0][0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match='G2.down.0.0.weight is not finite after step 0.*pt is still the last good'):
        ours.save(tmp_path, split)
    assert (tmp_path / 'checkpoint.pt').read_bytes() == before


def test_a_full_disk_leaves_the_checkpoint_before(trained, tmp_path, refused):
    run, cache = trained
    shutil.copytree(run, tmp_path / 'run')
    with small_disk(10 ** 6):
        refused(train, ['--resume', tmp_path / 'run', '--epochs', '3', '--device', 'cpu'],
                tmp_path / 'run/checkpoint.pt', 'cannot be written', 'still whole', '--resume')
    assert same(states(tmp_path / 'run'), states(run)) and not list((tmp_path / 'run').glob('*part*'))


def test_two_runs_into_one_folder(trained, demo, tmp_path, refused):
    run, cache = trained
    shutil.copytree(run, tmp_path / 'run')
    settings = vars(*train.parse_args(['--resume', str(tmp_path / 'run')]))
    with runs.open_run(tmp_path / 'run', settings):
        refused(train, ['--resume', tmp_path / 'run', '--device', 'cpu'], tmp_path / 'run', 'another process', '--out')
    with runs.open_run(tmp_path / 'run', settings):          # free again
        pass


def spoil(path, kind):
    """Put something hostile or broken in place of a file of a run."""
    settings = json.loads(path.read_text()) if path.suffix == '.json' else None
    state = None if settings else torch.load(path, weights_only=True)
    path.unlink()
    if kind == 'directory':
        path.mkdir()
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'dangling':
        path.symlink_to('nowhere')
    elif kind == 'cut':
        path.write_bytes(b'{"size": 3' if settings else b'PK' + bytes(1000))
    elif settings:
        path.write_text(json.dumps({'nothing': {}, 'size': dict(settings, size=10 ** 9),
                                    'text': dict(settings, size='32'),
                                    'data': dict(settings, data=5)}[kind]))
    else:
        if kind == 'code':
            state['model'] = Harm(str(path.parent / 'harm'))
        elif kind == 'a list':
            state = [1, 2]
        elif kind == 'shapes':
            state['model']['G1.down.0.0.weight'] = torch.zeros(1)
        elif kind == 'optimiser':
            state['G_optimizer']['state'][0]['exp_avg'] = torch.zeros(1)
        elif kind == 'random':
            state['random'] = [(torch.zeros(3), [])]
        torch.save(state, path)


@pytest.mark.parametrize('name, kind', [
    *(('config.json', kind) for kind in ('pipe', 'cut', 'nothing', 'size', 'text', 'data')),
    *(('checkpoint.pt', kind) for kind in
      ('directory', 'pipe', 'dangling', 'cut', 'code', 'shapes', 'optimiser', 'random')),
    *(('model.pt', kind) for kind in ('directory', 'pipe', 'code', 'a list', 'shapes'))])
def test_a_spoilt_run_is_named_by_every_command(trained, demo, tmp_path, refused, name, kind):
    run = shutil.copytree(trained[0], tmp_path / 'run')
    spoil(run / name, kind)
    clip = next((demo / 'chunk/validation/sax').iterdir())
    words = name if name == 'config.json' else run / name
    if name != 'model.pt':              # which no training reads, nor an evaluation the checkpoint beside it
        refused(train, ['--resume', run, '--epochs', '3', '--device', 'cpu'], words)
    if name != 'checkpoint.pt':
        refused(evaluate, [run, '--device', 'cpu'], words)
        refused(evaluate, [run, '--audio', clip, '--label', 'sax', '--out', tmp_path / 'x.png'], words)
    assert not (run / 'harm').exists() and not (tmp_path / 'x.png').exists()


def test_other_files_of_weights_cannot_run_code_either(trained, demo, tmp_path, refused):
    run, cache = trained
    for name, key in (('classifier.pt', 'classifier'), ('inception.pth', 'fc.bias')):
        torch.save({key: Harm(str(tmp_path / 'harm')), 'classes': [], 'accuracy': 1.0}, tmp_path / name)
    refused(train, [*run_flags(demo, cache, tmp_path / 'run'), '--classifier', tmp_path / 'classifier.pt'],
            tmp_path / 'classifier.pt')
    refused(evaluate, [run, '--inception', tmp_path / 'inception.pth'], tmp_path / 'inception.pth')
    spoilt = shutil.copytree(run, tmp_path / 'spoilt')
    (spoilt / 'checkpoint.pt').unlink()
    for name in ('classifier.pt', 'classifier-part.pt'):
        (spoilt / 'classifier.pt').unlink(missing_ok=True)
        shutil.copy(tmp_path / 'classifier.pt', spoilt / name)
        refused(train, ['--resume', spoilt, '--device', 'cpu'], spoilt / name)
    torch.save(dict(classifier={}, optimizer={}, best={}, epoch=1), spoilt / 'classifier-part.pt')
    refused(train, ['--resume', spoilt, '--device', 'cpu'], spoilt / 'classifier-part.pt', 'another network')
    assert not (tmp_path / 'harm').exists() and not (tmp_path / 'run').exists()


def test_out_of_memory_says_what_to_lower(trained, demo, tmp_path, refused, monkeypatch):
    """No GPU is needed to see what is said when one is too small."""
    run, cache = trained

    def small(self, *_):
        raise torch.OutOfMemoryError('CUDA out of memory')

    flags = run_flags(demo, cache, tmp_path / 'run')
    with monkeypatch.context() as patch:
        patch.setattr(cargan.Classifier, 'forward', small)
        refused(train, flags, '--classifier-batch-size 32 must be lower')
    monkeypatch.setattr(cargan.CARGAN, 'forward', small)
    refused(train, [*flags, '--classifier', run / 'classifier.pt'], '--batch-size 13 must be lower', '--accumulate 2')


def test_c_has_a_batch_size_of_its_own(trained, demo, tmp_path):
    """A batch of one fails in BatchNorm: pairs of a rest are spread over the other batches."""
    args = train.make_parser().parse_args([*SMALL, '--batch-size', '1', '--classifier-batch-size', '3'])
    dataset = preprocess.open_dataset(demo, 32, trained[1])
    few = dataset._replace(train=dataset.train.subset(range(4)))
    evaluate.get_classifier(args, few, tmp_path / 'classifier.pt', torch.device('cpu'))
    assert torch.load(tmp_path / 'classifier.pt', weights_only=True)['epoch'] == 1


def test_the_dataset_moves_to_the_gpu_after_a_first_step_unless_a_flag_keeps_it(trained, demo, tmp_path, monkeypatch):
    moved, step = [], train.Trainer.step

    def second_step_ends(self, *args, **more):
        if self.steps:
            raise InputError('seen')
        moved.append('step')
        return step(self, *args, **more)

    monkeypatch.setattr(train.Trainer, 'step', second_step_ends)
    monkeypatch.setattr(preprocess.Split, 'to', lambda self, device: moved.append(device.type))
    flags = ['--variant', 'D', '--classifier', trained[0] / 'classifier.pt']
    for more in [], ['--no-resident']:
        with pytest.raises(InputError, match='seen'):
            train.main(run_flags(demo, trained[1], tmp_path / f'run{len(more)}', *flags, *more))
    assert moved == ['step', 'cpu', 'step']


def test_float32_is_float32_before_c_is_trained(trained, demo, tmp_path, monkeypatch):
    allowed = []

    def look(*args, **more):
        allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        raise InputError('seen')

    monkeypatch.setattr(evaluate, 'train_classifier', look)
    for amp in 'off', 'bf16':
        with pytest.raises(InputError, match='seen'):
            train.main(run_flags(demo, trained[1], tmp_path / amp, '--amp', amp))
    assert allowed == [(False, False), (True, True)]


@pytest.mark.parametrize('amp', ['off', 'bf16'])
def test_accumulated_parts_are_the_whole_batch(amp):
    steps = []
    for parts in '1', '3', '99':
        ours = trainer('--dropout', '0', '--accumulate', parts, '--amp', amp)
        ours.model.eval(), ours.D.eval()            # BatchNorm would see each part alone
        losses = ours.step(*batch(7))
        steps.append((losses, [p.grad for p in (*ours.model.G1.parameters(), *ours.D.parameters())]))
    for losses, grads in steps[1:]:
        torch.testing.assert_close(losses, steps[0][0], rtol=1e-4 if amp == 'off' else 1e-2, atol=1e-5)
        if amp == 'off':
            torch.testing.assert_close(grads, steps[0][1], rtol=1e-3, atol=1e-5)


def test_mixed_precision_keeps_pictures_losses_and_residue_in_float32():
    exact, ours = trainer('--dropout', '0'), trainer('--dropout', '0', '--amp', 'bf16')
    lms, image, label = batch()
    widths = []
    ours.model.G1.down[1][1].register_forward_hook(lambda _, inputs, output: widths.append(output.dtype))
    with torch.autocast('cpu', torch.bfloat16):
        coarse, fine, logits = ours.model(lms, label)
        _, residue = ours.model.residue(coarse, label)
        scores = ours.D(torch.cat([lms, fine], dim=1))
    assert {x.dtype for x in (coarse, fine, logits, residue, scores)} == {torch.float32}
    assert widths == [torch.bfloat16]
    torch.testing.assert_close(ours.step(lms, image, label), exact.step(lms, image, label), rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']


def three_steps(path, parts):
    """Three steps of one process or of those that torchrun started, on a thread each; what comes of them in a file."""
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0', '--device', 'cpu', '--accumulate', str(parts)])
    torch.set_num_threads(1)
    with train.distributed(args):
        ours = train.Trainer(args, 5, 1, None, torch.device('cpu'))
        ours.model.eval(), ours.D.eval()
        for seed in range(3):
            torch.manual_seed(seed)
            whole = torch.rand(7, 1, 32, 32) * 2 - 1, torch.rand(7, 3, 32, 32) * 2 - 1, torch.arange(7) % 5
            ours.step(*(x.tensor_split(train.world_size())[train.rank()] for x in whole), size=7)     # 4 and 3, or 7
        if train.rank() == 0:
            torch.save(dict(world=train.world_size(), model=ours.model.state_dict(), D=ours.D.state_dict()), path)


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """The one goes through the batch in the others' parts: Adam makes a step as long as any other of a gradient
    that is no more than rounding, and that differs between a batch and its parts.
    """
    (tmp_path / 'steps.py').write_text(f'import sys, {__name__} as tests\ntests.three_steps(sys.argv[1], parts=1)')
    done = command(*TORCHRUN, 2, tmp_path / 'steps.py', tmp_path / 'two.pt', env=dict(os.environ, PYTHONPATH=str(HERE)))
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    try:
        three_steps(tmp_path / 'one.pt', parts=2)
    finally:
        torch.set_num_threads(threads)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one.pt', 'two.pt'))
    assert (one['world'], two['world']) == (1, 2)
    for name in ('model', 'D'):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_two_processes_resumed_end_as_two_uninterrupted(trained, demo, tmp_path):
    run, cache = trained
    words = run_flags(demo, cache, tmp_path / 'whole', '--variant', 'D', '--classifier', run / 'classifier.pt')
    (tmp_path / 'kept.py').write_text(             # the whole run, without figures, leaves a copy of its first epoch
        'import shutil, train\n'
        'train.evaluate_run = train.report_text = lambda *_, **__: None\n'
        'save = train.Trainer.save\n'
        'def keep(trainer, run, *more):\n'
        '    save(trainer, run, *more)\n'
        '    if train.rank() == 0 and trainer.epoch == 1:\n'
        '        shutil.copytree(run, run.with_name("run"))\n'
        'train.Trainer.save = keep\n'
        'train.run_command(train.main)')
    again = ['--resume', tmp_path / 'run', '--epochs', '2', '--device', 'cpu']
    for script, words in (tmp_path / 'kept.py', words), (HERE / 'train.py', again):
        done = command(*TORCHRUN, 2, script, *words, env=dict(os.environ, PYTHONPATH=str(HERE)))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(' classes; on ') == 1               # rank 0 alone speaks
        assert 'FutureWarning' not in done.stderr
    assert 'resumed after 1 of 2 epochs' in done.stdout and 'real frames' in done.stdout
    rows = list(csv.reader(open(tmp_path / 'run/log.csv')))
    assert [row[0] for row in rows[1:]] == [str(step) for step in range(1, 9)]
    state = states(tmp_path / 'run')
    assert state['steps'] == 8 and len(state['random']) == 2 and not same(*state['random'])
    assert same(state, states(tmp_path / 'whole'))
    _, model, _ = evaluate.load_run(tmp_path / 'run')       # BatchNorm is that of one process's pictures
    expected = copy.deepcopy(model.state_dict())
    cargan.recalibrate_batchnorm(model, preprocess.open_dataset(demo, 32, cache).train.batches(16, seed=0))
    torch.testing.assert_close(model.state_dict(), expected, rtol=1e-4, atol=1e-5)


def test_more_processes_than_pairs_and_a_single_validation_pair(demo, tmp_path):
    """Five pairs in batches of three and two, over three processes; what needs more pictures is not computed."""
    for split, name, count in (('train', 'tuba', 3), ('train', 'flute', 2), ('validation', 'tuba', 1)):
        for part in 'chunk', 'img':
            target = tmp_path / 'data' / part / split / name
            target.mkdir(parents=True)
            for path in sorted((demo / part / split / name).iterdir())[:count]:
                shutil.copy(path, target)
    done = command(*TORCHRUN, 3, HERE / 'train.py', '--data', tmp_path / 'data', '--out', tmp_path / 'run', *SMALL,
                   '--batch-size', 3, '--epochs', 2, '--device', 'cpu')
    assert done.returncode == 0, done.stderr
    assert '5 pairs in train, 1 in validation' in done.stdout and 'not computed' in done.stdout
    rows = list(csv.reader(open(tmp_path / 'run/log.csv')))
    assert [row[0] for row in rows[1:]] == ['1', '2', '3', '4']


def test_a_process_out_of_memory_ends_them_all_by_name(trained, demo, tmp_path):
    run, cache = trained
    (tmp_path / 'small.py').write_text(
        'import itertools, torch, train\n'
        'forward, count = train.DiscriminatorStep.forward, itertools.count(1)\n'
        'def small(*args):\n'
        '    if train.rank() == 1 and next(count) == 2:\n'
        '        raise torch.OutOfMemoryError("CUDA out of memory")\n'
        '    return forward(*args)\n'
        'train.DiscriminatorStep.forward = small\n'
        'train.run_command(train.main)')
    flags = run_flags(demo, cache, tmp_path / 'run', '--classifier', run / 'classifier.pt')
    done = command(*TORCHRUN, 2, tmp_path / 'small.py', *flags, env=dict(os.environ, PYTHONPATH=str(HERE)), timeout=120)
    assert done.returncode != 0
    assert 'error: process 1: the memory of cpu is too small: --batch-size 13 must be lower' in done.stderr
    assert 'error: process 0: another process ended' in done.stderr


def test_several_seeds_share_c_and_go_on_by_the_same_command(run_of_two, tmp_path, capsys, refused, monkeypatch):
    (_, data, cache), out = run_of_two, tmp_path / 'out'
    flags = [*run_flags(data, cache, out, '--variant', 'D', '--epochs', '1', '--batch-size', '5'), '--seed', '0', '1']
    refused(train, [flag for flag in flags if flag not in ('--out', str(out))], '--out')
    count, step = itertools.count(1), train.Trainer.step

    def stop(*args, **more):
        if next(count) == 6:                        # in the second run
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train.Trainer, 'step', stop)
        train.main(flags)
    assert 'go on with: the same command' in capsys.readouterr().out
    train.main(flags)
    text = capsys.readouterr().out
    assert f'run 2 of 2: {out}/D-seed-1\n' in text and 'run 1' not in text
    assert 'resumed after 0 of 1 epochs and 2 steps' in text and 'seeds: D 2' in text
    assert {path.name for path in out.iterdir()} == {'classifier.pt', 'D-seed-0', 'D-seed-1', 'tables.md',
                                                     'tables.json', 'figure4.png', 'figure5.png',
                                                     'report.html'}
    assert changed(*(states(out / name)['model'] for name in ('D-seed-0', 'D-seed-1')))
    refused(train, [*flags, '--lr', '0.1'], out / 'D-seed-0', 'lr', '--out')
    bad = [flag if flag != str(out) else out.with_name('bad') for flag in flags]
    refused(train, [*bad, '--lr', '1e25', '--epochs', '2'], 'bad-batch.txt')
    assert (out.with_name('bad') / 'D-seed-0/bad-batch.txt').exists()           # and what it had, is not removed
    config, model, trained_for = evaluate.load_run(out / 'D-seed-1')
    assert (config['seed'], config['variant'], trained_for['steps']) == (1, 'D', 4)
    with monkeypatch.context() as patch:            # a run of several is one that can be resumed as any other
        patch.setattr(train, 'train_gan', lambda *_: None)
        train.main(['--resume', str(out / 'D-seed-1'), '--device', 'cpu'])


@pytest.fixture(scope='session')
def group(run_of_two):
    """E, S2IC and CMCGAN, trained by one command for an epoch of four steps: the folder, the flags without it, and
    what was printed.
    """
    _, data, cache = run_of_two
    flags = ['--data', str(data), '--cache', str(cache), '--preset', 'small', '--variant', 'E', 'S2IC', 'CMCGAN',
             *'--device cpu --size 32 --base 8 --disc-base 8 --batch-size 5 --epochs 1'.split(),
             *'--no-pretrained --classifier-epochs 1'.split()]
    with redirect_stdout(io.StringIO()) as printed:
        train.main([*flags, '--out', str(data.parent / 'group')])
    return data.parent / 'group', flags, printed.getvalue()


def test_several_runs_killed_and_started_again_end_as_if_never_killed(group, tmp_path):
    """kill -9 in S2IC's second step of D, after C's one step and E's eight, as a user types it."""
    (expected, flags, _), out = group, tmp_path / 'out'
    words = [*flags, '--save-minutes', '0', '--out', out]
    assert killed(1 + 8 + 4, *words).returncode == -signal.SIGKILL
    assert (out / 'S2IC-seed-0/checkpoint.pt').exists() and not (out / 'S2IC-seed-0/metrics.json').exists()
    kept = [out / 'classifier.pt', *(out / 'E-seed-0').rglob('*')]
    before = [path.stat().st_mtime_ns for path in kept]
    done = command(HERE / 'train.py', *words)
    assert done.returncode == 0, done.stderr
    assert [path.stat().st_mtime_ns for path in kept] == before and 'run 1 of' not in done.stdout
    assert f'run 2 of 3: {out}/S2IC-seed-0\n' in done.stdout
    assert re.search(rf'run 3 of 3: {out}/CMCGAN-seed-0; all will be done in about \d:\d\d:\d\d\n', done.stdout)
    assert done.stdout.count('resumed after') == 1 and 'resumed after 0 of 1 epochs and 1 steps' in done.stdout
    assert 'audio classifier' not in done.stdout                    # it is kept beside the cache
    for run in 'E-seed-0', 'S2IC-seed-0', 'CMCGAN-seed-0':
        assert same(states(out / run), states(expected / run))
        for name in 'log.csv', 'metrics.json':
            assert (out / run / name).read_text() == (expected / run / name).read_text()
    assert list(out.rglob('classifier.pt')) == [out / 'classifier.pt'] and not list(out.rglob('*part*'))
    files = {'tables.md', 'tables.json', 'figure4.png', 'figure5.png', 'figure6.png', 'report.html'}
    assert {path.name for path in out.iterdir()} == files | {'classifier.pt', 'E-seed-0', 'S2IC-seed-0',
                                                             'CMCGAN-seed-0'}
    for name in files:
        assert (out / name).read_bytes().replace(b'>out:', b'>group:') == (expected / name).read_bytes()


def test_a_baseline_stopped_and_gone_on_with_is_the_uninterrupted_one(group, tmp_path, no_network):
    """CMCGAN by itself, with C from elsewhere, stopped between G's and D's third step; then its figures by
    evaluate.py. What generates is the average of its weights.
    """
    (expected, flags, _), half = group, tmp_path / 'half'
    count, adam = itertools.count(1), torch.optim.Adam.step

    def stop(*args, **more):
        if next(count) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return adam(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(torch.optim.Adam, 'step', stop)
        train.main([*flags, '--variant', 'CMCGAN', '--classifier', str(expected / 'classifier.pt'), '--out', str(half)])
    assert states(half)['step_in_epoch'] == 3
    train.main(['--resume', str(half), '--device', 'cpu'])
    ours, theirs = states(half), states(expected / 'CMCGAN-seed-0')
    assert (ours.pop('classifier'), theirs.pop('classifier')) == ('classifier.pt', '../classifier.pt')
    assert same(ours, theirs)
    for name in 'log.csv', 'metrics.json':
        assert (half / name).read_text() == (expected / 'CMCGAN-seed-0' / name).read_text()
    config, model, _ = evaluate.load_run(half)
    assert (config['lr'], config['init_std'], config['ema']) == (2e-4, 0.02, 1500)
    assert isinstance(model, baselines.CMCGAN) and not changed(ours['average'], model.state_dict())
    assert 'E_A.0.weight' in changed(ours['average'], ours['model'])
    (half / 'metrics.json').rename(tmp_path / 'before.json')
    evaluate.main([str(half), '--device', 'cpu'])
    before, after = (json.loads(path.read_text()) for path in (tmp_path / 'before.json', half / 'metrics.json'))
    assert before['variant'] == 'CMCGAN' and 'wrong_label' not in after['train']
    for split, kind, figure in itertools.product(('train', 'validation'), ('coarse', 'fine'),
                                                 ('l1', 'accuracy', 'accuracy_independent', 'fid_independent')):
        assert after[split][kind][figure] == pytest.approx(before[split][kind][figure], rel=1e-3, abs=1e-5)


def test_s2ics_audio_classifier_is_trained_once_kept_and_frozen(group, two, capsys):
    out, _, printed = group
    assert printed.count('audio classifier: accuracy') == 1 and 'audio classifier epoch 300/300' in printed
    random = torch.get_rng_state()
    audio, accuracy = evaluate.get_audio_classifier(two)
    assert not capsys.readouterr().out and torch.equal(random, torch.get_rng_state())
    assert isinstance(audio, baselines.AudioClassifier) and not audio.training
    assert accuracy == evaluate.measure_accuracy(audio, two.validation, source=0)
    assert evaluate.measure_accuracy(audio, two.train, source=0) > 0.9
    state, kept = audio.state_dict(), runs.load_file(two.folder / 'audio.pt')
    assert same(dict(state), dict(kept['classifier'])) and kept['accuracy'] == accuracy
    checkpoint, held = states(out / 'S2IC-seed-0'), runs.load_file(out / 'S2IC-seed-0/model.pt')['model']
    for weights in checkpoint['model'], checkpoint['average'], held:
        assert same(dict(state), {name[6:]: weights[name] for name in weights if name.startswith('audio.')})
    assert not changed({f'audio.{name}': value for name, value in state.items()},
                       evaluate.load_run(out / 'S2IC-seed-0')[1].state_dict())


def test_a_run_is_one_folder(trained):
    run, _ = trained
    assert {path.name for path in run.iterdir()} == {'config.json', 'classifier.pt', 'checkpoint.pt', 'model.pt',
                                                     'log.csv', 'samples', 'metrics.json', 'grid.png', 'failures.png',
                                                     'report.html', 'curves.png'}
    rows = list(csv.reader(open(run / 'log.csv')))
    assert rows[0] == ['step', 'epoch', 'L_C', 'L_cGAN', 'L_L1', 'L_D']
    assert [row[:2] for row in rows[1:]] == [[str(step), str((step + 3) // 4)] for step in range(1, 9)]
    assert all(math.isfinite(float(value)) for row in rows[1:] for value in row)
    assert sorted(path.name for path in (run / 'samples').iterdir()) == ['epoch-0001.png', 'epoch-0002.png']
    config = json.loads((run / 'config.json').read_text())
    assert config['size'] == 32 and config['classes'] == sorted(DEMO_INSTRUMENTS)
    made, page = config['made'], Page(run / 'report.html')
    assert made['command'].startswith('python train.py --data ') and made['command'].endswith(' '.join(SMALL))
    assert re.fullmatch(r'0:\d\d:\d\d, \d+\.\d images/s', made['since the last start'])
    assert made['machine'] == f'{platform.machine()} CPU, {torch.get_num_threads()} threads'
    assert {'command', 'since the last start', 'machine', 'commit'} == made.keys()
    assert page.names.count('svg') == 4 and len(page.images) == 2 + (run / 'failures.png').exists() + 1
    for text in [*made.values(), 'epoch 2 of 2', f'torch: {torch.__version__}']:
        assert text in page.text
    width, height = Image.open(run / 'grid.png').size
    assert width > 4 * 128 and height > 13 * 128
    classifier = torch.load(run / 'classifier.pt', weights_only=True)['classifier']
    assert same(classifier, evaluate.load_run(run)[1].residue.classifier.state_dict())
    assert not [name for name in states(run)['model'] if 'residue' in name]         # C is kept once


def test_the_classifier_is_reused_and_checked(trained, demo, data, tmp_path, capsys):
    run, cache = trained
    flags = ['--data', str(demo), '--cache', str(cache), '--classifier', str(run / 'classifier.pt'),
             '--epochs', '1', '--device', 'cpu', *SMALL]
    train.main([*flags, '--out', str(tmp_path / 'other'), '--variant', 'D'])
    out = capsys.readouterr().out
    assert 'classifier.pt, accuracy' in out and 'classifier epoch' not in out
    assert same(*(torch.load(folder / 'classifier.pt', weights_only=True) for folder in (run, tmp_path / 'other')))
    for part in ('chunk', 'img'):
        for split in ('train', 'validation'):
            rename(data / part / split, 'tuba', 'tube')
    with pytest.raises(InputError, match='a classifier of other classes'):
        train.main([*flags, '--data', str(data), '--out', str(tmp_path / 'third')])


def test_imagenet_weights(demo, tmp_path, refused, no_network):
    """A path given by hand is used; without network, path or --no-pretrained one line says what to do."""
    source = cargan.Classifier(1000, pretrained=False).resnet
    torch.save(source.state_dict(), tmp_path / 'resnet50.pth')
    classifier = cargan.Classifier(13, pretrained=str(tmp_path / 'resnet50.pth'))
    assert torch.equal(classifier.resnet.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert classifier.resnet.fc.out_features == 13
    flags = ['--data', demo, '--size', 32, '--batch-size', 13, '--out', tmp_path / 'run', '--device', 'cpu']
    refused(train, flags, 'ImageNet weights', '--classifier FILE', '--no-pretrained')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'wrong.pth')
    refused(train, [*flags, '--classifier', tmp_path / 'wrong.pth'], 'wrong.pth', '--no-pretrained')


def test_wrong_use_is_one_line(trained, demo, tmp_path, refused, capsys):
    run, cache = trained
    refused(train, ['--data', demo, '--cache', cache, '--out', run, *SMALL], run, '--resume')
    refused(train, ['--resume', run, '--base', 16, '--epochs', 3], '--base 16', '8')
    refused(train, ['--resume', tmp_path], tmp_path, 'not a run')
    refused(train, ['--data', demo, '--device', 'gpu'], '--device gpu')
    for flags in (['--size', '100'], ['--batch-size', '0'], ['--lr', '-1'], ['--variant', 'F'], ['--epochs', 'x'],
                  ['--dropout', '1'], ['--accumulate', '0'], ['--amp', 'fp8'], ['--classifier-batch-size', '1'],
                  ['--ema', '-1'], ['--preset', 'large'], ['--save-minutes', '-1']):
        refused(train, flags, *flags)
    small = ['--data', demo, '--cache', cache, '--device', 'cpu', '--size', 32]
    taken = tmp_path / 'file'
    taken.touch()
    refused(train, [*small, '--out', taken / 'run', '--batch-size', 13, '--no-pretrained'], taken, '--out')
    refused(train, [*small, '--out', '/proc/run', '--batch-size', 13, '--no-pretrained'], '/proc/run', '--out')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/mine.txt').write_text('keep me')
    refused(train, [*small, '--out', tmp_path / 'full'], tmp_path / 'full', '--out')
    for part in ('chunk', 'img'):
        for split in ('train', 'validation'):
            shutil.copytree(demo / part / split / 'tuba', tmp_path / 'one' / part / split / 'tuba')
    refused(train, ['--data', tmp_path / 'one', '--cache', tmp_path / 'c', '--out', tmp_path / 'run'], tmp_path / 'one',
            'one class')
    assert not (tmp_path / 'run').exists()      # nothing was begun
    with pytest.raises(SystemExit) as stop:
        train.main(['--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and 'python train.py --data Sub-URMP' in out
    assert len(set(re.findall(r'^  (--[a-z][a-z-]+)', out, re.M))) <= 34


def test_benchmark(capsys):
    train.main(['--benchmark', '1', '--size', '32', '--base', '8', '--batch-size', '2', '--device', 'cpu'])
    rate, work, speed, memory = map(float, re.fullmatch(
        r'(\S+) images/s, (\S+) GFLOP per image: (\S+) TFLOP/s; peak memory (\S+) GB',
        capsys.readouterr().out.splitlines()[-1]).groups())
    assert speed == pytest.approx(rate * work / 1000, abs=0.006) and 0.1 < memory < 30


def test_arithmetic_of_a_step_by_hand():
    """Two floating-point operations for each weight and place of a convolution, three passes of it in training."""
    size, base, ours = 64, 8, trainer('--size', '64', '--variant', 'D')
    with train.flop_counter() as counter:
        ours.model.G1(torch.zeros(1, 6, size, size))
    convolutions = [m for m in ours.model.G1.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))]
    down = [m for m in convolutions if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)]
    up = [m for m in convolutions if isinstance(m, torch.nn.ConvTranspose2d)]
    work = sum(2 * m.weight.numel() * (size >> i) ** 2 for i, m in enumerate(down, 1))
    work += sum(2 * m.weight.numel() * (2 ** i) ** 2 for i, m in enumerate(up))          # a place of its input
    for attention in (m for m in ours.model.G1.modules() if isinstance(m, cargan.SelfAttention)):
        places = (size // (2 if attention.value.in_channels == base else 4)) ** 2
        work += 2 * places * sum(m.weight.numel() for m in (attention.query, attention.key, attention.value,
                                                            attention.output))
        work += 2 * 2 * places * (places // 4) * attention.value.out_channels               # q and k padded to v
    assert counter.get_total_flops() == work


# ----------------------------------------------------------------------------- FID's Inception

def fill(network):
    """Reproducible weights that keep the activations near 1; NumPy's old generator never changes."""
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


def pictures(size, count=1):
    return torch.from_numpy(np.random.RandomState(1).uniform(0, 1, (count, 3, size, size)).astype(np.float32))


@pytest.fixture(scope='session')
def network():
    """FID's Inception with random weights."""
    return fill(InceptionV3())


def test_names_and_shapes_are_those_of_the_fid_weights(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 566                       # 94 convolutions with 6 entries each, fc with 2
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(('weight', 'bias'))) == 23850960
    expected = {'Conv2d_4a_3x3.bn.running_var': (192,), 'Mixed_5d.branch_pool.conv.weight': (64, 288, 1, 1),
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
def test_the_figures_are_those_of_pytorch_fid(network, size):
    """GOLDEN is what pytorch-fid 0.3.0 makes of the same weights and pictures, features and logits; it adds the bias
    of the last layer, which the Inception score's reference leaves out.
    """
    features, logits = network(pictures(size))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    got = [features.mean(), features.std(), *features[0, ::400], *(logits + network.fc.bias)[0, ::300]]
    np.testing.assert_allclose(got, GOLDEN[size], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, features @ network.fc.weight.T)


def test_weights_from_a_file(network, tmp_path):
    path = tmp_path / 'weights.pth'
    state = {name: value for name, value in network.state_dict().items() if 'num_batches' not in name}
    torch.save(state, path)                         # as older torch wrote it
    loaded = inception(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in state.items())


def test_inception_that_cannot_be_had(tmp_path, no_network):
    with pytest.raises(InputError) as error:
        inception()
    assert evaluate.INCEPTION_URL in str(error.value) and '--inception PATH' in str(error.value)
    assert '\n' not in str(error.value)


def test_a_broken_file_in_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cached = tmp_path / 'hub/checkpoints/pt_inception-2015-12-05-6726825d.pth'
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b'half a down')
    with pytest.raises(InputError) as error:
        inception()
    assert str(cached) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('write', [lambda path: None, lambda path: path.write_bytes(b'not weights'),
                                   lambda path: torch.save({'fc.weight': Harm(str(path.with_name('ran')))}, path),
                                   lambda path: torch.save([1, 2], path),
                                   lambda path: torch.save({'fc.weight': torch.zeros(1000, 2048)}, path)],
                         ids=['missing', 'garbage', 'code', 'list', 'another network'])
def test_a_bad_file_of_weights_is_one_line(tmp_path, write):
    path = tmp_path / 'weights.pth'
    write(path)
    with pytest.raises(InputError) as error:
        inception(path)
    assert str(path) in str(error.value) and '--inception' in str(error.value) and '\n' not in str(error.value)
    assert not path.with_name('ran').exists()


# ------------------------------------------------------------------------------- distance and score

def features(n, d=24, seed=0, offset=0.0):
    """Correlated features (n, d) >= offset, as behind a ReLU; the seed moves mean and covariance."""
    mixing, rows = np.random.RandomState(seed), np.random.RandomState(seed + 100)
    return np.maximum(rows.randn(n, d) @ mixing.randn(d, d) + mixing.randn(d), 0) + offset


def by_sqrtm(a, b):
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return (((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a) + np.trace(S_b)
            - 2 * np.trace(linalg.sqrtm(S_a @ S_b)).real)


@pytest.mark.parametrize('n, m', [(200, 300), (24, 25), (26, 400), (10, 15), (10, 200)])
def test_frechet_distance_is_the_formula(n, m):
    a, b = features(n), features(m, seed=1)
    expected = by_sqrtm(a, b)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(torch.from_numpy(a).float(), b) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('n', [2, 10, 24, 25, 26, 500])
@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_a_set_is_at_no_distance_from_itself(n, offset):
    a = features(n, offset=offset)
    distance = frechet_distance(a, a[::-1].copy())
    assert 0 <= distance <= 1e-6 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 24, rel=1e-6)


def test_equal_rows_are_at_the_distance_of_their_means():
    assert frechet_distance(np.ones((5, 3)), np.zeros((9, 3))) == pytest.approx(3)


@pytest.mark.parametrize('n, m', [(2, 3), (30, 20), (2500, 40)])
def test_kernel_distance_is_the_formula(n, m):
    """The unbiased estimate of MMD^2 with the kernel (x.y / d + 1)^3, written out; n of 2500 comes in blocks."""
    a, b = features(n), features(m, seed=1)
    K_aa, K_bb, K_ab = (((x @ y.T) / 24 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    expected = ((K_aa.sum() - np.trace(K_aa)) / (n * (n - 1)) + (K_bb.sum() - np.trace(K_bb)) / (m * (m - 1))
                - 2 * K_ab.mean())
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(torch.from_numpy(b).float(), a) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize('distance', [frechet_distance, kernel_distance])
@pytest.mark.parametrize('a, b', [(np.ones((1, 3)), np.ones((5, 3))), (np.ones((5, 3)), np.ones((0, 3))),
                                  (np.random.rand(5, 3), np.random.rand(5, 4)), (np.ones(5), np.ones(5)),
                                  (np.array([[0, 1], [np.nan, 0]]), np.eye(2)),
                                  (np.eye(2), np.array([[0, 1], [np.inf, 0]]))],
                         ids=['one row', 'nothing', 'two d', 'flat', 'nan', 'inf'])
def test_features_without_a_distance_are_refused(distance, a, b):
    with pytest.raises(ValueError):
        distance(a, b)


def test_inception_score_of_classes_used_equally_is_their_number():
    one_hot = torch.eye(5).repeat(20, 1)                             # 0 log 0 = 0
    assert inception_score(one_hot) == pytest.approx((5, 0), abs=1e-9)
    assert inception_score(torch.eye(5).repeat_interleave(20, dim=0), splits=5) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_is_the_formula_on_uneven_splits():
    p = np.random.RandomState(0).dirichlet(np.full(6, 0.3), 25)
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in np.array_split(p, 4)]
    assert inception_score(p, splits=4) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


def test_inception_score_of_vanishing_probabilities_is_finite():
    rows = np.tile([[1.0, 0.0], [1.0, 5e-324]], (10, 1))
    assert inception_score(rows, splits=2) == pytest.approx((1, 0))


@pytest.mark.parametrize('rows, splits', [(np.full((9, 2), 0.5), 10), (np.full((9, 2), 0.5), 0), (np.ones(10), 1),
                                          (np.full((9, 2), 0.7), 1), (np.tile([[1.5, -0.5]], (9, 1)), 1),
                                          (np.full((9, 2), np.nan), 1)],
                         ids=['few rows', 'no split', 'flat', 'logits', 'negative', 'nan'])
def test_rows_without_a_score_are_refused(rows, splits):
    with pytest.raises(ValueError):
        inception_score(rows, splits)


# -------------------------------------------------------------------------------------- classifiers

@pytest.fixture(scope='session')
def two_classes(tmp_path_factory):
    """A dataset of 12 pairs in train and 3 in validation of one class, 7 and 1 of another."""
    folder = tmp_path_factory.mktemp('two') / 'two'
    write_demo(folder, train=12, validation=3, size=64)
    for kind in folder.glob('*/*/*'):
        if kind.name not in ('bassoon', 'viola'):
            shutil.rmtree(kind)
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
def run_of_two(two_classes):
    """A run of one epoch on it, its dataset and its cache."""
    folder = two_classes.parent
    train.main(['--data', str(two_classes), '--cache', str(folder / 'cache'), '--out', str(folder / 'runs/E'),
                '--epochs', '1', '--device', 'cpu', *SMALL])
    return folder / 'runs/E', two_classes, folder / 'cache'


class Linear(nn.Module):
    """The smallest classifier, of images of 32x32 or of their LMS."""

    def __init__(self, channels=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(channels * 32 * 32, 8), nn.BatchNorm1d(8), nn.ReLU(),
                                    nn.Dropout(0.5), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def test_a_tenth_of_each_class_is_held_out_by_seed():
    labels = torch.tensor([0] * 29 + [1] * 9 + [2] * 10)[torch.randperm(48, generator=torch.Generator().manual_seed(5))]
    kept, tenth = preprocess.hold_out(labels, seed=3)
    assert torch.cat([kept, tenth]).sort().values.tolist() == list(range(48))
    assert labels[tenth].bincount(minlength=3).tolist() == [2, 0, 1]
    assert torch.equal(preprocess.hold_out(labels, seed=3)[1], tenth)
    assert len({tuple(preprocess.hold_out(labels, seed)[1].tolist()) for seed in range(9)}) > 5


def test_the_best_epoch_is_chosen_on_train_and_reported_on_validation(two, monkeypatch, capsys):
    """The validation frames have no say in what is chosen: with other ones the same epoch comes out."""
    measured, of = [], evaluate.measure_accuracy
    monkeypatch.setattr(evaluate, 'measure_accuracy', lambda classifier, split, *more: (
        measured.append((len(split), of(classifier, split, *more))), measured[-1][1])[1])
    state = evaluate.train_classifier(Linear(), two, epochs=4, seed=1, batch_size=4)
    tenths = [share for count, share in measured[:-1]]
    assert [count for count, _ in measured] == [1] * 4 + [4]            # 12 // 10 of one class, 7 // 10 of the other
    assert state.keys() == {'classifier', 'classes', 'accuracy', 'held_out', 'epoch'}
    best = max(epoch for epoch, share in enumerate(tenths, 1) if share == max(tenths))
    assert state['held_out'] == max(tenths) and state['epoch'] == best             # of equals the last
    trained = Linear()
    trained.load_state_dict(state['classifier'])
    assert state['accuracy'] == of(trained.eval(), two.validation) == measured[-1][1]
    assert 'on validation' in capsys.readouterr().out
    other = two._replace(validation=two.train)
    assert same(evaluate.train_classifier(Linear(), other, epochs=4, seed=1, batch_size=4)['classifier'],
                state['classifier'])
    # where no class has ten pairs nothing is held out and the last epoch counts
    few = two._replace(train=two.train.subset(range(5, 19)))
    late = evaluate.train_classifier(Linear(), few, epochs=3, seed=1)
    assert late['epoch'] == 3 and late['held_out'] is None


def test_a_classifier_goes_on_from_its_last_whole_epoch(two, tmp_path):
    """Stopped in its third epoch and gone on with, it ends as one that was never stopped, dropout and all."""
    settings = dict(epochs=4, seed=1, batch_size=4)
    whole = evaluate.train_classifier(Linear(), two, **settings, part=tmp_path / 'whole.pt')
    calls, part = itertools.count(1), tmp_path / 'part.pt'

    def check():
        if next(calls) == 12:                       # five batches an epoch
            sys.exit(143)

    with pytest.raises(SystemExit):
        evaluate.train_classifier(Linear(), two, **settings, part=part, check=check)
    assert runs.load_file(part)['epoch'] == 2
    torch.manual_seed(99)
    assert same(evaluate.train_classifier(Linear(), two, **settings, part=part), whole)
    assert same(torch.load(part, weights_only=True), torch.load(tmp_path / 'whole.pt', weights_only=True))
    # a file of the end: nothing is trained any more
    assert same(evaluate.train_classifier(Linear(), two, **settings, part=part, check=lambda: 1 / 0), whole)
    torch.save({'classifier': Harm(str(tmp_path / 'ran'))}, part)
    with pytest.raises(InputError, match=str(part)):
        evaluate.train_classifier(Linear(), two, **settings, part=part)
    assert not (tmp_path / 'ran').exists()


def test_the_rate_of_a_classifier_falls_to_zero_and_is_gone_on_with(two, tmp_path, monkeypatch):
    rates, adam = [], torch.optim.Adam.step
    monkeypatch.setattr(torch.optim.Adam, 'step', lambda self: (rates.append(self.param_groups[0]['lr']), adam(self)))
    part = tmp_path / 'part.pt'
    evaluate.train_classifier(Linear(), two, epochs=2, lr=0.5, batch_size=4, part=part)         # 17 pairs
    assert rates == pytest.approx([0.05 * left for left in range(10, 0, -1)])
    rates.clear()
    evaluate.train_classifier(Linear(), two, epochs=3, lr=0.5, batch_size=4, part=part)
    assert rates == pytest.approx([0.5 / 15 * left for left in range(5, 0, -1)])


def test_classifiers_of_sounds_with_groups_of_parameters(two):
    """source=0 classifies the LMS; a group's weight decay pulls all weights of its layer to zero, and no others."""
    network = Linear(channels=1)
    layers = network.layers[1], network.layers[5]
    network.parameter_groups = lambda: [dict(params=layer.parameters(), weight_decay=decay)
                                        for layer, decay in zip(layers, (1e6, 0))]
    before = [layer.weight.detach().clone() for layer in layers]
    state = evaluate.train_classifier(network, two, epochs=1, lr=1e-4, source=0, batch_size=4)
    smaller = [((layer.weight.abs() < old.abs()).float().mean().item()) for layer, old in zip(layers, before)]
    assert smaller[0] > 0.9 and 0.1 < smaller[1] < 0.9
    assert state['accuracy'] == evaluate.measure_accuracy(network, two.validation, source=0)


def test_no_batch_of_one_and_no_infinite_loss(two):
    sizes = []
    network = Linear()
    network.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])) if module.training else None)
    evaluate.train_classifier(network, two._replace(train=two.train.subset(range(7, 16))), epochs=1, batch_size=2)
    assert sizes == [3, 2, 2, 2]                                # of nine pairs; BatchNorm fails at one
    with pytest.raises(InputError, match='--classifier FILE'):
        evaluate.train_classifier(Linear(), two, epochs=1, lr=math.inf, batch_size=4)


def test_the_independent_classifier_is_trained_once_and_is_not_c(two, tmp_path, capsys):
    dataset = two._replace(folder=tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    independent = evaluate.get_independent(dataset)
    assert torch.equal(torch.get_rng_state(), state)            # the run's random numbers stay its own
    assert 'independent classifier epoch 10/10' in capsys.readouterr().out and not independent.training
    assert len(independent.resnet.layer1) == 2                              # ResNet18, C is a ResNet50
    _, image, _ = dataset.train.batch(range(19))
    rows, logits = independent(image)
    assert rows.shape == (19, 512) and torch.equal(independent.resnet(image), logits)
    torch.testing.assert_close(independent.resnet.fc(rows), logits)
    assert independent.accuracy == evaluate.measure_accuracy(independent.resnet, dataset.validation)
    again = evaluate.get_independent(dataset)
    assert 'epoch' not in capsys.readouterr().out
    assert same(again.state_dict(), independent.state_dict()) and again.accuracy == independent.accuracy
    kept = tmp_path / 'independent.pt'
    torch.save(dict(torch.load(kept, weights_only=True), key='of other files'), kept)
    assert same(evaluate.get_independent(dataset).state_dict(), independent.state_dict())
    assert 'independent classifier epoch 10/10' in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ figures

class Colours(nn.Module):
    """A space of images by their mean colour (B, 3), for figures by hand; two classes, red and the rest."""

    def forward(self, image):
        colour = image.mean(dim=(2, 3))
        return colour, torch.stack([colour[:, 0], -colour[:, 0]], dim=1)


def test_generated_pictures_are_seen_in_8_bits():
    """All networks see what a file would hold; L1 stays on the floats. Out of range is cut, as in a file."""
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    read = torch.stack([torch.from_numpy(np.array(preprocess.picture(x))).permute(2, 0, 1) for x in image])
    torch.testing.assert_close(preprocess.as_saved(image), read / 127.5 - 1, atol=1e-6, rtol=0)
    seen = []
    spies = [lambda x: (seen.append(x), Colours()(x))[1] for _ in range(2)]
    rows = evaluate.look_at(image, dict(zip(('', '_independent'), spies)), torch.zeros_like(image),
                            lambda x: (seen.append(x), x.mean(dim=(2, 3)))[1])
    inception_saw, *others = seen
    assert len(others) == 2 and all(torch.equal(x, preprocess.as_saved(image)) for x in others)
    torch.testing.assert_close(inception_saw, read / 255)
    assert rows['l1'].tolist() == pytest.approx(image.abs().mean(dim=(1, 2, 3)).tolist())


def test_measure_by_hand(trained, tmp_path):
    """The figures of a run's validation split against the whole split at once; what is written of I''."""
    run, cache = trained
    config, model, _ = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=cache)
    split, independent, C = dataset.validation, evaluate.get_independent(dataset), model.residue.classifier
    rows = evaluate.measure(model, dataset, {'_independent': independent}, batch_size=7, images=tmp_path)['validation']
    lms, image, label = split.batch(range(26))
    with torch.no_grad():
        coarse, fine, _ = model(lms, label)
        for kind, x in (('coarse', coarse), ('fine', fine), ('real', image)):
            figures, saved = evaluate.figures(rows[kind], split, rows['real'], dataset.classes), preprocess.as_saved(x)
            right = independent(saved)[1].argmax(dim=1) == label
            assert figures['accuracy'] == pytest.approx((C(saved).argmax(dim=1) == label).float().mean().item())
            assert figures['is_independent'] is None                                    # 26 are too few
            assert list(figures['classes']) == dataset.classes
            for i in (0, 12):
                found = figures['classes'][dataset.classes[i]]
                assert found['l1'] == pytest.approx((x - image)[2 * i:2 * i + 2].abs().mean().item(), rel=1e-4)
                assert found['accuracy_independent'] == right[2 * i:2 * i + 2].float().mean().item()
    assert len(list(tmp_path.rglob('*.png'))) == 78
    for i in (0, 7, 25):
        path = tmp_path / 'validation' / dataset.classes[label[i]] / f'{split.stems[i]}.png'
        written = np.asarray(Image.open(path)).astype(int)
        assert np.abs(written - np.asarray(preprocess.picture(fine[i])).astype(int)).max() <= 1


def test_the_inception_score_is_that_of_mixed_up_pictures(two):
    """Sorted by class, each of the ten splits would hold one class and the score be 1."""
    split = two.train.subset([*range(12)] * 5 + [*range(12, 19)] * 6)
    assert len(split) == 102
    p = torch.eye(2)[split.labels]
    rows = {'features_independent': torch.rand(102, 3), 'probabilities_independent': p, 'l1': torch.zeros(102)}
    found = evaluate.figures(rows, split, rows)
    expected = inception_score(p[torch.randperm(102, generator=torch.Generator().manual_seed(0))])
    assert (found['is_independent'], found['is_independent_std']) == expected and expected[0] > 1.5
    assert found['fid_independent'] == pytest.approx(0, abs=1e-5) and 'accuracy' not in found


def test_controls_by_hand(two, network, tmp_path):
    """Generated and real frames, a random and the mean train frame of the class, in both spaces, written out."""
    dataset = two._replace(train=two.train.subset([0, 1, 12]), validation=two.validation.subset([0, 3]))
    independent, model = evaluate.get_independent(dataset), cargan.CARGAN(2, 32, 8, init_std=0.02).eval()
    config = dict(data=None, size=32, variant='E', seed=0)
    metrics = evaluate.evaluate_run(tmp_path, config, model, dataset, network=network, batch_size=2)
    assert metrics == json.loads((tmp_path / 'metrics.json').read_text())
    batches = dict(train=dataset.train.batch(range(3)), validation=dataset.validation.batch(range(2)))
    train, means = batches['train'][1], torch.stack([batches['train'][1][:2].mean(dim=0), batches['train'][1][2]])
    kinds, rows = {}, {}
    for name, (lms, image, label) in batches.items():
        drawn = preprocess.random_frames(dataset.train.labels, label, own=name == 'train')
        with torch.no_grad():
            coarse, fine, _ = model(lms, label)
            kinds[name] = dict(coarse=coarse, fine=fine, real=image, random_frame=train[drawn], mean_frame=means[label])
            for kind, x in kinds[name].items():
                saved = preprocess.as_saved(x)
                rows[name, kind] = {'': network((saved + 1) / 2)[0], '_independent': independent(saved)[0],
                                    'predictions': independent(saved)[1].argmax(dim=1)}
    for name, other in (('train', 'validation'), ('validation', 'train')):
        _, image, label = batches[name]
        draws = [preprocess.random_frames(dataset.train.labels, label, name == 'train', seed) for seed in range(8)]
        copied = torch.stack([(train[drawn] - image).abs().mean() for drawn in draws]).mean().item()
        for kind, x in kinds[name].items():
            found, truth = metrics[name][kind], rows[other if kind == 'real' else name, 'real']
            for space in ('', '_independent'):
                sets = rows[name, kind][space], truth[space]
                assert found[f'fid{space}'] == pytest.approx(frechet_distance(*sets), rel=1e-3, abs=1e-5)
                assert found[f'kid{space}'] == pytest.approx(kernel_distance(*sets), rel=1e-3, abs=1e-5)
            l1 = copied if kind == 'random_frame' else (x - image).abs().mean().item()
            assert found['is'] is None and found['l1'] == pytest.approx(l1, rel=1e-4)
            assert found['accuracy_independent'] == (rows[name, kind]['predictions'] == label).double().mean().item()
            assert ('accuracy' in found) == (kind in ('coarse', 'fine', 'real'))


def test_another_label_and_another_sound_by_hand(trained, demo):
    """Of model E alone: the figures of I'' where G1 and the residue are given the label of another class, or G1 the
    sound of another clip of the class and split. Here of three classes, in train and in validation.
    """
    torch.manual_seed(0)
    dataset, model = preprocess.open_dataset(demo, 32, trained[1]), cargan.CARGAN(13, 32, 8, init_std=0.1).eval()
    few = dataset._replace(classes=dataset.classes[:3], train=dataset.train.subset([0, 1, 2, 4, 5, 8, 9]),
                           validation=dataset.validation.subset(range(6)))
    C, networks = model.residue.classifier, {'_independent': lambda x: (x.mean((2, 3)), x[:, 0, 2, :13])}
    found = evaluate.measure(model, few, networks, batch_size=4)
    torch.manual_seed(1)
    again = evaluate.measure(model, few, networks, batch_size=5)
    for name, split in (('train', few.train), ('validation', few.validation)):
        (lms, image, label), rows = split.batch(range(len(split))), found[name]
        given = rows['wrong_label']['given']
        assert set(given.tolist()) == {0, 1, 2} and set(((given - label) % 3).tolist()) == {1, 2}
        assert torch.equal(given, again[name]['wrong_label']['given'])                  # by seed
        with torch.no_grad():
            fine = model(lms, given)[1]
            seen = preprocess.as_saved(fine)
            wrong = rows['wrong_label']
            torch.testing.assert_close(wrong['l1'], (fine - image).abs().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)
            assert torch.equal(wrong['predictions'], C(seen).argmax(dim=1))
            probabilities = networks['_independent'](seen)[1].softmax(dim=1)
            torch.testing.assert_close(wrong['probabilities_independent'], probabilities, rtol=0, atol=0.01)
            for i in range(len(split)):     # which sound of the split makes this picture?
                made = model(lms, label[i].expand(len(split)))[1]
                apart = ((made - image[i]).abs().mean((1, 2, 3)) - rows['other_sound']['l1'][i]).abs()
                j = apart.argmin()
                assert apart[j] < 1e-6 < 1e-5 < apart.sort().values[1] and j != i and label[j] == label[i]
    rows = {'probabilities_independent': torch.eye(13)[[5, 1, 7, 7, 0, 0]], 'given': torch.tensor([5, 7, 7, 7, 9, 9]),
            'features_independent': torch.rand(6, 3), 'predictions': torch.tensor([0, 0, 1, 7, 7, 7]),
            'l1': torch.ones(6)}
    figures = evaluate.figures(rows, few.validation, rows)          # of the classes 0, 0, 1, 1, 2, 2
    assert (figures['accuracy_given'], figures['accuracy'], figures['accuracy_independent']) == (0.5, 0.5, 0)
    model.variant = 'D'
    assert not {'wrong_label', 'other_sound'} & set(evaluate.measure(model, few, networks)['validation'])


def test_random_frames_are_of_the_class_and_not_their_own():
    train, other = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([2, 0, 1, 1, 0] * 20)
    drawn = preprocess.random_frames(train, other)
    assert torch.equal(train[drawn], other) and set(drawn.tolist()) == set(range(6))
    assert torch.equal(preprocess.random_frames(train, other), drawn)
    many = torch.cat([torch.tensor([1]), torch.tensor([0, 2]).repeat(20)])
    own = preprocess.random_frames(many, many, own=True)
    assert torch.equal(many[own], many) and own[0] == 0 and not (own[1:] == torch.arange(1, 41)).any()


# ------------------------------------------------------------------------------------------- a run

def test_failures_are_sorted_by_loudness(trained, tmp_path):
    run, cache = trained
    config, model, _ = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=cache)
    split, path = dataset.validation, tmp_path / 'failures.png'
    loudness, predictions = split.loudness(), split.labels.clone()
    path.write_bytes(b'of an earlier evaluation')
    found = report.failure_grid(model, split, dataset.classes, predictions, path)
    silent = sum(1 for level in loudness if level < -40)
    assert found == dict(clips=26, wrong=0, near_silent=silent, near_silent_wrong=0) and not path.exists()
    wrong = loudness.argsort()[[20, 0, 9]]
    predictions[wrong] = (predictions[wrong] + 1) % 13
    found = report.failure_grid(model, split, dataset.classes, predictions, path)
    assert found == dict(clips=26, wrong=3, near_silent=silent, near_silent_wrong=int(loudness.min() < -40))
    sheet = np.asarray(Image.open(path).convert('RGB')).astype(int)
    assert sheet.shape[0] == 28 + 3 * 132
    for row, i in enumerate(sorted(wrong.tolist(), key=lambda i: loudness[i])):     # the quietest first
        truth = np.asarray(preprocess.picture(split.batch([i])[1][0]).resize((128, 128), Image.Resampling.BICUBIC))
        assert np.array_equal(sheet[28 + row * 132:][:128, 130 + 3 * 132:][:, :128], truth)


def test_lms_that_are_pictures_have_no_decibels(tmp_path, monkeypatch):
    lms = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    split = preprocess.Split(lms, lms, range(2), [0, 1], ['a', 'b'], 32)
    model, titles = cargan.CARGAN(2, 32, 8, lms_channels=3), []
    monkeypatch.setattr(report, 'draw_grid', lambda rows, path: titles.extend(title for title, _ in rows))
    found = report.failure_grid(model, split, ['horn', 'tuba'], torch.tensor([1, 0]), tmp_path / 'failures.png')
    assert found == dict(clips=2, wrong=2)
    levels = [lms[i].mean() for i in range(2)]
    assert sorted(titles) == sorted(f'{name}\nbrightness {level:.0f}\nseen as\n{other}' for name, other, level in
                                    zip(('horn', 'tuba'), ('tuba', 'horn'), levels))


def cells(text):
    """The rows of the first Markdown table in a text."""
    table = re.search(r'(?:^\|.*\|\n?)+', text, re.M)[0].splitlines()
    assert len(set(map(len, table))) == 1 and re.fullmatch(r'(\|-+)+\|', table[1])
    return [[cell.strip() for cell in line[1:-1].split('|')] for line in (table[0], *table[2:])]


def test_the_tables(trained):
    run, _ = trained
    metrics = json.loads((run / 'metrics.json').read_text())
    shown = {"I''": ([metrics], 'fine', 'E'), 'real frames': ([metrics], 'real', 'real'),
             'mean': ([metrics], 'mean_frame', None)}
    for split in 'train', 'validation':
        head, *lines = cells(report.table(shown, split))
        found = {name: row for name, *row in lines if 'paper' not in name}
        assert head == [split, *shown] and list(found) == list(report.FIGURES)
        for figure, row in found.items():
            for cell, (_, kind, _) in zip(row, shown.values()):
                value = metrics[split][kind].get(figure)
                assert cell == ('-' if value is None else f'{value:.4f}')
    assert found['accuracy'][2] == '-' and found['l1'][1] == '0.0000'
    assert [row for row in lines if 'paper' in row[0]] == [
        ['fid, paper', '240.7771', '-', '-'], ['is, paper', '4.2023', '4.7552', '-'],
        ['accuracy, paper', '0.9033', '0.9956', '-']]
    # two seeds: mean +- deviation; IS of one run with the deviation over its splits
    other = copy.deepcopy(metrics)
    metrics['train']['fine'] |= {'l1': 0.2, 'is': 3, 'is_std': 0.5, 'fid': 1}
    other['train']['fine'] |= {'l1': 0.4, 'is': 4, 'is_std': 0.5, 'fid': None}
    columns = {'both': ([metrics, other], 'fine', 'S2IC'), 'one': ([metrics], 'fine', None)}
    found = {name: row for name, *row in cells(report.table(columns, 'train'))}
    assert found['l1'] == ['0.3000 +- 0.1414', '0.2000'] and found['fid'] == ['-', '1.0000']
    assert found['is'] == ['3.5000 +- 0.7071', '3.0000 +- 0.5000']
    assert found['accuracy, paper'] == ['0.8737', '-']


def test_a_verdict_wants_two_standard_errors():
    """Of 3, 4, 5 and three others of variance 1 the means differ by 2 sqrt(1/3 + 1/3) = 1.633."""
    for far, found in ((1.64, ('confirmed', 'reversed')), (1.62, ('undecided', 'undecided'))):
        theirs = [x - far for x in (3, 4, 5)]
        assert tuple(report.verdict([3, 4, 5], theirs, better) for better in (1, -1)) == found
        assert tuple(report.verdict(theirs, [3, 4, 5], better) for better in (-1, 1)) == found
    assert report.verdict([3, 4, 5], [1.5, 3.5] * 8, 1) == 'confirmed'  # 1.5 of 2 sqrt(1/3 + 16/15/16) = 1.265
    assert report.verdict([9], [1, 2, 3], 1) == report.verdict([9, 9], [1], 1) == 'undecided'   # one seed
    assert report.verdict([], [1, 2], 1) == 'undecided'                 # not computed


def three_seeds(space='', **middle):
    """The metrics of three seeds, those of validation being -, 0 and + a deviation around these, train's 0.05 more."""
    deviations = {f'fid{space}': 2.0, f'is{space}': 1.0, 'accuracy': 0.0, 'accuracy_independent': 0.1, 'l1': 0.01}

    def kinds(shift):
        fine = {name: value + shift * deviations[name] for name, value in middle.items()}
        wrong = dict(accuracy=0.1, accuracy_independent=0.2, accuracy_given=0.6 + shift * 0.2, l1=0.4)
        return dict(fine=fine, real=dict(accuracy=0.99, l1=0.0), random_frame=dict(l1=0.3), mean_frame=dict(l1=0.2),
                    wrong_label=wrong, other_sound=dict(fine, l1=fine['l1'] + 0.03))

    def more(found):
        return {kind: {name: value + 0.05 for name, value in of_kind.items()} for kind, of_kind in found.items()}

    return [dict(data='/urmp', size=64, pictures=dict(train=3000, validation=2048), train=more(kinds(shift)),
                 validation=kinds(shift)) for shift in (-1, 0, 1)]


PAPER_TABLES = {'E': dict(fid=12, accuracy=0.9, accuracy_independent=0.6, l1=0.1) | {'is': 5},
                'A': dict(fid=30, accuracy=0.8, accuracy_independent=0.5, l1=0.1) | {'is': 4.8},
                'B': dict(fid=22, accuracy=0.8, accuracy_independent=0.5, l1=0.1) | {'is': 3},
                'C': dict(fid=4, accuracy=0.8, accuracy_independent=0.5, l1=0.1) | {'is': 5},
                'D': dict(fid=12, accuracy=0.8, accuracy_independent=0.5, l1=0.1) | {'is': 9},
                'S2IC': dict(fid=50, accuracy=0.7, accuracy_independent=0.2, l1=0.2) | {'is': 2},
                'CMCGAN': dict(fid=40, accuracy=0.5, accuracy_independent=0.5, l1=0.2) | {'is': 2}}


def claims(text):
    """The paper's claims in tables.md, {of which model: [(verdict, figure, both figures)]}."""
    lines = text.partition("## The paper's claims")[2].split('\n- ')[1:]
    return {re.match(r'E is ahead of (.*?):', line)[1]: re.findall(r'(\w+) by (\w+) \((.*?)\)', line) for line in lines}


def test_the_papers_tables_by_hand(tmp_path):
    columns = {model: (model, three_seeds(**PAPER_TABLES[model])) for model in sorted(PAPER_TABLES)}
    columns['E, longer'] = 'E', three_seeds(**PAPER_TABLES['E'] | dict(fid=1000))
    text = report.paper_tables(columns, tmp_path)
    assert (tmp_path / 'tables.md').read_text() == text + '\n' and 'fewer' not in text
    assert text.startswith('# /urmp, 64 pixels, 3000 pairs in train, 2048 pairs in validation\n')
    assert 'Mean +- deviation, seeds: A 3, B 3, C 3, CMCGAN 3, D 3, E 3, S2IC 3, E, longer 3' in text
    head, *lines = cells(text.split('## Table 1')[1])
    assert head == ['validation', *columns, 'real frames', 'random frame', 'mean frame']
    table1 = {name: dict(zip(head[1:], row)) for name, *row in lines}
    assert table1['fid']['E'] == '12.0000 +- 2.0000' and table1['fid']['E, longer'] == '1000.0000 +- 2.0000'
    assert table1['is']['B'] == '3.0000 +- 1.0000' and table1['fid_independent']['E'] == '-'
    assert table1['accuracy']['real frames'] == '0.9900' and table1['l1']['mean frame'] == '0.2000'
    assert [table1['fid, paper'][model] for model in 'ABCDE'] == ['279.3022', '332.1574', '380.1104', '307.3725',
                                                                  '240.7771']
    head, *lines = cells(text.split('## Table 2')[1])
    assert head[1:] == ['accuracy, train', 'accuracy, validation', 'accuracy_independent, train',
                        'accuracy_independent, validation', 'paper, train', 'paper, test']
    assert {name: row for name, *row in lines if name not in ('E, longer', 'random frame', 'mean frame')} == {
        'S2IC': ['0.7500 +- 0.0000', '0.7000 +- 0.0000', '0.2500 +- 0.1000', '0.2000 +- 0.1000', '0.8737', '0.7556'],
        'CMCGAN': ['0.5500 +- 0.0000', '0.5000 +- 0.0000', '0.5500 +- 0.1000', '0.5000 +- 0.1000', '0.9105', '0.7661'],
        'E': ['0.9500 +- 0.0000', '0.9000 +- 0.0000', '0.6500 +- 0.1000', '0.6000 +- 0.1000', '0.9954', '0.9033'],
        'E, wrong label': ['0.1500 +- 0.0000', '0.1000 +- 0.0000', '0.2500 +- 0.0000', '0.2000 +- 0.0000', '-', '-'],
        'E, another sound': ['0.9500 +- 0.0000', '0.9000 +- 0.0000', '0.6500 +- 0.1000', '0.6000 +- 0.1000', '-', '-'],
        'real frames': ['1.0400', '0.9900', '-', '-', '-', '0.9956']}
    assert [row[0] for row in lines][:4] == ['S2IC', 'CMCGAN', 'E', 'E, longer']
    assert 'recognised as the label given: 0.6000 +- 0.2000' in text
    assert 'With another sound l1 is 0.1300 +- 0.0100, with its own 0.1000 +- 0.0100.' in text
    assert 'not given the label and do not train against C' in text
    e = '12.0000 +- 2.0000 against ', '5.0000 +- 1.0000 against '
    assert claims(text) == {                                # 1 - 12/22, 5/3 - 1; 1 - 12/4, 5/5 - 1; 0, 5/9 - 1
        'A, without attention': [('confirmed', 'fid', e[0] + '30.0000 +- 2.0000'),
                                 ('undecided', 'is', e[1] + '4.8000 +- 1.0000')],
        'B, without the classification loss L_C': [
            ('confirmed', 'fid', e[0] + '22.0000 +- 2.0000: 45.45 % better, in the paper 27.51 %'),
            ('confirmed', 'is', e[1] + '3.0000 +- 1.0000: 66.67 % better, in the paper 22.39 %')],
        'C, without the residue module': [
            ('reversed', 'fid', e[0] + '4.0000 +- 2.0000: -200.00 % better, in the paper 36.66 %'),
            ('undecided', 'is', e[1] + '5.0000 +- 1.0000: 0.00 % better, in the paper 103.01 %')],
        'D, without stage II': [
            ('undecided', 'fid', e[0] + '12.0000 +- 2.0000: 0.00 % better, in the paper 21.67 %'),
            ('reversed', 'is', e[1] + '9.0000 +- 1.0000: -44.44 % better, in the paper 13.01 %')],
        'CMCGAN, the better baseline': [                    # by the independent classifier
            ('confirmed', 'accuracy', '0.9000 +- 0.0000 against 0.5000 +- 0.0000'),
            ('undecided', 'accuracy_independent', '0.6000 +- 0.1000 against 0.5000 +- 0.1000')]}
    # what was written is enough to write it again
    kept = json.loads((tmp_path / 'tables.json').read_text())
    again = {title: (x['model'], x['metrics']) for title, x in kept.items()}
    assert again == columns and report.paper_tables(again, tmp_path) == text


def test_the_papers_tables_of_some_models_alone(tmp_path):
    """Without E there is nothing to claim, without baselines nothing to be ahead of; without FID of one of them
    its place is taken by the independent classifier's.
    """
    made = {model: (model, three_seeds(**middle)) for model, middle in PAPER_TABLES.items()}
    text = report.paper_tables({model: made[model] for model in ('D', 'S2IC')}, tmp_path)
    assert 'claims' not in text and 'better' not in text and 'label given' not in text
    assert [row[0] for row in cells(text.split('## Table 2')[1])] == ['', 'S2IC', 'real frames', 'random frame',
                                                                       'mean frame']
    text = report.paper_tables({model: made[model] for model in ('D', 'E')}, tmp_path)
    (about, found), = claims(text).items()
    assert about == 'D, without stage II' and [figure for _, figure, _ in found] == ['fid', 'is']
    assert 'baseline' not in text.split('## The paper')[1]
    few = [run | dict(pictures=dict(train=3000, validation=9)) for run in three_seeds(
        '_independent', fid_independent=12, is_independent=5, accuracy=0.9, accuracy_independent=0.6, l1=0.1)]
    other = three_seeds('_independent', fid_independent=24, is_independent=5, accuracy=0.9, accuracy_independent=0.6,
                        l1=0.1)
    for run in other:
        run['validation']['fine'] |= dict(fid=3.0, is_independent=None)
    text = report.paper_tables({'E': ('E', few), 'B': ('B', other)}, tmp_path)
    assert 'fewer than 2,048' in text and claims(text) == {'B, without the classification loss L_C': [
        ('confirmed', 'fid_independent',
         '12.0000 +- 2.0000 against 24.0000 +- 2.0000: 50.00 % better, in the paper 27.51 %'),
        ('undecided', 'is_independent', '5.0000 +- 1.0000 against -')]}         # not computed


def test_what_the_report_says(trained):
    run, _ = trained
    config, metrics = runs.load_config(run), json.loads((run / 'metrics.json').read_text())
    classes = metrics['validation']['fine']['classes']
    for i, found in enumerate(classes.values()):
        found |= dict(accuracy_independent=1 - (i % 5 == 1) / 2, l1=0.1 + i / 100)
    text = report.report_text(run, config, metrics)
    assert f'model E after epoch 2: {metrics["data"]}, 32 pixels, 52 pairs in train, 26 pairs in validation' in text
    worst = text.split("worst I'' of validation: ")[1].splitlines()[0]
    assert re.findall(r'(\w+) \(', worst) == [dict(enumerate(classes))[i] for i in (11, 6, 1)]
    for words in 'fid and is of fewer than 2,048', 'fid and kid need 2 pictures in both splits, is needs 100':
        assert words in text
    metrics['pictures'] = dict(train=2048, validation=2048)
    assert 'fewer' not in report.report_text(run, config, metrics)


def test_evaluate_command_repeats_what_train_found(trained, no_network):
    run, cache = trained
    before = json.loads((run / 'metrics.json').read_text())
    dataset = evaluate.open_run_data(runs.load_config(run), cache=cache)
    assert before['pictures'] == dict(train=52, validation=26)
    assert (before['epoch'], before['steps'], before['size'], before['variant'], before['seed']) == (2, 8, 32, 'E', 0)
    assert before['data'] == runs.load_config(run)['data'] and before['versions']['torch'] == torch.__version__
    assert before['independent_accuracy'] == evaluate.get_independent(dataset).accuracy
    controls = {'fid_independent', 'kid_independent', 'is_independent', 'is_independent_std', 'accuracy_independent',
                'l1'}
    figures = controls | {'accuracy'}
    for split in ('train', 'validation'):
        assert {kind: set(found) for kind, found in before[split].items() if kind != 'failures'} == {
            'coarse': figures, 'fine': figures | {'classes'}, 'real': figures, 'random_frame': controls,
            'mean_frame': controls, 'wrong_label': figures | {'accuracy_given'}, 'other_sound': figures}
    for name in 'metrics.json', 'grid.png', 'report.html', 'curves.png':
        (run / name).unlink()
    # the newest run below runs/
    done = command(HERE / 'evaluate.py', '--device', 'cpu', '--batch-size', '13', cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr
    after = json.loads((run / 'metrics.json').read_text())
    assert after.keys() == before.keys()
    for split in ('train', 'validation'):
        for kind in ('coarse', 'fine', 'real', 'wrong_label', 'other_sound'):
            for figure in figures - {'is_independent', 'is_independent_std'}:
                value = before[split][kind][figure]
                assert after[split][kind][figure] == (value and pytest.approx(value, rel=1e-3, abs=1e-5)), figure
    page = Page(run / 'report.html')
    for words in ("I'' fine", 'real frames', 'random frame', '0.9954', f'{after["validation"]["fine"]["l1"]:.4f}'):
        assert words in done.stdout and words in page.text
    assert (run / 'curves.png').exists()
    # a row a class: LMS, I', I'', truth and the train frame nearest to I''
    sheet = np.asarray(Image.open(run / 'grid.png').convert('RGB')).astype(int)
    assert sheet.shape == (28 + 13 * 132, 130 + 5 * 132, 3)
    _, model, _ = evaluate.load_run(run)
    lms, _, label = preprocess.example_clips(dataset)[4][1]
    independent, frames = evaluate.get_independent(dataset), dataset.train.batch(range(52))[1]
    with torch.no_grad():
        distances = torch.cdist(independent(preprocess.as_saved(model(lms, label)[1]))[0], independent(frames)[0])
    nearest = preprocess.picture(frames[distances.argmin()]).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.array_equal(sheet[28 + 4 * 132:, 130 + 4 * 132:][:128, :128], nearest)


def test_other_data_leaves_the_runs_files_as_they_are(run_of_two, tmp_path, no_network, refused, capsys):
    """--data goes to a folder of its own in the run, or to --out. The other data has but one pair in validation."""
    run, data, cache = run_of_two
    run, flags = shutil.copytree(run, tmp_path / 'run'), ['--device', 'cpu', '--cache', str(cache)]
    before = {path: path.read_bytes() for path in run.rglob('*') if path.is_file()}
    other = shutil.copytree(data, tmp_path / 'one pair')
    for path in other.glob('*/validation/bassoon'):
        shutil.rmtree(path)
    evaluate.main([str(run), '--data', str(other), *flags])
    assert {path: path.read_bytes() for path in before} == before
    found = json.loads((run / 'one pair/metrics.json').read_text())
    assert found['data'] == str(other) and found['pictures'] == dict(train=19, validation=1)
    for figure in ('fid_independent', 'kid_independent', 'is_independent'):
        assert found['validation']['fine'][figure] is None
    assert found['validation']['fine']['accuracy_independent'] in (0, 1)
    assert list(found['validation']['fine']['classes']) == ['viola'] and (run / 'one pair/grid.png').exists()
    evaluate.main([str(run), '--data', str(other), '--out', str(tmp_path / 'out'), *flags])
    assert {path: path.read_bytes() for path in before} == before
    said = dict(re.findall(r'^in (.*): (metrics\.json, .*)$', capsys.readouterr().out, re.M))
    assert [*said] == [str(run / 'one pair'), str(tmp_path / 'out')]
    assert json.loads((tmp_path / 'out/metrics.json').read_text())['data'] == str(other)
    for path in other.glob('*/*/viola'):
        path.rename(path.with_name('violet'))
    refused(evaluate, [run, '--data', other, *flags], other, 'classes')
    for folder, names in said.items():              # what it says it has written
        assert {*names.split(', ')} == {path.name for path in Path(folder).iterdir()}


def test_images_are_written_for_other_tools(run_of_two, tmp_path, no_network, refused):
    """Every I'' of both splits, also where a stem is no UTF-8; into a new or empty folder only."""
    run, data, _ = run_of_two
    data = shutil.copytree(data, tmp_path / 'data')
    for path in (data / 'img/train/viola', data / 'chunk/train/viola'):
        old = sorted(path.iterdir())[0]
        os.rename(old, os.path.join(os.fsencode(path), b'h\xff' + os.fsencode(old.suffix)))
    images, cache = tmp_path / 'images', tmp_path / 'cache'
    images.mkdir()
    flags = ['--device', 'cpu', '--cache', str(cache)]
    evaluate.main([str(run), '--data', str(data), '--out', str(tmp_path / 'out'), '--images', str(images), *flags])
    written = {path.relative_to(images).with_suffix('') for path in images.rglob('*.png')}
    assert len(written) == 23
    assert written == {path.relative_to(data / 'img').with_suffix('') for path in (data / 'img').rglob('*.jpg')}
    _, model, _ = evaluate.load_run(run)
    split, name = preprocess.open_dataset(data, 32, cache).train, os.fsdecode(b'h\xff')
    lms, _, label = split.batch([split.stems.index(name)])
    with torch.no_grad():
        expected = np.asarray(preprocess.picture(model(lms, label)[1][0])).astype(int)
    assert np.abs(np.asarray(Image.open(images / 'train/viola' / f'{name}.png')).astype(int) - expected).max() <= 1
    refused(evaluate, [run, '--images', images, *flags], images, 'empty')
    with pytest.raises(SystemExit):
        evaluate.main([str(run), str(run), '--images', str(tmp_path / 'none')])


def test_without_inception_all_else_comes(run_of_two, no_network, refused, capsys, tmp_path):
    run, _, _ = run_of_two
    evaluate.main([str(run), '--device', 'cpu'])
    out, err = capsys.readouterr()
    assert 'fid, kid and is: not computed' in err and '--inception PATH' in err and 'not computed' in out
    assert 'fid' not in json.loads((run / 'metrics.json').read_text())['train']['fine']
    refused(evaluate, [run, '--device', 'cpu', '--require-inception'], '--inception PATH')
    refused(evaluate, [run, '--device', 'cpu', '--inception', tmp_path / 'none.pth'], 'none.pth')


def test_several_runs_side_by_side(run_of_two, tmp_path, no_network, refused, capsys):
    """A column a run, and one for two seeds; the classifiers C of runs need not be the same."""
    run, data, cache = run_of_two
    for name, changes in (('D', dict(variant='D')), ('E-seed-3', dict(seed=3, out='3')),
                          ('E-seed-4', dict(seed=4, out='4', classifier='c.pt', workers=1))):
        shutil.copytree(run, tmp_path / 'all' / name)
        path = tmp_path / 'all' / name / 'config.json'
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for name, model in (('D', cargan.CARGAN(2, 32, 8, 'D', init_std=0.02)),
                        ('E-seed-4', cargan.CARGAN(2, 32, 8, init_std=0.02))):
        folder, C = tmp_path / 'all' / name, model.residue.classifier
        changes = {'model.pt': dict(model=train.generator_state(model), classifier_digest=evaluate.digest(C)),
                   'classifier.pt': dict(classifier=C.state_dict())}
        for file, change in changes.items():
            torch.save(torch.load(folder / file, weights_only=True) | change, folder / file)
    capsys.readouterr()
    evaluate.main([str(tmp_path / 'all'), '--device', 'cpu', '--out', str(tmp_path / 'figures')])
    out = capsys.readouterr().out
    text = (tmp_path / 'figures/tables.md').read_text()
    assert text.strip() in out and 'seeds: D 1, E 2' in text
    head, *lines = cells(text.split('## Table 1')[1])
    assert head == ['validation', 'D', 'E', 'real frames', 'random frame', 'mean frame']
    lines = {name: row for name, *row in lines}
    assert lines['fid, paper'] == ['307.3725', '240.7771', '-', '-', '-']
    metrics = [json.loads((tmp_path / 'all' / name / 'metrics.json').read_text())['validation']
               for name in ('D', 'E-seed-3', 'E-seed-4')]
    first, *seeds = [found['fine']['l1'] for found in metrics]
    assert seeds[0] != seeds[1]
    assert lines['l1'] == [f'{first:.4f}', f'{np.mean(seeds):.4f} +- {np.std(seeds, ddof=1):.4f}', '0.0000',
                           f'{metrics[0]["random_frame"]["l1"]:.4f}', f'{metrics[0]["mean_frame"]["l1"]:.4f}']
    kept = json.loads((tmp_path / 'figures/tables.json').read_text())
    assert [(title, x['model'], [run['validation'] for run in x['metrics']]) for title, x in kept.items()] == [
        ('D', 'D', metrics[:1]), ('E', 'E', metrics[1:])]
    figure4, figure5, figure6 = (np.asarray(Image.open(tmp_path / f'figures/figure{n}.png').convert('RGB'))
                                 for n in (4, 5, 6))
    assert figure4.shape == (28 + 2 * 132, 130 + 4 * 132, 3) and figure5.shape == (28 + 2 * 132, 130 + 6 * 132, 3)
    assert np.array_equal(figure6, np.delete(figure4, range(130 + 132, 130 + 2 * 132), axis=1))       # without D
    clip = preprocess.example_clips(evaluate.open_run_data(runs.load_config(run)))[1][1]

    def tile(sheet, column):
        return sheet[28 + 132:, 130 + column * 132:][:128, :128].astype(int)

    for column, name in enumerate(('D', 'E-seed-3'), 1):
        with torch.no_grad():
            stages = evaluate.load_run(tmp_path / 'all' / name)[1](*clip[::2])[:2]
        coarse, fine = (np.asarray(preprocess.picture(x[0]).resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
                        for x in stages)
        assert np.abs(tile(figure4, column) - fine).max() <= 1
        assert np.abs(tile(figure5, 2 * column - 1) - coarse).max() <= 1
        assert np.abs(tile(figure5, 2 * column) - fine).max() <= 1

    page = Page(tmp_path / 'figures/report.html')
    assert [image.size for image in page.images] == [(sheet.shape[1], sheet.shape[0])
                                                     for sheet in (figure4, figure5, figure6)]
    assert page.names.count('h2') == 4 and page.names.count('pre') == 2 and cells(page.text) == cells(text)
    path = tmp_path / 'all/E-seed-3/config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(data='/other')))
    refused(evaluate, [tmp_path / 'all', '--device', 'cpu'], path.parent, '/other', 'same data')
    refused(evaluate, [tmp_path / 'all/D', tmp_path / 'none'], tmp_path / 'none', 'not a run')


def test_grid_shows_the_pictures_in_their_place(tmp_path):
    red, half = torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 32, 32), torch.zeros(3, 32, 32)
    preprocess.draw_grid([('one', dict(a=preprocess.picture(red), b=preprocess.picture(half)))], tmp_path / 'grid.png')
    sheet = np.asarray(Image.open(tmp_path / 'grid.png').convert('RGB'))
    assert tuple(sheet[28 + 64, 130 + 64]) == (255, 0, 0) and tuple(sheet[28 + 64, 130 + 132 + 64]) == (128, 128, 128)
    assert (sheet[:28] < 128).any() and (sheet[28:, :120] < 128).any()       # titles and name
    lms = torch.full((1, 32, 32), -1.0)
    lms[:, :16] = 1                                                          # loud low bands
    drawn = np.asarray(preprocess.lms_picture(lms)).astype(int).sum(axis=2)
    assert (drawn[16:] > 600).all() and (drawn[:16] < 30).all()              # bright at the bottom


def test_a_run_is_its_model_or_its_checkpoint_and_the_classifier_they_name(run_of_two, tmp_path, refused):
    run = shutil.copytree(run_of_two[0], tmp_path / 'run')
    _, model, so_far = evaluate.load_run(run)
    assert not model.training and so_far == dict(epoch=1, steps=2)
    assert same(model.residue.classifier.state_dict(), runs.load_file(run / 'classifier.pt')['classifier'])
    (run / 'model.pt').unlink()
    state = torch.load(run / 'checkpoint.pt', weights_only=True)
    _, again, so_far = evaluate.load_run(run)
    assert so_far == dict(epoch=1, steps=2) and same(again.state_dict(), model.state_dict())
    average = {name: value + 1 for name, value in state['model'].items()}
    torch.save(dict(state, average=average), run / 'checkpoint.pt')
    assert not changed(average, evaluate.load_run(run)[1].state_dict())             # of the EMA, where there is one
    (run / 'classifier.pt').rename(tmp_path / 'shared.pt')
    torch.save(dict(state, classifier='../shared.pt'), run / 'checkpoint.pt')
    assert same(evaluate.load_run(run)[1].state_dict(), model.state_dict())
    other = torch.load(tmp_path / 'shared.pt', weights_only=True)
    other['classifier']['resnet.fc.bias'] += 1
    torch.save(other, tmp_path / 'shared.pt')
    refused(evaluate, [run, '--device', 'cpu'], 'shared.pt', 'not the classifier')
    (tmp_path / 'shared.pt').unlink()
    refused(evaluate, [run, '--device', 'cpu'], 'shared.pt', 'no such file')


def test_files_of_a_run_cannot_run_code_and_broken_ones_are_named(run_of_two, tmp_path, refused, monkeypatch):
    run, _, _ = run_of_two
    state, C = torch.load(run / 'model.pt', weights_only=True), torch.load(run / 'classifier.pt', weights_only=True)
    harm, few = Harm(str(tmp_path / 'harm')), {'a': torch.zeros(1)}
    broken = {'code': (dict(state, model=harm), C), 'code of C': (state, dict(C, classifier=harm)),
              'other': (dict(state, model=few), C), 'other C': (state, dict(C, classifier=few)),
              'few': (few, C), 'none': (None, C), 'no C': (state, None)}
    for name, files in broken.items():
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(run / 'config.json', folder)
        for file, content in zip(('model.pt', 'classifier.pt'), files):
            if content is not None:
                torch.save(content, folder / file)
        file = 'checkpoint.pt' if name == 'none' else 'classifier.pt' if 'C' in name else 'model.pt'
        refused(evaluate, [folder, '--device', 'cpu'], folder / file)
    (tmp_path / 'few/model.pt').write_bytes((run / 'model.pt').read_bytes()[:5000])
    refused(evaluate, [tmp_path / 'few', '--device', 'cpu'], tmp_path / 'few/model.pt')
    assert not (tmp_path / 'harm').exists()
    config = json.loads((run / 'config.json').read_text())
    for change in (dict(variant='F'), dict(classes=None), dict(size=33)):
        (tmp_path / 'few/config.json').write_text(json.dumps(config | change))
        shutil.copy(run / 'model.pt', tmp_path / 'few'), shutil.copy(run / 'classifier.pt', tmp_path / 'few')
        refused(evaluate, [tmp_path / 'few', '--device', 'cpu'], tmp_path / 'few', 'config.json')
    (tmp_path / 'elsewhere').mkdir()
    refused(evaluate, [tmp_path / 'elsewhere'], tmp_path / 'elsewhere', 'not a run')
    monkeypatch.chdir(tmp_path / 'elsewhere')
    refused(evaluate, [], 'no run', 'python train.py')


# ------------------------------------------------------------------------- a run's page, a recording

NASTY = '<b>&"\udcff'       # a class or a folder may be called so


class Page(HTMLParser):
    """What is on a page: its tags in order with their attributes, the pictures as Pillow reads them, its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], '', []
        self.feed(path.read_text('utf-8'))
        self.names = [name for name, _ in self.tags]
        self.images = [Image.open(io.BytesIO(b64decode(more['src'].removeprefix('data:image/jpeg;base64,'))))
                       for name, more in self.tags if name == 'img']
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open += [tag] * (tag not in ('meta', 'link', 'img'))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def write_log(run, rows, tail=''):
    lines = ['step,epoch,L_C,L_cGAN,L_L1,L_D', *(','.join(map(str, row)) for row in rows), tail]
    (run / 'log.csv').write_text('\n'.join(lines))


@pytest.fixture
def finished(tmp_path):
    """A run of 20 epochs of ten steps; its pictures are of one colour each, the samples' redder from each to the next.
    """
    run, figures = tmp_path / 'run', dict(accuracy=0.5, accuracy_independent=0.25, l1=0.125)
    (run / 'samples').mkdir(parents=True)
    made = {'command': 'python train.py --data "a b"', 'machine': 'an <abacus>', 'commit': ''}
    (run / 'config.json').write_text(json.dumps(dict(
        size=64, base=32, disc_base=16, seed=0, variant='C', data=f'/data/{NASTY}', cache=None, preset='small',
        epochs=20, made=made)))
    found = dict(dict.fromkeys(('coarse', 'real', 'random_frame', 'mean_frame'), figures),
                 fine=dict(figures, classes={NASTY: figures}), failures=dict(clips=2, wrong=1))
    (run / 'metrics.json').write_text(json.dumps(dict(
        data=f'/data/{NASTY}', size=64, epoch=20, pictures=dict(train=2, validation=2), independent_accuracy=0.75,
        versions=dict(torch='2.x'), train=found, validation=found)))
    write_log(run, [(step, 1 + (step - 1) // 10, *(k + 100 / step for k in range(4))) for step in range(1, 201)])
    for epoch in range(1, 21):
        Image.new('RGB', (90, 60), (10 * epoch, 0, 0)).save(run / f'samples/epoch-{epoch:04d}.png')
    Image.new('RGB', (100, 60), (0, 200, 0)).save(run / 'grid.png')
    Image.new('RGB', (100, 60), (0, 0, 200)).save(run / 'failures.png')
    return run


REFRESH = 'meta', {'http-equiv': 'refresh', 'content': '30'}


def test_the_page_of_a_finished_run(finished):
    """In order, without anything from elsewhere, and whatever the names are."""
    report.write_page(finished)
    page, text = Page(finished / 'report.html'), (finished / 'report.html').read_text('utf-8')
    green, *reds, blue = [image.getpixel((50, 30)) for image in page.images]
    assert green[1] > 150 and blue[2] > 150 and reds[-1][0] > 140
    assert len(reds) <= 8 and [red[0] for red in reds] == sorted({red[0] for red in reds})
    order = [page.text.index(word) for word in (
        'Model C, without the residue module, on /data/<b>&"', 'small', 'python train.py --data "a b"',
        'after epoch 20', 'real frames', '0.1250', 'L_C', 'L_cGAN', 'L_L1', 'L_D', 'Samples over time, 7 of 20',
        'Failures', 'machine: an <abacus>', 'torch: 2.x')]
    assert order == sorted(order) and page.text.count('python train.py') == 1 and 'commit' not in page.text
    assert page.names.count('svg') == 4 and 'epoch 20 of 20' in page.text and REFRESH not in page.tags
    assert all(more['alt'] for name, more in page.tags if name == 'img') and ('details', {}) in page.tags    # folded
    assert not {'script', 'b', 'abacus', 'iframe', 'object', 'base'} & {*page.names}
    assert page.text.count('<b>&"\\udcff') == 3                             # the data twice, a class once
    assert all(more[name].startswith('data:') for _, more in page.tags for name in ('src', 'href') if name in more)
    assert not re.search(r'https?:|url\(|@import', text)
    several = finished.parent / '<i>'
    several.mkdir()
    report.write_folder_page(several, f'# {NASTY}\n\n| {NASTY} |\n|---|\n\n{NASTY}')
    page = Page(several / 'report.html')
    assert page.names[-4:] == ['h1', 'h2', 'pre', 'p'] and page.text.count('<b>&"') == 3 and '<i>: sev' in page.text
    with pytest.raises(InputError):
        report.write_page(several)


def test_the_page_while_a_run_is_at_work(finished):
    """It has the newest sample for the grid and loads itself again; also where a run goes on after its end."""
    config, metrics = json.loads((finished / 'config.json').read_text()), finished / 'metrics.json'
    (finished / 'config.json').write_text(json.dumps(config | dict(epochs=30)))
    report.write_page(finished)
    page = Page(finished / 'report.html')
    assert REFRESH in page.tags and page.images[0].getpixel((50, 30))[0] > 150 and 'after epoch 20' in page.text
    metrics.unlink(), (finished / 'failures.png').unlink()
    for epoch in (16, 17, 18, 19, 20):
        (finished / f'samples/epoch-{epoch:04d}.png').unlink()
    del config['made']                                              # as runs before there was one
    (finished / 'config.json').write_text(json.dumps(config))
    report.write_page(finished)
    page = Page(finished / 'report.html')
    assert REFRESH in page.tags and 'epoch 15 of 20' in page.text and 'real frames' not in page.text
    assert abs(page.images[0].getpixel((50, 30))[0] - 150) < 5


def test_large_pictures_and_long_logs_make_no_large_page(finished):
    noise = np.random.default_rng(0).integers(0, 256, (852, 357, 3), np.uint8).repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(noise).save(finished / 'noise', 'BMP')
    for path in [finished / 'grid.png', finished / 'failures.png', *finished.glob('samples/*')]:    # of 13 classes
        path.unlink()
        if path.parent == finished or path.stem > 'epoch-0012':
            path.symlink_to(finished / 'noise')
    losses = np.random.default_rng(0).random((50_000, 4)).round(4)
    write_log(finished, [(i + 1, 1 + i // 250, *row) for i, row in enumerate(losses)])
    report.write_page(finished)
    page = Page(finished / 'report.html')
    assert len(page.images) == 10 and page.images[0].width > 650 and page.images[1].width > 300
    assert (finished / 'report.html').stat().st_size < 3e6


@pytest.mark.parametrize('log, curves', [(None, 0), ('step,epoch,L_C,L_cGAN,L_L1,L_D\n', 0), ('1,1,1,2,3,4\n', 4)])
def test_a_log_of_a_row_or_none(finished, log, curves):
    (finished / 'log.csv').unlink() if log is None else (finished / 'log.csv').write_text(log)
    report.write_page(finished)
    assert Page(finished / 'report.html').names.count('svg') == curves == 4 * (finished / 'curves.png').exists()


def test_the_log_is_read_without_what_is_torn(tmp_path):
    write_log(tmp_path, [(1, 1, 1, 2, 3, 4), (2, 1, 1, 2, 3, 4), (3, 2, 1, 'inf', 3, 4), ('3', 2), (4, 2, 5, 6, 7, 8)],
              '5,3,1,2,3,4')        # the last line's end may be missing
    epochs, losses = report.read_log(tmp_path / 'log.csv')
    assert epochs.tolist() == [0.5, 1, 2] and losses.tolist() == [[1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_the_curves_by_hand(tmp_path):
    """Of five epochs of one step: what is drawn faint, bold and beside the axes, in the SVG and in the PNG."""
    values, means = np.array([4.0, 0, 2, 6, 4]), np.array([2, 2, 8 / 3, 4, 5])      # of each and its neighbours
    write_log(tmp_path, [(i + 1, i + 1, value, value, 1, -value) for i, value in enumerate(values)])
    svgs = report.draw_losses(tmp_path / 'log.csv', tmp_path / 'curves.png')
    low, high = np.quantile([*values, *means], [0.005, 0.995])
    low, high = low - (high - low) / 20, high + (high - low) / 20

    def points(svg, kind):
        text, = re.findall(f'class="{kind}" points="([^"]*)"', svg)
        return [tuple(map(float, point.split(','))) for point in text.split()]

    for kind, line in (('smooth', means), ('raw', np.clip(values, low, high))):
        x, y = zip(*points(svgs[0], kind))
        assert x == (110, 170, 230, 290, 350)
        np.testing.assert_allclose(y, 146 - 122 * (line - low) / (high - low), atol=0.051)
    words = [re.findall(f'<text class="{anchor}"[^>]*>([^<]*)', svgs[0]) for anchor in ('ms', 'rs')]
    assert words == [['0', '1', '2', '3', '4', '5'], ['epoch', '0', '2', '4', '6']]
    sheet = Image.open(tmp_path / 'curves.png').convert('RGB')
    assert sheet.size == (1440, 680)
    for i, svg in enumerate(svgs):
        for x, y in points(svg, 'smooth')[1:-1]:
            assert sheet.getpixel((i % 2 * 720 + round(2 * x), i // 2 * 340 + round(2 * y))) == (31, 95, 168)


def test_ticks_are_round_and_few():
    for low, high in ((0.18, 0.83), (-0.3, 7), (100, 101), (-7e-4, 9e-4), (0, 5e6), (0, 5.99)):
        found = report.ticks(low, high)
        assert 3 <= len(found) <= 6 and low <= found[0] and found[-1] <= high + 1e-9
        np.testing.assert_allclose(np.diff(found), float(f'{found[1] - found[0]:.0e}'))
    assert report.ticks(0, 3.5, least=1).tolist() == [0, 1, 2, 3]


def test_a_recording_is_heard_every_hop():
    """Half a second from each moment on, silence after the end: by a model whose I'' is as bright as its LMS is loud.
    """
    def ear(lms, label):
        assert lms.shape == (1, 1, 32, 32) and label.tolist() == [1]
        return None, lms.mean().expand(1, 3, 32, 32), None

    def heard(wave, rate=22050, hop=0.5):
        frames = preprocess.generate_recording(ear, ['a', 'b'], wave, rate, 'b', 32, hop=hop)
        np.testing.assert_allclose([seconds for seconds, _ in frames], hop * np.arange(len(frames)))
        return [image.getpixel((0, 0))[0] for _, image in frames]

    wave = np.random.default_rng(0).normal(0, 0.1, 44100).astype(np.float32)
    wave[22050:] = 0                                                # a second of noise, a second of silence
    loud, also, still, last = heard(wave)
    assert loud > still == last and abs(also - loud) < 20
    found = heard(wave, hop=0.25)
    assert len(found) == 8 and still < found[3] < loud and found[4] == still        # half of found[3] is noise
    # 0.15 s are 3307.5 samples, read from 3308; a tenth of a second, or nothing, is one picture
    for length, hop, count in ((0.15, 0.15, 1), (1.1, 0.1, 11), (0.1, 0.5, 1), (0, 0.5, 1), (0.501, 0.5, 2),
                               (1, 1 / 3, 3)):
        assert len(heard(wave[:round(length * 22050)], hop=hop)) == count
    assert len(heard(wave[:11025], rate=11025)) == 2                # half of this rate is no whole number


@pytest.mark.parametrize('hop', [0.5, 0.125, 1 / 3])
def test_a_gif_moves_in_real_time(tmp_path, hop):
    frames = [(i * hop, Image.new('RGB', (32, 32), (10 * i, 0, 0))) for i in range(24)]
    report.save_recording(frames, tmp_path / 'a.gif', hop)
    with Image.open(tmp_path / 'a.gif') as gif:
        assert gif.format == 'GIF' and gif.n_frames == 24 and gif.info['loop'] == 0
        durations = []
        for i in range(24):
            gif.seek(i)
            durations.append(gif.info['duration'])
            assert abs(gif.convert('RGB').getpixel((5, 5))[0] - 10 * i) < 5
    assert all(abs(duration - 1000 * hop) < 10 for duration in durations)
    assert abs(sum(durations) - 24000 * hop) <= 5                   # no error adds up


def test_a_png_wraps_at_sixteen(tmp_path):
    frames = [(i / 4, Image.new('RGB', (32, 32), (10 * i, 0, 0))) for i in range(20)]
    report.save_recording(frames, str(tmp_path / 'a.png'))
    sheet = Image.open(tmp_path / 'a.png').convert('RGB')
    assert sheet.size == (4 + 16 * 132, 2 * (28 + 132))
    for i in range(20):
        left, top = 4 + i % 16 * 132, i // 16 * 160
        assert sheet.getpixel((left + 64, top + 28 + 64)) == (10 * i, 0, 0)
        assert min(sheet.crop((left, top, left + 128, top + 28)).convert('L').tobytes()) < 100      # its time above


def test_a_picture_is_generated_for_a_recording(trained, demo, tmp_path, refused, monkeypatch, capsys):
    run, cache = trained
    config, model, _ = evaluate.load_run(run)
    clip = sorted((demo / 'chunk/validation/sax').iterdir())[0]
    lms, _, label = evaluate.open_run_data(config, cache=cache).validation.batch([2 * config['classes'].index('sax')])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, 'load_run', lru_cache(evaluate.load_run))         # for time

    def tiles(path):
        sheet = np.asarray(Image.open(path).convert('RGB')).astype(int)
        assert sheet.shape[0] == 28 + 132 and sheet.shape[1] % 132 == 4
        return [sheet[28:, 4 + left:][:128, :128] for left in range(0, sheet.shape[1] - 4, 132)]

    flags = ['--label', 'sax', '--device', 'cpu']
    evaluate.main([str(run), '--audio', str(clip), *flags])
    generated, = tiles(clip.with_suffix('.png').name)
    with torch.no_grad():
        expected = preprocess.picture(model(lms, label)[1][0]).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.abs(generated - np.asarray(expected)).max() <= 3      # the cache holds float16
    samples = np.random.default_rng(0).integers(-9999, 9999, (28000, 2)).astype('<i2')
    wavfile.write('long.wav', 22050, samples)               # 1.27 s
    wavfile.write('short.wav', 22050, samples[:2205])       # 0.1 s
    long = [run, '--audio', 'long.wav', *flags]
    evaluate.main([*map(str, long), '--out', 'scene.png'])
    parts = tiles('scene.png')
    assert len(parts) == 3 and not np.array_equal(parts[0], parts[2])
    evaluate.main([*map(str, long), '--out', 'twice.png', '--hop', '0.25'])
    assert '\ntwice.png: 6 pictures of sax, every 0.25 s\n' in capsys.readouterr().out
    assert len(tiles('twice.png')) == 6 and np.array_equal(tiles('twice.png')[::2], parts)
    evaluate.main([*map(str, long), '--out', 'scene.gif', '--hop', '0.3'])
    with Image.open('scene.gif') as gif:
        durations = [gif.seek(i) or gif.info['duration'] for i in range(gif.n_frames)]
    assert gif.size == (32, 32) and durations == [300] * 5
    evaluate.main([str(run), '--audio', 'short.wav', *flags])
    assert len(tiles('short.png')) == 1
    refused(evaluate, [*long, '--out', 'scene.png'], 'scene.png', 'exists')
    refused(evaluate, [*long, '--out', 'scene.jpg'], 'scene.jpg', '.png or .gif')
    refused(evaluate, [run, '--audio', 'long.wav', '--label', 'kazoo'], 'kazoo', 'bassoon, cello')
    refused(evaluate, [run, '--audio', 'scene.png', '--out', 'x.png', *flags], 'scene.png', 'WAV')
    for hop in '0', '-1', 'nan', '601':
        refused(evaluate, [*long, '--out', 'x.png', '--hop', hop], '--hop')
    refused(evaluate, [run, run, '--audio', 'long.wav', '--label', 'sax'], '--audio')
    refused(evaluate, [run, *flags], '--label', '--audio')
    refused(evaluate, [run, '--batch-size', '0'], '--batch-size')
    assert not list(tmp_path.glob('x.*')) and not list(tmp_path.glob('*.jpg'))


def test_what_plays_in_a_recording_is_heard(trained, demo, tmp_path, monkeypatch, capsys):
    """Without --label: the three likeliest on average over its half seconds, a tuba's and two of a flute here."""
    run, cache = trained
    cache, train_classifier = shutil.copytree(cache, tmp_path / 'cache'), evaluate.train_classifier
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, 'load_run', lru_cache(evaluate.load_run))         # for time, as are the few epochs
    monkeypatch.setattr(evaluate, 'train_classifier',
                        lambda *args, **more: train_classifier(*args, **more | dict(epochs=25)))
    clips = [sorted((demo / 'chunk/validation' / name).iterdir())[0] for name in ('tuba', 'flute', 'flute')]
    rate, samples = wavfile.read(clips[0])[0], np.concatenate([wavfile.read(clip)[1] for clip in clips])
    wavfile.write('three.wav', rate, samples)
    flags = [str(run), '--audio', 'three.wav', '--cache', str(cache), '--device', 'cpu']
    evaluate.main([*flags, '--out', 'heard.gif'])
    line, last = capsys.readouterr().out.splitlines()[-2:]
    dataset = evaluate.open_run_data(runs.load_config(run), cache=cache)
    audio, accuracy = evaluate.get_audio_classifier(dataset)
    lms = preprocess.recording_lms(*preprocess.read_wav('three.wav'), 32)
    with torch.no_grad():
        heard = audio(lms).softmax(dim=1).mean(dim=0)
    likely = [(dataset.classes[i], f'{heard[i]:.4f}') for i in heard.argsort(descending=True)[:3]]
    assert len(lms) == 3 and line.startswith('three.wav: ')
    assert re.findall(r'(\w+) (0\.\d{4})\b', line.split(', by')[0]) == likely and f'is {accuracy:.4f};' in line
    assert last == f'heard.gif: 3 pictures of {likely[0][0]}, every 0.5 s'
    evaluate.main([*flags, '--out', 'told.gif', '--label', likely[0][0]])
    assert Path('told.gif').read_bytes() == Path('heard.gif').read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 1           # nothing is heard where it is told


# --------------------------------------------------------------------------------------- baselines

both_baselines = pytest.mark.parametrize('name', baselines.BASELINES)


@pytest.fixture(scope='module')
def random_C():
    torch.manual_seed(0)
    return cargan.Classifier(5, pretrained=False).eval()


@pytest.fixture(scope='module')
def pairs():
    """26 demo pairs at 32x32, two of each instrument, as a batch."""
    lms, image, label = [], [], []
    for number, instrument in enumerate(DEMO_INSTRUMENTS):
        for piece in (1, 2):
            waveform, picture = demo_pair(instrument, 'train', piece, 0.0, size=32)
            lms.append(torch.from_numpy(preprocess.log_mel_spectrogram(waveform, 44_100)))
            image.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1)
            label.append(number)
    return preprocess.network_lms(torch.stack(lms), 32), torch.stack(image), torch.tensor(label)


def baseline(name, classifier, size=32, base=8, lms_channels=1):
    """A baseline of five classes and its discriminator."""
    torch.manual_seed(0)
    model, D = baselines.BASELINES[name]
    return model(5, size, base, lms_channels, classifier), D(size, base, lms_channels)


def clips(n=4, size=32, lms_channels=1):
    """Random LMS, images and labels (0, 1, 1, 1)."""
    torch.manual_seed(1)
    lms, image = torch.rand(n, lms_channels, size, size) * 2 - 1, torch.rand(n, 3, size, size) * 2 - 1
    return lms, image, (torch.arange(n) + 2) // 3


def numbers(*networks):
    return sum(p.numel() for network in networks for p in network.parameters())


@both_baselines
@pytest.mark.parametrize('size, lms_channels', [(32, 1), (64, 3), (128, 1)])
def test_baselines_shapes(random_C, name, size, lms_channels):
    model, D = baseline(name, random_C, size, 4, lms_channels)
    lms, image, label = clips(3, size, lms_channels)
    coarse, fine, logits = model(lms, label)
    for generated in (coarse, fine, model.generate(lms)):
        assert generated.shape == image.shape and generated.dtype == torch.float32 and 0 < generated.abs().max() <= 1
    assert logits.shape == (3, 5)
    if name == 'S2IC':
        assert model.audio.features(lms).shape == (3, 128) and model.audio(lms).shape == (3, 5)
        assert D(image, model.audio.features(lms)).shape == (3,)
    else:
        assert D(image, lms).shape == (3,)
        outputs = model.cycles(lms, image)
        assert len(outputs) == 8
        for kind, x in outputs.items():
            assert x.shape == (lms if kind.endswith('Sound') else image).shape and x.abs().max() <= 1


@both_baselines
@pytest.mark.parametrize('size', [0, 16, 48])
def test_baselines_sizes(random_C, name, size):
    model, D = baselines.BASELINES[name]
    for make in (lambda: model(5, size, classifier=random_C), lambda: D(size)):
        with pytest.raises(ValueError, match=f'size {size} is not a power of two from 32'):
            make()


@pytest.mark.parametrize('size, base, audio, s2ic, cmcgan', [
    (64, 64, 399_869, (3_371_971, 3_069_825), ((2_755_392, 2_757_440, 2_795_393, 2_797_443), 6_046_337)),
    (64, 32, 399_869, (1_001_987, 785_377), ((689_568, 690_592, 709_569, 710_595), 1_515_841)),
    (256, 64, 4_332_029, (11_762_627, 11_460_481), ((11_146_048, 11_148_096, 11_227_009, 11_229_059), 22_827_649))])
def test_baselines_parameters(size, base, audio, s2ic, cmcgan):
    with torch.device('meta'):
        model = baselines.S2IC(13, size, base)
        assert numbers(model.audio) == audio
        assert (numbers(model.phi, model.G), numbers(baselines.S2ICDiscriminator(size, base))) == s2ic
        model = baselines.CMCGAN(13, size, base)
        nets = tuple(numbers(getattr(model, name)) for name in NETS['CMCGAN'])
        assert (nets, numbers(baselines.CMCGANDiscriminator(size, base))) == cmcgan


@both_baselines
def test_baselines_weights_start_from_a_normal_distribution(random_C, name):
    for network in baseline(name, random_C):
        for key, module in network.named_modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and not key.startswith(('residue', 'audio')):
                normalised = hasattr(module, 'parametrizations')
                weight = module.parametrizations.weight.original if normalised else module.weight
                if weight.numel() > 1000:
                    assert weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert module.bias is None or not module.bias.any()


def test_audio_classifier_decays_its_linear_layers_alone():
    audio = baselines.AudioClassifier(13, 32)
    free, decayed = audio.parameter_groups()
    linear = {p for module in audio.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    assert set(decayed['params']) == linear and decayed['weight_decay'] == 1e-4 and 'weight_decay' not in free
    assert set(free['params']) | linear == set(audio.parameters()) and not set(free['params']) & linear
    assert [module.p for module in audio.modules() if isinstance(module, nn.Dropout)] == [0.3, 0.2]


def test_audio_classifier_learns_half_seconds_from_any_moment_on():
    """In training the LMS turn by up to a quarter of their time, each way; elsewhere they are as they are."""
    audio, lms, heard = baselines.AudioClassifier(13, 32), torch.randn(2, 1, 32, 32), []
    audio.convolutions.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    torch.manual_seed(0)
    for _ in range(200):
        audio(lms)
    turns = {shift: lms.roll(shift, dims=3) for shift in range(-8, 9)}
    found = [[shift for shift, turned in turns.items() if torch.equal(turned, x)] for x in heard]
    assert {shift for shift, in found} == {*turns}
    heard.clear()
    audio.eval()(lms), audio.train().features(lms)
    assert torch.equal(heard[0], lms) and torch.equal(heard[1], lms)


def test_losses_of_the_baselines_by_hand():
    torch.manual_seed(0)
    logits = torch.randn(5, 6, dtype=torch.double)
    S, valid = logits.sigmoid(), torch.tensor([True, True, False, True, False, True])

    def mean(x, rows=slice(None)):
        return x[rows].mean()

    expected = mean(S[0].log()) + (mean((1 - S[1]).log(), valid) + mean((1 - S[2]).log())) / 2
    assert baselines.s2ic_discriminator_loss(*logits[:3], valid).item() == pytest.approx(-expected.item())
    L_Dw = mean(S[0].log()) + (mean((1 - S[1]).log(), valid) + mean((1 - S[2]).log(), valid)) / 2
    L_Df = mean(S[0].log()) + (mean((1 - S[3]).log()) + mean((1 - S[4]).log())) / 2
    assert baselines.cmcgan_discriminator_loss(*logits, valid).item() == pytest.approx(-(L_Dw + L_Df).item())
    zero, valid, ln2 = torch.zeros(6), torch.ones(6, dtype=torch.bool), math.log(2)
    assert baselines.s2ic_discriminator_loss(zero, zero, zero, valid).item() == pytest.approx(2 * ln2)
    assert baselines.cmcgan_discriminator_loss(*[zero] * 5, valid).item() == pytest.approx(4 * ln2)
    assert baselines.generator_loss(zero, saturating=False).item() == pytest.approx(ln2)
    assert baselines.generator_loss(zero, zero, saturating=False).item() == pytest.approx(2 * ln2)
    x = {'RF_Sound': zero + 1, 'RF_Image': zero + 2, 'FR_Image': zero + 4, 'FR_Sound': zero + 8}
    assert baselines.consistency_loss(zero, zero - 16, x).item() == 1 + 18 + 20 + 8


def mismatched(label, seed):
    torch.manual_seed(seed)
    return baselines.mismatch(label)


def test_s2ic_steps_by_hand(random_C):
    model, D = baseline('S2IC', random_C)
    (lms, image, label), audio = clips(), model.audio.features
    torch.manual_seed(2)
    terms, fakes = baselines.GeneratorStep(model, D)(lms, image, label)
    torch.manual_seed(2)
    fake = model.G(model.phi(audio(lms)), torch.randn(4, 10))
    assert torch.equal(fakes[0], fake) and not fakes[0].requires_grad
    L_G = D(fake, audio(lms)).sigmoid().log().mean().item()
    torch.testing.assert_close(terms, torch.tensor([[0, -L_G, 0]]) * 4)
    index, valid = mismatched(label, 3)
    assert valid.all()
    real, wrong, fake = (D(x, audio(lms)).sigmoid() for x in (image, image[index], fake))
    expected = -real.log().mean() - ((1 - wrong).log().mean() + (1 - fake).log().mean()) / 2
    torch.manual_seed(3)
    L_D, = baselines.DiscriminatorStep(model, D)(lms, image, label, fakes)
    torch.testing.assert_close(L_D, expected.view(1, 1) * 4)


def test_cmcgan_steps_by_hand(random_C):
    model, D = baseline('CMCGAN', random_C)
    a, v, label = clips()
    E_A, E_V = model.E_A, model.E_V
    torch.manual_seed(2)
    terms, fakes = baselines.GeneratorStep(model, D)(a, v, label)
    torch.manual_seed(2)
    z = torch.randn(4, 10)
    D_A, D_V = (lambda features, decoder=decoder: decoder(features, z) for decoder in (model.D_A, model.D_V))
    F_Image, F_Sound, R_Sound, R_Image = D_V(E_A(a)), D_A(E_V(v)), D_A(E_A(a)), D_V(E_V(v))
    assert torch.equal(fakes[0], F_Image) and torch.equal(fakes[1], F_Sound)
    assert not fakes[0].requires_grad and not fakes[1].requires_grad
    L_G = D(v, F_Sound).sigmoid().log().mean() + D(F_Image, a).sigmoid().log().mean()
    L_Cons = ((D_A(E_V(F_Image)) - a).abs().mean() + (D_V(E_A(F_Sound)) - v).abs().mean()
              + (D_V(E_A(R_Sound)) - v).abs().mean() + (D_A(E_V(R_Image)) - a).abs().mean())
    torch.testing.assert_close(terms, torch.tensor([[0, -L_G.item(), L_Cons.item()]]) * 4)
    index, valid = mismatched(label, 3)
    assert valid.all()
    real, *others = (D(*pair).sigmoid() for pair in ((v, a), (v, a[index]), (v[index], a), (v, F_Sound), (F_Image, a)))
    expected = -2 * real.log().mean() - sum((1 - other).log().mean() for other in others) / 2
    torch.manual_seed(3)
    L_D, = baselines.DiscriminatorStep(model, D)(a, v, label, fakes)
    torch.testing.assert_close(L_D, expected.view(1, 1) * 4)


def test_mismatch_is_any_row_of_another_class():
    label, seen = torch.tensor([0, 1, 0, 2]), set()
    for seed in range(100):
        index, valid = mismatched(label, seed)
        assert valid.all()
        seen |= set(enumerate(index.tolist()))
    assert seen == {(i, j) for i in range(4) for j in range(4) if label[i] != label[j]}


@both_baselines
def test_a_batch_of_one_class_has_no_wrong_pairs(random_C, name):
    model, D = baseline(name, random_C)
    lms, image, _ = clips()
    label = torch.full((4,), 2)
    assert not baselines.mismatch(label)[1].any()
    _, fakes = baselines.GeneratorStep(model, D)(lms, image, label)
    L_D, = baselines.DiscriminatorStep(model, D)(lms, image, label, fakes)
    L_D.sum().backward()
    assert all(p.grad.isfinite().all() for p in D.parameters()) and any(p.grad.any() for p in D.parameters())
    pairs = [(image, lms), (image, fakes[-1]), (fakes[0], lms)]
    if name == 'S2IC':
        features = model.audio.features(lms)
        pairs = [(image, features), (fakes[0], features)]
    real, *others = (D(*pair) for pair in pairs)
    expected = F.softplus(-real).mean() * (2 if name == 'CMCGAN' else 1) + sum(F.softplus(x).mean() for x in others) / 2
    torch.testing.assert_close(L_D, expected.view(1, 1) * 4)


@both_baselines
def test_discriminators_see_pairs(random_C, name):
    """Not the sum of what they see in each: such a D would never notice that a pair does not match."""
    D = baseline(name, random_C)[1].double().eval()
    x, y = clips(2)[1].double()[:, None]
    a, b = torch.randn(2, 1, *((128,) if name == 'S2IC' else (1, 32, 32))).double()
    change = D(x, a) - D(y, a)
    assert (change - (D(x, b) - D(y, b))).abs().item() > 1e-3 * change.abs().item() > 0


@both_baselines
def test_baselines_see_sound_and_noise_but_not_the_label(random_C, name):
    model = baseline(name, random_C)[0].eval()
    lms, _, label = clips()
    with torch.no_grad():
        calls = []
        with model.residue.classifier.register_forward_hook(lambda *_: calls.append(1)):
            first = model.eval()(lms, label)
        assert len(calls) == 1
        random = torch.get_rng_state()
        for other in (label, label + 1):
            for x, y in zip(first, model.eval()(lms, other)):
                assert torch.equal(x, y)
        assert torch.equal(torch.get_rng_state(), random)
        assert torch.equal(model.eval().generate(lms), first[1])
        assert torch.equal(copy.deepcopy(model).eval().generate(lms), first[1])
        assert not torch.equal(model.generate(lms), first[1])                       # another z
        assert not torch.equal(model.eval().generate(lms.flip(0)), first[1])
        z = torch.randn(4, 10)
        assert torch.equal(model.generate(lms, z), model.generate(lms, z))
        assert not torch.equal(model.generate(lms, z), model.generate(lms, z.flip(0)))
        torch.testing.assert_close(random_C(first[0]), first[2])
        assert torch.equal(first[0], first[1])
        if name == 'CMCGAN':
            z = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
            assert torch.equal(first[1], model.cycles(lms, torch.zeros(4, 3, 32, 32), z)['F_Image'])
        model.train()
        torch.manual_seed(7)
        first = model.generate(lms)
        assert not torch.equal(model.generate(lms), first)
        torch.manual_seed(7)
        assert torch.equal(model.generate(lms), first)          # as a checkpoint's random state brings it back


@both_baselines
def test_each_baseline_step_moves_its_own_weights_alone(random_C, name):
    (model, D), batch = baseline(name, random_C), clips()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == numbers(*(getattr(model, net) for net in NETS[name]))
    for network in (model.residue, *([model.audio] if name == 'S2IC' else [])):
        assert not any(module.training for module in network.modules() if module is not model.residue)
    for moving, fixed in ((trained, list(D.parameters())), (list(D.parameters()), trained)):
        for p in (*moving, *fixed):
            p.requires_grad_(any(p is q for q in moving))
        before, D_before = copy.deepcopy(model.state_dict()), [p.clone() for p in D.parameters()]
        if moving is trained:
            terms, fakes = baselines.GeneratorStep(model, D)(*batch)
        else:
            terms, = baselines.DiscriminatorStep(model, D)(*batch, fakes)
        terms.sum().backward()
        torch.optim.Adam(moving, lr=1e-3).step()
        moved = {key.split('.')[0] for key in changed(before, model.state_dict())}
        assert moved == (set(NETS[name]) if moving is trained else set())       # C and the audio classifier stay
        assert any(not torch.equal(p, q) for p, q in zip(D.parameters(), D_before)) == (moving is not trained)
    assert not [key for key in model.state_dict() if not key.startswith((*NETS[name], 'audio', 'residue'))]


@pytest.mark.parametrize('kind, nets', [('RF_Sound', 'E_A E_V D_A D_V'), ('RF_Image', 'E_A E_V D_A D_V'),
                                        ('FR_Image', 'E_A D_A D_V'), ('FR_Sound', 'E_V D_A D_V')])
def test_each_cycle_trains_the_networks_on_its_way(random_C, kind, nets):
    model, _ = baseline('CMCGAN', random_C)
    lms, image, _ = clips()
    F.l1_loss(model.cycles(lms, image)[kind], lms if kind.endswith('Sound') else image).backward()
    reached = [net for net in NETS['CMCGAN'] if any(p.grad is not None and p.grad.any()
                                                    for p in getattr(model, net).parameters())]
    assert reached == nets.split()


@both_baselines
def test_baseline_steps_enter_autocast_in_any_thread(random_C, name):
    (model, D), batch, seen, out = baseline(name, random_C), clips(), set(), []
    for module in (*model.modules(), *D.modules()):
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            module.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))

    def work():
        out.extend(baselines.GeneratorStep(model, D, torch.bfloat16)(*batch))
        out.extend(baselines.DiscriminatorStep(model, D, torch.bfloat16)(*batch, out[1]))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {torch.bfloat16}
    for x in (out[0], *out[1], out[2]):
        assert x.dtype == torch.float32 and x.isfinite().all()


def test_cmcgan_learns_to_reconstruct(pairs, random_C):
    lms, image, label = pairs
    model, D = baseline('CMCGAN', random_C, base=16)
    steps = baselines.GeneratorStep(model, D), baselines.DiscriminatorStep(model, D)
    sides = [[p for p in network.parameters() if p.requires_grad] for network in (model, D)]
    optimizers = [torch.optim.Adam(side, lr=2e-4, betas=(0.5, 0.999)) for side in sides]
    curve = []
    for _ in range(60):
        terms, fakes = steps[0](lms, image, label)
        curve.append(terms[0, 2].item() / len(label))
        for loss, optimizer in ((terms[0, 1] + 10 * terms[0, 2], optimizers[0]),
                                (*steps[1](lms, image, label, fakes), optimizers[1])):
            optimizer.zero_grad()
            (loss.sum() / len(label)).backward()
            optimizer.step()
    assert curve[-1] < 0.75 * curve[0]          # 0.93 of it without L_Cons


def test_audio_classifier_learns(pairs):
    lms, _, label = pairs
    torch.manual_seed(0)
    audio = baselines.AudioClassifier(13, 32)
    optimizer = torch.optim.Adam(audio.parameter_groups(), lr=1e-3)
    for _ in range(400):
        loss = F.cross_entropy(audio(lms), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (audio.eval()(lms).argmax(dim=1) == label).sum() >= 25


# ------------------------------------------------------------------------ the whole, as a newcomer

def test_train_without_data_makes_the_demo_and_ends_with_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_module, 'write_demo', partial(write_demo, train=4, validation=2))        # for time
    train.main('--size 32 --base 8 --batch-size 26 --epochs 1 --classifier-epochs 1 --device cpu'.split())
    out = capsys.readouterr().out
    for words in ('built-in demo data', '52 pairs in train, 26 in validation', 'epoch 1/1', "I'' fine", 'metrics.json'):
        assert words in out
    assert len(list((tmp_path / 'runs').glob('demo-E-*/samples/epoch-0001.png'))) == 1
    path, = Path('runs').glob('demo-E-*/report.html')
    assert out.splitlines()[-1] == f'its page: {path}'
    assert 'python train.py --size 32 --base 8 --batch-size 26' in Page(path).text


def test_arrows_of_import_run_one_way():
    """../shared/design.md: a file knows those that serve it and no other; every import stands at a file's top."""
    rooms = {'runs': (), 'cargan': (), 'baselines': ('cargan',), 'demo': ('runs',), 'preprocess': ('runs',)}
    rooms['report'] = (*rooms['preprocess'], 'preprocess', 'cargan')
    rooms['evaluate'] = (*rooms['report'], 'report', 'demo', 'baselines')
    rooms['train'] = (*rooms['evaluate'], 'evaluate')
    assert {path.stem for path in HERE.glob('*.py')} == {*rooms, Path(__file__).stem}
    for room, known in rooms.items():
        tree = ast.parse((HERE / f'{room}.py').read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {name for node in imports for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                                                       [alias.name for alias in node.names])}
        assert names & rooms.keys() <= {*known}, room
        assert all(node in tree.body or any(node in block.body for block in tree.body if isinstance(block, ast.Try))
                   for node in imports), room


def test_the_readmes_lines_of_python(trained, demo, tmp_path, monkeypatch):
    """From a run and a recording to a picture, as a reader would type them."""
    lines, = [block for block in re.findall(r'```python\n(.*?)```', (HERE / 'README.md').read_text(), re.S)
              if 'load_run' in block]
    assert len(lines.splitlines()) <= 7
    monkeypatch.chdir(tmp_path)
    shutil.copy(next((demo / 'chunk/validation/violin').iterdir()), 'clip.wav')
    exec(re.sub(r'runs/[^\'"]*', str(trained[0]), lines), {})
    assert Image.open('scene.png').size == (4 + 132, 28 + 132)        # a picture and its time
