"""What every command needs of files and processes: errors of one line, progress, safe files, a
run's folder, the device, ranks.
"""
import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, redirect_stdout
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

try:
    import fcntl
    import resource
except ImportError:         # Windows has neither
    fcntl = resource = None


# ----------------------------------------------------------------------- errors, flags, progress

class InputError(ValueError):
    """Something the user can fix: one line that names the file or the flag, and the remedy."""


def reason(error):
    """The error in a few words, without the path that the message around it already names."""
    words = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return words.splitlines()[0]


def one_line(text):
    """Text with file names in it as it can be printed: a name may hold line breaks."""
    return ''.join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def note(text):
    """Print a line on stderr, whatever names it holds."""
    print(one_line(text), file=sys.stderr)


@contextmanager
def blame(path, what, remedy=''):
    """Raise whatever fails inside as an InputError: `path`: `what` (the reason)`remedy`."""
    try:
        yield
    except Exception as error:
        raise InputError(f'{path}: {what} ({reason(error)}){remedy}') from error


def run_command(main):
    """Run a command: what the user can fix is one line on stderr and exit code 2, no traceback."""
    for stream in sys.stdout, sys.stderr:       # a class may have a name that the terminal lacks
        stream.reconfigure(errors='backslashreplace')
    try:
        main()
        return
    except torch.OutOfMemoryError as error:
        note(f'error: {reason(error)} Lower --batch-size')
    except (InputError, OSError) as error:
        note(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(2)


def at_least(convert, least, below=None):
    """A type of argparse: numbers from `least`, and less than `below` where that is given."""
    def parse(text):
        value = convert(text)
        if not value >= least:      # nor is nan
            raise argparse.ArgumentTypeError(f'{text}: must be at least {least}')
        if below is not None and value >= below:
            raise argparse.ArgumentTypeError(f'{text}: must be less than {below}')
        return value
    parse.__name__ = convert.__name__
    return parse


def power_of_two(text):
    """A type of argparse: the side of a picture."""
    value = int(text)
    if value < 32 or value & (value - 1):
        raise argparse.ArgumentTypeError(f'{text}: must be a power of two from 32')
    return value


def duration(seconds):
    """Seconds as h:mm:ss, after a day as 1 day, h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


class Progress:
    """A line that is rewritten in place on a terminal; elsewhere a plain line every `seconds`."""

    def __init__(self, stream=None, seconds=10):
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.seconds = 0.2 if self.terminal else seconds
        self.printed = time.monotonic()

    def due(self):
        """Whether it is time to print again: for texts that cost something to make."""
        return time.monotonic() - self.printed >= self.seconds

    def __call__(self, text, last=False):
        if not (last or self.due()):
            return
        self.printed = time.monotonic()
        line = one_line(text)
        end = '\n'
        if self.terminal:
            line = f'\r{line}\x1b[K'
            end = '\n' if last else ''
        print(line, end=end, file=self.stream, flush=True)


# ----------------------------------------------------------------------------------------- files

def default_cache():
    """Where caches go unless a flag says otherwise: never into the data, which may be read-only."""
    cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    if cache.startswith('~'):       # a user without a home
        cache = tempfile.gettempdir()
    return Path(cache, 'cargan')


@contextmanager
def written_whole(path):
    """Give a path beside `path` to write a file or folder to; move it into place when written."""
    path = Path(path)
    part = Path(f'{path}.part')
    _remove(part)                   # of a process that was killed
    try:
        yield part
        if part.is_file():
            with open(part, 'rb+') as file:
                os.fsync(file.fileno())
        elif part.is_dir():
            _remove(path)           # a folder cannot replace another
        os.replace(part, path)
    finally:
        _remove(part)


@contextmanager
def new_path(path):
    """`written_whole` for what a user names. Raises InputError where that is there already, or the
    disk refuses.
    """
    refuse_existing(path)
    with _blame_disk(path, 'another place'):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as part:
            yield part
            if os.path.lexists(path):
                raise InputError(f'{path}: was made by another meanwhile, and is left as it is')


def refuse_existing(path):
    """Raise InputError where `path` is there, or the one beside it that is written first: another
    process may be at work there, or it is the user's.
    """
    for taken in path, f'{path}.part':
        if os.path.lexists(taken):
            raise InputError(f'{taken}: exists already; name another place, or remove it')


@contextmanager
def _blame_disk(path, elsewhere):
    """Raise what the disk refuses inside as an InputError that says to write `elsewhere`."""
    try:
        yield
    except BrokenPipeError:         # of the terminal
        raise
    except OSError as error:
        raise InputError(f'{path}: cannot be written ({reason(error)}); make room there, or name '
                         f'{elsewhere}') from error


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, whole or not at all; file names in it may hold bytes that are no text."""
    with written_whole(path) as part:
        part.write_text(text, 'utf-8', 'backslashreplace')


LOCKED = set()      # what this process has locked: (thread, folder)


@contextmanager
def locked(folder, wait=True):
    """Have a folder to oneself until the block, or the process, ends. Raises InputError where
    another process has it, unless it is to `wait`. Where the file system has no locks, it goes on.
    """
    held = threading.get_ident(), os.path.realpath(folder)
    if fcntl is None or held in LOCKED:
        yield
        return
    file = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f'{folder}: another process is training there; wait for it, or '
                                 'name another by --out')
            note(f'waiting for another process that writes in {folder}')
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            note(f'note: no locks here ({reason(error)}): let no two commands write one folder')
        LOCKED.add(held)
        yield
    finally:
        LOCKED.discard(held)
        os.close(file)


