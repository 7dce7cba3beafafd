"""Sound to LMS, files to pairs, pairs to batches: everything CAR-GAN needs before its networks.

    python preprocess.py --data Sub-URMP          # check every file and pack the cache (train.py does too)
    python preprocess.py --demo my-demo           # write the built-in demo data as a Sub-URMP folder

    waveform, sample_rate = read_wav('violin06_2400.wav')
    lms = log_mel_spectrogram(waveform, sample_rate)        # (128, 22) float32, dB

A dataset is a folder of pairs, one stem one pair; the folder names are the classes:

    Sub-URMP/chunk/{train,validation}/<instrument>/<stem>.wav     0.5 s of sound
    Sub-URMP/img/{train,validation}/<instrument>/<stem>.jpg       the frame at its start

`spectram` (LMS drawn as RGB .png), `img_256` and `test` are understood as well: the authors' sample.
"""
import argparse
import hashlib
import io
import json
import mmap
import os
import shutil
import stat
import sys
import time
import warnings
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from math import ceil, gcd
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from scipy import fft, signal, sparse
from scipy.io import wavfile

try:
    import fcntl
except ImportError:         # Windows: there are no locks
    fcntl = None

SAMPLE_RATE = 22050         # Hz, after resampling
CLIP = 11025                # samples: 0.5 s
N_FFT, HOP, N_MELS = 2048, 512, 128
DB_RANGE = (-80.0, 40.0)    # dB, shown to the network as [-1, 1]; absolute, so that silence is dark
LAYOUT = 'DATA/{chunk,img}/{train,validation}/<class>/<stem>.{wav,jpg}'

MINUTES, FILE_LIMIT = 10, 2 ** 27       # a recording may last, a file may hold (bytes) as much
PIXEL_LIMIT, SIDE_LIMIT = 7680 * 4320, 2 ** 16      # of a picture: 8K

warnings.filterwarnings('ignore', category=wavfile.WavFileWarning)              # unknown chunks
warnings.filterwarnings('ignore', module='PIL')     # about pictures that are read all the same, or refused below


class InputError(ValueError):
    """Something the user can mend: one line that names the file or the flag, and the remedy."""


class UserFile(io.BytesIO):
    """A file that may be anything, in memory. A pipe would let us wait for ever, and a file of millions of
    tiny parts nearly so: opening the one and reading the other raise ValueError, as does, where it is to be
    `whole`, a file that ends before what it says of itself.
    """

    def __init__(self, path, whole=False):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError('not a file')
        with open(path, 'rb') as file:
            data = file.read(FILE_LIMIT + 1)
        if len(data) > FILE_LIMIT:
            raise ValueError(f'more than {FILE_LIMIT >> 20} MiB')
        super().__init__(data)
        self.whole, self.reads = whole, 0

    def read(self, size=-1):
        data, self.reads = super().read(size), self.reads + 1
        if self.reads > 100_000:
            raise ValueError('it consists of too many parts')
        if self.whole and 0 < len(data) < size:
            raise ValueError(f'cut short: {len(data)} of {size} bytes are there')
        return data


# ------------------------------------------------------------------------------------------- sound

def read_wav(path, seconds=None):
    """Read a WAV file: 8- to 64-bit integer or float, 8 to 192 kHz, any number of channels; all of it,
    or its first `seconds`.

    Returns (waveform (n,) float32, the mean of the channels, full scale = [-1, 1]; sample rate in Hz).
    Raises InputError, naming the file, where it is unreadable, cut short, empty, not finite, larger than
    128 MiB, or where what is asked for lasts more than 10 minutes.
    """
    try:
        sample_rate, samples = wavfile.read(UserFile(path, whole=True))
        if not 8000 <= sample_rate <= 192000:
            raise ValueError(f'sample rate {sample_rate} Hz is outside 8 to 192 kHz')
        if seconds is not None:
            samples = samples[:ceil(seconds * sample_rate)]
        if len(samples) > 60 * MINUTES * sample_rate:
            raise ValueError(f'more than {MINUTES} minutes')
        if samples.size == 0:
            raise ValueError('no samples in it')
        samples = samples.reshape(len(samples), -1)
        waveform, step = np.empty(len(samples), np.float32), ceil(2 ** 20 / samples.shape[1])
        for i in range(0, len(samples), step):      # in parts, since they are several times as large on the way
            _full_scale(samples[i:i + step]).clip(-1, 1).mean(axis=1, out=waveform[i:i + step])
    except Exception as error:      # scipy answers a broken header with whatever it stumbles over
        why = 'no sound in it' if isinstance(error, UnboundLocalError) else reason(error)
        raise InputError(f'{path}: not a readable WAV file ({why}); '
                         f'give an uncompressed one of at most {MINUTES} minutes') from error
    return waveform, sample_rate


def _full_scale(samples):
    """Samples as wavfile gives them -> floats, full scale = [-1, 1]. Raises ValueError where one is not finite."""
    if samples.dtype == np.uint8:
        return (samples - np.float32(128)) / 128
    if samples.dtype.kind == 'i':                   # 24 bits come as the upper three bytes of 32
        return samples * np.float32(1 / -float(np.iinfo(samples.dtype).min))
    if not np.isfinite(samples).all():
        raise ValueError('samples that are not finite numbers')
    return samples


def mel_filterbank(sample_rate=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=0.0, fmax=None):
    """Triangular mel filters on the Slaney scale, each of area 1: (n_mels, n_fft // 2 + 1) float32.

    The scale is linear up to 1 kHz (15 mels) and logarithmic above (27 mels for each factor of 6.4).
    Frequencies are in Hz; fmax is half the sample rate by default.
    """
    def mel(hz):
        return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))

    def hertz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))

    edges = hertz(np.linspace(mel(fmin), mel(fmax or sample_rate / 2), n_mels + 2))
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.fft.rfftfreq(n_fft, 1 / sample_rate)                                    # of the FFT's bins
    triangle = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return (triangle * 2 / (high - low)).astype(np.float32)


