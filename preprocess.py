"""Sound to LMS, files to pairs, pairs to batches: everything CAR-GAN needs before its networks.

    python preprocess.py --data Sub-URMP    # check every file, pack the cache (train.py does too)
    python preprocess.py --cut take.wav frames --fps 10 --class violin --piece take1 --out mydata
                                            # a dataset from a recording and the frames of its video

A dataset is a folder of pairs, one stem one pair; the folder names are the classes:

    Sub-URMP/chunk/{train,validation}/<instrument>/<stem>.wav     0.5 s of sound
    Sub-URMP/img/{train,validation}/<instrument>/<stem>.jpg       the frame at its start

`spectram` (LMS drawn as RGB .png), `img_256` and `test`, the authors' sample, are read as well.
"""
import argparse
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import struct
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from math import ceil, gcd
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from scipy import fft, sparse
from scipy.io import wavfile

from runs import (InputError, Progress, at_least, blame, default_cache, note, power_of_two,
                  run_command, writing, written_whole)

SAMPLE_RATE = 22050         # Hz, after resampling
CLIP = 11025                # samples: 0.5 s
N_FFT = 2048
HOP = 512
N_MELS = 128
DB_RANGE = (-80.0, 40.0)    # shown to the network as [-1, 1]; absolute, so that silence is dark

FILE_LIMIT = 2 ** 27                # bytes
PIXEL_LIMIT = 7680 * 4320           # of a picture: 8K
warnings.filterwarnings('ignore', module='PIL')     # on Exif and the like, which is not wanted


