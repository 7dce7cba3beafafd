"""What a trained model draws: scenes of a recording or a piece, grids of clips, Figures 4 to 6.

    python generate.py RUN clip.wav                     # a picture for each half second: clip.png
    python generate.py RUN clip.wav --hop 0.1 --out scene.html      # a page: sound and scene
    python generate.py RUN --piece violin01             # a piece of the data: violin01.html

RUN is a folder that train.py made. What --out ends in decides what is written: .html, a page that
needs no other file; .gif, without sound; .png, all pictures of a recording; nothing, a folder with
a PNG a moment, named by milliseconds. From Python:

    config, model, _ = load_run('runs/NAME')
    coarse, fine, _ = model(lms, label)         # (B, C_a, S, S) in [-1, 1], (B,) -> I', I'', C(I')
"""
import argparse
import json
from base64 import b64encode
from collections import namedtuple
from html import escape
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from baselines import BASELINES, AudioClassifier
from cargan import CARGAN, VARIANTS
from demo import demo_data
from preprocess import find_pairs, open_dataset, read_wav, recording_lms, write_wav
from runs import (InputError, Progress, at_least, choose_device, default_cache, digest,
                  load_config, load_file, load_state, new_path, reason, refuse_existing,
                  run_command, written_whole)

METHODS = (*BASELINES, 'E')     # of Table 2 and Figure 6


# ----------------------------------------------------------------------------------- a run, loaded

def load_run(run, device='cpu'):
    """A run's settings, its model in eval mode, and how far it was trained: (config, model,
    dict(epoch=, steps=)).

    From model.pt or, where that is not there, checkpoint.pt, and the classifier file that it names.
    Raises InputError where one of them is no good, or the classifier is another one.
    """
    config = load_config(run)
    path = Path(run, 'model.pt')
    if not path.exists():
        path = Path(run, 'checkpoint.pt')
    state = load_file(path, mmap=True, model=dict, classifier=str, classifier_digest=str, epoch=int,
                      steps=int)
    source = Path(run, state['classifier'])
    try:
        model = make_model(config['variant'], len(config['classes']), config['size'],
                           config['base'], config['lms_channels'])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f'{run}: not a run of train.py (config.json: {reason(error)})') from error
    classifier = model.residue.classifier
    load_state(classifier, load_file(source, classifier=dict)['classifier'], source)
    if digest(classifier) != state['classifier_digest']:
        raise InputError(f'{source}: not the classifier that {path} was trained with; put that one '
                         'back')
    load_generators(model, state.get('average') or state['model'], path)
    model.to(device, memory_format=torch.channels_last)     # faster, on a CPU too
    return config, model.eval(), dict(epoch=state['epoch'], steps=state['steps'])


def make_model(variant, num_classes, size, base, lms_channels, classifier=None, dropout=0.5,
               init_std=0.2, audio=None, detach_residue=False):
    """CARGAN or a baseline; `audio` is S2IC's audio classifier, whose weights a run keeps too."""
    if variant in VARIANTS:
        return CARGAN(num_classes, size, base, variant, lms_channels, classifier, dropout, init_std,
                      detach_residue)
    settings = [num_classes, size, base, lms_channels, classifier]
    if variant == 'S2IC':
        settings.append(audio)
    return BASELINES[variant][0](*settings, init_std)


def load_generators(model, state, path):
    """Load the weights that a run keeps, all but C's. InputError for another network's."""
    load_state(model, {**model.residue.state_dict(prefix='residue.'), **state}, path)


def open_run_data(config, data=None, cache=None):
    """The dataset that a run was trained on, or `data` with the same classes. Raises InputError."""
    cache = cache or config['cache']
    data = data or config['data']
    if not data:
        data = demo_data(config['size'], cache)
    elif not Path(data).is_dir():
        raise InputError(f'{data}: the data of this run is not there; say where by --data DIR')
    dataset = open_dataset(data, config['size'], cache)
    if (dataset.classes, dataset.lms_channels) != (config['classes'], config['lms_channels']):
        raise InputError(f'{data}: its classes or its kind of LMS are not those the run was '
                         'trained on')
    return dataset