def log_mel_spectrogram(waveform, sample_rate):
    """The LMS of half a second of sound, section 4.1: waveform (n,) in [-1, 1] -> (128, 22) float32, dB.

    Resampled to 22,050 Hz, cut or zero-padded to 11,025 samples; power of the STFT (Hann 2048, hop
    512, centred with reflection) in 128 mel bands from 0 to 11,025 Hz; 10 log10(max(x, 1e-10)).
    Row 0 is the lowest band. The level is absolute: a silent clip is -100 dB throughout.
    """
    up, down = SAMPLE_RATE // gcd(SAMPLE_RATE, sample_rate), sample_rate // gcd(SAMPLE_RATE, sample_rate)
    waveform = waveform[:ceil((CLIP + 64) * down / up)]     # 64 more than the filter reaches beyond the cut
    if up != down:
        h, delay = _resampling_filter(up, down)
        end = delay + ceil(len(waveform) * up / down)
        waveform = signal.upfirdn(h, waveform, up, down)[delay:end]
    waveform = waveform[:CLIP]
    waveform = np.pad(waveform, (0, CLIP - len(waveform)))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, N_FFT // 2, mode='reflect'), N_FFT)[::HOP]
    window, filters = _hann_and_filters()
    spectrum = fft.rfft(frames * window)                                            # (22, 1025)
    power = spectrum.real ** 2 + spectrum.imag ** 2
    return (10 * np.log10(np.maximum(filters @ power.T, 1e-10))).astype(np.float32)


@lru_cache
def _resampling_filter(up, down):
    """The anti-aliasing filter of scipy's resample_poly and its delay in samples after resampling."""
    half = 10 * max(up, down)
    lead = -half % down         # zeros in front make the delay a whole number
    h = up * signal.firwin(2 * half + 1, 1 / max(up, down), window=('kaiser', 5.0))
    return np.pad(h, (lead, 0)).astype(np.float32), (half + lead) // down


@lru_cache
def _hann_and_filters():
    return signal.get_window('hann', N_FFT), sparse.csr_array(mel_filterbank().astype(np.float64))


# ------------------------------------------------------------------------------------------- files

def read_image(path, size):
    """Read a picture and resize it: (size, size, 3) uint8, RGB. A JPEG much larger than `size` is
    decoded at a reduced scale. Raises InputError, naming the file, where it cannot be read or is larger
    than 8K or 128 MiB.
    """
    try:
        file = UserFile(path)
        # Each scan of a progressive JPEG is a pass over the whole picture, each profile of a PNG is
        # unpacked: of the one there are some ten, of the other one, unless the file is meant to stall us.
        if max(file.getvalue().count(part) for part in (b'\xff\xda\0', b'iCCP')) > 50:
            raise ValueError('it consists of too many parts')
        with Image.open(file, formats=('JPEG', 'PNG')) as image:
            if image.width * image.height > PIXEL_LIMIT or max(image.size) > SIDE_LIMIT:
                raise ValueError(f'{image.width} x {image.height} pixels')
            image.draft('RGB', (2 * size, 2 * size))        # a JPEG: the smallest scale of at least this
            if image.mode == 'I;16':                        # which convert() would clip
                image = image.point(lambda value: value / 256)
            image = image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise InputError(f'{path}: not a JPEG or PNG image; give one of these') from None
    except Exception as error:      # Pillow raises many kinds
        raise InputError(f'{path}: not a readable JPEG or PNG image ({reason(error)}); '
                         'give an intact one of at most 8K') from error


def reason(error):
    """The error in a few words, without the path that the message around it already names."""
    return (getattr(error, 'strerror', None) or str(error) or type(error).__name__).splitlines()[0]


def one_line(text):
    """Text with file names in it as it can be printed: a name may hold line breaks, and bytes that are no text."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class Pair(NamedTuple):
    split: str      # train or validation
    label: int      # index into the classes
    stem: str
    audio: Path
    image: Path


def find_pairs(data):
    """Pair the files of a dataset folder by stem within split and class.

    Returns (classes, pairs, problems): the sorted folder names, the pairs in order of split, class and
    stem, and a line for each file that has no partner. Raises InputError where the layout is not there,
    or where the name of a class cannot be printed.
    """
    data = Path(data)
    audio_root, image_root = _subfolder(data, 'chunk', 'spectram'), _subfolder(data, 'img', 'img_256')
    splits = {split: (_subfolder(audio_root, *names), _subfolder(image_root, *names))
              for split, names in {'train': ['train'], 'validation': ['validation', 'test']}.items()}
    classes = sorted({entry.name for folders in splits.values() for folder in folders
                      for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith('.')})
    if not classes:
        raise InputError(f'{data}: no class folders in it; the layout is {LAYOUT}')
    for name in classes:
        if not name.isprintable():      # it is to stand in tables, pictures and JSON
            raise InputError(f'{data}: the name of its class folder {name} cannot be printed; rename it')

    pairs, problems = [], []
    for split, (audio_folder, image_folder) in splits.items():
        for label, name in enumerate(classes):
            audio = _stems(audio_folder / name, ('.wav', '.png'), problems)
            image = _stems(image_folder / name, ('.jpg', '.jpeg', '.png'), problems)
            problems += [f'{audio[stem]}: no frame of this stem in {image_folder / name}'
                         for stem in sorted(audio.keys() - image)]
            problems += [f'{image[stem]}: no sound of this stem in {audio_folder / name}'
                         for stem in sorted(image.keys() - audio)]
            pairs += [Pair(split, label, stem, audio[stem], image[stem])
                      for stem in sorted(audio.keys() & image)]
    return classes, pairs, problems


def _subfolder(parent, *names):
    for name in names:
        if (parent / name).is_dir():
            return parent / name
    raise InputError(f'{parent}: no folder {" or ".join(names)} in it; the layout is {LAYOUT}')


def _stems(folder, suffixes, problems):
    """The files of a class folder as {stem: path}; a stem that stands twice is a problem, and the
    suffix named first is used.
    """
    found = {}
    files = [path for path in (folder.iterdir() if folder.is_dir() else ())
             if path.suffix.lower() in suffixes and not path.name.startswith('.')]
    for path in sorted(files, key=lambda path: (suffixes.index(path.suffix.lower()), path.name)):
        if path.stem in found:
            problems.append(f'{path}: {found[path.stem].name} has the same stem and is used')
        else:
            found[path.stem] = path
    return found


@contextmanager
def written_whole(path):
    """Give a path beside `path` to write a file or folder to; move it into place once all is written."""
    part = Path(path).with_name(f'{Path(path).name}.part')
    _remove(part)                   # of a process that was killed
    try:
        yield part
        if part.is_file():
            with open(part, 'rb+') as file:
                _sync(file)
        elif part.is_dir():
            _remove(Path(path))     # a folder cannot replace another
        os.replace(part, path)
    finally:
        _remove(part)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock_file(file, wait=False):
    """Lock an open file or folder until it is closed or the process ends; False where another has locked it."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        return False