def _read_file(path):
    """All bytes of a file. Raises ValueError where it is none (a pipe would be waited for)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError('no such file' if not path.exists() else 'not a file')
    if path.stat().st_size > FILE_LIMIT:
        raise ValueError(f'more than {FILE_LIMIT >> 20} MiB')
    return path.read_bytes()


# ------------------------------------------------------------------------------------------- sound

def read_wav(path):
    """Read a WAV file: integers of 8 to 64 bits or floats of 32 or 64, 8 to 192 kHz, any number of
    channels.

    Returns (waveform (n,) float32, the mean of the channels, full scale = [-1, 1]; sample rate in
    Hz). Channels and bits say what a frame is, and the sound ends with the last whole one. Raises
    InputError, naming the file, where it is broken, empty, not finite or over 128 MiB.
    """
    remedy = f'; give PCM or float, 8 to 192 kHz, at most {FILE_LIMIT >> 20} MiB'
    with blame(path, 'not a readable WAV file', remedy):
        samples, sample_rate = _parse_wav(_read_file(path))
        if not np.isfinite(samples).all():
            raise ValueError('samples that are not finite numbers')
    full_scale = 2 ** (8 * samples.itemsize - 1)
    if samples.dtype.kind == 'f':
        samples, full_scale = samples.clip(-1, 1), 1
    return samples.mean(axis=1, dtype=np.float32) / full_scale, sample_rate


def write_wav(file, waveform, sample_rate):
    """Write a waveform (n,) in [-1, 1] as a WAV file of 16 bits; one read from such comes out the
    same.
    """
    samples = np.round(waveform * 32768).clip(-32768, 32767)
    wavfile.write(file, sample_rate, samples.astype(np.int16))


def _parse_wav(content):
    """The samples (n, channels), signed integers or floats, and their rate."""
    form, data = _wav_chunks(content)
    code, channels, sample_rate, bits, subformat = struct.unpack_from('<HHI6xH8xH', form)
    if code == 0xFFFE:                              # WAVE_FORMAT_EXTENSIBLE
        code = subformat
    width = ceil(bits / 8)                          # bytes of a sample
    if code == 1:
        kind = 'i'
    elif code == 3 and width in (4, 8):
        kind = 'f'
    else:
        raise ValueError(f'codec {code} of {bits} bits, neither PCM nor float')
    if not 8000 <= sample_rate <= 192000:
        raise ValueError(f'sample rate {sample_rate} Hz is outside 8 to 192 kHz')
    count = len(data) // max(1, channels * width) * channels        # of samples in whole frames
    if count == 0:
        raise ValueError(f'no samples of {channels} channels in it')
    octets = np.frombuffer(data, np.uint8, count * width).reshape(count, width)
    if width == 1:
        octets = octets ^ 128                       # 8 bits are unsigned
    if width == 3:
        octets = np.pad(octets, [(0, 0), (1, 0)])   # 24 bits become the upper ones of 32
    return octets.view(f'<{kind}{octets.shape[1]}').reshape(-1, channels), sample_rate


def _wav_chunks(content):
    """The format, filled up to the longest, and what is there of the sound."""
    if content[:4] not in (b'RIFF', b'RF64') or content[8:12] != b'WAVE':
        raise ValueError('it does not begin as RIFF WAVE')
    chunks = {b'fmt ': b''}
    start = 12
    while b'data' not in chunks:
        if start + 8 > len(content):
            raise ValueError('no sound in it')
        name, size = struct.unpack_from('<4sI', content, start)
        start += 8
        chunks[name] = content[start:start + size]
        start += size + size % 2
    data = chunks[b'data']
    if b'ds64' in chunks:                           # RF64 says there how long its sound is
        data = data[:int.from_bytes(chunks[b'ds64'][8:16], 'little')]
    elif size == 0 and content[4:8] != struct.pack('<I', len(content) - 8):
        data = content[start:]                      # nobody filled in the lengths at the end
    return chunks[b'fmt '].ljust(40, b'\0'), data


def mel_filterbank(sample_rate=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=0.0, fmax=None):
    """Triangular mel filters, each of area 1: (n_mels, n_fft // 2 + 1) float32; frequencies in Hz.
    Slaney's scale is linear up to 1 kHz (15 mels), logarithmic above (27 mels for a factor of 6.4).
    """
    ends = np.array([fmin, fmax or sample_rate / 2])
    linear = np.minimum(ends, 1000) * 3 / 200
    logarithmic = 27 * np.log(np.maximum(ends, 1000) / 1000) / np.log(6.4)
    mels = np.linspace(*(linear + logarithmic), n_mels + 2)
    edges = np.minimum(mels, 15) * 200 / 3 * 6.4 ** (np.maximum(mels - 15, 0) / 27)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    bins = np.fft.rfftfreq(n_fft, 1 / sample_rate)
    triangles = np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)).clip(0)
    return (triangles * 2 / (high - low)).astype(np.float32)


HANN = 0.5 + 0.5 * np.cos(np.linspace(-np.pi, np.pi, N_FFT + 1)[:-1])
FILTERS = sparse.csr_array(mel_filterbank().astype(np.float64))


def log_mel_spectrogram(waveform, sample_rate):
    """The LMS of half a second of sound, section 3.5: waveform (n,) in [-1, 1] -> (128, 22) float32
    in dB.

    Resampled to 22,050 Hz, cut or zero-padded to 11,025 samples; power of the STFT (Hann 2048, hop
    512, centred with reflection) in 128 mel bands up to 11,025 Hz, the lowest first;
    10 log10(max(x, 1e-10)), so that silence is -100 dB.
    """
    if sample_rate != SAMPLE_RATE:
        from scipy.signal import resample_poly          # takes a second to import
        low_pass = _low_pass(sample_rate)
        waveform = resample_poly(waveform, SAMPLE_RATE, sample_rate, window=low_pass)
    waveform = waveform[:CLIP]
    waveform = np.pad(waveform, (0, CLIP - len(waveform)))
    waveform = np.pad(waveform, N_FFT // 2, mode='reflect')
    frames = np.lib.stride_tricks.sliding_window_view(waveform, N_FFT)[::HOP]
    power = np.abs(fft.rfft(frames * HANN)) ** 2            # (22, 1025)
    return (10 * np.log10(np.maximum(FILTERS @ power.T, 1e-10))).astype(np.float32)


@cache
def _low_pass(sample_rate):
    """The filter that resample_poly would design at each call."""
    from scipy.signal import firwin
    factor = max(SAMPLE_RATE, sample_rate) // gcd(SAMPLE_RATE, sample_rate)
    return firwin(20 * factor + 1, 1 / factor, window=('kaiser', 5.0)).astype(np.float32)


# ------------------------------------------------------------------------------------------- files

def read_image(path, size):
    """Read a picture and resize it: (size, size, 3) uint8, RGB, upright, the transparent over
    white. A JPEG much larger than `size` is decoded at a reduced scale. Raises InputError, naming
    the file, where it cannot be read or is larger than 8K or 128 MiB.
    """
    with blame(path, 'not a readable JPEG or PNG image', '; give an intact one of at most 8K'):
        content = _read_file(path)
        plugin = JpegImageFile if content.startswith(b'\xff\xd8') else PngImageFile
        image = plugin(io.BytesIO(content))         # Image.open() would keep the reason to itself
        if image.width * image.height > PIXEL_LIMIT:
            raise ValueError(f'{image.width} x {image.height} pixels')
        image.draft('RGB', (2 * size, 2 * size))    # a JPEG: the smallest scale of at least this
        pixels = _opaque(image).resize((size, size), Image.Resampling.BICUBIC)
        pixels.info.clear()
        with suppress(Exception):                   # an Exif that says nothing, or is broken
            pixels.getexif()[Base.Orientation] = image.getexif()[Base.Orientation]
        return np.asarray(ImageOps.exif_transpose(pixels))


def _opaque(image):
    """RGB; what is transparent shows white, whatever colour is hidden there."""
    if image.mode.startswith('I'):                          # 16 bits, which convert() would clip
        return image.point(lambda value: value / 256).convert('RGB')
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    return image.convert('RGB')


PICTURES = '.jpg', '.jpeg', '.png'
Pair = namedtuple('Pair', 'split name stem audio image')      # the name is that of the class


def find_pairs(data):
    """Pair the files of a dataset folder by stem within split and class: (classes, pairs,
    problems), the last a line for each file without a partner. Raises InputError for a missing
    layout or a class name that cannot be printed.
    """
    classes = set()
    pairs = []
    problems = []
    for split, folders in ('train', ['train']), ('validation', ['validation', 'test']):
        sounds = _files(data, ('chunk', 'spectram'), folders, ('.wav', '.png'))
        frames = _files(data, ('img', 'img_256'), folders, PICTURES)
        for key in sorted(sounds | frames):
            classes.add(key[0])
            if key not in frames:
                problems.append(f'{sounds[key]}: no frame of this class and stem')
            elif key not in sounds:
                problems.append(f'{frames[key]}: no sound of this class and stem')
            else:
                pairs.append(Pair(split, *key, sounds[key], frames[key]))
    for name in classes:
        if not name.isprintable():      # it is to stand in tables, pictures and JSON
            raise InputError(f'{data}: the name of its class folder {name} cannot be printed; '
                             'rename it')
    return sorted(classes), pairs, problems


def _files(data, parts, splits, suffixes):
    """The files of a split as {(class, stem): path}; of a stem's, that of the first suffix."""
    names = [f'{part}/{split}' for part in parts for split in splits]
    folders = [Path(data, name) for name in names if Path(data, name).is_dir()]
    if not folders:
        raise InputError(f'{data}: no folder {" or ".join(names)} in it; '
                         'preprocess.py --help shows the layout')
    paths = sorted(folders[0].glob('[!.]*/[!.]*'))
    files = {}
    for suffix in suffixes:
        for path in paths:
            if path.suffix.lower() == suffix:
                files.setdefault((path.parent.name, path.stem), path)
    return files


# -------------------------------------------------------------------------------- the packed cache

CACHE_VERSION = 6       # raised whenever the same files would be packed otherwise
Dataset = namedtuple('Dataset',
                     'data classes lms_channels train validation folder fingerprint')


def open_dataset(data, size=256, cache=None, workers=None):
    """Check a dataset folder, pack it (once; again where the name, length or time of a file has
    changed) and map it into memory. Bad files are named on stderr and left out.

    Returns a Dataset: its folder; the classes' names; 1, or 3 where the LMS are RGB pictures; two
    Splits; the folder of the cache; a digest of the files. Raises InputError for a missing layout,
    a class without a good pair in train, an empty validation split or a cache that cannot be
    written.
    """
    data = Path(os.path.realpath(data))
    classes, pairs, problems = find_pairs(data)
    if not classes:
        raise InputError(f'{data}: no sound and no frame in it; preprocess.py --help shows the '
                         'layout')
    drawn = all(pair.audio.suffix.lower() == '.png' for pair in pairs)
    fingerprint = _fingerprint(size, classes, pairs, problems)
    place = hashlib.sha256(os.fsencode(data)).hexdigest()[:8]
    folder = Path(cache or default_cache()) / f'{data.name}-{size}-{place}'
    meta = _read_meta(folder, fingerprint)
    if not meta:
        with writing(folder):           # another may pack it while we wait
            meta = (_read_meta(folder, fingerprint)
                    or _build_cache(folder, fingerprint, pairs, drawn, size, workers))
    for problem in problems + meta['problems']:
        note(f'left out: {problem}')
    packed = [pairs[i] for i in meta['packed']]         # those of train first
    border = sum(pair.split == 'train' for pair in packed)
    for split, some in ('train', packed[:border]), ('validation', packed[border:]):
        missing = ', '.join(sorted(set(classes) - {pair.name for pair in some}))
        if not some or (missing and split == 'train'):
            raise InputError(f'{data}: no good pair in {split} of class {missing}; '
                             'add some, or remove the class folder')
        if missing:
            note(f'note: no pair in validation of class {missing}: trained, but not validated')
    frames, lms = [np.memmap(folder / name, np.uint8, 'r') for name in ('frames', 'lms')]
    frames = frames.reshape(-1, size, size, 3)
    if drawn:
        lms = lms.reshape(frames.shape)
    else:
        lms = lms.view(np.float16).reshape(-1, N_MELS, CLIP // HOP + 1)
    labels = torch.tensor([classes.index(pair.name) for pair in packed])
    stems = [pair.stem for pair in packed]
    whole = Split(lms, frames, np.arange(len(packed)), labels, stems, size)
    train = whole.subset(range(border))
    validation = whole.subset(range(border, len(packed)))
    return Dataset(data, classes, 3 if drawn else 1, train, validation, folder, fingerprint)


def _fingerprint(size, classes, pairs, problems):
    """A digest of all that decides what is packed."""
    files = []
    for pair in pairs:
        for path in pair.audio, pair.image:
            if path.exists():                       # which a dangling link does not
                stat = path.stat()
                files.append((path, stat.st_size, stat.st_mtime_ns))
    constants = CACHE_VERSION, size, SAMPLE_RATE, CLIP, N_FFT, HOP, N_MELS
    return hashlib.sha256(repr((constants, classes, pairs, problems, files)).encode()).hexdigest()


def _read_meta(folder, fingerprint):
    """What a whole cache of these files says of itself; None where there is none."""
    with suppress(Exception):           # a file may hold anything
        meta = json.loads((folder / 'meta.json').read_text())
        if (meta['fingerprint'], meta['bytes']) == (fingerprint, _lengths(folder)):
            return meta


def _lengths(folder):
    return [(folder / name).stat().st_size for name in ('frames', 'lms')]


def _build_cache(folder, fingerprint, pairs, drawn, size, workers):
    """Pack all pairs, in parallel and constant memory: LMS as float16 dB or uint8 pictures, frames
    as uint8. Returns what meta.json says.
    """
    def read(pair):
        """The LMS and the frame; an InputError for the first that is bad."""
        try:
            if drawn:
                lms = read_image(pair.audio, size)
            else:
                lms = log_mel_spectrogram(*read_wav(pair.audio)).astype(np.float16)
            return lms, read_image(pair.image, size)
        except InputError as error:
            return error

    meta = dict(fingerprint=fingerprint, packed=[], problems=[])
    progress = Progress()
    with written_whole(folder) as building:
        building.mkdir()
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, \
                open(building / 'lms', 'wb') as lms, open(building / 'frames', 'wb') as frames:
            for start in range(0, len(pairs), 256):     # a window, so that results never pile up
                for i, found in enumerate(pool.map(read, pairs[start:start + 256]), start):
                    if isinstance(found, InputError):
                        meta['problems'].append(str(found))
                    else:
                        lms.write(found[0])
                        frames.write(found[1])
                        meta['packed'].append(i)
                progress(f'packing {i + 1} of {len(pairs)} pairs', last=i + 1 == len(pairs))
        meta['bytes'] = _lengths(building)
        (building / 'meta.json').write_text(json.dumps(meta))
    return meta


# ------------------------------------------------------------------------------------------ loader

@dataclass(eq=False)
class Split:
    """One split of a packed dataset, or some of its pairs. Batches are (lms, image, label),
    converted on the device: lms (B, C_a, S, S) and image (B, 3, S, S) float32 in [-1, 1], label
    (B,) int64.
    """
    lms: np.ndarray         # lms and frames are those of the whole cache
    frames: np.ndarray
    rows: np.ndarray
    labels: torch.Tensor
    stems: list
    size: int

    def __len__(self):
        return len(self.rows)

    def subset(self, indices):
        """The pairs of these indices (a sequence of int) as a Split of the same cache."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        rows = self.rows[indices.numpy()]
        stems = [self.stems[index] for index in indices]
        return Split(self.lms, self.frames, rows, self.labels[indices], stems, self.size)

    def batch(self, indices, device='cpu'):
        """The pairs of these indices (a sequence of int) as one batch."""
        return self._convert(self._read(torch.as_tensor(indices), device), device)

    def _read(self, indices, device):
        """The packed pairs of these indices: [lms, frames, labels]; for a GPU in memory that it
        can fetch by itself.
        """
        rows = self.rows[indices.numpy()]
        packed = [*map(torch.from_numpy, (self.lms[rows], self.frames[rows])), self.labels[indices]]
        if torch.device(device).type == 'cuda':
            return [part.pin_memory() for part in packed]
        return packed

    def _convert(self, packed, device):
        # towards other devices than CUDA a copy that is not waited for may be read too early
        lms, frames, labels = [part.to(device, non_blocking=part.is_pinned()) for part in packed]
        return network_lms(lms, self.size), network_lms(frames, self.size), labels

    def order(self, seed=None):
        """The indices of all pairs (n,): as they lie, or shuffled by this seed alone."""
        if seed is None:
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def count(self, batch_size, least=1, start=0):
        """The number of batches in what an epoch has left after `start` pairs: of at most
        `batch_size` pairs, but of at least `least`, given as many.
        """
        left = len(self) - start
        return min(ceil(left / batch_size), max(1, left // least))

    def indices(self, batch_size, seed=None, start=0, least=1):
        """The indices of each batch: the epoch's order(), but for the first `start` pairs, in
        count() batches of nearly equal size. From where a batch ended they are the same batches.
        """
        left = self.order(seed)[start:]
        if len(left) == 0:
            return []
        return list(left.tensor_split(self.count(batch_size, least, start)))

    def batches(self, batch_size, device='cpu', seed=None, start=0, part=0, parts=1, least=1):
        """The batches of an epoch, after its first `start` pairs; each is read in a thread while
        the one before is in use. Of each, one process of many takes the `part`th of so many `parts`
        (tensor_split). Where there is nothing for it, it takes the first pair, to be weighed with
        0: all processes take part in every step.
        """
        waiting = []
        with ThreadPoolExecutor(1) as reader:
            for batch in self.indices(batch_size, seed, start, least):
                mine = batch.tensor_split(parts)[part] if part < len(batch) else batch[:1]
                waiting.append(reader.submit(self._read, mine, device))
                if len(waiting) > 1:        # the next is read while this one is in use
                    yield self._convert(waiting.pop(0).result(), device)
            for last in waiting:
                yield self._convert(last.result(), device)

    def loudness(self):
        """How loud each clip is (n,): the mean power of its bands in dB; of RGB LMS the mean
        brightness, 0 to 255.
        """
        if self.lms.dtype == np.uint8:
            return self._of_each(lambda lms: lms.flatten(1).mean(1))
        return 10 * self._of_each(lambda lms: (10 ** (lms / 10)).flatten(1).mean(1)).log10()

    def average_lms(self):
        """The LMS averaged over time (n, 128) float32, dB; of RGB LMS over their width, flattened
        (n, 3 S), 0 to 255.
        """
        return self._of_each(lambda lms: lms.mean(2).flatten(1))

    def _of_each(self, measure):
        windows = np.split(self.rows, range(64, len(self), 64))
        return torch.cat([measure(torch.from_numpy(self.lms[rows]).float()) for rows in windows])


def network_lms(lms, size):
    """LMS as the network sees them, section 3.5: dB (B, 128, 22) -> (B, 1, size, size), or uint8
    pictures, frames as well, (B, size, size, 3) -> (B, 3, size, size); float32 in [-1, 1].
    Bilinear, antialiased where that is a reduction.
    """
    if lms.dtype == torch.uint8:
        return lms.permute(0, 3, 1, 2).float() / 127.5 - 1
    low, high = DB_RANGE
    scaled = ((lms.float() - low) * (2 / (high - low)) - 1).clamp(-1, 1).unsqueeze(1)
    return F.interpolate(scaled, (size, size), mode='bilinear', antialias=size < N_MELS)


def recording_lms(waveform, sample_rate, size, hop=0.5, batch_size=64):
    """The LMS of the half seconds that begin every `hop` seconds of a recording, filled up with
    silence after its end: yields (b, 1, size, size), b at most `batch_size`.
    """
    length = ceil(sample_rate / 2)
    count = max(1, ceil((len(waveform) - 0.5) / sample_rate / hop))     # each begins before the end
    for batch in torch.arange(count).split(batch_size):
        starts = [round(i * hop * sample_rate) for i in batch.tolist()]
        lms = [log_mel_spectrogram(waveform[start:start + length], sample_rate) for start in starts]
        yield network_lms(torch.from_numpy(np.stack(lms)), size)


# ---------------------------------------------------------------------- a dataset from a recording

VALIDATION_SHARE = 0.2      # of a recording, at its end


def numbered_frames(folder):
    """The pictures of a folder as [(number, path)] by the last number in their names, the first of
    them 0. Raises InputError where there are none, or a name has no number or that of another.
    """
    if not Path(folder).is_dir():
        raise InputError(f'{folder}: no such folder of frames')
    frames = {}
    for path in sorted(Path(folder).glob('[!.]*')):
        if path.suffix.lower() not in PICTURES:
            continue
        numbers = re.findall('[0-9]+', path.stem)
        if not numbers:
            raise InputError(f'{path}: no number in its name, which is to say when it was seen')
        other = frames.setdefault(int(numbers[-1]), path)
        if other != path:
            raise InputError(f'{path}: has the number of {other}')
    if not frames:
        raise InputError(f'{folder}: no .jpg or .png in it')
    first = min(frames)
    return [(number - first, path) for number, path in sorted(frames.items())]


def cut_recording(recording, folder, out, label, piece, fps=10.0, shift=0.0):
    """Add a recording and the frames of its video to the dataset `out`: frame k, seen at k / fps
    seconds, with the half second of sound that begins `shift` seconds later, as stem
    <label><piece>_<milliseconds>. The last fifth goes to validation; what would be heard in both
    splits is left out. Returns how many pairs each split got, {split: count}.

    Raises InputError where frames and sound do not last equally long, no frame has half a second of
    sound, or a stem is there already.
    """
    for name in label, piece:
        if not re.fullmatch(r'\w[^/\\]*', name) or not name.isprintable():
            raise InputError(f'--class, --piece: {name!r} is no good name for a file')
    waveform, sample_rate = read_wav(recording)
    frames = numbered_frames(folder)
    lasts = (frames[-1][0] + 1) / fps
    length = len(waveform) / sample_rate
    if abs(lasts - length) > 0.5:
        raise InputError(f'{folder}: its frames last {lasts:.1f} s at {fps:g} a second, '
                         f'{recording} {length:.1f} s; give the true --fps, or cut both alike')
    half = ceil(sample_rate / 2)
    border = round((1 - VALIDATION_SHARE) * len(waveform))
    plan = {}
    for k, path in frames:
        start = round((k / fps + shift) * sample_rate)
        if 0 <= start <= border - half:
            split = 'train'
        elif border <= start <= len(waveform) - half:
            split = 'validation'
        else:
            continue
        plan[f'{label}{piece}_{round(1000 * k / fps)}'] = split, start, path
    if not plan:
        raise InputError(f'{recording}: no frame has half a second of it, {shift:g} s later')
    counts = dict(train=0, validation=0)
    for split in counts:
        for part in 'chunk', 'img':
            folder = Path(out, part, split, label)
            with blame(folder, 'cannot be made', '; name another --out'):
                folder.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if path.stem in plan:
                    raise InputError(f'{path}: is there already; name another --piece')
    progress = Progress()
    written = []
    try:
        for stem, (split, start, path) in plan.items():
            chunk = waveform[start:start + half]
            picture = Path(out, 'img', split, label, stem + path.suffix.lower())
            sound = Path(out, 'chunk', split, label, f'{stem}.wav')
            written += picture, sound
            _write_pair(path, picture, sound, chunk, sample_rate)
            counts[split] += 1
            progress(f'{stem}: {sum(counts.values())} of {len(plan)} pairs')
    except BaseException:           # a piece is there whole, or not at all
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return counts


def _write_pair(frame, picture, sound, chunk, sample_rate):
    """Copy a frame to `picture`, and write its half second to `sound`."""
    with blame(frame, 'cannot be copied', '; mend or remove it'):
        shutil.copyfile(frame, picture)
    with blame(sound, 'cannot be written', '; make room there, or name another --out'):
        write_wav(sound, chunk, sample_rate)


# ----------------------------------------------------------------------------------------- command

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--data', help='the dataset folder to check and to pack')
    add('--cache', help=f'where packed data is kept (default: {default_cache()})')
    add('--size', type=power_of_two, default=256, help='side of the frames (default: 256)')
    add('--cut', nargs=2, metavar=('WAV', 'FRAMES'), help='make a dataset, or add to one: a '
        'recording, and a folder with the frames of its video, numbered as ffmpeg does')
    add('--fps', type=at_least(float, 0.01), default=10.0, metavar='N',
        help='of these frames (default: 10)')
    add('--class', dest='label', metavar='CLASS', help='what plays there')
    add('--piece', metavar='NAME', help='what to call it, for stems <class><name>_<milliseconds>')
    add('--shift', type=at_least(float, -600, below=601), default=0.0, metavar='SECONDS',
        help='a frame goes with the half second that begins so much later (default: 0)')
    add('--out', help='the dataset folder to make, or to add to')
    args = parser.parse_args(argv)
    if args.cut:
        if None in (args.label, args.piece) or not args.out:
            parser.error('--cut wants --class, --piece and --out, too')
        counts = cut_recording(*args.cut, args.out, args.label, args.piece, args.fps, args.shift)
        print(f'{args.out}: {counts["train"]} pairs more in train, {counts["validation"]} in '
              f'validation; now: python train.py --data {shlex.quote(args.out)} --preset small')
        if 0 in counts.values():
            print('which wants some in both: cut a recording of more than 2.5 s as well')
        return
    if not args.data:
        parser.error('name a dataset by --data, or make one by --cut')
    data = open_dataset(args.data, args.size, args.cache)
    print(f'{"class":20} train validation')
    for label, name in enumerate(data.classes):
        train = (data.train.labels == label).sum()
        validation = (data.validation.labels == label).sum()
        print(f'{name:20} {train:5} {validation:10}')


if __name__ == '__main__':
    run_command(main)
