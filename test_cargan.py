"""The tests: python -m pytest. On a CPU, without network and without any data but the demo's."""
import copy
import csv
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from scipy.signal import resample_poly
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cargan
import evaluate
import preprocess
import train
from evaluate import InceptionV3, Moments, frechet_distance, inception, inception_score
from preprocess import InputError

HERE = Path(__file__).parent
SMALL = '--size 32 --base 8 --disc-base 8 --batch-size 13 --init-std 0.02 --no-pretrained --classifier-epochs 1'.split()


@pytest.fixture(scope='session')
def demo(tmp_path_factory):
    """A small demo dataset: 13 classes, 4 pairs in train and 2 in validation each."""
    folder = tmp_path_factory.mktemp('data') / 'demo'
    preprocess.write_demo(folder, train=4, validation=2, size=64)
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
                '--epochs', '2', '--sample-every', '1', '--workers', '2', '--strict', '--device', 'cpu', *SMALL])
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
            preprocess.run_command(lambda: module.main([str(word) for word in argv]))
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


def test_lms_does_not_depend_on_the_files_rate():
    def tone(rate):
        return (0.5 * np.sin(2 * np.pi * 1000 * np.arange(rate // 2) / rate)).astype(np.float32)
    reference = preprocess.log_mel_spectrogram(tone(22050), 22050)
    for rate in (44100, 48000, 96000, 192000):
        lms = preprocess.log_mel_spectrogram(tone(rate), rate)
        loud = reference[:, 3:18] > 0
        np.testing.assert_allclose(lms[:, 3:18][loud], reference[:, 3:18][loud], atol=0.2)


EXTENSIBLE = struct.pack('<HHIH14s', 22, 20, 0, 1, bytes.fromhex('000000001000800000aa00389b71'))
RARE_WAVS = {       # each of them holds full scale downwards and nothing
    '12 bits in 2 bytes': wav_bytes(struct.pack('<2h', -2 ** 15, 0), 12, block=2),
    '20 bits in 3 bytes, extensible': wav_bytes(b'\0\0\x80\0\0\0', 20, code=0xFFFE, block=3, more=EXTENSIBLE),
    '20 bits in 4 bytes': wav_bytes(struct.pack('<2i', -2 ** 31, 0), 20, block=4),
    '40 bits': wav_bytes(b'\0\0\0\0\x80' + bytes(5), 40),
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
    'not a WAV': (b'hello, this is text' * 10, 'not understood'),
    'no samples': (wav_bytes(b'', 16), 'no samples'),
    'less than a frame of 65,535 channels': (wav_bytes(bytes(99), 8, channels=65535), '65535'),
    'no sound': (b'RIFF\x04\0\0\0WAVE', 'no sound in it'),
    'no channels': (wav_bytes(bytes(99), 16, channels=0, block=2), 'by zero'),
    'header alone': (wav_bytes(bytes(100), 16)[:30], 'cut short: 10 of 16 bytes'),
    'sound before its format': (b'RIFF\0\0\0\0WAVE' + wav_chunk(b'data', bytes(100)), 'WAV file ('),
    'cut short': (wav_bytes(bytes(100), 16)[:-40], 'cut short: 60 of 100 bytes'),
    '4 GB claimed': (wav_bytes(bytes(100), 16, length=2 ** 32 - 1), 'cut short: 100 of 4294967295 bytes'),
    'not a number': (wav_bytes(np.full(100, np.nan, '<f4').tobytes(), 32, code=3), 'not finite'),
    'infinite': (wav_bytes(np.full(100, -np.inf, '<f8').tobytes(), 64, code=3), 'not finite'),
    'floats of 16 bits': (wav_bytes(bytes(100), 16, code=3), '16-bit'),
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
    'animated PNG': saved(PICTURE, 'PNG', save_all=True, append_images=[Image.new('RGB', (64, 64))]),
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
    'empty file': (b'', 'not a JPEG or PNG'),
    'text': (b'hello, this is text' * 10, 'not a JPEG or PNG'),
    'GIF': (saved(PICTURE, 'GIF'), 'not a JPEG or PNG'),
    'JPEG cut short': (PICTURES['JPEG'][:-10], 'truncated'),
    'PNG cut short': (PICTURES['PNG'][:-30], 'not a readable'),
    'PNG bomb that Pillow takes': (png_bytes(13000, 13000, 1, 0, bytes(13000 * 1626)), '13000 x 13000 pixels'),
    'PNG of a single column': (png_bytes(1, 10 ** 7, 1, 0, bytes(2 * 10 ** 7)), '1 x 10000000 pixels'),
    'PNG bomb': (png_bytes(2 ** 30, 2 ** 30, 1, 0, b''), 'pixels'),
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
    assert line.startswith(f'{path}: ') and why in line and 'give ' in line


def test_a_file_too_large_to_be_a_picture(tmp_path):
    (tmp_path / 'x.png').write_bytes(PICTURES['PNG'])
    os.truncate(tmp_path / 'x.png', 2 ** 40)
    with pytest.raises(InputError, match='x.png: .*more than 128 MiB'):
        preprocess.read_image(tmp_path / 'x.png', 64)


def test_a_picture_that_claims_4_gb_takes_no_such_memory(tmp_path):
    """Its pixels are there; what the part that holds them claims beyond them, Pillow reads in one piece."""
    start, end = PICTURES['PNG of 16 bits'].split(b'IDAT')
    (tmp_path / 'x.png').write_bytes(start[:-4] + struct.pack('>I', 2 ** 32 - 1) + b'IDAT' + end)
    code = ('import preprocess, resource\n'
            "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2 ** 30\n"
            'resource.setrlimit(resource.RLIMIT_AS, (size, size))\n'
            f'print(preprocess.read_image({str(tmp_path / "x.png")!r}, 1).tolist())')
    assert command('-c', code, cwd=HERE).stdout == '[[[240, 128, 32]]]\n'


@pytest.mark.parametrize('kind, why', [('nothing', 'No such file'), ('dangling', 'No such file'),
                                       ('folder', 'not a file'), ('loop', 'symbolic links'),
                                       ('fifo', 'not a file'), ('device', 'not a file')])
def test_what_is_no_file_is_named_and_not_waited_for(tmp_path, kind, why):
    (tmp_path / 'dangling').symlink_to('nowhere')
    (tmp_path / 'folder').mkdir()
    (tmp_path / 'loop').symlink_to('loop')
    os.mkfifo(tmp_path / 'fifo')
    (tmp_path / 'device').symlink_to('/dev/zero')
    for read in (preprocess.read_wav, lambda path: preprocess.read_image(path, 64)):
        with pytest.raises(InputError, match=f'{tmp_path / kind}: .*{why}.*; give '):
            read(tmp_path / kind)


def rename(folder, old, new):
    (folder / old).rename(folder / new)


def test_both_layouts_and_any_class_names(data):
    for split in ('train', 'validation'):
        for part in ('chunk', 'img'):
            for name in sorted(preprocess.DEMO_INSTRUMENTS)[2:]:
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
    assert dataset.classes == sorted(preprocess.DEMO_INSTRUMENTS) and len(split) == 52
    lms, image, label = split.batch([5, 40])
    assert lms.shape == (2, 1, 64, 64) and image.shape == (2, 3, 64, 64) and lms.dtype == image.dtype == torch.float32
    assert label.dtype == torch.int64 and label.shape == (2,)
    for row, index in enumerate([5, 40]):
        name = f'{dataset.classes[label[row]]}/{split.stems[index]}'
        frame = np.asarray(Image.open(demo / f'img/train/{name}.jpg')) / 127.5 - 1
        np.testing.assert_allclose(image[row].permute(1, 2, 0), frame, atol=1e-6)
        db = preprocess.log_mel_spectrogram(*preprocess.read_wav(demo / f'chunk/train/{name}.wav'))
        expected = F.interpolate(torch.tensor((db + 80) / 60 - 1).clamp(-1, 1)[None, None], (64, 64), mode='bilinear')
        np.testing.assert_allclose(lms[row], expected[0], atol=1e-3)        # float16 in the cache
        assert split.stems[index].startswith(dataset.classes[label[row]])


def test_an_epoch_covers_every_pair_once_in_the_seeds_order(demo, tmp_path):
    split = preprocess.open_dataset(demo, 32, tmp_path).train
    def epoch(seed):
        return [image for _, image, _ in split.batches(10, seed=seed)]
    sizes = [len(image) for image in epoch(1)]
    assert sizes == [9, 9, 9, 9, 8, 8] and len(sizes) == split.count(10)
    first, again, other, ordered = (torch.cat(epoch(seed)) for seed in (1, 1, 2, None))
    assert torch.equal(first, again) and not torch.equal(first, other)
    def rows(images):
        return sorted(image.numpy().tobytes() for image in images)
    assert rows(first) == rows(other) == rows(ordered) and torch.equal(ordered, split.batch(range(52))[1])


def test_cache_is_made_once_and_notices_every_change(data, tmp_path, capsys):
    def packs(size=32, folder=tmp_path / 'cache'):
        preprocess.open_dataset(data, size, folder)
        return 'packing' in capsys.readouterr().err
    before = sorted(path.relative_to(data) for path in data.rglob('*'))
    assert packs() and not packs()
    assert packs(size=64) and not packs(size=64) and not packs(size=32)
    wav = next((data / 'chunk/train/oboe').iterdir())
    wav.write_bytes(wav.read_bytes() + b'\0\0')
    assert packs() and not packs()
    stamp = wav.stat().st_mtime_ns
    os.utime(wav, ns=(stamp, stamp + 1000))
    assert packs() and not packs()
    for part in ('frames', 'lms', 'meta.json'):         # cut short, as by a full disk
        path, = (tmp_path / 'cache').glob(f'data-32-*/{part}')
        os.truncate(path, path.stat().st_size - 1)
        assert packs() and not packs()
    frame = next((data / 'img/train/oboe').iterdir())
    frame.unlink()
    assert packs() and not packs()
    frame.write_bytes(next((data / 'img/train/oboe').iterdir()).read_bytes())
    packs()
    assert sorted(path.relative_to(data) for path in data.rglob('*')) == before      # nothing put there


def test_whatever_stands_in_the_caches_place_it_is_built_anew(data, tmp_path, capsys):
    folder = preprocess.open_dataset(data, 32, tmp_path / 'cache').folder
    def emptied(path):
        path.write_bytes(b'')
    def made_a_folder(path):
        path.unlink()
        path.mkdir()
    spoilt = [(spoil, folder / name) for spoil in (emptied, made_a_folder, Path.unlink)
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


def test_lms_parameters_are_part_of_the_cache(data, tmp_path, capsys, monkeypatch):
    preprocess.open_dataset(data, 32, tmp_path / 'cache')
    monkeypatch.setattr(preprocess, 'CACHE_VERSION', preprocess.CACHE_VERSION + 1)
    capsys.readouterr()
    preprocess.open_dataset(data, 32, tmp_path / 'cache')
    assert 'packing' in capsys.readouterr().err


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
    batch = dataset.train.batch(range(52))[1]
    report = Path('/proc/self/smaps').read_text()
    assert re.findall(rf'{re.escape(str(dataset.folder / "frames"))}\n(?:.*\n)*?Rss: +(\d+) kB', report) == ['0']
    assert torch.equal(dataset.train.batch(range(52))[1], batch)


def test_two_processes_that_want_the_same_cache_build_it_once(data, tmp_path):
    cache, code = tmp_path / 'cache', 'import preprocess; print(len(preprocess.open_dataset({!r}, 32, {!r}).train))'
    folder = preprocess.open_dataset(data, 32, cache).folder
    shutil.rmtree(folder)
    with preprocess.writing(folder):        # until both wait for it
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
    with pytest.raises(InputError, match='demo.*--cache'):
        preprocess.demo_data(32, tmp_path / 'file')
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
    twin = some('img', 'trumpet').with_suffix('.png')
    Image.new('RGB', (64, 64)).save(twin)

    dataset = preprocess.open_dataset(data, 32, tmp_path / 'cache')
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('left out:')]
    for path in (truncated, text, empty, garbage, both, lonely_wav, lonely_jpg, folder, link, twin):
        line, = [line for line in lines if f' {path}: ' in line]
        assert len(line.split(f'{path}: ')[1]) > 5          # a reason
    assert len(lines) == 10 and len(dataset.train) == 52 - 8
    preprocess.open_dataset(data, 32, tmp_path / 'cache')   # named again when the cache is reused
    assert capsys.readouterr().err.count('left out:') == 10
    with pytest.raises(InputError, match='10 problems'):
        preprocess.open_dataset(data, 32, tmp_path / 'cache', strict=True)


def test_classes_in_one_split_only(data, capsys):
    for part in ('chunk', 'img'):
        shutil.rmtree(data / part / 'validation/tuba')
    dataset = preprocess.open_dataset(data, 32)
    assert 'class tuba has no pair in validation' in capsys.readouterr().err
    assert len(dataset.classes) == 13 and len(dataset.train) == 52 and len(dataset.validation) == 24
    for part in ('chunk', 'img'):
        shutil.rmtree(data / part / 'train/oboe')
    with pytest.raises(InputError, match='no good pair in train of class oboe'):
        preprocess.open_dataset(data, 32)


def test_commands_refuse_bad_data_with_one_line(data, tmp_path, refused):
    for wav in (data / 'chunk/train/horn').iterdir():
        wav.write_bytes(b'')
    flags = ['--data', data, '--out', tmp_path / 'run', *SMALL]
    done = command(HERE / 'train.py', *flags)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    err = refused(train, flags, data, 'no good pair in train of class horn')
    assert err.count('left out:') == 4 and not (tmp_path / 'run').exists()
    shutil.rmtree(data / 'chunk/validation')
    refused(preprocess, ['--data', data], 'chunk', 'validation or test')
    refused(preprocess, ['--data', tmp_path / 'nothing'], 'nothing', 'chunk or spectram')


def test_strict_stops_at_any_bad_file(data, capsys, refused):
    next((data / 'img/train/horn').iterdir()).write_bytes(b'')
    refused(preprocess, ['--data', data, '--strict', '--size', 32], data, '1 problems')
    for flags in (['--size', 0], ['--workers', -1]):
        refused(preprocess, ['--data', data, *flags], 'at least 1')
    preprocess.main(['--data', str(data), '--size', '32', '--workers', '1'])
    assert any(line.split() == ['horn', '3', '2'] for line in capsys.readouterr().out.splitlines())


# --------------------------------------------------------------------------------------- demo data

def test_demo_data_is_deterministic_and_whole(demo, tmp_path, refused, capsys):
    preprocess.main(['--demo', str(tmp_path / 'full'), '--size', '64'])
    assert '676 of 676' in capsys.readouterr().err
    assert sum(1 for _ in (tmp_path / 'full').rglob('*.wav')) == 676
    preprocess.write_demo(tmp_path / 'again', train=4, validation=2, size=64)
    files = sorted(path.relative_to(demo) for path in demo.rglob('*.*'))
    assert len(files) == 2 * 78
    for file in files:
        assert (demo / file).read_bytes() == (tmp_path / 'again' / file).read_bytes()
        assert (demo / file).read_bytes() == (tmp_path / 'full' / file).read_bytes()
    preprocess.write_demo(tmp_path / 'other', train=1, validation=1, size=64, seed=1)
    file = next(tmp_path.glob('other/chunk/train/tuba/*'))
    assert file.read_bytes() != (demo / file.relative_to(tmp_path / 'other')).read_bytes()
    refused(preprocess, ['--demo', tmp_path / 'full'], 'full', 'exists already')


def test_demo_sound_shows_in_the_picture():
    player = preprocess.demo_player(np.random.default_rng(0))
    def draw(instrument, pitch, loudness, size=64):
        note = preprocess.Note(0, 0.6, pitch, loudness)
        return np.asarray(preprocess.demo_picture(instrument, player, note, 0, size)).astype(int)
    pictures = []
    for instrument in preprocess.DEMO_INSTRUMENTS.values():
        low, high = instrument.register
        soft, loud, up, silent = (draw(instrument, *note) for note in
                                  ((low, 0.1), (low, 1.0), (high, 0.1), (low, 0.0)))
        for other in (loud, up, silent):                # of 4096 pixels these change clearly
            assert (np.abs(other - soft).max(axis=2) > 40).sum() > 20
        pictures.append(soft)
    for i, one in enumerate(pictures):                  # and no two instruments look alike
        for other in pictures[:i]:
            assert (np.abs(one - other).max(axis=2) > 40).sum() > 100
    assert draw(instrument, 60, 0.5, 256).shape == (256, 256, 3)


def test_demo_sounds_have_their_pitch_and_their_rests():
    for name in ('flute', 'cello', 'tuba'):
        instrument = preprocess.DEMO_INSTRUMENTS[name]
        pitch = sum(instrument.register) // 2
        wave = preprocess.demo_sound(instrument, [preprocess.Note(0, 0.6, pitch, 0.8)], 0, np.random.default_rng(0))
        power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2
        order = np.fft.rfftfreq(len(wave), 1 / 44100) / (440 * 2 ** ((pitch - 69) / 12))
        assert wave.shape == (22050,) and power[np.abs(order - 1) < 0.04].sum() > 1e-3 * power.sum()
        harmonic = (np.abs(order / order.round().clip(1) - 1) < 0.04) & (order < 20)
        assert power[harmonic].sum() > 0.9 * power.sum()
    rest = preprocess.demo_sound(instrument, [preprocess.Note(0, 0.6, pitch, 0.0)], 0, np.random.default_rng(0))
    assert 20 * math.log10(np.sqrt((rest ** 2).mean())) == pytest.approx(-70, abs=1)
    clips = [preprocess.demo_pair('oboe', 'train', 1, bar * 0.6, size=32)[0] for bar in range(60)]
    silent = sum(np.abs(clip).max() < 0.005 for clip in clips)
    assert 1 <= silent <= 15


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


def test_l1_and_eq_6():
    image = torch.zeros(1, 3, 2, 2)
    assert cargan.l1_loss(image, image + 0.25, image - 0.5).item() == pytest.approx(0.75)
    assert cargan.objective(2.0, 3.0, 0.5) == pytest.approx(2 + 3 + 50)
    assert cargan.objective(2.0, 3.0, 0.5, 0.5, 2, 10) == pytest.approx(1 + 6 + 5)


# ---------------------------------------------------------------------------------------- training

def trainer(*flags, classes=5):
    args = train.make_parser().parse_args([*SMALL, *flags])
    return train.Trainer(args, classes, 1, None, torch.device('cpu'))


def batch(n=4, size=32):
    torch.manual_seed(1)
    return torch.rand(n, 1, size, size) * 2 - 1, torch.rand(n, 3, size, size) * 2 - 1, torch.arange(n) % 5


def weights(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize('moving', ['G', 'D'])
def test_each_step_moves_its_own_weights_alone(moving):
    """With the other optimiser's rate at 0, a step of both shows what one of them moves."""
    ours = trainer()
    still = ours.D_optimizer if moving == 'G' else ours.G_optimizer
    still.param_groups[0]['lr'] = 0.0
    C = ours.model.residue.classifier
    before = {name: weights(module) for name, module in (('G1', ours.model.G1), ('G2', ours.model.G2), ('D', ours.D))}
    state_of_C = copy.deepcopy(C.state_dict())
    for _ in range(2):          # attention's projections have no gradient until their scale has left 0
        ours.step(*batch())
    moved = {name: len(changed(before[name], weights(module))) for name, module in
             (('G1', ours.model.G1), ('G2', ours.model.G2), ('D', ours.D))}
    everything = {name: len(before[name]) for name in before}
    assert moved == ({**everything, 'D': 0} if moving == 'G' else {'G1': 0, 'G2': 0, 'D': everything['D']})
    assert not changed(state_of_C, C.state_dict()) and all(p.grad is None for p in C.parameters())
    assert not C.training and ours.model.G1.training


def test_a_step_is_the_papers_by_hand():
    """The gradients that Trainer.step leaves, against those of the equations written out: G1 and G2 first, then
    D, on what G1 and G2 paint after their step; D judges real and painted in batches apart.
    """
    ours = trainer('--dropout', '0', '--stage-weights', '0.3', '0.7', '--lambda-c', '2', '--lambda-gan', '3',
                   '--lambda-l1', '50')
    ours.D_optimizer.param_groups[0]['lr'] = 0.0
    other = copy.deepcopy((ours.model, ours.D))
    lms, image, label = batch()
    losses = ours.step(lms, image, label)
    model, D = other
    model.G1.requires_grad_(True), model.G2.requires_grad_(True)
    coarse, fine, logits = model(lms, label)
    L_C = 0.3 * F.cross_entropy(logits, label) + 0.7 * F.cross_entropy(model.residue.classifier(fine), label)
    D_coarse, D_fine = (D(torch.cat([lms, x], 1)) for x in (coarse, fine))
    L_cGAN = torch.log(1 - D_coarse.sigmoid()).mean() + torch.log(1 - D_fine.sigmoid()).mean()
    L_L1 = (image - coarse).abs().mean() + (image - fine).abs().mean()
    grads = torch.autograd.grad(2 * L_C + 3 * L_cGAN + 50 * L_L1, [*model.G1.parameters(), *model.G2.parameters()])
    left = [p.grad for p in [*ours.model.G1.parameters(), *ours.model.G2.parameters()]]
    torch.testing.assert_close(left, list(grads), rtol=1e-3, atol=1e-5)
    before = fine
    with torch.no_grad():
        coarse, fine, _ = ours.model(lms, label)
    assert (fine - before).abs().mean() > 0.01
    D_real, *D_stages = (D(torch.cat([lms, x], 1)) for x in (image, coarse, fine))
    L_D = -2 * torch.log(D_real.sigmoid()).mean() - sum(torch.log(1 - x.sigmoid()).mean() for x in D_stages)
    grads = torch.autograd.grad(3 * L_D, list(D.parameters()))
    torch.testing.assert_close([p.grad for p in ours.D.parameters()], list(grads), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(losses, torch.stack([L_C, L_cGAN, L_L1, L_D]).detach(), rtol=1e-4, atol=1e-5)


def test_settled_statistics_are_those_of_the_weights(trained, demo):
    """They bring what is painted without training's batches near to what is painted in one, and move no weight."""
    split = preprocess.open_dataset(demo, 32, trained[1]).train
    ours = trainer('--dropout', '0', '--batch-size', '52', classes=13)
    lms, image, label = next(split.batches(52, seed=0))
    for _ in range(3):
        ours.step(lms, image, label)

    def painted(model):
        with torch.no_grad():
            return model(lms, label)[1]

    before, in_batch = weights(ours.model), painted(copy.deepcopy(ours.model))
    outrun = (painted(copy.deepcopy(ours.model).eval()) - in_batch).abs().mean()
    random = torch.get_rng_state()
    ours.settle(split)
    settled = (painted(copy.deepcopy(ours.model).eval()) - in_batch).abs().mean()
    assert settled < 0.1 * outrun
    assert ours.model.training and not ours.model.residue.classifier.training
    assert not changed(before, weights(ours.model)) and torch.equal(random, torch.get_rng_state())
    assert {module.momentum for module in ours.model.modules() if isinstance(module, torch.nn.BatchNorm2d)} == {0.1}


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
    assert trainer('--no-saturating').step(*batch())[1] > 0 > trainer().step(*batch())[1]


def test_training_learns():
    """Twenty steps on one batch of plain colours bring both stages nearer to the truth."""
    ours, (lms, _, label) = trainer('--lr', '0.002'), batch(8)
    colours = torch.linspace(-0.8, 0.8, 15).view(5, 3)[label][:, :, None, None].expand(-1, -1, 32, 32)
    first, *_, last = [ours.step(lms, colours, label)[2].item() for _ in range(20)]
    assert last < 0.6 * first


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_data_parallel_takes_the_same_step():
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0'])
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
    for step in ours.G_step, ours.D_step:
        parts = [step(lms[part], image[part], label[part]) for part in (slice(0, 4), slice(4, 7))]
        whole = step(lms, image, label)
        torch.testing.assert_close(torch.cat(parts).sum(dim=0) / 7, whole[0] / 7, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_step_on_the_gpu_is_that_of_the_cpu():
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0'])
    steps = []
    for device in ('cpu', 'cuda'):
        ours = train.Trainer(args, 5, 1, None, torch.device(device))
        steps.append(ours.step(*(x.to(device) for x in batch())).cpu())
    torch.testing.assert_close(*steps, rtol=1e-2, atol=1e-2)


def test_defaults_are_the_papers_numbers():
    args = train.parse_args(['--data', 'Sub-URMP'])
    assert (args.size, args.base, args.disc_base, args.batch_size, args.epochs) == (256, 64, 64, 64, 200)
    assert (args.lr, args.betas, args.init_std) == (0.0008, [0.9, 0.999], 0.2)
    assert (args.lambda_c, args.lambda_gan, args.lambda_l1, args.stage_weights) == (1, 1, 100, [0.5, 0.5])
    assert (args.variant, args.pretrained, args.saturating, args.dropout) == ('E', True, True, 0.5)
    assert args.classifier_accuracy == 0.9956
    ours = trainer()
    for optimizer in (ours.G_optimizer, ours.D_optimizer):
        assert type(optimizer) is torch.optim.Adam
        assert optimizer.param_groups[0]['lr'] == 0.0008 and tuple(optimizer.param_groups[0]['betas']) == (0.9, 0.999)


def test_demo_preset_says_what_it_changes_and_yields_to_flags(capsys):
    args = train.parse_args(['--epochs', '3', '--size', '32'])
    out = capsys.readouterr().out
    assert (args.epochs, args.size, args.base) == (3, 32, train.DEMO_PRESET['base'])
    for words in ('--epochs 3 (200)', '--size 32 (256)', '--base 32 (64)', '--betas 0.5 0.999 (0.9 0.999)',
                  '--no-saturating', '--no-pretrained', 'python train.py --data Sub-URMP'):
        assert words in out


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


@pytest.mark.parametrize('number, step', [(signal.SIGTERM, 4), (signal.SIGTERM, 4 + 6), (signal.SIGINT, 4 + 11)])
def test_a_signal_ends_the_step_and_the_resumed_run_is_the_uninterrupted_one(trained, demo, tmp_path, capsys, number,
                                                                              step):
    """C makes the first 4 steps of Adam, then G and D make one each a step: stopped at C's last, after a D step
    and between G's and D's.
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
    assert end.value.code == 128 + number and next(count) == step + (2 if step % 2 else 1)
    assert f'python train.py --resume {half}' in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL        # given back
    with open(half / 'log.csv', 'a') if step > 4 else nullcontext() as file:
        if file:
            file.write('7,2,1,1,1,1\n8,2,0.5')          # steps after the checkpoint, and half a line
    (half / 'checkpoint.pt.part').write_bytes(b'half a checkpoint')
    train.main(['--resume', str(half), '--device', 'cpu'])
    assert f'resumed after {(step - 4) // 8} of 2 epochs' in capsys.readouterr().out or step == 4
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


def test_killed_runs_go_on_to_the_same_end(trained, demo, tmp_path):
    """kill -9 at a random moment, from the first import to the last figure, then --resume. By hand:
    CARGAN_KILLS=30 python -m pytest -s -k killed_runs
    """
    kills, rng, equal, whole = int(os.environ.get('CARGAN_KILLS', 1)), np.random.default_rng(), 0, 12.0
    words = [HERE / 'train.py', *run_flags(demo, tmp_path / 'cache', tmp_path / 'run', '--save-minutes', '0')]
    expected, log = states(trained[0]), (trained[0] / 'log.csv').read_text()

    def again():
        for folder in 'run', 'cache':
            shutil.rmtree(tmp_path / folder, ignore_errors=True)

    if kills > 1:       # one kill comes early, for the sake of the tests' time
        start = time.monotonic()
        assert command(*words).returncode == 0
        whole = time.monotonic() - start
    for trial in range(1, kills + 1):
        again()
        with pytest.raises(subprocess.TimeoutExpired):      # killed with -9 when the time is over
            while True:                                     # a run that was faster: once more
                moment = rng.uniform(0, whole)
                command(*words, timeout=moment)
                again()
        begun = (tmp_path / 'run/config.json').exists()
        done = command(HERE / 'train.py', '--resume', tmp_path / 'run', '--device', 'cpu') if begun else command(*words)
        assert done.returncode == 0, done.stderr
        equal += same(states(tmp_path / 'run'), expected) and (tmp_path / 'run/log.csv').read_text() == log
        print(f'killed after {moment:.1f} of {whole:.1f} s: {equal} of {trial} ended as the uninterrupted run',
              flush=True)
    assert equal == kills
    left = {path.name for path in (tmp_path / 'cache').iterdir()} | {path.name for path in (tmp_path / 'run').iterdir()}
    assert not [name for name in left if 'part' in name or 'building' in name]


@pytest.mark.parametrize('resumed', [True, False])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(trained, demo, tmp_path, refused, resumed):
    run, cache = trained
    out = tmp_path / 'run'
    wild = ['--lr', '1e25', '--save-minutes', '0']      # G's first step ends training: D judges what it paints then
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
    rows = list(csv.reader(open(out / 'log.csv')))
    assert rows[-1][0] == step and not math.isfinite(float(rows[-1][2 + train.LOSSES.index(name)]))


def test_a_classifier_that_explodes_is_named(demo, trained, tmp_path, refused):
    refused(train, run_flags(demo, trained[1], tmp_path / 'run', '--classifier-lr', '1e30'), 'classifier: its loss is',
            'epoch 1', '--classifier-lr')


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    ours = trainer()
    ours.save(tmp_path / 'checkpoint.pt')
    before = (tmp_path / 'checkpoint.pt').read_bytes()
    ours.model.G2.down[0][0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(InputError, match='G2.down.0.0.weight is not finite after step 0.*pt is still the last good'):
        ours.save(tmp_path / 'checkpoint.pt')
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
    args = train.parse_args(['--resume', str(tmp_path / 'run')])
    with train.open_run(args):
        refused(train, ['--resume', tmp_path / 'run', '--device', 'cpu'], tmp_path / 'run', 'another process', '--out')
    with train.open_run(args):          # free again
        pass


def spoil(run, kind):
    """Put something hostile or broken in place of a file of a run; returns the file."""
    checkpoint, config = run / 'checkpoint.pt', run / 'config.json'
    path = config if kind.startswith('config') else checkpoint
    state, settings = states(run), json.loads(config.read_text())
    path.unlink()
    if kind.endswith('directory'):
        path.mkdir()
    elif kind.endswith('pipe'):
        os.mkfifo(path)
    elif kind.endswith('dangling'):
        path.symlink_to('nowhere')
    elif kind.endswith('cut'):
        path.write_bytes(b'PK' + bytes(1000) if path == checkpoint else b'{"size": 3')
    elif path == config:
        changes = {'list': [], 'nothing': {}, 'size': dict(settings, size=10 ** 9), 'text': dict(settings, size='32'),
                   'variant': dict(settings, variant=['E']), 'data': dict(settings, data=5),
                   'classes': dict(settings, classes=None)}
        path.write_text(json.dumps(changes[kind.split()[-1]]))
    else:
        if kind == 'code':
            state['model'] = Harm(str(run / 'harm'))
        elif kind == 'a list':
            state = [1, 2]
        elif kind == 'shapes':
            state['model']['G1.down.0.0.weight'] = torch.zeros(1)
        elif kind == 'optimiser':
            state['G_optimizer']['state'][0]['exp_avg'] = torch.zeros(1)
        elif kind == 'random':
            state['random'] = [(torch.zeros(3), [])]
        torch.save(state, path)
    return path


@pytest.mark.parametrize('kind', ['config directory', 'config pipe', 'config dangling', 'config cut', 'config list',
                                  'config nothing', 'config size', 'config text', 'config variant', 'config data',
                                  'config classes', 'directory', 'pipe', 'dangling', 'cut', 'code', 'a list', 'shapes',
                                  'optimiser', 'random'])
def test_a_spoilt_run_is_named_by_every_command(trained, demo, tmp_path, refused, kind):
    run = shutil.copytree(trained[0], tmp_path / 'run')
    path = spoil(run, kind)
    clip = next((demo / 'chunk/validation/sax').iterdir())
    words = path.name if path.name == 'config.json' else path
    refused(train, ['--resume', run, '--epochs', '3', '--device', 'cpu'], words)
    if kind not in ('optimiser', 'random'):         # an evaluation does not look at these
        refused(evaluate, [run, '--device', 'cpu'], words)
        refused(evaluate, [run, '--audio', clip, '--label', 'sax', '--out', tmp_path / 'x.png'], words)
    assert not (run / 'harm').exists() and not (tmp_path / 'x.png').exists()


def test_other_files_of_weights_cannot_run_code_either(trained, demo, tmp_path, refused):
    run, cache = trained
    for name, key in (('classifier.pt', 'classifier'), ('inception.pth', 'fc.bias'), ('resnet50.pth', 'fc.bias')):
        torch.save({key: Harm(str(tmp_path / 'harm')), 'classes': [], 'accuracy': 1.0}, tmp_path / name)
    flags = run_flags(demo, cache, tmp_path / 'run')
    refused(train, [*flags, '--classifier', tmp_path / 'classifier.pt'], tmp_path / 'classifier.pt')
    refused(train, [flag for flag in flags if flag != '--no-pretrained']
            + ['--classifier-weights', tmp_path / 'resnet50.pth'], tmp_path / 'resnet50.pth')
    refused(evaluate, [run, '--inception', tmp_path / 'inception.pth'], tmp_path / 'inception.pth')
    spoilt = shutil.copytree(run, tmp_path / 'spoilt')
    (spoilt / 'checkpoint.pt').unlink()
    for name in ('classifier.pt', 'classifier-part.pt'):
        (spoilt / 'classifier.pt').unlink(missing_ok=True)
        shutil.copy(tmp_path / 'classifier.pt', spoilt / name)
        refused(train, ['--resume', spoilt, '--device', 'cpu'], spoilt / name)
    torch.save(dict(classifier={}, optimizer={}, best={}, epoch=1, done=0), spoilt / 'classifier-part.pt')
    refused(train, ['--resume', spoilt, '--device', 'cpu'], spoilt / 'classifier-part.pt', 'another network')
    assert not (tmp_path / 'harm').exists() and not (tmp_path / 'run').exists()


def test_out_of_memory_names_what_would_fit(trained, demo, tmp_path, refused, monkeypatch):
    """No GPU is needed to see what is said when one is too small."""
    run, cache = trained
    forward = cargan.CARGAN.forward

    def small(self, lms, label):
        if self.training and len(label) > 4:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(self, lms, label)

    monkeypatch.setattr(cargan.CARGAN, 'forward', small)
    flags = run_flags(demo, cache, tmp_path / 'run', '--classifier', run / 'classifier.pt')
    refused(train, flags, '--batch-size 13 does not fit', '--batch-size 3 would fit', '--accumulate 5')
    trainer('--accumulate', '5').step(*batch(13))


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
        judged = ours.D(torch.cat([lms, fine], dim=1))
    assert {x.dtype for x in (coarse, fine, logits, residue, judged)} == {torch.float32}
    assert widths == [torch.bfloat16]
    torch.testing.assert_close(ours.step(lms, image, label), exact.step(lms, image, label), rtol=0.05, atol=0.05)
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())


TORCHRUN = ['-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']


def five_steps(path, parts):
    """Five steps of one process or of those that torchrun started, on a thread each; what comes of them in a file."""
    args = train.make_parser().parse_args([*SMALL, '--dropout', '0', '--device', 'cpu', '--accumulate', str(parts)])
    torch.set_num_threads(1)
    with train.distributed(args):
        ours = train.Trainer(args, 5, 1, None, torch.device('cpu'))
        ours.model.eval(), ours.D.eval()
        for seed in range(5):
            torch.manual_seed(seed)
            whole = torch.rand(7, 1, 32, 32) * 2 - 1, torch.rand(7, 3, 32, 32) * 2 - 1, torch.arange(7) % 5
            ours.step(*(x.tensor_split(train.world())[train.rank()] for x in whole), size=7)     # 4 and 3, or 7
        if train.rank() == 0:
            torch.save(dict(world=train.world(), model=ours.model.state_dict(), D=ours.D.state_dict()), path)


def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """The one goes through the batch in the others' parts: Adam makes a step as long as any other of a gradient
    that is no more than rounding, and that differs between a batch and its parts.
    """
    (tmp_path / 'steps.py').write_text('import sys, test_cargan\ntest_cargan.five_steps(sys.argv[1], parts=1)')
    done = command(*TORCHRUN, tmp_path / 'steps.py', tmp_path / 'two.pt', env=dict(os.environ, PYTHONPATH=str(HERE)))
    assert done.returncode == 0, done.stderr
    threads = torch.get_num_threads()
    try:
        five_steps(tmp_path / 'one.pt', parts=2)
    finally:
        torch.set_num_threads(threads)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ('one.pt', 'two.pt'))
    assert (one['world'], two['world']) == (1, 2)
    for name in ('model', 'D'):
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=1e-5)


def test_two_processes_train_resume_and_evaluate(trained, demo, tmp_path):
    run, cache = trained
    words = run_flags(demo, cache, tmp_path / 'run', '--epochs', '1', '--classifier', run / 'classifier.pt')
    for words in (words, ['--resume', tmp_path / 'run', '--epochs', '2', '--device', 'cpu']):
        done = command(*TORCHRUN, HERE / 'train.py', *words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f'run {tmp_path / "run"}:') == 1               # rank 0 alone speaks
    assert 'resumed after 1 of 2 epochs' in done.stdout and 'real frames' in done.stdout
    rows = list(csv.reader(open(tmp_path / 'run/log.csv')))
    assert [row[0] for row in rows[1:]] == [str(step) for step in range(1, 9)]
    state = states(tmp_path / 'run')
    assert state['steps'] == 8 and len(state['random']) == 2 and not same(*state['random'])
    first = [float(list(csv.reader(open(folder / 'log.csv')))[1][2]) for folder in (run, tmp_path / 'run')]
    assert first[0] == pytest.approx(first[1], rel=0.2)     # L_C of the same batch, but for BatchNorm and dropout
    evaluate.load_run(tmp_path / 'run')


def test_a_run_is_one_folder(trained):
    run, _ = trained
    assert {path.name for path in run.iterdir()} == {'config.json', 'classifier.pt', 'checkpoint.pt', 'log.csv',
                                                     'samples', 'metrics.json', 'grid.png', 'failures.png'}
    rows = list(csv.reader(open(run / 'log.csv')))
    assert rows[0] == ['step', 'epoch', 'L_C', 'L_cGAN', 'L_L1', 'L_D']
    assert [row[:2] for row in rows[1:]] == [[str(step), str((step + 3) // 4)] for step in range(1, 9)]
    assert all(math.isfinite(float(value)) for row in rows[1:] for value in row)
    assert sorted(path.name for path in (run / 'samples').iterdir()) == ['epoch-0001.png', 'epoch-0002.png']
    config = json.loads((run / 'config.json').read_text())
    assert config['size'] == 32 and config['classes'] == sorted(preprocess.DEMO_INSTRUMENTS)
    width, height = Image.open(run / 'grid.png').size
    assert width > 4 * 128 and height > 13 * 128
    classifier = torch.load(run / 'classifier.pt', weights_only=True)
    trained_C = {name.removeprefix('residue.classifier.'): value for name, value in states(run)['model'].items()
                 if 'classifier' in name}
    assert same(classifier['classifier'], trained_C)        # C was frozen throughout


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


def test_the_classifier_stops_when_it_is_good_enough(demo, tmp_path, capsys):
    dataset = preprocess.open_dataset(demo, 32, tmp_path)
    torch.manual_seed(0)
    classifier = cargan.Classifier(13, pretrained=False)
    best = evaluate.train_classifier(classifier, dataset, epochs=4, accuracy=0.01)
    out = capsys.readouterr().out
    assert f'0.01 reached in epoch {best["epoch"]}' in out and out.count('epoch') == best['epoch'] + 1
    assert best['accuracy'] == evaluate.measure_accuracy(classifier.eval(), dataset.validation)
    evaluate.train_classifier(classifier, dataset, epochs=1, accuracy=1.1)
    assert 'the best of 1 epochs; 1.1 was not reached' in capsys.readouterr().out


def test_imagenet_weights(demo, tmp_path, refused, no_network):
    """A path given by hand is used; without network, path or --no-pretrained one line says what to do."""
    source = cargan.Classifier(1000, pretrained=False).resnet
    torch.save(source.state_dict(), tmp_path / 'resnet50.pth')
    classifier = cargan.Classifier(13, pretrained=str(tmp_path / 'resnet50.pth'))
    assert torch.equal(classifier.resnet.layer4[2].conv3.weight, source.layer4[2].conv3.weight)
    assert classifier.resnet.fc.out_features == 13
    flags = ['--data', demo, '--size', 32, '--batch-size', 13, '--out', tmp_path / 'run', '--device', 'cpu']
    refused(train, flags, 'ImageNet weights', '--classifier-weights PATH', '--no-pretrained')
    torch.save({'a': torch.zeros(1)}, tmp_path / 'wrong.pth')
    refused(train, [*flags, '--classifier-weights', tmp_path / 'wrong.pth'], 'wrong.pth', '--no-pretrained')


def test_wrong_use_is_one_line(trained, demo, tmp_path, refused, capsys):
    run, cache = trained
    refused(train, ['--data', demo, '--cache', cache, '--out', run, *SMALL], run, '--resume')
    refused(train, ['--resume', run, '--base', 16, '--epochs', 3], '--base 16', '8')
    refused(train, ['--resume', tmp_path], tmp_path, 'not a run')
    refused(train, ['--data', demo, '--gpus', '97'], '--gpus 97')
    refused(train, ['--data', demo, '--gpus', 'all'], '--gpus all')
    refused(train, ['--data', demo, '--device', 'gpu'], '--device gpu')
    for flags in (['--size', '100'], ['--batch-size', '0'], ['--lr', '-1'], ['--variant', 'F'], ['--epochs', 'x'],
                  ['--dropout', '1'], ['--accumulate', '0'], ['--amp', 'fp8']):
        refused(train, flags, *flags)
    refused(train, ['--amp', 'fp16', '--device', 'cpu'], '--amp fp16', 'GPU')
    refused(train, ['--sync-bn', '--device', 'cpu'], '--sync-bn', 'torchrun')
    small = ['--data', demo, '--cache', cache, '--device', 'cpu', '--size', 32]
    refused(train, [*small, '--out', tmp_path / 'big', '--batch-size', 53], '--batch-size 52 is the most')
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
    assert not (tmp_path / 'run').exists() and not (tmp_path / 'big').exists()      # nothing was begun
    with pytest.raises(SystemExit) as stop:
        train.main(['--help'])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and 'python train.py --data Sub-URMP' in out and '--lambda-l1' in out


def test_benchmark(capsys):
    train.main(['--benchmark', '1', '--size', '32', '--base', '8', '--batch-size', '2', '--device', 'cpu',
                '--peak-tflops', '0.5'])
    alone, loaded = capsys.readouterr().out.splitlines()[-2:]
    rate, work, speed, share, memory = map(float, re.fullmatch(
        r'(\S+) images/s, (\S+) GFLOP per image: (\S+) TFLOP/s, (\S+)% of 0.5; peak memory (\S+) GB', alone).groups())
    assert speed == pytest.approx(rate * work / 1000, abs=0.006) and share == pytest.approx(speed / 0.005, abs=1.1)
    assert 0.1 < memory < 30 and re.fullmatch(r'\S+ images/s with the loader on the demo data: it costs \S+%', loaded)


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
    """FID's Inception with weights by lot."""
    return fill(InceptionV3())


def test_names_and_shapes_are_those_of_the_fid_weights(network):
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(shapes) == 566                       # 94 convolutions with 6 entries each, fc with 2
    assert sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(('weight', 'bias'))) == 23850960
    expected = {'Conv2d_1a_3x3.conv.weight': (32, 3, 3, 3), 'Conv2d_4a_3x3.bn.running_var': (192,),
                'Mixed_5b.branch1x1.conv.weight': (64, 192, 1, 1), 'Mixed_5d.branch_pool.conv.weight': (64, 288, 1, 1),
                'Mixed_6a.branch3x3.conv.weight': (384, 288, 3, 3),
                'Mixed_6c.branch7x7_2.conv.weight': (160, 160, 1, 7),
                'Mixed_6e.branch7x7dbl_4.conv.weight': (192, 192, 7, 1),
                'Mixed_7a.branch7x7x3_4.conv.weight': (192, 192, 3, 3),
                'Mixed_7b.branch3x3dbl_3b.conv.weight': (384, 384, 3, 1), 'Mixed_7c.branch3x3_2a.bn.bias': (384,),
                'Mixed_7c.branch_pool.conv.weight': (192, 2048, 1, 1), 'fc.weight': (1008, 2048), 'fc.bias': (1008,)}
    assert {name: shapes[name] for name in expected} == expected
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


GOLDEN = {
    64: [0.31487, 0.416104, 1.04752, 0.0847179, 0.0365558, 0.0117877, 0.0836658, 0,
         -0.712324, -1.45251, -0.202041, 1.28359],
    299: [0.450484, 0.586331, 1.59732, 0.1494, 0.0379128, 0.0219257, 0.103194, 0,
          -0.743717, -1.78469, -0.0811616, 1.75713]}


@pytest.mark.parametrize('size', [64, 299])
def test_the_figures_are_those_of_pytorch_fid(network, size):
    """GOLDEN is what pytorch-fid 0.3.0 makes of the same weights and pictures, features and logits."""
    features, logits = network(pictures(size))
    assert features.shape == (1, 2048) and logits.shape == (1, 1008)
    got = [features.mean(), features.std(), *features[0, ::400], *logits[0, ::300]]
    np.testing.assert_allclose(got, GOLDEN[size], rtol=1e-3, atol=1e-4)


def test_inceptions_pools(network):
    """What enters each branch_pool: averages that do not count the padding, the maximum in Mixed_7c."""
    seen, hooks = {}, []
    for name, block in network.named_children():
        if hasattr(block, 'branch_pool'):
            hooks += [block.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]})),
                      block.branch_pool.register_forward_pre_hook(
                          lambda _, x, name=name: seen.update({name + ' pooled': x[0]}))]
    network(pictures(64))
    for hook in hooks:
        hook.remove()
    names = [name for name in seen if 'pooled' not in name]
    assert names == [f'Mixed_{block}' for block in '5b 5c 5d 6b 6c 6d 6e 7b 7c'.split()]
    assert [seen[name].shape[2] for name in names] == [35] * 3 + [17] * 4 + [8] * 2
    for name in names:
        x = seen[name]
        windows = F.pad(x, (1, 1, 1, 1), value=math.nan).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        expected = windows.nan_to_num(-math.inf).amax(dim=4) if name == 'Mixed_7c' else windows.nanmean(dim=4)
        torch.testing.assert_close(seen[name + ' pooled'], expected)


def test_images_are_resized_and_scaled(network):
    inside = []
    with network.Conv2d_1a_3x3.register_forward_pre_hook(lambda _, x: inside.append(x[0])):
        network(torch.tensor([0.0, 1.0]).expand(1, 3, 4, 2))         # black on the left, white on the right
    x, = inside
    assert x.shape == (1, 3, 299, 299)
    # Half-pixel centres: a quarter of the width is flat at either end, the middle is linear in between
    position = (torch.arange(299) + 0.5) / 299 * 2 - 0.5
    torch.testing.assert_close(x[0, 0, 0], 2 * position.clamp(0, 1) - 1, atol=1e-5, rtol=0)


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
    assert frechet_distance(torch.from_numpy(a).float(), Moments(b)) == pytest.approx(expected, rel=1e-5)


def test_frechet_distance_by_hand():
    """One dimension: (mu_a - mu_b)^2 + (sigma_a - sigma_b)^2, with the divisor n - 1."""
    assert frechet_distance([[0.0], [2.0]], [[10.0], [14.0], [12.0]]) == pytest.approx(11 ** 2 + (2 ** 0.5 - 2) ** 2)


@pytest.mark.parametrize('n', [2, 10, 24, 25, 26, 500])
@pytest.mark.parametrize('offset', [0.0, 1e4])
def test_a_set_is_at_no_distance_from_itself(n, offset):
    a = features(n, offset=offset)
    distance = frechet_distance(a, a[::-1].copy())
    assert 0 <= distance <= 1e-6 * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, a + 3) == pytest.approx(9 * 24, rel=1e-6)


def test_equal_rows_are_at_the_distance_of_their_means():
    assert frechet_distance(np.ones((5, 3)), np.zeros((9, 3))) == pytest.approx(3)


@pytest.mark.parametrize('n', [10, 49, 50, 51, 1000])
def test_streaming_is_the_whole(n):
    a, b, moments = features(n), features(300, seed=1), Moments()
    for start in range(0, n, 7):
        moments.update(torch.from_numpy(a[start:start + 7]))
    mean, factor = moments.mean_and_factor()
    assert moments.count == n and len(factor) <= 24
    np.testing.assert_allclose(mean, a.mean(0), rtol=1e-10)
    np.testing.assert_allclose(factor.T @ factor, np.cov(a, rowvar=False), rtol=1e-8, atol=1e-10)
    assert frechet_distance(moments, b) == pytest.approx(by_sqrtm(a, b), rel=1e-6)


def test_memory_does_not_grow_with_the_set(monkeypatch):
    moments, decomposed, qr = Moments(), [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, 'qr', lambda rows, mode: (decomposed.append(len(rows)), qr(rows, mode=mode))[1])
    for _ in range(30):
        moments.update(torch.rand(40, 6, dtype=torch.float16))
        assert moments.rows.dtype == torch.float64 and moments.rows.numel() <= 2 * 7 * 7
    moments.update(np.random.rand(5000, 6))
    assert moments.rows.numel() <= 2 * 7 * 7 and moments.count == 6200
    assert 2 * 7 < max(decomposed) <= 3 * 7


@pytest.mark.parametrize('a, b', [(np.ones((1, 3)), np.ones((5, 3))), (np.ones((5, 3)), Moments()),
                                  (np.random.rand(5, 3), np.random.rand(5, 4)), (np.ones(5), np.ones(5)),
                                  (np.array([[0, 1], [np.nan, 0]]), np.eye(2)),
                                  (np.eye(2), np.array([[0, 1], [np.inf, 0]]))],
                         ids=['one row', 'nothing', 'two d', 'flat', 'nan', 'inf'])
def test_features_without_a_distance_are_refused(a, b):
    with pytest.raises(ValueError):
        frechet_distance(a, b)


def test_a_batch_of_another_width_is_refused():
    moments = Moments(np.ones((5, 3)))
    with pytest.raises(ValueError, match='4'):
        moments.update(np.ones((5, 4)))


def test_inception_score_of_equal_rows_is_1():
    assert inception_score(torch.rand(7).softmax(dim=0).expand(50, 7)) == pytest.approx((1, 0), abs=1e-6)


def test_inception_score_of_classes_used_equally_is_their_number():
    one_hot = torch.eye(5).repeat(20, 1)                             # 0 log 0 = 0
    assert inception_score(one_hot) == pytest.approx((5, 0), abs=1e-9)
    assert inception_score(torch.eye(5).repeat_interleave(20, dim=0), splits=5) == pytest.approx((1, 0), abs=1e-9)


def test_inception_score_splits_in_order():
    """20 rows of one class, then 20 of two classes in turn: 1 and 2; all together by hand."""
    rows = np.concatenate([np.tile([[1, 0, 0]], (20, 1)), np.tile([[0, 1, 0], [0, 0, 1]], (10, 1))])
    assert inception_score(rows, splits=2) == pytest.approx((1.5, 0.5))                     # population std
    assert inception_score(rows, splits=1) == pytest.approx((2 ** 1.5, 0))                  # entropy of 1/2, 1/4, 1/4


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


# -------------------------------------------------------------------------------------- evaluation

def test_measure_by_hand(trained):
    run, cache = trained
    config, model = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=cache)
    judge = evaluate.get_judge(dataset)
    figures, verdicts = evaluate.measure(model, dataset.validation, batch_size=7, judge=judge)
    lms, image, label = dataset.validation.batch(range(26))
    with torch.no_grad():
        coarse, fine, _ = model(lms, label)
        for key, x in (('coarse', coarse), ('fine', fine), ('real', image)):
            for figure, network in (('accuracy', model.residue.classifier), ('accuracy_judge', judge)):
                seen = torch.cat([network(x[i:i + 1]).argmax(dim=1) for i in range(26)])
                assert figures[key][figure] == pytest.approx((seen == label).sum().item() / 26)
                if (key, figure) == ('fine', 'accuracy_judge'):
                    assert verdicts.tolist() == seen.tolist()
            if key != 'real':
                assert figures[key]['l1'] == pytest.approx((x - image).abs().mean().item(), rel=1e-4)
    assert set(figures['real']) == {'accuracy', 'accuracy_judge', 'is_classifier', 'is_classifier_std'}