@contextmanager
def writing(path):
    """Have the folder of `path` to oneself; another process that wants to write there waits. Raises
    InputError where the disk refuses: full, read-only, a file where a folder should be.
    """
    path = Path(path)
    with _blame_disk(path, 'a folder elsewhere by --cache'):
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.parent):
            yield


def load_file(path, mmap=False, **kinds):
    """Load the dict in a .pt file to the CPU without running anything in it; `mmap`: tensors are
    read when used. Raises InputError, naming the file, where it cannot be read, or a key is missing
    or of another kind.
    """
    with blame(path, 'not a readable file of weights'):
        state = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    for key, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(key), kind):
            raise InputError(f'{path}: not a file that train.py wrote (no good {key!r} in it)')
    return state


def save_file(state, path):
    """Write a .pt file, whole or not at all. Raises InputError where the disk is full."""
    remedy = '; what was there before is still whole. Make room, and go on with --resume'
    with blame(path, 'cannot be written', remedy), written_whole(path) as part:
        torch.save(state, part)


def load_state(module, state, path):
    """Copy a state_dict into a module. Raises InputError where it is another network's."""
    with blame(path, 'weights of another network'):
        module.load_state_dict(state)


def digest(network):
    """A name for a network's weights: they are the same where it is."""
    weights = hashlib.sha256()
    for tensor in network.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    return weights.hexdigest()


# ------------------------------------------------------------------------------ the folder of a run

CONFIG_NAMES = {'size', 'base', 'disc_base', 'epochs', 'seed', 'variant', 'classes',
                'lms_channels', 'data', 'cache'}


def load_config(run):
    """The settings of a run, as train.py wrote them. Raises InputError where `run` is none."""
    path = Path(run, 'config.json')
    with blame(run, 'not a run of train.py: config.json', '; name a folder that it wrote'):
        config = json.loads(path.read_text('utf-8'))
        missing = CONFIG_NAMES - config.keys()
        if missing:
            raise ValueError(f'no {min(missing)}')
    return config


def write_config(run, settings, **more):
    """Write config.json: the settings, and what the run found out about its data."""
    settings = dict(settings, resume=None, **more)
    for name in 'data', 'cache':
        if settings[name]:
            settings[name] = os.path.realpath(settings[name])
    write_text(run / 'config.json', json.dumps(settings, indent=1) + '\n')


def epochs_done(run):
    """The epochs in a run's checkpoint; 0 where it has none. Raises InputError for a broken one."""
    path = Path(run, 'checkpoint.pt')
    if not os.path.lexists(path):
        return 0
    return load_file(path, mmap=True, epoch=int)['epoch']


@contextmanager
def open_run(run, resume=False):
    """Have a run's folder to oneself. Raises InputError where another process is at work there, or,
    unless it is to `resume`, where a run is there already. What fails before it has begun leaves no
    folder behind.
    """
    run = Path(run)
    fresh = not run.exists()
    if not (resume or fresh) and _begun(run):
        raise InputError(f'{run}: not an empty folder; go on with it by --resume {run}, or name '
                         'another by --out')
    with blame(run, 'cannot be made', '; name another folder by --out'):
        (run / 'samples').mkdir(parents=True, exist_ok=True)
    with locked(run, wait=False):
        try:
            yield run
        except InputError:
            if fresh and not _begun(run):
                shutil.rmtree(run)
            raise


def _begun(run):
    """Whether a folder holds more than the settings of a run, or others than ours."""
    names = {path.name for path in run.glob('*')}
    if 'config.json' in names:
        try:
            load_config(run)
        except InputError:
            return True
    return bool(names - {'config.json', 'samples'})


# ---------------------------------------------------------------------------- device and processes

def choose_device(name=None):
    """The device of this name; by default the first GPU, else the CPU. Raises InputError."""
    with blame(f'--device {name}', 'not to be had here'):
        device = torch.device(name or ('cuda' if torch.cuda.is_available() else 'cpu'))
        torch.empty(0, device=device)
    return device


def peak_memory():
    """The most memory that this process has had, in bytes; None on Windows."""
    if resource is None:
        return None
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rank():
    """The number of this process among those that torchrun started; 0 is the one that writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes torchrun started; 1 without it."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def distributed(args):
    """Join the processes of torchrun, where there are some; give each its GPU, and rank 0 alone a
    voice. One that fails says why and ends at once: the others, in the midst of a step, fail in
    turn, or torchrun ends them.
    """
    if 'LOCAL_RANK' not in os.environ:
        yield
        return
    gpu = torch.cuda.is_available() and args.device != 'cpu'
    if gpu:
        args.device = f'cuda:{os.environ["LOCAL_RANK"]}'
        torch.cuda.set_device(choose_device(args.device))
    # the others wait as long as rank 0 takes to pack the data and to train C
    dist.init_process_group('cpu:gloo,cuda:nccl' if gpu else 'gloo', timeout=timedelta(days=2))
    with open(os.devnull, 'w') as nowhere, redirect_stdout(nowhere if rank() else sys.stdout):
        try:
            yield
        except (InputError, OSError, RuntimeError) as error:
            why = error
            if isinstance(error, RuntimeError):
                if 'connection' not in str(error).lower():
                    raise
                why = 'another process ended; its own message says why'
            note(f'error: process {rank()}: {why}')
            sys.stdout.flush()
            os._exit(2)
    dist.destroy_process_group()


def broadcast(value):
    """What rank 0 has as `value`, in all processes."""
    box = [value]
    if world_size() > 1:
        dist.broadcast_object_list(box)
    return box[0]


def rank0_first(work, local=False):
    """work() by rank 0 (with `local`, by the first process of each node) before all others."""
    if world_size() == 1:
        return work()
    first = os.environ['LOCAL_RANK'] == '0' if local else rank() == 0
    result = work() if first else None
    dist.barrier()
    return result if first else work()
