"""What a trained model draws: pictures for a recording, grids of clips, the paper's Figures 4 to 6.

    python generate.py RUN clip.wav                       # a picture for each half second: clip.png
    python generate.py RUN clip.wav --label violin --hop 0.1 --out clip.gif        # a moving scene

RUN is a folder that train.py made. From Python:

    config, model, _ = load_run('runs/NAME')
    coarse, fine, _ = model(lms, label)         # (B, C_a, S, S) in [-1, 1], (B,) -> I', I'', C(I')
"""
import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from baselines import BASELINES, AudioClassifier
from cargan import CARGAN, VARIANTS, Classifier
from demo import demo_data
from preprocess import open_dataset, read_wav, recording_lms
from runs import (InputError, choose_device, default_cache, digest, load_config, load_file,
                  load_state, reason, run_command, written_whole)


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
        classifier = Classifier(len(config['classes']), pretrained=False)
        model = make_model(config['variant'], len(config['classes']), config['size'],
                           config['base'], config['lms_channels'], classifier)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f'{run}: not a run of train.py (config.json: {reason(error)})') from error
    load_state(classifier, load_file(source, classifier=dict)['classifier'], source)
    if digest(classifier) != state['classifier_digest']:
        raise InputError(f'{source}: not the classifier that {path} was trained with; put that one '
                         'back')
    load_generators(model, state.get('average') or state['model'], path)
    model.to(device, memory_format=torch.channels_last)     # faster, on a CPU too
    return config, model.eval(), dict(epoch=state['epoch'], steps=state['steps'])


def make_model(variant, num_classes, size, base, lms_channels, classifier=None, dropout=0.5,
               init_std=0.2, audio=None):
    """CARGAN or a baseline; `audio` is S2IC's audio classifier, whose weights a run keeps too."""
    if variant in VARIANTS:
        return CARGAN(num_classes, size, base, variant, lms_channels, classifier, dropout, init_std)
    network = BASELINES[variant][0]
    if variant == 'S2IC':
        return network(num_classes, size, base, lms_channels, classifier, audio, init_std)
    return network(num_classes, size, base, lms_channels, classifier, init_std)


def load_generators(model, state, path):
    """Load the weights that a run keeps, all but C's. InputError for another network's."""
    load_state(model, {**model.residue.state_dict(prefix='residue.'), **state}, path)