def test_fidelity_by_hand(trained, network):
    """FID and IS in both spaces, of the batches that measure() streams, against the whole at once."""
    run, cache = trained
    config, model = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=cache)
    split = dataset.validation
    split.rows, split.labels = split.rows[::2], split.labels[::2]           # one of each class, for time's sake
    known = evaluate.real_features(network, dataset, 'validation', batch_size=10)
    figures, _ = evaluate.measure(model, split, batch_size=10, network=network, real=known)
    # in the order of a seed: sorted by class, each of IS's splits would hold but a class or two
    lms, image, label = split.batch(torch.randperm(13, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        coarse, fine, _ = model(lms, label)
        C = model.residue.classifier
        body = nn.Sequential(*list(C.resnet.children())[:-1], nn.Flatten())
        for space, encode in (('', lambda x: network((x + 1) / 2)),
                              ('_classifier', lambda x: (body(((x + 1) / 2 - C.mean) / C.std), C(x)))):
            real, _ = encode(image)
            for kind, x in (('coarse', coarse), ('fine', fine)):
                features, logits = encode(x)
                assert figures[kind][f'fid{space}'] == pytest.approx(frechet_distance(features, real), rel=1e-3)
                score = inception_score(logits.softmax(dim=1))
                ours = figures[kind][f'is{space}'], figures[kind][f'is{space}_std']
                assert ours == pytest.approx(score, rel=1e-3, abs=1e-5)
    assert 'fid' not in figures['real'] and figures['real']['is'] >= 1

    metrics = dict(train=figures, validation=figures)
    text = evaluate.table({"I''": (metrics, 'fine', 'E'), 'real frames': (metrics, 'real', 'real')}).split('validation')
    for figure in evaluate.FIGURES:
        line, = [line for line in text[0].splitlines() if line.startswith(f'  {figure} ')]
        assert ('not computed' in line) == (figure == 'accuracy_judge')
        value = figures['fine'].get(figure)
        assert value is None or f'{value:.{3 if figure in evaluate.FIGURES[:4] else 4}f}' in line
    papers = [line.split()[2:] for line in text[1].splitlines() if 'paper' in line]
    assert papers == [['240.780', '-'], ['4.202', '4.755'], ['0.9033', '0.9956']]


def test_features_of_the_real_frames_are_kept_and_a_stale_file_is_noticed(trained, network, tmp_path):
    run, cache = trained
    config, _ = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=shutil.copytree(cache, tmp_path / 'cache'))
    dataset.validation.rows = dataset.validation.rows[::2]                  # for time's sake
    first = evaluate.real_features(network, dataset, 'validation')
    kept = dataset.folder / 'inception-validation.pt'
    when = kept.stat().st_mtime_ns
    again = evaluate.real_features(network, dataset, 'validation')
    assert kept.stat().st_mtime_ns == when and again.score() == first.score()
    assert torch.equal(again.moments.rows, first.moments.rows)
    changed = copy.deepcopy(network)
    changed.Mixed_7c.branch1x1.bn.bias.data += 1                            # other weights
    moved = evaluate.real_features(changed, dataset, 'validation')
    assert frechet_distance(moved.moments, first.moments) > 1
    other = dataset._replace(fingerprint='other files')
    for state in (other, dataset):
        when = kept.stat().st_mtime_ns
        assert evaluate.real_features(network, state, 'validation').score() == pytest.approx(first.score())
        assert kept.stat().st_mtime_ns > when
    kept.write_bytes(b'cut')
    assert evaluate.real_features(network, dataset, 'validation').score() == pytest.approx(first.score())


def test_the_judge_is_trained_once_and_is_not_c(demo, tmp_path, capsys):
    dataset = preprocess.open_dataset(demo, 32, tmp_path)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    judge = evaluate.get_judge(dataset)
    assert torch.equal(torch.get_rng_state(), state)            # the run's random numbers stay its own
    assert 'judge epoch 1/20' in capsys.readouterr().out and not judge.training
    assert len(judge.layer1) == 2 and judge.fc.in_features == 512           # ResNet18, C is a ResNet50
    assert evaluate.measure_accuracy(judge, dataset.train) > 0.5
    again = evaluate.get_judge(dataset)
    assert 'judge epoch' not in capsys.readouterr().out
    assert same(again.state_dict(), judge.state_dict())
    torch.save(dict(torch.load(dataset.folder / 'judge.pt'), key='of other files'), dataset.folder / 'judge.pt')
    assert same(evaluate.get_judge(dataset).state_dict(), judge.state_dict())
    assert 'judge epoch 1/20' in capsys.readouterr().out


def test_failures_are_sorted_by_loudness(trained, tmp_path):
    run, cache = trained
    config, model = evaluate.load_run(run)
    dataset = evaluate.open_run_data(config, cache=cache)
    split = dataset.validation
    loudness = split.loudness()
    for i in (0, 7):
        power = 10 ** (split.lms[split.rows[i]].astype(float) / 10)
        assert loudness[i].item() == pytest.approx(10 * math.log10(power.mean()), abs=0.01)
    verdicts, path = split.labels.clone(), tmp_path / 'failures.png'
    path.write_bytes(b'of an earlier evaluation')
    found = evaluate.failure_grid(model, split, dataset.classes, verdicts, path)
    silent = sum(1 for level in loudness if level < -40)
    assert found == dict(clips=26, wrong=0, near_silent=silent, near_silent_wrong=0) and not path.exists()
    wrong = loudness.argsort()[[20, 0, 9]]
    verdicts[wrong] = (verdicts[wrong] + 1) % 13
    found = evaluate.failure_grid(model, split, dataset.classes, verdicts, path)
    assert found == dict(clips=26, wrong=3, near_silent=silent, near_silent_wrong=int(loudness.min() < -40))
    sheet = np.asarray(Image.open(path).convert('RGB')).astype(int)
    assert sheet.shape[0] == 28 + 3 * 132
    for row, i in enumerate(sorted(wrong.tolist(), key=lambda i: loudness[i])):     # the quietest first
        truth = np.asarray(evaluate.picture(split.batch([i])[1][0]).resize((128, 128), Image.Resampling.BICUBIC))
        assert np.array_equal(sheet[28 + row * 132:][:128, 130 + 3 * 132:][:, :128], truth)
    silence = split.lms.copy()
    silence[:] = -100
    quiet = preprocess.Split(silence, split.frames, *map(list, zip(*[(0, '')] * len(silence))), split.rows, 32)
    assert quiet.loudness().tolist() == pytest.approx([-100] * 26)


def test_several_runs_side_by_side(trained, demo, data, tmp_path, no_network, refused, capsys):
    run, cache = trained
    base = ['--data', demo, '--cache', cache, '--device', 'cpu', '--epochs', '1', *SMALL]
    train.main([*map(str, base), '--variant', 'D', '--out', str(tmp_path / 'D'), '--classifier',
                str(run / 'classifier.pt')])
    capsys.readouterr()
    shutil.copytree(run, tmp_path / 'E')
    runs = [str(tmp_path / variant) for variant in 'DE']
    evaluate.main([*runs, '--device', 'cpu', '--out', str(tmp_path / 'figures')])
    out = capsys.readouterr().out
    lines = {line.split('  ')[1]: line.split()[-3:] for line in out.split('\nvalidation\n')[1].splitlines()
             if line.startswith('  ')}
    assert out.count('real frames') == 1 and lines['fid, paper'] == ['307.370', '240.780', '-']
    metrics = [json.loads(Path(folder, 'metrics.json').read_text())['validation'] for folder in runs]
    assert lines['l1'] == [f'{found["fine"]["l1"]:.4f}' for found in metrics] + ['-']
    assert lines['accuracy_judge'] == [f'{found["accuracy_judge"]:.4f}' for found in
                                       [found['fine'] for found in metrics] + [metrics[0]['real']]]
    assert 'classifiers' not in out
    figure4, figure5 = (np.asarray(Image.open(tmp_path / f'figures/figure{n}.png').convert('RGB')) for n in (4, 5))
    assert figure4.shape == (28 + 13 * 132, 130 + 4 * 132, 3) and figure5.shape == (28 + 13 * 132, 130 + 6 * 132, 3)
    clip = evaluate.example_clips(evaluate.open_run_data(evaluate.load_config(run), cache=cache))[2][1]
    def tile(sheet, column):
        return sheet[28 + 2 * 132:, 130 + column * 132:][:128, :128].astype(int)

    for column, folder in enumerate(runs, 1):
        with torch.no_grad():
            stages = evaluate.load_run(folder)[1](*clip[::2])[:2]
        coarse, fine = (np.asarray(evaluate.picture(x[0]).resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
                        for x in stages)
        assert np.abs(tile(figure4, column) - fine).max() <= 1
        assert np.abs(tile(figure5, 2 * column - 1) - coarse).max() <= 1
        assert np.abs(tile(figure5, 2 * column) - fine).max() <= 1

    config = json.loads((tmp_path / 'D/config.json').read_text())
    (tmp_path / 'D/config.json').write_text(json.dumps(dict(config, data=str(data))))
    refused(evaluate, [*runs, '--device', 'cpu'], tmp_path / 'D', data, 'same data')
    refused(evaluate, [runs[0], tmp_path / 'none'], tmp_path / 'none', 'not a run')


def test_without_inception_all_else_comes(trained, no_network, refused, capsys, tmp_path):
    run, cache = trained
    evaluate.main([str(run), '--device', 'cpu'])
    out, err = capsys.readouterr()
    assert 'fid and is: not computed' in err and '--inception PATH' in err and 'not computed' in out
    assert "I'' fine" in out and 'fid' not in json.loads((run / 'metrics.json').read_text())['train']['fine']
    refused(evaluate, [run, '--device', 'cpu', '--require-inception'], '--inception PATH')
    refused(evaluate, [run, '--device', 'cpu', '--inception', tmp_path / 'none.pth'], 'none.pth')


def test_evaluate_command_repeats_what_train_found(trained, no_network):
    run, cache = trained
    before = json.loads((run / 'metrics.json').read_text())
    assert before.keys() == {'train', 'validation'}
    for split in before.values():
        assert split.keys() - {'failures'} == {'coarse', 'fine', 'real'}
        assert split['fine'].keys() == {'accuracy', 'accuracy_judge', 'l1', 'fid_classifier', 'is_classifier',
                                        'is_classifier_std'}
    (run / 'metrics.json').unlink(), (run / 'grid.png').unlink()
    # the newest run below runs/
    done = command(HERE / 'evaluate.py', '--device', 'cpu', '--batch-size', '13', cwd=run.parent.parent)
    assert done.returncode == 0, done.stderr
    after = json.loads((run / 'metrics.json').read_text())
    for split in before:
        for key in before[split]:
            assert after[split][key] == pytest.approx(before[split][key], rel=1e-5, abs=1e-6)
    for words in ("I'' fine", 'real frames', '0.9954', '0.9033', f'{after["validation"]["fine"]["l1"]:.4f}',
                  'grid.png'):
        assert words in done.stdout
    assert (run / 'grid.png').exists()


def test_evaluate_refuses_data_of_other_classes(trained, data, refused):
    run, _ = trained
    for part in ('chunk', 'img'):
        for split in ('train', 'validation'):
            rename(data / part / split, 'tuba', 'tube')
    refused(evaluate, [run, '--data', data, '--workers', '1', '--cache', data.parent / 'c', '--device', 'cpu'], data)


def test_grid_shows_the_pictures_in_their_place(tmp_path):
    red, half = torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 32, 32), torch.zeros(3, 32, 32)
    evaluate.draw_grid([('one', dict(a=evaluate.picture(red), b=evaluate.picture(half)))], tmp_path / 'grid.png')
    sheet = np.asarray(Image.open(tmp_path / 'grid.png').convert('RGB'))
    assert tuple(sheet[28 + 64, 130 + 64]) == (255, 0, 0) and tuple(sheet[28 + 64, 130 + 132 + 64]) == (128, 128, 128)
    assert (sheet[:28] < 128).any() and (sheet[28:, :120] < 128).any()       # titles and name
    lms = torch.full((1, 32, 32), -1.0)
    lms[:, :16] = 1                                                          # loud low bands
    drawn = np.asarray(evaluate.lms_picture(lms)).astype(int).sum(axis=2)
    assert (drawn[16:] > 600).all() and (drawn[:16] < 30).all()              # bright at the bottom


def test_a_recording_is_painted(trained, demo, tmp_path, refused, monkeypatch):
    run, cache = trained
    config, model = evaluate.load_run(run)
    clip = sorted((demo / 'chunk/validation/sax').iterdir())[0]
    lms, _, label = evaluate.open_run_data(config, cache=cache).validation.batch([2 * config['classes'].index('sax')])
    monkeypatch.chdir(tmp_path)
    flags = ['--label', 'sax', '--device', 'cpu']
    evaluate.main([str(run), '--audio', str(clip), *flags])
    painted = np.asarray(Image.open(clip.with_suffix('.png').name)).astype(int)
    with torch.no_grad():
        expected = np.asarray(evaluate.picture(model(lms, label)[1][0])).astype(int)
    assert np.abs(painted - expected).max() <= 3            # the cache holds float16
    rate, samples = 22050, np.random.default_rng(0).integers(-9999, 9999, (28000, 2)).astype('<i2')
    Path('long.wav').write_bytes(wav_bytes(samples.tobytes(), 16, rate, 2))         # 1.27 s
    evaluate.main([str(run), '--audio', 'long.wav', '--out', 'scene.png', *flags])
    strip = Image.open('scene.png')
    assert strip.size == (3 * 32, 32)
    parts = [np.asarray(strip.crop((i * 32, 0, i * 32 + 32, 32))) for i in range(3)]
    assert not np.array_equal(parts[0], parts[2])
    refused(evaluate, [run, '--audio', 'long.wav', '--out', 'scene.png', *flags], 'scene.png', 'exists')
    refused(evaluate, [run, '--audio', 'long.wav', '--label', 'kazoo'], 'kazoo', 'bassoon, cello')
    refused(evaluate, [run, '--audio', 'scene.png', '--out', 'x.png', *flags], 'scene.png', 'WAV')
    refused(evaluate, [run, '--audio', 'long.wav'], '--label')
    refused(evaluate, [run, run, '--audio', 'long.wav', '--label', 'sax'], '--audio')
    refused(evaluate, [run, '--workers', '-1'], '--workers')


def test_checkpoints_cannot_run_code_and_broken_ones_are_named(trained, tmp_path, refused, monkeypatch):
    run, _ = trained
    for folder in ('code', 'cut', 'other', 'none'):
        (tmp_path / folder).mkdir()
        shutil.copy(run / 'config.json', tmp_path / folder)
    torch.save({'model': Harm(str(tmp_path / 'harm'))}, tmp_path / 'code/checkpoint.pt')
    (tmp_path / 'cut/checkpoint.pt').write_bytes((run / 'checkpoint.pt').read_bytes()[:5000])
    torch.save({'model': {'a': torch.zeros(1)}}, tmp_path / 'other/checkpoint.pt')
    for folder in ('code', 'cut', 'other', 'none'):
        refused(evaluate, [tmp_path / folder, '--device', 'cpu'], tmp_path / folder / 'checkpoint.pt')
    assert not (tmp_path / 'harm').exists()
    refused(evaluate, [tmp_path], tmp_path, 'not a run')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    refused(evaluate, [], 'no run', 'python train.py')


# ------------------------------------------------------------------------ the whole, as a newcomer

def test_train_without_data_makes_the_demo_and_ends_with_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preprocess, 'write_demo', partial(preprocess.write_demo, train=4, validation=2))    # for time
    train.main('--size 32 --base 8 --batch-size 26 --epochs 1 --classifier-epochs 1 --device cpu'.split())
    out = capsys.readouterr().out
    for words in ('built-in demo data', '52 pairs in train, 26 in validation', 'epoch 1/1', "I'' fine", 'metrics.json'):
        assert words in out
    assert len(list((tmp_path / 'runs').glob('demo-E-*/samples/epoch-0001.png'))) == 1