@contextmanager
def writing(path):
    """Have a file or folder of the cache to oneself: another process that wants to write it waits here.

    Raises InputError where the disk refuses: full, read-only, a file where a folder should be.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_name(f'{path.name}.lock'), 'w') as lock:    # let go of when the process ends, however
            if not lock_file(lock):
                print(one_line(f'waiting for another process that writes {path}'), file=sys.stderr)
                lock_file(lock, wait=True)
            yield
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({reason(error)}); make room there, or name a folder elsewhere '
                         'by --cache') from error


def _sync(file):
    file.flush()
    os.fsync(file.fileno())


class Progress:
    """A line that is rewritten in place on a terminal; elsewhere a plain line every `seconds`."""

    def __init__(self, stream=None, seconds=10):
        self.stream, self.seconds, self.printed = stream or sys.stderr, seconds, time.monotonic()

    def due(self):
        """Whether it is time to print again: for texts that cost something to make."""
        return time.monotonic() - self.printed >= (0.2 if self.stream.isatty() else self.seconds)

    def __call__(self, text, last=False):
        if last or self.due():
            terminal = self.stream.isatty()
            text = one_line(text)
            print(f'\r{text}\x1b[K' if terminal else text, end='' if terminal and not last else '\n',
                  file=self.stream, flush=True)
            self.printed = time.monotonic()


# ------------------------------------------------------------------------------- the packed cache

CACHE_VERSION = 3       # raised whenever the same files would be packed to other bytes


class Dataset(NamedTuple):
    classes: list       # names
    lms_channels: int   # 1, or 3 where the dataset's LMS are RGB pictures
    train: 'Split'
    validation: 'Split'
    folder: Path        # its packed cache, where what is learned of the data alone may be kept
    fingerprint: str    # of the files it was packed from


def default_cache():
    """Where caches go unless a flag says otherwise: never into the data, which may be read-only."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'cargan'


def open_dataset(data, size=256, cache=None, strict=False, workers=None):
    """Check a dataset folder, pack it (once) and map it into memory.

    The cache holds each frame as uint8 at size x size, each LMS as float16 dB (or as uint8 pictures),
    and knows the files it came from by name, length and time: a change of them, or of the LMS's
    parameters, builds it anew. Bad files are named on stderr and left out. Returns a Dataset.

    Raises InputError for a missing layout, a class without a good pair in train, an empty validation
    split, a cache that cannot be written, or, with `strict`, for any bad file.
    """
    classes, pairs, problems = find_pairs(data)
    fingerprint = _fingerprint(data, classes, pairs, problems, size)
    root = Path(cache or default_cache())
    where = hashlib.sha256(os.fsencode(Path(data).resolve())).hexdigest()[:8]
    folder = root / f'{Path(data).resolve().name}-{size}-{where}'
    meta = _read_meta(folder, fingerprint)
    if meta is None:
        with writing(folder):           # another process may have packed it while we waited
            meta = (_read_meta(folder, fingerprint)
                    or _build_cache(folder, fingerprint, data, classes, pairs, problems, size, workers))
    for problem in meta['problems']:
        print(one_line(f'left out: {problem}'), file=sys.stderr)
    if strict and meta['problems']:
        raise InputError(f'{data}: {len(meta["problems"])} problems, named above; mend them or leave --strict out')
    _check_classes(data, meta)
    frames = np.memmap(folder / 'frames', np.uint8, 'r', shape=(len(meta['stems']), size, size, 3))
    lms = np.memmap(folder / 'lms', meta['lms_dtype'], 'r', shape=(len(meta['stems']), *meta['lms_shape']))
    split = np.array(meta['splits'])
    return Dataset(meta['classes'], 1 if meta['lms_dtype'] == 'float16' else 3,
                   *(Split(lms, frames, meta['labels'], meta['stems'], np.flatnonzero(split == name), size)
                     for name in ('train', 'validation')), folder, fingerprint)


def _fingerprint(data, classes, pairs, problems, size):
    """A digest of all that decides the cache's bytes."""
    def state(path):
        try:
            status = path.stat()
            return str(path.relative_to(data)), status.st_size, status.st_mtime_ns
        except OSError:                 # a dangling link: reading it will name it
            return str(path.relative_to(data)), -1, -1

    files = [(pair.split, pair.label, *state(pair.audio), *state(pair.image)) for pair in pairs]
    parameters = (CACHE_VERSION, size, SAMPLE_RATE, CLIP, N_FFT, HOP, N_MELS)
    return hashlib.sha256(json.dumps((parameters, classes, files, problems)).encode()).hexdigest()