def open_run_data(config, data=None, cache=None):
    """The dataset that a run was trained on, or `data` with the same classes. Raises InputError."""
    cache = cache or config['cache']
    data = data or config['data']
    if data and not Path(data).is_dir():
        raise InputError(f'{data}: the data of this run is not there; say where by --data DIR')
    if not data:
        data = demo_data(config['size'], cache)
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
    pixels = ((as_saved(image).cpu() + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def lms_picture(lms):
    """An LMS (1 or 3, S, S) in [-1, 1] as a PIL picture: low bands at the bottom, bright is loud;
    RGB as it is.
    """
    if len(lms) == 3:
        return picture(lms)
    level = (lms[0].flip(0).cpu().numpy() + 1) / 2
    stops = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
    pixels = [np.interp(level, np.linspace(0, 1, 5), channel) for channel in stops.T]
    return Image.fromarray(np.stack(pixels, axis=2).round().astype(np.uint8))


def draw_grid(rows, path):
    """Draw rows [(title, {column: picture})] as one PNG, in tiles of 128 pixels or more. The
    columns' names stand above the first row; above each, where rows have no title.
    """
    tile = max([128] + [image.width for _, images in rows for image in images.values()])
    step, head, left, gap = tile + 4, 28, 130, 8
    titled = bool(rows[0][0])
    heads = 1
    if not titled:
        left, heads = 4, len(rows)
    size = left + len(rows[0][1]) * step, heads * head + len(rows) * step
    sheet = Image.new('RGB', size, 'white')
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(size=15), 0
    for i, (title, images) in enumerate(rows):
        named = i == 0 or not titled
        if named:
            top += head
        draw.multiline_text((left - gap, top + tile / 2), title.replace('_', ' '), 'black', font,
                            anchor='rm', align='right')
        for x, (column, image) in enumerate(images.items()):
            if named:
                draw.text((left + x * step + tile / 2, top - head / 2), column, 'black', font,
                          anchor='mm')
            tiled = image.resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(tiled, (left + x * step, top))
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
    methods = (*BASELINES, 'E')
    for number, models, stages in ((4, VARIANTS, ["I''"]), (5, VARIANTS, ["I'", "I''"]),
                                   (6, methods, ["I''"])):
        chosen = {title: rows for title, (model, rows) in shown.items() if model in models}
        if not chosen:
            continue
        grid = []
        for i, (clip, images) in enumerate(next(iter(chosen.values()))):
            row = {'LMS': images['LMS']}
            for title, rows in chosen.items():
                for stage in stages:
                    name = f'{title} {stage}' if len(stages) > 1 else title
                    row[name] = rows[i][1][stage]
            grid.append((clip, {**row, 'truth': images['truth']}))
        draw_grid(grid, Path(folder, f'figure{number}.png'))


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
    network.eval().requires_grad_(False)
    return state['accuracy']


AUDIO_KEY = 'audio 6'       # raised when S2IC's audio classifier is trained otherwise


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


@torch.inference_mode()
def generate_recording(model, classes, waveform, sample_rate, label, size, device='cpu', hop=0.5):
    """I'' every `hop` seconds of a recording (n,) in [-1, 1], as (seconds, picture) one by one:
    each hears the half second from its moment on, and silence after the end.
    """
    moment = 0
    for lms in recording_lms(waveform, sample_rate, size, hop):
        labels = torch.full((len(lms),), classes.index(label), device=device)
        for image in model(lms.to(device), labels)[1]:
            yield moment * hop, picture(image)
            moment += 1


def save_recording(frames, path, hop=0.5):
    """Write what generate_recording() gave, as the ending of `path` says: .png, 16 pictures to a
    row below their times, or .gif, which moves in real time.
    """
    frames = list(frames)
    if Path(path).suffix == '.png':
        named = [(f'{seconds:g} s', image) for seconds, image in frames]
        return draw_grid([('', dict(named[i:i + 16])) for i in range(0, len(named), 16)], path)
    ends = [10 * round(100 * hop * i) for i in range(len(frames) + 1)]      # ms, in GIF's 1/100 s
    first, *others = [image for _, image in frames]
    durations = [end - start for start, end in zip(ends, ends[1:])]
    with written_whole(path) as part:
        first.save(part, 'GIF', save_all=True, append_images=others, loop=0, duration=durations)


# ----------------------------------------------------------------------------------------- command

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('run', help='a folder that train.py made')
    add('recording', help='a .wav file')
    add('--label', help="what plays in it (default: what S2IC's audio classifier hears)")
    add('--hop', type=float, default=0.5,
        help='from one picture to the next (default: 0.5)')
    add('--out', help="a .png, or a moving .gif (default: the recording's name, here)")
    add('--data', help="a dataset folder (default: the run's own)")
    add('--cache', help=f"where packed data is kept (default: the run's, else {default_cache()})")
    add('--device', help='cpu, cuda, ... (default: the first GPU, else the CPU)')
    args = parser.parse_args(argv)
    if not 0.02 <= args.hop <= 600:
        parser.error('--hop must be from 0.02 to 600')
    config = load_config(args.run)
    classes = config.get('classes', [])
    if config.get('lms_channels') != 1:
        raise InputError(f'{args.recording}: this run was trained on LMS drawn as pictures and '
                         'cannot hear a recording')
    if args.label not in (None, *classes):
        raise InputError(f'--label {args.label}: this run knows {", ".join(classes)}')
    out = Path(args.out or Path(args.recording).with_suffix('.png').name)
    if out.suffix not in ('.png', '.gif'):
        raise InputError(f'{out}: a picture ends in .png or .gif; name another file by --out')
    if out.exists():
        raise InputError(f'{out}: exists already; name another file by --out')
    sound, label = read_wav(args.recording), args.label
    device = choose_device(args.device)
    if label is None:
        heard, accuracy = hear(open_run_data(config, args.data, args.cache), *sound, device)
        likely = ', '.join(f'{name} {probability:.4f}' for name, probability in heard[:3])
        print(f"{args.recording}: {likely}, by S2IC's audio classifier, whose accuracy on "
              f'validation is {accuracy:.4f}; --label names another')
        label = heard[0][0]
    model = load_run(args.run, device)[1]
    frames = list(generate_recording(model, classes, *sound, label, config['size'], device,
                                     args.hop))
    save_recording(frames, out, args.hop)
    print(f'{out}: {len(frames)} pictures of {label}, every {args.hop:g} s')


if __name__ == '__main__':
    run_command(main)