# ----------------------------------------------------------------------------------------- pictures

def as_saved(image):
    """Images (..., 3, S, S) in [-1, 1] as they would come back from a file: 256 levels."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def picture(image):
    """An image (3, S, S) in [-1, 1] as a PIL picture."""
    pixels = ((as_saved(image) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def lms_picture(lms):
    """An LMS (1 or 3, S, S) in [-1, 1] as a PIL picture: low bands at the bottom, bright is loud;
    RGB as it is.
    """
    if len(lms) == 3:
        return picture(lms)
    level = (lms[0].flip(0).cpu().numpy() + 1) / 2
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    pixels = [np.interp(level, np.linspace(0, 1, 5), channel) for channel in stops.T]
    return Image.fromarray(np.dstack(pixels).round().astype(np.uint8))


def draw_grid(rows, path):
    """Draw rows [(title, {column: picture})] as one PNG, in tiles of 128 pixels or more. The
    columns' names stand above the first row; above each, where rows have no title.
    """
    tile = max(128, *[image.width for _, images in rows for image in images.values()])
    step = tile + 4
    head = 28
    titled = rows[0][0]
    left = 130 if titled else 4
    heads = 1 if titled else len(rows)
    size = left + len(rows[0][1]) * step, heads * head + len(rows) * step
    sheet = Image.new('RGB', size, 'white')
    draw = ImageDraw.Draw(sheet)
    draw.font = ImageFont.load_default(size=15)
    top = 0
    for title, images in rows:
        named = top == 0 or not titled
        if named:
            top += head
        draw.text((left - 8, top + tile / 2), title.replace('_', ' '), 'black', anchor='rm',
                  align='right')
        for x, (column, image) in zip(range(left, sheet.width, step), images.items()):
            if named:
                draw.text((x + tile / 2, top - head / 2), column, 'black', anchor='mm')
            sheet.paste(image.resize((tile, tile)), (x, top))       # bicubic
        top += step
    with written_whole(path) as part:
        sheet.save(part, 'PNG')


EXAMPLES = 36       # at most: a grid of hundreds would be too large for Pillow to read again


def example_clips(dataset):
    """A clip of each class, or of 36 evenly spaced ones, of validation or, where that has none,
    train: [(title, its batch)].
    """
    examples = []
    count = len(dataset.classes)
    shown = min(count, EXAMPLES)
    for i in range(shown):
        label = i * count // shown
        title = dataset.classes[label]
        split = dataset.validation
        if label not in split.labels:
            split, title = dataset.train, f'{title} (train)'
        examples.append((title, split.batch(torch.nonzero(split.labels == label)[0])))
    return examples


@torch.inference_mode()
def example_pictures(model, examples, device='cpu', nearest=None):
    """[(title, {'LMS': picture, "I'": ..., "I''": ..., 'truth': ...})] of example clips, in eval
    mode; the model is left in the mode it was in. `nearest` maps I'' (1, 3, S, S) to the train
    frame most like it, a further column.
    """
    training, rows = model.training, []
    model.eval()
    for title, (lms, image, label) in examples:
        coarse, fine, _ = model(lms.to(device), label.to(device))
        images = {"I'": coarse, "I''": fine, 'truth': image}
        if nearest:
            images['nearest in train'] = nearest(fine)
        pictures = {name: picture(x[0]) for name, x in images.items()}
        rows.append((title, {'LMS': lms_picture(lms[0]), **pictures}))
    model.train(training)
    return rows


@torch.inference_mode()
def draw_sounds(model, split, path, device='cpu'):
    """Draw one class by six of its sounds, I'' over the truth: the quietest clip, then five of the
    others from low to high.
    """
    clips = torch.nonzero(split.labels == split.labels.mode().values).flatten()
    clips = clips[split.loudness()[clips].argsort()]
    loudest_band = split.average_lms().softmax(dim=1)
    pitch = loudest_band @ torch.arange(loudest_band.shape[1], dtype=torch.float32)
    others = clips[1:][pitch[clips[1:]].argsort()]
    places = torch.linspace(0, len(others) - 1, min(5, len(others))).long()
    chosen = torch.cat([clips[:1], others[places]])
    lms, image, label = split.batch(chosen, device)
    fine = model(lms, label)[1]
    names, rows = ('quietest', '1 low', '2', '3', '4', '5 high'), []
    for title, draw, images in (('LMS', lms_picture, lms), ("I''", picture, fine),
                                ('truth', picture, image)):
        rows.append((title, dict(zip(names, map(draw, images)))))
    draw_grid(rows, path)


def paper_figures(shown, folder):
    """Draw figure4.png (I'' of the models A to E), figure5.png (their I' beside I'') and
    figure6.png (S2IC, CMCGAN and E), each where there are such runs; `shown`: {title: (model,
    example_pictures())}.
    """
    for number, models, stages in ((4, VARIANTS, ["I''"]), (5, VARIANTS, ["I'", "I''"]),
                                   (6, METHODS, ["I''"])):
        chosen = {title: rows for title, (model, rows) in shown.items() if model in models}
        if not chosen:
            continue
        grid = []
        for of_clip in zip(*chosen.values()):           # (clip, its pictures) by each model
            clip, first = of_clip[0]
            row = {'LMS': first['LMS']}
            for title, (_, images) in zip(chosen, of_clip):
                for stage in stages:
                    name = f'{title} {stage}' if len(stages) > 1 else title
                    row[name] = images[stage]
            row['truth'] = first['truth']
            grid.append((clip, row))
        draw_grid(grid, folder / f'figure{number}.png')


# -------------------------------------------------------------------------------------- a recording

def kept_classifier(dataset, name, network, key):
    """Load a classifier that is kept beside a dataset's cache into `network`. Returns its accuracy
    on validation; None where there is none of this key.
    """
    path = dataset.folder / f'{name}.pt'
    try:
        state = load_file(path, key=str, classifier=dict, accuracy=float)
    except InputError:
        return None
    if state['key'] != f'{key} {dataset.fingerprint}':
        return None
    load_state(network, state['classifier'], path)
    network.eval()
    return state['accuracy']


AUDIO_KEY = 'audio 7'       # raised when S2IC's audio classifier is trained otherwise


@torch.inference_mode()
def hear(dataset, waveform, sample_rate, device='cpu'):
    """What plays in a recording, by S2IC's audio classifier: [(class, probability)], likeliest
    first, and that classifier's accuracy. Raises InputError where evaluate.py has not trained it.
    """
    size = dataset.train.size
    network = AudioClassifier(len(dataset.classes), size, dataset.lms_channels)
    accuracy = kept_classifier(dataset, 'audio', network, AUDIO_KEY)
    if accuracy is None:
        raise InputError('no classifier of sounds yet: say what plays by --label CLASS, or make '
                         'one by: python evaluate.py RUN')
    network.to(device)
    parts = recording_lms(waveform, sample_rate, size)
    logits = torch.cat([network(lms.to(device)) for lms in parts])          # (half seconds, K)
    heard = logits.log_softmax(dim=1).mean(dim=0).softmax(dim=0)            # a geometric mean
    order = heard.argsort(descending=True)
    return [(dataset.classes[i], heard[i].item()) for i in order], accuracy


# ------------------------------------------------------------------------------------------ a scene

Moment = namedtuple('Moment', 'seconds picture l1')     # l1: of I'' to the truth, or None
Scene = namedtuple('Scene', 'moments end title columns sound')      # end: in seconds
PICTURES = 16           # at once


@torch.inference_mode()
def generate_recording(model, classes, waveform, sample_rate, label, size, device='cpu', hop=0.5):
    """I'' every `hop` seconds of a recording (n,) in [-1, 1], as Moments one by one: each hears the
    half second from its moment on, and silence after the end.
    """
    k = 0
    for lms in recording_lms(waveform, sample_rate, size, hop, PICTURES):
        labels = torch.full((len(lms),), classes.index(label), device=device)
        for image in model(lms.to(device), labels)[1]:
            yield Moment(k * hop, picture(image), None)
            k += 1


def find_pieces(split):
    """The pieces of a split, whose stems are <piece>_<milliseconds>: {piece: [(seconds from its
    beginning, index)]}, in the order of time.
    """
    pieces = {}
    for index, stem in enumerate(split.stems):
        piece, _, moment = stem.rpartition('_')
        if moment.isdecimal():
            pieces.setdefault(piece, []).append((int(moment), index))
    for clips in pieces.values():
        clips.sort()
        begin = clips[0][0]
        clips[:] = [((moment - begin) / 1000, index) for moment, index in clips]
    return dict(sorted(pieces.items()))


@torch.inference_mode()
def generate_piece(model, split, clips, device='cpu'):
    """LMS, I', I'' and truth side by side for the clips of a piece, [(seconds, index)], as Moments
    one by one.
    """
    for start in range(0, len(clips), PICTURES):
        some = clips[start:start + PICTURES]
        lms, image, label = split.batch([index for _, index in some], device)
        coarse, fine, _ = model(lms, label)
        distances = (fine - image).abs().mean(dim=(1, 2, 3)).tolist()
        for i, (seconds, _) in enumerate(some):
            tiles = [lms_picture(lms[i]), picture(coarse[i]), picture(fine[i]), picture(image[i])]
            yield Moment(seconds, Image.fromarray(np.hstack(tiles)), distances[i])


def piece_sound(dataset, split, clips):
    """The sound of a piece from its chunks, each as far as the next one begins, silence where there
    is none: waveform (n,) in [-1, 1], sample rate. Raises InputError for chunks of several rates.
    """
    _, pairs, _ = find_pairs(dataset.data)
    chunks = {pair[:3]: pair.audio for pair in pairs}       # by split, class and stem
    part = 'train' if split is dataset.train else 'validation'
    waveform = None
    for seconds, index in clips:
        path = chunks[part, dataset.classes[split.labels[index]], split.stems[index]]
        chunk, rate = read_wav(path)
        if waveform is None:
            sample_rate = rate
            waveform = np.zeros(round((clips[-1][0] + 0.5) * rate), np.float32)
        if rate != sample_rate:
            raise InputError(f'{path}: {rate} Hz, but the piece begins with {sample_rate} Hz; .gif '
                             'or a folder of pictures has no sound')
        begin = round(seconds * rate)
        waveform[begin:begin + len(chunk)] = chunk[:len(waveform) - begin]
    return waveform, sample_rate


def save_scene(scene, path):
    """Write a Scene as the ending of `path` says: .png, 16 pictures to a row below their times;
    .gif, which moves in real time; .html, a page that plays its sound; none, a folder with a PNG a
    moment. Returns the number of moments.
    """
    path = Path(path)
    progress = Progress()
    count = 0

    def moments():
        nonlocal count
        for count, moment in enumerate(scene.moments, 1):
            yield moment
            progress(f'{path}: {moment.seconds:.1f} of {scene.end:.1f} s')

    with new_path(path) as part:
        if path.suffix == '.html':
            write_scene_page(scene, moments(), part)
        elif path.suffix == '.png':
            named = [(f'{moment.seconds:g} s', moment.picture) for moment in moments()]
            draw_grid([('', dict(named[i:i + 16])) for i in range(0, len(named), 16)], part)
        elif path.suffix == '.gif':
            seconds, pictures, _ = zip(*moments())
            times = [10 * round(100 * time) for time in (*seconds, scene.end)]  # ms, in 1/100 s
            durations = np.diff(times).clip(10).tolist()
            pictures[0].save(part, 'GIF', save_all=True, append_images=pictures[1:], loop=0,
                             duration=durations)
        else:
            part.mkdir()
            for moment in moments():
                moment.picture.save(part / f'{round(1000 * moment.seconds):08}.png')
    return count


SCENE_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>TITLE</title><style>:root { color-scheme: light dark }
body { max-width: 62rem; margin: auto; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif;
       overflow-wrap: anywhere }
div { display: flex } span { flex: 1; text-align: center }
img { display: block; width: 100%; max-height: 70vh; object-fit: contain } figure { margin: 0 }
audio, svg { display: block; width: 100%; margin: 0.5rem 0 } svg { height: 6rem }
polyline, line { fill: none; stroke: currentColor; vector-effect: non-scaling-stroke }
line { stroke: #d33; stroke-width: 3 }</style></head><body><p>TITLE</p>
<figure><div>COLUMNS</div><img alt="the scene at the moment heard"><audio controls></audio>
<svg viewBox="0 0 1000 100" preserveAspectRatio="none"><polyline/><line y1="0" y2="100"/></svg>
<output></output></figure><script>
const moments = [       // seconds, picture, L1 to the truth
"""
SCENE_TAIL = """const [audio, picture, graph, curve, mark, output] =
  ['audio', 'img', 'svg', 'polyline', 'line', 'output'].map(name => document.querySelector(name))
const bytes = Uint8Array.from(atob(sound), letter => letter.charCodeAt(0))
audio.src = URL.createObjectURL(new Blob([bytes], {type: 'audio/wav'}))
const highest = moments.reduce((most, moment) => Math.max(most, moment[2]), 0)
if (highest)
  curve.setAttribute('points', moments.map(
    ([seconds, _, l1]) => `${1000 * seconds / end},${98 - 96 * l1 / highest}`).join(' '))
else
  graph.remove()
let shown = -1
function show() {
  const now = audio.currentTime + 0.001
  let k = Math.max(shown, 0)
  while (k + 1 < moments.length && moments[k + 1][0] <= now) k++
  while (k > 0 && moments[k][0] > now) k--
  if (k !== shown) {
    const [seconds, image, l1] = moments[k]
    picture.src = 'data:image/webp;base64,' + image
    output.textContent = `${seconds.toFixed(2)} s`
    if (highest) output.textContent += `, L1 of I'' ${l1.toFixed(4)}, at most ${highest.toFixed(4)}`
    shown = k
  }
  mark.setAttribute('x1', 1000 * now / end)
  mark.setAttribute('x2', 1000 * now / end)
  requestAnimationFrame(show)
}
show()
</script></body></html>
"""


def write_scene_page(scene, moments, path):
    """Write a page that needs no other file: the sound with its controls, and the picture of the
    moment that is heard. The pictures are written one by one, as there may be many.
    """
    wav = BytesIO()
    write_wav(wav, *scene.sound)
    columns = ''.join(f'<span>{escape(name)}</span>' for name in scene.columns)
    with open(path, 'w', encoding='utf-8') as page:
        page.write(SCENE_HEAD.replace('COLUMNS', columns).replace('TITLE', escape(scene.title)))
        for seconds, image, l1 in moments:
            file = BytesIO()
            # I'' alone is small enough to be kept exactly; four pictures side by side are not
            image.save(file, 'WEBP', lossless=l1 is None, quality=85)
            row = seconds, b64encode(file.getvalue()).decode(), l1
            page.write(f'{json.dumps(row)},\n')
        sound = b64encode(wav.getvalue()).decode()
        page.write(f']\nconst end = {scene.end}\nconst sound = "{sound}"\n{SCENE_TAIL}')


# ----------------------------------------------------------------------------------------- command

def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('run', help='a folder that train.py made')
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('recording', nargs='?', help='a .wav file')
    source.add_argument('--piece', help="instead of a recording a piece of the run's data: the "
                        'beginning of its stems <piece>_<milliseconds>')
    add('--label', help="what plays in it (default: what S2IC's audio classifier hears)")
    add('--hop', type=at_least(float, 0.02, below=601),
        help='seconds from one picture to the next (default: 0.5)')
    add('--split', choices=('validation', 'train'),
        help='where the piece is (default: validation)')
    add('--out', help='a new .html, .gif, .png or folder (default: clip.png of clip.wav, PIECE.html'
        ', here)')
    add('--data', help="a dataset folder (default: the run's own)")
    add('--cache', help=f"where packed data is kept (default: the run's, else {default_cache()})")
    add('--device', help='cpu, cuda, ... (default: the first GPU, else the CPU)')
    return parser


def check_out(args):
    """The path to write, as it was asked for or by default. Raises InputError where it is there,
    its ending is none of those that can be written, or a flag is of the other source.
    """
    if args.piece is not None:
        source, useless = '--piece', ['label', 'hop']
        name = f'{args.piece}.html'
        endings = '.html', '.gif'
    else:
        source, useless = 'a recording', ['split']
        name = f'{Path(args.recording).stem}.png'
        endings = '.html', '.gif', '.png'
    for flag in useless:
        if getattr(args, flag) is not None:
            raise InputError(f'--{flag}: does not go with {source}; leave it out')
    out = Path(args.out or name)
    if out.suffix not in ('', *endings):
        raise InputError(f'{out}: ends in {out.suffix}; name a {", ".join(endings)} or a folder by '
                         '--out')
    refuse_existing(out)
    return out


def choose_label(args, config, sound, device):
    """What plays in a recording: --label, the only class there is, or what S2IC's audio classifier
    hears.
    """
    classes = config['classes']
    if args.label not in (None, *classes):
        raise InputError(f'--label {args.label}: this run knows {", ".join(classes)}')
    if args.label or len(classes) == 1:
        return args.label or classes[0]
    heard, accuracy = hear(open_run_data(config, args.data, args.cache), *sound, device)
    likely = ', '.join(f'{name} {probability:.4f}' for name, probability in heard[:3])
    print(f"{args.recording}: {likely}, by S2IC's audio classifier, whose accuracy on validation "
          f'is {accuracy:.4f}; --label names another')
    return heard[0][0]


def recording_scene(args, config, model, about, device):
    """I'' for a recording. Raises InputError where it cannot be read, or nobody knows what plays.
    """
    hop = args.hop or 0.5
    sound = read_wav(args.recording)
    label = choose_label(args, config, sound, device)
    moments = generate_recording(model, config['classes'], *sound, label, config['size'], device,
                                 hop)
    title = f'{Path(args.recording).name}: {label}, every {hop:g} s, by {about}'
    waveform, sample_rate = sound
    return Scene(moments, len(waveform) / sample_rate, title, ["I''"], sound)


def piece_scene(args, config, model, about, device, heard):
    """A piece of a run's data, beside the truth; with its sound where that is to be `heard`. Raises
    InputError where there is none so called.
    """
    dataset = open_run_data(config, args.data, args.cache)
    part = args.split or 'validation'
    split = getattr(dataset, part)
    pieces = find_pieces(split)
    if args.piece not in pieces:
        known = ', '.join(pieces) or 'no stem is <piece>_<milliseconds>'
        raise InputError(f'--piece {args.piece}: not in {part}, which has: {known}')
    clips = pieces[args.piece]
    names = sorted({dataset.classes[split.labels[index]] for _, index in clips})
    if len(names) > 1:
        raise InputError(f'--piece {args.piece}: {", ".join(names)} have one each; name the stems '
                         'of each class apart')
    moments = generate_piece(model, split, clips, device)
    sound = piece_sound(dataset, split, clips) if heard else None
    title = f'{args.piece} of {part}, by {about}'
    return Scene(moments, clips[-1][0] + 0.5, title, ['LMS', "I'", "I''", 'truth'], sound)


def main(argv=None):
    args = make_parser().parse_args(argv)
    out, device = check_out(args), choose_device(args.device)
    config, model, trained = load_run(args.run, device)
    if config['lms_channels'] != 1 and (args.recording or out.suffix == '.html'):
        raise InputError(f'{args.run}: was trained on LMS drawn as pictures, so there is no sound '
                         'to hear; --piece writes a .gif or a folder')
    about = f'model {config["variant"]} of {args.run}, epoch {trained["epoch"]}'
    if args.piece is not None:
        scene = piece_scene(args, config, model, about, device, out.suffix == '.html')
    else:
        scene = recording_scene(args, config, model, about, device)
    count = save_scene(scene, out)
    print(f'{out}: {count} moments; {scene.title}')


if __name__ == '__main__':
    run_command(main)