def _read_meta(folder, fingerprint):
    """What a whole cache of these files says of itself; None where there is none, or something else."""
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        whole = all((folder / name).stat().st_size == meta['bytes'][name] for name in ('frames', 'lms'))
        return meta if whole and meta['fingerprint'] == fingerprint else None
    except Exception:                   # a file may hold anything
        return None


def _build_cache(folder, fingerprint, data, classes, pairs, problems, size, workers):
    """Read all pairs, in order, in parallel and in constant memory; move the whole into place."""
    picture_lms = bool(pairs) and all(pair.audio.suffix.lower() == '.png' for pair in pairs)
    meta = dict(fingerprint=fingerprint, data=str(data), classes=classes, problems=list(problems),
                lms_dtype='uint8' if picture_lms else 'float16',
                lms_shape=[size, size, 3] if picture_lms else [N_MELS, CLIP // HOP + 1],
                splits=[], labels=[], stems=[])

    def read_lms(path):
        return read_image(path, size) if picture_lms else log_mel_spectrogram(*read_wav(path, 1)).astype(np.float16)

    def read(pair):
        """[LMS, frame] and the reasons why one is missing: where both are bad, both are named."""
        arrays, reasons = [], []
        for read_one, path in ((read_lms, pair.audio), (partial(read_image, size=size), pair.image)):
            try:
                arrays.append(read_one(path))
            except InputError as error:
                reasons.append(str(error))
        return arrays, reasons

    progress, start = Progress(), time.monotonic()
    with written_whole(folder) as building:
        building.mkdir()
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, \
                open(building / 'frames', 'wb') as frame_file, open(building / 'lms', 'wb') as lms_file:
            for i in range(0, len(pairs), 256):     # a window, so that results never pile up
                for pair, (arrays, reasons) in zip(pairs[i:i + 256], pool.map(read, pairs[i:i + 256])):
                    meta['problems'] += reasons
                    if reasons:
                        continue
                    lms_file.write(arrays[0].tobytes())
                    frame_file.write(arrays[1].tobytes())
                    for key, value in (('splits', pair.split), ('labels', pair.label), ('stems', pair.stem)):
                        meta[key].append(value)
                done = min(i + 256, len(pairs))
                progress(f'packing {data}: {done} of {len(pairs)} pairs, '
                         f'{done / (time.monotonic() - start):.0f} pairs/s', last=done == len(pairs))
            _sync(lms_file), _sync(frame_file)
        meta['bytes'] = {name: (building / name).stat().st_size for name in ('frames', 'lms')}
        with open(building / 'meta.json', 'w') as file:
            json.dump(meta, file)
            _sync(file)
    return meta


def _check_classes(data, meta):
    """Name the classes that one split lacks; stop where it is train, or where there is no validation."""
    present = set(zip(meta['splits'], meta['labels']))
    missing = {split: [name for label, name in enumerate(meta['classes']) if (split, label) not in present]
               for split in ('train', 'validation')}
    if missing['train']:
        raise InputError(f'{data}: no good pair in train of class {", ".join(missing["train"])}; '
                         'add some, or remove the class folder')
    if 'validation' not in meta['splits']:
        raise InputError(f'{data}: no good pair in validation; put some pairs of each class there')
    for name in missing['validation']:
        print(f'note: class {name} has no pair in validation: trained, but not validated', file=sys.stderr)


# ------------------------------------------------------------------------------------------ loader

class Split:
    """One split of a packed dataset. Batches are (lms, image, label), converted on the device:
    lms (B, C_a, S, S) and image (B, 3, S, S) float32 in [-1, 1], label (B,) int64.
    """

    def __init__(self, lms, frames, labels, stems, rows, size):
        self.lms, self.frames, self.rows, self.size = lms, frames, rows, size
        self.labels = torch.tensor(labels)[rows]
        self.stems = [stems[row] for row in rows]
        self.resident = None        # (lms, frames, labels) on a GPU

    def __len__(self):
        return len(self.rows)

    def to(self, device):
        """Move the whole split to a GPU where it takes no more than half of the memory that is free
        there: then no batch waits for the disk or the bus. Returns the split.
        """
        size = len(self) * (self.lms[0].nbytes + self.frames[0].nbytes)
        if torch.device(device).type == 'cuda' and size <= torch.cuda.mem_get_info(device)[0] / 2:
            self.resident = [torch.cat([_packed(array, rows).to(device)
                                        for rows in np.array_split(self.rows, ceil(len(self) / 1024))])
                             for array in (self.lms, self.frames)] + [self.labels.to(device)]
        return self

    def batch(self, indices, device='cpu'):
        """The pairs of these indices (a sequence of int) as one batch."""
        return self._convert(self._read(torch.as_tensor(indices), device), device)

    def _read(self, indices, device):
        """The packed pairs of these indices, in memory from which a copy to a GPU need not wait."""
        if self.resident:
            indices = indices.to(device, non_blocking=True)
            return [tensor[indices] for tensor in self.resident]
        rows = self.rows[indices.numpy()]
        packed = [_packed(self.lms, rows), _packed(self.frames, rows), self.labels[indices]]
        return [tensor.pin_memory() for tensor in packed] if torch.device(device).type == 'cuda' else packed

    def _convert(self, packed, device):
        lms, frames, labels = (tensor.to(device, non_blocking=True) for tensor in packed)
        return network_lms(lms, self.size), _signed(frames), labels

    def order(self, seed=None):
        """The indices of all pairs (n,): as they lie, or shuffled as `seed` says (the same seed, the
        same order, whatever came before).
        """
        if seed is None:
            return torch.arange(len(self))
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))

    def indices(self, batch_size, seed=None):
        """The indices of each batch: all pairs once, in that order, in ceil(n / batch_size) batches of
        nearly equal size.
        """
        return self.order(seed).tensor_split(self.count(batch_size))

    def batches(self, batch_size, device='cpu', seed=None, start=0, part=0, parts=1):
        """The batches of an epoch, from batch `start` on; of each the `part`th of so many `parts`. Each is
        read in a thread while the one before is in use.
        """
        mine = [indices.tensor_split(parts)[part] for indices in self.indices(batch_size, seed)[start:]]
        with ThreadPoolExecutor(1) as reader:
            coming = None
            for indices in mine + [None]:
                ready, coming = coming, None if indices is None else reader.submit(self._read, indices, device)
                if ready is not None:
                    yield self._convert(ready.result(), device)

    def count(self, batch_size):
        """The number of batches in an epoch."""
        return ceil(len(self) / batch_size)

    def loudness(self):
        """How loud each clip is (n,): the mean power of its mel bands in dB; of LMS drawn as pictures,
        their mean brightness.
        """
        lms = (self.lms[row].astype(np.float32) for row in self.rows)
        if self.lms.dtype == np.uint8:
            return torch.tensor([x.mean() for x in lms])
        return torch.tensor([10 * np.log10((10 ** (x / 10)).mean()) for x in lms])


