"""Sound to LMS, files to pairs, pairs to batches: everything CAR-GAN needs before its networks.

    python preprocess.py --data Sub-URMP          # check every file and pack the cache (train.py does too)

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
import sys
import warnings
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise, repeat
from math import ceil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from scipy import fft, signal, sparse
from scipy.io import wavfile

from runs import InputError, Progress, default_cache, one_line, reason, run_command, writing, written_whole

SAMPLE_RATE, CLIP = 22050, 11025        # Hz, after resampling; samples: 0.5 s
N_FFT, HOP, N_MELS = 2048, 512, 128
DB_RANGE = (-80.0, 40.0)    # dB, shown to the network as [-1, 1]; absolute, so that silence is dark

MINUTES, FILE_LIMIT = 10, 2 ** 27       # a recording may last, a file may hold (bytes) as much
PIXEL_LIMIT, SIDE_LIMIT = 7680 * 4320, 2 ** 16      # of a picture: 8K
warnings.filterwarnings('ignore', category=wavfile.WavFileWarning)              # unknown chunks
warnings.filterwarnings('ignore', module='PIL')     # about pictures that are read all the same, or refused below


class UserFile(io.BytesIO):
    """A file that may be anything, in memory. ValueError for what would be waited for: a pipe, a file of millions
    of tiny parts; and, where it is to be `whole`, for one that ends before what it says of itself.
    """
    def __init__(self, path, whole=False):
        if not Path(path).is_file():
            raise ValueError('no such file')
        if os.path.getsize(path) > FILE_LIMIT:
            raise ValueError(f'more than {FILE_LIMIT >> 20} MiB')
        super().__init__(Path(path).read_bytes())
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
    """Read a WAV file, or its first `seconds`: 8- to 64-bit integer or float, 8 to 192 kHz, any number of channels.

    Returns (waveform (n,) float32, the mean of the channels, full scale = [-1, 1]; sample rate in Hz). Raises
    InputError, naming the file, where it is broken, empty, not finite, over 128 MiB, or asked for over 10 minutes.
    """
    try:
        sample_rate, samples = wavfile.read(UserFile(path, whole=True))
        if not 8000 <= sample_rate <= 192000:
            raise ValueError(f'sample rate {sample_rate} Hz is outside 8 to 192 kHz')
        samples = samples[:seconds and ceil(seconds * sample_rate)]
        if len(samples) > 60 * MINUTES * sample_rate:
            raise ValueError(f'more than {MINUTES} minutes')
        if samples.size == 0:
            raise ValueError('no samples in it')
        kind, full = samples.dtype.kind, 2 ** (8 * samples.itemsize - 1)    # 24 bits come as the upper ones of 32
        if kind == 'f' and not np.isfinite(samples).all():
            raise ValueError('samples that are not finite numbers')
        if kind == 'f':
            samples, full = samples.clip(-1, 1), 1
        waveform = samples.reshape(len(samples), -1).mean(axis=1, dtype=np.float32)
        waveform -= full if kind == 'u' else 0      # 8 bits are unsigned; in place, as it may be large
        waveform /= full
    except Exception as error:      # scipy answers a broken header with whatever it stumbles over
        raise InputError(f'{path}: not a readable WAV file ({reason(error)}); '
                         f'give an uncompressed one of at most {MINUTES} minutes') from error
    return waveform, sample_rate


def mel_filterbank(sample_rate=SAMPLE_RATE, n_fft=N_FFT, n_mels=N_MELS, fmin=0.0, fmax=None):
    """Triangular mel filters, each of area 1: (n_mels, n_fft // 2 + 1) float32; frequencies in Hz. Slaney's scale is
    linear up to 1 kHz (15 mels), logarithmic above (27 mels for each factor of 6.4).
    """
    hz = np.array([fmin, fmax or sample_rate / 2])
    ends = np.minimum(hz, 1000) * 3 / 200 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4)
    mels = np.linspace(*ends, n_mels + 2)
    edges = np.minimum(mels, 15) * 200 / 3 * 6.4 ** (np.maximum(mels - 15, 0) / 27)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hz = np.fft.rfftfreq(n_fft, 1 / sample_rate)                                    # of the FFT's bins
    triangle = np.minimum((hz - low) / (centre - low), (high - hz) / (high - centre)).clip(0)
    return (triangle * 2 / (high - low)).astype(np.float32)


HANN, FILTERS = signal.get_window('hann', N_FFT), sparse.csr_array(mel_filterbank().astype(np.float64))


def log_mel_spectrogram(waveform, sample_rate):
    """The LMS of half a second of sound, section 3.5: waveform (n,) in [-1, 1] -> (128, 22) float32, dB.

    Resampled to 22,050 Hz, cut or zero-padded to 11,025 samples; power of the STFT (Hann 2048, hop 512, centred with
    reflection) in 128 mel bands up to 11,025 Hz, the lowest first; 10 log10(max(x, 1e-10)): silence is -100 dB.
    """
    waveform = signal.resample_poly(waveform, SAMPLE_RATE, sample_rate)[:CLIP]
    waveform = np.pad(waveform, (0, CLIP - len(waveform)))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(waveform, N_FFT // 2, mode='reflect'), N_FFT)[::HOP]
    power = np.abs(fft.rfft(frames * HANN)) ** 2            # (22, 1025)
    return (10 * np.log10(np.maximum(FILTERS @ power.T, 1e-10))).astype(np.float32)


# ------------------------------------------------------------------------------------------- files

def read_image(path, size):
    """Read a picture and resize it: (size, size, 3) uint8, RGB. A JPEG much larger than `size` is decoded at a
    reduced scale. Raises InputError, naming the file, where it cannot be read or is larger than 8K or 128 MiB.
    """
    try:
        file = UserFile(path)
        # scans of a JPEG, each a pass over the picture, and profiles of a PNG, each unpacked: ten are many
        if max(file.getvalue().count(part) for part in (b'\xff\xda\0', b'iCCP')) > 50:
            raise ValueError('it consists of too many parts')
        with Image.open(file, formats=('JPEG', 'PNG')) as image:
            if image.width * image.height > PIXEL_LIMIT or max(image.size) > SIDE_LIMIT:
                raise ValueError(f'{image.width} x {image.height} pixels')
            image.draft('RGB', (2 * size, 2 * size))        # a JPEG: the smallest scale of at least this
            if image.mode.startswith('I'):                        # 16 bits, which convert() would clip
                image = image.point(lambda value: value / 256)
            image = image.convert('RGB').resize((size, size), Image.Resampling.BICUBIC)
            return np.asarray(ImageOps.exif_transpose(image))
    except Exception as error:      # Pillow raises many kinds
        why = 'another kind of file' if isinstance(error, UnidentifiedImageError) else reason(error)
        raise InputError(f'{path}: not a readable JPEG or PNG image ({why}); '
                         'give an intact one of at most 8K') from error


Pair = namedtuple('Pair', 'split name stem audio image')      # the name is that of the class


def find_pairs(data):
    """Pair the files of a dataset folder by stem within split and class: (classes, pairs, problems), the last a line
    for each file without a partner. Raises InputError for a missing layout or a class name that cannot be printed.
    """
    classes, pairs, problems = set(), [], []
    for split, names in ('train', ('train',)), ('validation', ('validation', 'test')):
        audio = _files(data, ('chunk', 'spectram'), names, ('.wav', '.png'))
        image = _files(data, ('img', 'img_256'), names, ('.jpg', '.jpeg', '.png'))
        classes |= {name for name, _ in audio | image}
        pairs += [Pair(split, *key, audio[key], image[key]) for key in sorted(audio.keys() & image.keys())]
        for files, others, missing in (audio, image, 'frame'), (image, audio, 'sound'):
            problems += [f'{files[key]}: no {missing} of this class and stem' for key in sorted(files.keys() - others)]
    for name in classes:
        if not name.isprintable():      # it is to stand in tables, pictures and JSON
            raise InputError(f'{data}: the name of its class folder {name} cannot be printed; rename it')
    return sorted(classes), pairs, problems


def _files(data, parts, splits, suffixes):
    """The files of a split as {(class, stem): path}; where a stem has several, that of the first suffix."""
    names = [f'{part}/{split}' for part in parts for split in splits]
    folder = next((Path(data, name) for name in names if Path(data, name).is_dir()), None)
    if not folder:
        raise InputError(f'{data}: no folder {" or ".join(names)} in it; preprocess.py --help shows the layout')
    paths = sorted(folder.glob('[!.]*/[!.]*'))
    return {(path.parent.name, path.stem): path for suffix in reversed(suffixes) for path in paths
            if path.suffix.lower() == suffix}


# ------------------------------------------------------------------------------- the packed cache

CACHE_VERSION = 5       # raised whenever the same files would be packed otherwise
Dataset = namedtuple('Dataset', 'classes lms_channels train validation folder fingerprint')


def open_dataset(data, size=256, cache=None, strict=False, workers=None):
    """Check a dataset folder, pack it (once; again where the name, length or time of a file has changed) and map it
    into memory. Bad files are named on stderr and left out.

    Returns a Dataset: the classes' names; 1, or 3 where the LMS are RGB pictures; two Splits; the folder of the cache;
    a digest of the files. Raises InputError for a missing layout, a class without a good pair in train, an empty
    validation split, a cache that cannot be written or, with `strict`, any bad file.
    """
    data = Path(os.path.realpath(data))
    classes, pairs, problems = find_pairs(data)
    drawn = all(pair.audio.suffix.lower() == '.png' for pair in pairs)
    files = [(path, path.exists() and (path.stat().st_size, path.stat().st_mtime_ns))    # False for a dangling link
             for pair in pairs for path in (pair.audio, pair.image)]
    key = CACHE_VERSION, size, SAMPLE_RATE, CLIP, N_FFT, HOP, N_MELS, classes, problems, files
    fingerprint = hashlib.sha256(repr(key).encode()).hexdigest()
    place = hashlib.sha256(os.fsencode(data)).hexdigest()[:8]
    folder = Path(cache or default_cache()) / f'{data.name}-{size}-{place}'
    if not _read_meta(folder, fingerprint):
        with writing(folder):
            if not _read_meta(folder, fingerprint):     # another process may have packed it while we waited
                _build_cache(folder, fingerprint, data, pairs, drawn, size, workers)
    meta = _read_meta(folder, fingerprint)
    problems += meta['problems']
    for problem in problems:
        print(one_line(f'left out: {problem}'), file=sys.stderr)
    if strict and problems:
        raise InputError(f'{data}: {len(problems)} problems, named above; fix them or leave --strict out')
    packed = [pairs[i] for i in meta['packed']]

    def split(name):
        rows = [row for row, pair in enumerate(packed) if pair.split == name]
        labels, stems = [classes.index(packed[row].name) for row in rows], [packed[row].stem for row in rows]
        missing = ', '.join(sorted({*classes} - {packed[row].name for row in rows}))
        if not rows or missing and name == 'train':
            raise InputError(f'{data}: no good pair in {name} of class {missing}; add some, or remove the class folder')
        if missing:
            print(f'note: no pair in validation of class {missing}: trained, but not validated', file=sys.stderr)
        frames = np.memmap(folder / 'frames', np.uint8, 'r', shape=(len(packed), size, size, 3))
        kind, shape = (np.uint8, frames.shape[1:]) if drawn else (np.float16, (N_MELS, CLIP // HOP + 1))
        lms = np.memmap(folder / 'lms', kind, 'r', shape=(len(packed), *shape))
        return Split(lms, frames, rows, labels, stems, size)

    return Dataset(classes, 3 if drawn else 1, split('train'), split('validation'), folder, fingerprint)


def _read_meta(folder, fingerprint):
    """What a whole cache of these files says of itself; None where there is none, or something else."""
    try:
        meta = json.loads((folder / 'meta.json').read_text())
        whole = all((folder / name).stat().st_size == meta['bytes'][name] for name in ('frames', 'lms'))
        return meta if whole and meta['fingerprint'] == fingerprint else None
    except Exception:                   # a file may hold anything
        return None


def _build_cache(folder, fingerprint, data, pairs, drawn, size, workers):
    """Pack all pairs, in parallel and constant memory: LMS as float16 dB or uint8 pictures, frames as uint8."""

    def read(path, as_lms):         # of the sound 0.5 s, and what the filter of resampling reaches beyond
        try:
            return log_mel_spectrogram(*read_wav(path, seconds=0.6)) if as_lms else read_image(path, size)
        except InputError as error:
            return error

    meta, progress = dict(fingerprint=fingerprint, packed=[], problems=[]), Progress()
    with written_whole(folder) as building:
        building.mkdir()
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool, \
                open(building / 'frames', 'wb') as frames, open(building / 'lms', 'wb') as lms:
            for start in range(0, len(pairs), 256):     # a window, so that results never pile up
                _, _, _, audio, image = zip(*pairs[start:start + 256])
                found = zip(pool.map(read, audio, repeat(not drawn)), pool.map(read, image, repeat(False)))
                for i, parts in enumerate(found, start):
                    bad = [str(error) for error in parts if isinstance(error, InputError)]
                    meta['problems'] += bad
                    if not bad:
                        lms.write(parts[0].astype(np.uint8 if drawn else np.float16).tobytes())
                        frames.write(parts[1].tobytes())
                        meta['packed'].append(i)
                progress(f'packing {data}: {i + 1} of {len(pairs)} pairs', last=i + 1 == len(pairs))
        meta['bytes'] = {path.name: path.stat().st_size for path in building.iterdir()}
        (building / 'meta.json').write_text(json.dumps(meta))


# ------------------------------------------------------------------------------------------ loader

class Split:
    """One split of a packed dataset, or some of its pairs. Batches are (lms, image, label), converted on the device:
    lms (B, C_a, S, S) and image (B, 3, S, S) float32 in [-1, 1], label (B,) int64.
    """

    def __init__(self, lms, frames, rows, labels, stems, size):
        self.lms, self.frames, self.size = lms, frames, size        # the arrays of the whole cache
        self.rows, self.labels, self.stems = np.array(rows, int), torch.as_tensor(labels), stems
        self.resident, self.resident_bytes = (), 0      # lms, frames, labels on a GPU

    def __len__(self):
        return len(self.rows)

    def subset(self, indices):
        """The pairs of these indices (a sequence of int) as a Split of the same cache."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return Split(self.lms, self.frames, self.rows[indices.numpy()], self.labels[indices],
                     [self.stems[index] for index in indices], self.size)

    def to(self, device):
        """Move the whole split to a GPU where it takes at most 0.4 of what is free there (0.8 on the way), so that no
        batch waits for the disk. To be called once a step has taken its memory, be it while batches() runs.
        """
        size = len(self) * (self.lms[0].nbytes + self.frames[0].nbytes + 8)
        if torch.device(device).type == 'cuda' and size <= 0.4 * torch.cuda.mem_get_info(device)[0]:
            chunks = ([part.to(device) for part in self._read(indices, 'cpu')]
                      for indices in torch.arange(len(self)).split(1024))
            self.resident, self.resident_bytes = [torch.cat(parts) for parts in zip(*chunks)], size
        return self

    def batch(self, indices, device='cpu'):
        """The pairs of these indices (a sequence of int) as one batch."""
        return self._convert(self._read(torch.as_tensor(indices), device), device)

    def _read(self, indices, device):
        """The packed pairs of these indices, lms, frames, labels; for a GPU in memory that it can fetch by itself."""
        if self.resident:
            indices = indices.pin_memory().to(self.resident[0].device, non_blocking=True)
            return [whole[indices] for whole in self.resident]
        rows = self.rows[indices.numpy()]
        packed = _packed(self.lms, rows), _packed(self.frames, rows), self.labels[indices]
        return [part.pin_memory() for part in packed] if torch.device(device).type == 'cuda' else packed

    def _convert(self, packed, device):
        # towards other devices than CUDA a copy that is not waited for may be read before it is there
        lms, frames, labels = (part.to(device, non_blocking=part.is_pinned()) for part in packed)
        return network_lms(lms, self.size), network_lms(frames, self.size), labels

    def order(self, seed=None):
        """The indices of all pairs (n,): as they lie, or shuffled by this seed, whatever came before."""
        order = torch.Generator().manual_seed(seed or 0)
        return torch.arange(len(self)) if seed is None else torch.randperm(len(self), generator=order)

    def count(self, batch_size, least=1):
        """The number of batches in an epoch: of at most `batch_size` pairs, but of at least `least`, given as many."""
        return min(ceil(len(self) / batch_size), max(1, len(self) // least))

    def indices(self, batch_size, seed=None, least=1):
        """The indices of each batch: all pairs once, in that order, in count() batches of nearly equal size."""
        return self.order(seed).tensor_split(self.count(batch_size, least))

    def batches(self, batch_size, device='cpu', seed=None, start=0, part=0, parts=1, least=1):
        """The batches of an epoch, from batch `start` on; each is read in a thread while the one before is in use.
        Of each, one process of many takes the `part`th of so many `parts` (tensor_split). Where there is nothing for
        it, it takes the first pair, to be weighed with 0: all processes take part in every step.
        """
        batches = self.indices(batch_size, seed, least)[start:]
        mine = [batch.tensor_split(parts)[part] if part < len(batch) else batch[:1] for batch in batches]
        with ThreadPoolExecutor(1) as reader:
            jobs = (reader.submit(self._read, indices, device) for indices in mine)
            for job, _ in pairwise(chain(jobs, [None])):        # which looks one ahead
                yield self._convert(job.result(), device)       # here: threads of arithmetic are this thread's

    def loudness(self):
        """How loud each clip is (n,): the mean power of its bands in dB; of RGB LMS the mean brightness, 0 to 255."""
        drawn = self.lms.dtype == np.uint8
        parts = (_packed(self.lms, self.rows[i:i + 64]).float().flatten(1) for i in range(0, len(self), 64))
        mean = torch.cat([(part if drawn else 10 ** (part / 10)).mean(1) for part in parts])
        return mean if drawn else 10 * mean.log10()


def _packed(array, rows):
    """These rows of one of the cache's arrays, as a tensor."""
    packed = torch.from_numpy(array[rows])
    if hasattr(array.base, 'madvise'):      # what stays mapped would count as this process's memory
        array.base.madvise(mmap.MADV_DONTNEED)
    return packed


def network_lms(lms, size):
    """LMS as the network sees them, section 3.5: dB (B, 128, 22) -> (B, 1, size, size), or uint8 pictures, frames as
    well, (B, size, size, 3) -> (B, 3, size, size); float32 in [-1, 1]. Bilinear, antialiased where that is a reduction.
    """
    if lms.dtype == torch.uint8:
        return lms.permute(0, 3, 1, 2).float() / 127.5 - 1
    low, high = DB_RANGE
    scaled = ((lms.float() - low) * (2 / (high - low)) - 1).clamp(-1, 1).unsqueeze(1)
    return F.interpolate(scaled, (size, size), mode='bilinear', align_corners=False, antialias=size < N_MELS)


def recording_lms(waveform, sample_rate, size, hop=0.5):
    """The LMS (n, 1, size, size) of the half seconds that begin every `hop` seconds of a recording, filled up with
    silence after its end.
    """
    starts = range(max(1, ceil((len(waveform) - 0.5) / sample_rate / hop)))         # round(start) is before the end
    parts = [waveform[round(i * hop * sample_rate):][:ceil(sample_rate / 2)] for i in starts]
    return network_lms(torch.from_numpy(np.stack([log_mel_spectrogram(part, sample_rate) for part in parts])), size)


# ------------------------------------------------------------------------------- pairs, and pictures of them

def example_clips(dataset):
    """A pair of each class, of validation or, where that has none, train: [(title, (lms, image, label) of one)]."""
    examples = []
    for label, name in enumerate(dataset.classes):
        split, title = ((dataset.validation, name) if label in dataset.validation.labels
                        else (dataset.train, f'{name} (train)'))
        examples.append((title, split.batch(torch.nonzero(split.labels == label)[0])))
    return examples


def hold_out(labels, seed):
    """The indices of nine tenths of a split and of the rest, which is n // 10 pairs of each class, drawn by seed."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = [order[labels[order] == label] for label in labels.unique()]
    kept, tenth = zip(*((own[len(own) // 10:], own[:len(own) // 10]) for own in classes))
    return torch.cat(kept).sort().values, torch.cat(tenth).sort().values


def random_frames(train_labels, labels, own=False, seed=0):
    """Draw a train pair of the class of each of `labels` (n,), by seed: indices (n,). With `own` the labels are train's
    own, and each gets another pair than itself if its class has one.
    """
    generator, drawn = torch.Generator().manual_seed(seed), []
    for i, label in enumerate(labels):
        pairs = torch.nonzero(train_labels == label).flatten()
        others = pairs[pairs != i] if own and len(pairs) > 1 else pairs
        drawn.append(others[torch.randint(len(others), (), generator=generator)])
    return torch.stack(drawn)


def as_saved(image):
    """Images (..., 3, S, S) in [-1, 1] as they would come back from a file: rounded to 256 levels."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def picture(image):
    """An image (3, S, S) in [-1, 1] as a PIL picture."""
    pixels = ((as_saved(image).cpu() + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def lms_picture(lms):
    """An LMS (1 or 3, S, S) in [-1, 1] as a PIL picture: low bands at the bottom, bright is loud; RGB as it is."""
    if len(lms) == 3:
        return picture(lms)
    level = (lms[0].flip(0).cpu().numpy() + 1) / 2
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    pixels = [np.interp(level, np.linspace(0, 1, 5), stop) for stop in stops.T]
    return Image.fromarray(np.stack(pixels, axis=2).round().astype(np.uint8))


def draw_grid(rows, path):
    """Draw rows [(title, {column: picture})] as one PNG, tiles of 128 pixels or more; untitled rows all have heads."""
    tile, top = max([128] + [image.width for _, images in rows for image in images.values()]), 0
    font, step, (left, names) = ImageFont.load_default(size=15), tile + 4, (130, 1) if rows[0][0] else (4, len(rows))
    sheet = Image.new('RGB', (left + len(rows[0][1]) * step, names * 28 + len(rows) * step), 'white')
    draw = ImageDraw.Draw(sheet)
    for title, images in rows:
        named = not (title and top)
        top += named * 28
        draw.multiline_text((left - 8, top + tile / 2), title.replace('_', ' '), 'black', font, anchor='rm',
                            align='right')
        for x, (column, image) in enumerate(images.items()):
            draw.text((left + x * step + tile / 2, top - 14), column * named, 'black', font, anchor='mm')
            sheet.paste(image.resize((tile, tile), Image.Resampling.BICUBIC), (left + x * step, top))
        top += step
    with written_whole(path) as part:
        sheet.save(part, 'PNG')


@torch.inference_mode()
def example_pictures(model, examples, device='cpu', nearest=None):
    """[(title, {'LMS': picture, "I'": ..., "I''": ..., 'truth': ...})] of example clips, in eval mode; the model is
    left in the mode it was in. `nearest` maps I'' (B, 3, S, S) to the train frames most like it, a further column.
    """
    training, rows = model.training, []
    model.eval()
    for title, (lms, image, label) in examples:
        coarse, fine, _ = model(lms.to(device), label.to(device))
        shown = {"I'": coarse, "I''": fine, 'truth': image} | ({'nearest in train': nearest(fine)} if nearest else {})
        rows.append((title, {'LMS': lms_picture(lms[0]), **{name: picture(x[0]) for name, x in shown.items()}}))
    model.train(training)
    return rows


@torch.inference_mode()
def generate_recording(model, classes, waveform, sample_rate, label, size, device='cpu', hop=0.5):
    """I'' every `hop` seconds of a recording (n,) in [-1, 1], as [(seconds, picture)]: each hears the half second from
    its moment on, and silence after the end.
    """
    lms, label = recording_lms(waveform, sample_rate, size, hop), torch.tensor([classes.index(label)], device=device)
    return [(i * hop, picture(model(part.to(device), label)[1][0])) for i, part in enumerate(lms.split(1))]


# ----------------------------------------------------------------------------------------- command

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data', metavar='DIR', required=True, help='the dataset folder to check and to pack')
    parser.add_argument('--cache', metavar='DIR', help=f'where packed data is kept (default: {default_cache()})')
    parser.add_argument('--size', type=int, default=256, metavar='N', help='side of the frames (default: 256)')
    parser.add_argument('--strict', action='store_true', help='stop at any bad file')
    args = parser.parse_args(argv)
    if args.size < 1:
        parser.error('--size must be at least 1')
    data = open_dataset(args.data, args.size, args.cache, args.strict)
    print(f'{"class":20} train validation')
    for label, name in enumerate(data.classes):
        print(f'{name:20} {(data.train.labels == label).sum():5} {(data.validation.labels == label).sum():10}')


if __name__ == '__main__':
    run_command(main)