def _packed(array, rows):
    """These rows of one of the cache's arrays, as a tensor."""
    packed = torch.from_numpy(array[rows])
    if hasattr(array.base, 'madvise'):      # what stays mapped would count as this process's memory
        array.base.madvise(mmap.MADV_DONTNEED)
    return packed


def network_lms(lms, size):
    """LMS as the network sees them: dB (B, 128, 22) -> (B, 1, size, size), or uint8 pictures
    (B, size, size, 3) -> (B, 3, size, size); float32 in [-1, 1].
    """
    if lms.dtype == torch.uint8:
        return _signed(lms)
    low, high = DB_RANGE
    scaled = ((lms.float() - low) * (2 / (high - low)) - 1).clamp(-1, 1)
    return F.interpolate(scaled.unsqueeze(1), size=(size, size), mode='bilinear', align_corners=False)


def _signed(pictures):
    """uint8 pictures (B, S, S, 3) -> float32 (B, 3, S, S) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


# --------------------------------------------------------------------------------------- demo data
# A stand-in for Sub-URMP made by code: half a second of additive synthesis, and a drawing of the
# player at that moment. Pitch moves the hand, loudness the arm or the bell, and in silence the
# player waits: the sound carries more than its label. Looks, pieces and noise are left to chance.

DEMO_VERSION = 1                     # raised whenever the demo data come out otherwise
DEMO_RATE, MOMENT = 44_100, 0.5      # Hz; seconds of sound per picture
BAR, REST_PROBABILITY = 0.6, 0.08    # a bar (seconds) holds one note, two notes or a rest
PIECES = {'train': (1, 2, 3, 4), 'validation': (5, 6)}

GOLD, COPPER, SILVER, BLACK = (246, 190, 40), (230, 126, 48), (226, 230, 238), (22, 20, 24)
MAROON, IVORY, WOOD, DARK_WOOD = (128, 30, 26), (244, 232, 206), (214, 112, 34), (126, 58, 24)


class DemoInstrument(NamedTuple):
    """How an instrument sounds, is held and looks.

    Lengths are fractions of the picture's width, y points down, angles are in degrees, clockwise.
    `shapes` are strokes (colour, (x, y, width), ...) in the instrument's own frame (one point: a
    disc), which `scale` and a pose (x and y from the player's mouth, angle) take to the picture.
    """
    register: tuple[int, int]          # lowest and highest pitch, MIDI note numbers
    rolloff: tuple[float, float]       # slope of the spectrum when soft and loud, dB per octave
    formants: tuple                    # resonances: (Hz, gain in dB), ...
    attack: float                      # seconds
    vibrato: float                     # depth, cents
    noise: float                       # breath or bow noise relative to the tone, dB
    scale: float
    play: tuple[float, float, float]   # pose of the softest note ...
    lift: float                        # ... which the loudest one turns by this angle
    rest: tuple[float, float, float]   # pose while the player waits
    fingers: tuple                     # place of the playing hand at the lowest, highest pitch
    hold: tuple[float, float]          # place of the other hand, or of the bow on the strings
    shapes: tuple
    slide: tuple = ()                  # shapes that move along with the playing hand
    bow: float | None = None           # direction from the strings to the bow hand, in the picture
    seated: bool = False
    offset: float = 0.0                # of the player from the middle of the picture
    even: float = 0.0                  # even partials are this much weaker, dB


def discs(colour, size, *points):
    return tuple((colour, (x, y, size)) for x, y in points)


def coil(colour, x, y, radius, width):
    angles = np.radians(np.arange(0, 361, 30))
    return colour, *((x + radius * np.cos(a), y + radius * np.sin(a), width) for a in angles)


def bowed(wood):
    """Body, scroll, fingerboard, tailpiece, bridge and f-holes; x runs from tail (0) to scroll."""
    return ((wood, (0, 0, .16), (.02, 0, .36), (.16, 0, .42), (.29, 0, .08), (.40, 0, .38),
             (.54, 0, .32), (.55, 0, .10)), (wood, (.94, 0, .07), (1, 0, .10)),
            (BLACK, (.34, 0, .07), (.94, 0, .055)), (BLACK, (.05, 0, .06), (.16, 0, .06)),
            (IVORY, (.24, -.07, .025), (.24, .07, .025)),
            (BLACK, (.18, -.11, .02), (.29, -.08, .02)), (BLACK, (.18, .11, .02), (.29, .08, .02)))


DEMO_INSTRUMENTS = {
    'bassoon': DemoInstrument(
        (34, 72), (13, 7), ((480, 14), (1200, 6)), .03, 10, -34,
        1, (0, 0, 4), -16, (.02, .10, 24), ((.14, 0), (-.04, .30)), (-.12, .40),
        ((MAROON, (-.20, .52, .075), (.22, -.17, .055)),
         (IVORY, (.21, -.16, .07), (.23, -.20, .08)),
         (SILVER, (0, 0, .012), (-.03, .01, .014), (-.06, .07, .016), (.01, .16, .018)),
         *discs(SILVER, .03, (-.15, .44), (-.05, .28), (.10, .04))), seated=True),
    'cello': DemoInstrument(
        (36, 76), (8, 6), ((250, 6), (600, 5), (2000, 4)), .05, 22, -32,
        .66, (.04, .53, -86), 7, (.10, .53, -66), ((.92, 0), (.52, 0)), (.30, 0),
        ((BLACK, (-.10, 0, .02), (0, 0, .02)), *bowed(WOOD)), bow=172, seated=True),
    'clarinet': DemoInstrument(
        (50, 91), (12, 7), ((1500, 4),), .03, 2, -36,
        .44, (0, 0, 118), 24, (-.06, .20, 75), ((.70, 0), (.28, 0)), (.60, 0),
        ((BLACK, (0, 0, .05), (.10, 0, .09), (.78, 0, .10), (.92, 0, .15), (1, 0, .30)),
         *discs(SILVER, .05, *((x, 0) for x in (.14, .25, .37, .49, .61, .72, .82)))), even=26),
    'double_bass': DemoInstrument(
        (28, 60), (9, 7), ((110, 8), (350, 5)), .06, 8, -30,
        .90, (.17, .69, -93), 5, (.20, .69, -79), ((.90, 0), (.52, 0)), (.30, 0),
        ((BLACK, (-.06, 0, .015), (0, 0, .015)), *bowed(DARK_WOOD)), bow=165, offset=-.12),
    'flute': DemoInstrument(
        (60, 96), (22, 12), ((900, 5),), .05, 25, -22,
        .48, (.04, 0, 172), 14, (-.10, .24, 40), ((.84, 0), (.42, 0)), (.28, 0),
        ((SILVER, (0, 0, .065), (1, 0, .065)),
         *discs(BLACK, .025, *((x, 0) for x in (.08, .40, .50, .60, .70, .80)))),),
    'horn': DemoInstrument(
        (41, 77), (18, 9), ((340, 9),), .06, 3, -38,
        1, (0, 0, 0), 16, (.06, .12, -30), ((.19, .27), (.04, .12)), (-.20, .33),
        (coil(COPPER, .05, .23, .135, .03), coil(COPPER, .05, .23, .07, .024),
         (COPPER, (0, 0, .018), (.02, .05, .02), (.12, .08, .025), (.17, .18, .03)),
         (COPPER, (.10, .11, .03), (-.02, .09, .045), (-.12, .15, .06), (-.17, .23, .09),
          (-.20, .29, .17), (-.225, .335, .32))), seated=True),
    'oboe': DemoInstrument(
        (58, 91), (9, 5), ((1050, 14), (2900, 9)), .03, 14, -38,
        .42, (0, 0, 90), -20, (0, .28, 20), ((.72, 0), (.25, 0)), (.62, 0),
        ((IVORY, (0, 0, .03), (.12, 0, .03)), (BLACK, (.12, 0, .055), (.9, 0, .065), (1, 0, .13)),
         *discs(SILVER, .03, *((x, 0) for x in (.25, .35, .45, .55, .65, .75)))), seated=True),
    'sax': DemoInstrument(
        (49, 81), (9, 5), ((700, 6), (1700, 6)), .03, 18, -28,
        1, (0, 0, 0), 16, (-.02, .12, -24), ((-.08, .08), (-.14, .30)), (-.10, .24),
        ((BLACK, (0, 0, .02), (-.03, -.01, .025)),
         (GOLD, (-.03, -.01, .02), (-.08, -.02, .025), (-.08, .06, .04), (-.12, .22, .055),
          (-.16, .44, .07), (-.24, .49, .08), (-.29, .4, .09), (-.30, .28, .11), (-.33, .23, .20)),
         *discs(IVORY, .028, (-.10, .14), (-.115, .22), (-.13, .30), (-.15, .38)))),
    'trombone': DemoInstrument(
        (40, 72), (17, 6), ((600, 6),), .05, 3, -40,
        .52, (0, 0, 172), 12, (-.05, .12, 118), ((.82, 0), (.40, 0)), (.16, -.03),
        ((GOLD, (0, 0, .03), (.55, 0, .03)), (GOLD, (.06, -.09, .03), (.55, -.09, .03)),
         (GOLD, (.06, -.09, .03), (-.22, -.09, .04), (-.36, -.22, .05), (-.24, -.35, .05),
          (.10, -.35, .06), (.34, -.35, .10), (.44, -.35, .22), (.48, -.35, .42))),
        ((SILVER, (-.25, 0, .04), (.28, 0, .04), (.36, -.045, .04), (.28, -.09, .04),
          (-.25, -.09, .04)), (SILVER, (0, 0, .03), (0, -.09, .03))), offset=.12),
    'trumpet': DemoInstrument(
        (55, 82), (15, 3), ((1200, 8),), .03, 8, -38,
        .46, (0, 0, 172), 26, (-.08, .24, 120), ((.34, -.10), (.62, -.10)), (.28, -.12),
        ((GOLD, (0, 0, .06), (.05, 0, .035), (.80, 0, .05), (.92, 0, .12), (1, 0, .38)),
         (GOLD, (.20, 0, .05), (.10, -.10, .05), (.20, -.20, .05), (.68, -.20, .05), (.80, -.10, .05),
          (.70, 0, .05)), *((IVORY, (x, .09, .045), (x, -.24, .045)) for x in (.38, .47, .56)))),
    'tuba': DemoInstrument(
        (28, 58), (17, 9), ((230, 8),), .07, 2, -36,
        1, (0, 0, 0), -14, (.02, .06, 20), ((.12, .16), (-.02, .30)), (-.14, .32),
        ((GOLD, (-.13, .08, .07), (-.15, .38, .08), (-.02, .48, .11), (.14, .40, .12),
          (.16, .10, .13), (.17, -.12, .16), (.17, -.20, .30), (.17, -.235, .36)),
         coil(GOLD, 0, .25, .10, .05), (GOLD, (0, .02, .03), (-.06, .02, .03), (-.13, .08, .06)),
         *((IVORY, (x, .18, .024), (x, .32, .024)) for x in (-.03, .01, .05))), seated=True),
    'viola': DemoInstrument(
        (48, 84), (9, 7), ((220, 6), (700, 8)), .05, 22, -30,
        .48, (.02, .08, 22), -10, (.02, .36, -55), ((.94, 0), (.60, 0)), (.30, 0),
        bowed(DARK_WOOD), bow=160, seated=True, offset=-.06),
    'violin': DemoInstrument(
        (55, 96), (7, 5), ((480, 5), (2800, 8)), .04, 26, -30,
        .40, (.03, .05, -6), -14, (.06, .32, 50), ((.94, 0), (.58, 0)), (.30, 0),
        bowed(WOOD), bow=140),
}

Note = namedtuple('Note', 'start duration pitch loudness')    # seconds, seconds, MIDI, 0 ... 1
Player = namedtuple('Player', 'skin hair shirt trousers long_hair build x curtain folds light')


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
            loudness = rng.uniform(.05, 1) * (not rest)
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
    """The waveform from `moment` (seconds) on: float32, (22050,), in [-1, 1]."""
    time = moment + np.arange(int(MOMENT * DEMO_RATE)) / DEMO_RATE
    room, noise = rng.standard_normal((2, len(time)))
    wave = 10 ** (-70 / 20) * room
    noise = 10 ** (instrument.noise / 20) * signal.lfilter([.5], [1, -.5], noise)
    for note in notes:
        inside = (time >= note.start) & (time < note.start + note.duration)
        if note.loudness == 0 or not inside.any():
            continue
        t = time[inside] - note.start
        envelope = np.clip(np.minimum(t / instrument.attack, (note.duration - t) / .05), 0, 1)
        frequency = 440 * 2 ** ((note.pitch - 69) / 12)
        vibrato = instrument.vibrato / 1200 * np.sin(2 * np.pi * 5.5 * t)
        phase = np.cumsum(frequency * 2 ** vibrato) / DEMO_RATE
        soft, loud = (np.interp(phase, np.arange(4096) / 4096,
                                one_period(instrument, frequency, loud), period=1)
                      for loud in (False, True))
        bright = envelope * note.loudness                     # a louder tone is a brighter tone
        tone = (1 - bright) * soft + bright * loud + noise[inside]
        wave[inside] += .07 * (.8 / .07) ** note.loudness * envelope * tone
    return np.clip(wave, -1, 1).astype(np.float32)


def demo_player(rng):
    """Looks drawn by lot; light shirts, so that every instrument stands out."""
    def pick(*colours):
        return colours[rng.integers(len(colours))]
    return Player(
        skin=pick((246, 208, 178), (232, 186, 150), (186, 128, 92), (128, 84, 60)),
        hair=pick((36, 26, 22), (92, 56, 30), (206, 166, 92), (150, 146, 146)),
        shirt=pick((240, 238, 232), (206, 214, 224), (222, 206, 196), (198, 216, 200)),
        trousers=pick((40, 40, 50), (58, 52, 50), (34, 42, 66)), long_hair=rng.random() < .5,
        build=rng.uniform(.095, .115), x=rng.uniform(.48, .52),
        curtain=tuple(rng.uniform(.85, 1.15) * np.array((34, 66, 150))),
        folds=rng.uniform(7, 9), light=rng.uniform(.35, .65))


@lru_cache(maxsize=8)
def empty_stage(player, size):
    """A blue curtain with folds and a wooden floor in soft light: PIL RGB image, size x size."""
    y, x = np.mgrid[:size, :size][..., None] / size
    folds = 1 + .22 * np.sin(2 * np.pi * player.folds * x + 1.5 * np.sin(5 * x) + .4 * y)
    light = 1.1 - .9 * ((x - player.light) ** 2 + (y - .45) ** 2)
    picture = light * np.where(y > .88, (.8 + .4 * y) * (112, 78, 58), folds * player.curtain)
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
    """The player during `note`, `sway` beside the usual place: PIL RGB image, size x size."""
    factor = max(2, -(-256 // size))              # drawn larger, then averaged: anti-aliasing
    image = empty_stage(player, size * factor).copy()
    stroke = partial(draw_stroke, ImageDraw.Draw(image))
    seated, playing = instrument.seated, note.loudness > 0

    x, neck = player.x + instrument.offset + sway, .39 if seated else .31
    head, hip = neck - .095, neck + .29
    if seated:
        stroke((84, 70, 62), [(x, neck + .10, .26), (x, hip + .06, .26)])        # the chair
    for side in (-1, 1):
        thigh, foot = x + side * .05, x + side * (.14 if seated else .07)
        knee = (x + side * .15, hip + .06, .10) if seated else (x + side * .06, .77, .09)
        stroke(player.trousers, [(thigh, hip - .04, .10), (thigh, hip, .10), knee,
                                 (foot, .85, .075), (foot, .93, .07)])
        stroke(BLACK, [(foot - .04, .945, .03), (foot + .04, .945, .03)])
    if player.long_hair:
        stroke(player.hair, [(x, head - .03, .17), (x, head + .10, .17)])
    stroke(player.shirt, [(x, neck - .02, .06), (x, neck, 1.9 * player.build),
                          (x, neck + .08, 2.1 * player.build), (x, hip, .17), (x, hip + .02, .17)])
    stroke(player.hair, [(x, head - .018, .155)])
    stroke(player.skin, [(x, head + .012, .125)])
    for side in (-1, 1):
        stroke(BLACK, [(x + side * .024, head + .005, .006)])

    # What is heard: loudness turns the instrument and draws the bow, pitch moves the fingers.
    low, high = instrument.register
    height = (note.pitch - low) / (high - low) if playing else 0
    dx, dy, angle = instrument.play if playing else instrument.rest
    pose = x + dx, head + .045 + dy, angle + instrument.lift * note.loudness, instrument.scale
    fingers = np.array([1 - height, height]) @ instrument.fingers
    hands = place([fingers, instrument.hold], *pose)
    strokes = [(colour, place(points, *pose)) for colour, *points in instrument.shapes]
    strokes += [(colour, place(np.add(points, (*fingers, 0)), *pose))
                for colour, *points in instrument.slide]
    if instrument.bow is not None:
        reach, bow = .05 + .22 * note.loudness, (*hands[1], instrument.bow)
        if not playing:
            reach, bow = 0, (x - .17, neck + .26, -75, .8)      # hanging down at the side
        hands[1], tip = place([(reach, 0), (reach - .40, 0)], *bow)
        strokes.append((IVORY, [(*hands[1], .016), (*tip, .016)]))

    hands = hands[hands[:, 0].argsort()]                      # from left to right: uncrossed arms
    for side, hand in zip((-1, 1), hands):
        shoulder = np.array([x + side * (player.build - .01), neck + .045])
        stroke(player.shirt, bent_arm(shoulder, hand, side))
    for colour, points in strokes:
        stroke(colour, points)
    for hand in hands:
        stroke(player.skin, [(*hand, .05)])
    return image.reduce(factor)


def demo_pair(instrument, split, piece, moment, seed=0, size=256):
    """Half a second of a piece from `moment` (seconds) on, and its player in the middle of it.

    Returns the waveform (float32, (22050,), in [-1, 1], 44,100 Hz) and a PIL RGB image.
    """
    key = seed, split, instrument, piece
    rng, instrument = stable_rng(*key), DEMO_INSTRUMENTS[instrument]
    player = demo_player(rng)
    notes = demo_melody(instrument.register, rng, moment + MOMENT)
    shown = [note for note in notes if note.start <= moment + MOMENT / 2][-1]
    rng = stable_rng(*key, round(1000 * moment))
    waveform = demo_sound(instrument, notes, moment, rng)
    return waveform, demo_picture(instrument, player, shown, rng.uniform(-.01, .01), size)


def write_demo(directory, train=40, validation=12, size=256, seed=0):
    """Write `train` and `validation` pairs of each instrument, laid out as Sub-URMP is:
    directory/chunk/<split>/<instrument>/<stem>.wav and directory/img/.../<stem>.jpg, the stem
    being <instrument><piece>_<milliseconds>. The same arguments, the same bytes.
    """
    plan = [(split, name, PIECES[split][i % len(PIECES[split])], i // len(PIECES[split]))
            for split, count in (('train', train), ('validation', validation))
            for name in DEMO_INSTRUMENTS for i in range(count)]
    progress = Progress()
    for done, (split, name, piece, bar) in enumerate(plan, 1):
        waveform, picture = demo_pair(name, split, piece, bar * BAR, seed, size)
        stem = f'{split}/{name}/{name}{piece:02d}_{round(1000 * bar * BAR)}'
        sound, image = Path(directory, f'chunk/{stem}.wav'), Path(directory, f'img/{stem}.jpg')
        for path in (sound, image):
            path.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(sound, DEMO_RATE, np.round(32767 * waveform).astype(np.int16))
        picture.save(image, quality=92)
        progress(f'demo data: {done} of {len(plan)} pairs drawn', last=done == len(plan))


def demo_data(size, cache=None):
    """The demo data at size x size, as a dataset folder below the cache; written once. Raises InputError
    where the cache cannot be written.
    """
    folder = Path(cache or default_cache()) / f'demo-v{DEMO_VERSION}-{size}'
    if not folder.exists():
        with writing(folder):
            if not folder.exists():     # another process may have written it while we waited
                with written_whole(folder) as part:
                    write_demo(part, size=size)
    return folder


# ----------------------------------------------------------------------------------------- command

def run_command(main):
    """Run a command: what the user can mend is one line on stderr and exit code 2, no traceback."""
    try:
        main()
    except (InputError, OSError) as error:
        print(one_line(f'error: {error}'), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument('--data', metavar='DIR', help='check this dataset folder and pack its cache')
    what.add_argument('--demo', metavar='DIR', help='write the built-in demo data into this new folder')
    parser.add_argument('--cache', metavar='DIR', help=f'where packed data is kept (default: {default_cache()})')
    parser.add_argument('--size', type=int, default=256, metavar='N',
                        help='side of the frames in pixels (default: 256)')
    parser.add_argument('--workers', type=int, metavar='N', help='threads that read files (default: one a core)')
    parser.add_argument('--strict', action='store_true', help='stop at any bad file')
    args = parser.parse_args(argv)
    if args.size < 1 or args.workers is not None and args.workers < 1:
        parser.error('--size and --workers must be at least 1')
    if args.demo:
        if Path(args.demo).exists():
            raise InputError(f'{args.demo}: exists already; name a new folder')
        write_demo(args.demo, size=args.size)
        return
    data = open_dataset(args.data, args.size, args.cache, args.strict, args.workers)
    print(f'{"class":20} train validation')
    for label, name in enumerate(data.classes):
        print(f'{name:20} {(data.train.labels == label).sum():5} {(data.validation.labels == label).sum():10}')


if __name__ == '__main__':
    run_command(main)
